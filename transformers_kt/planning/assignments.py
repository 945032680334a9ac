"""A plan for a model, the tensors that each of its entries gets, and whether its operations can take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers_kt.errors import RuleError, UnsupportedModelError, UnsupportedTypeError
from transformers_kt.families.registry import read_by_others
from transformers_kt.planning.operations import ATTENTION, OPERATIONS, ROTARY, Operation, replaced_classes
from transformers_kt.rules import make_plan
from transformers_kt.text import longest_prefix

if TYPE_CHECKING:
    from transformers_kt.families.base import Family, TensorSlot
    from transformers_kt.families.tree import ModelTree
    from transformers_kt.gguf.reader import TensorInfo
    from transformers_kt.rules import DeviceMap, Plan, PlanEntry, RuleList


@dataclass(frozen=True, slots=True)
class Assignment:
    """One entry of the plan, the operation that it names, and its tensors. Their keys are paths relative to the module:
    "kv_b_proj.k_b".

    ``rule`` names file, number and line of the rule that decided, for messages; None where "auto" did.
    """

    entry: PlanEntry
    operation: Operation
    tensors: Mapping[str, TensorInfo]
    rule: str | None = None

    @property
    def stored_bytes(self) -> int:
        """Bytes to read from the checkpoint."""
        return sum(info.nbytes for info in self.tensors.values())

    def memory_needed(self, config: Any) -> int:
        """Bytes that the weights take on the device of the entry."""
        return self.operation.memory_needed(self.tensors, config, self.entry.device)

    def require_supported(self, tree: ModelTree, config: Any) -> None:
        """Raise `UnsupportedModelError` if the operation cannot stand for its module or has no use for a tensor."""
        with self.with_rule_context():
            self.operation.require_supported(tree.at(self.entry.module), config, self.entry.module)
            self.operation.require_use(self.tensors, self.entry.module)

    def check_types(self) -> None:
        """Raise `UnsupportedTypeError` if the operation cannot take the types that it would get."""
        with self.with_rule_context():
            self.operation.check_types(self.tensors, self.entry.module)

    @contextmanager
    def with_rule_context(self) -> Iterator[None]:
        """Start the message of a refusal with the rule that gave the module to this operation."""
        try:
            yield
        except (UnsupportedModelError, UnsupportedTypeError) as error:
            if self.rule is None:
                raise
            raise type(error)(f"{self.rule}: {error}") from None


def resolve_plan(tree: ModelTree, rules: RuleList, attention: str | None, device_map: DeviceMap | None) -> Plan:
    """The plan for the model, after resolving what attention and its neighbours must agree on.

    ``attention`` is the attn_implementation that is to stand in place of ours, None for ours.
    """
    not_by_itself = [ATTENTION, ROTARY] if attention else []
    plan = make_plan(tree, rules, replaced_classes(), not_by_itself, kept=read_by_others(), device_map=device_map)
    ours = first_of(plan, ATTENTION)
    if attention and ours is not None:
        raise RuleError(
            f"{plan.source} gives attention to {ours.op}, but attn_implementation={attention!r} asks for "
            "transformers' own; leave one of them out"
        )
    if first_of(plan, ROTARY) is not None and keeps_attention(tree, plan):
        # Its one table of cosines and sines is nothing that stock attention could read.
        kept = [*not_by_itself, ROTARY]
        plan = make_plan(tree, rules, replaced_classes(), kept, kept=read_by_others(), device_map=device_map)
        rotary = first_of(plan, ROTARY)
        if rotary is not None:
            raise RuleError(
                f"{plan.source} gives rotary embeddings to {rotary.op}, which feeds {ATTENTION}_{rotary.backend} only, "
                "and keeps some attention stock; keep the rotary embedding (op: torch) as well"
            )
    return plan


def keeps_attention(tree: ModelTree, plan: Plan) -> bool:
    """Whether some attention of the model stays stock."""
    stock = replaced_classes()[ATTENTION]
    in_all = sum(not set(stock).isdisjoint(node.classes) for _, node in tree.modules())
    return in_all > sum(OPERATIONS[entry.op].kind == ATTENTION for entry in plan.entries)


def first_of(plan: Plan, kind: str) -> Operation | None:
    """The first operation of ``kind`` in ``plan``; None if there is none."""
    found = (OPERATIONS[entry.op] for entry in plan.entries)
    return next((operation for operation in found if operation.kind == kind), None)


def assign_tensors(
    plan: Plan, tree: ModelTree, family: Family, slots: Sequence[TensorSlot], tensors: Mapping[str, TensorInfo]
) -> list[Assignment]:
    """The tensors of every entry of ``plan``, made for the model of ``tree``, which is of ``family``.

    Slots of the head go nowhere where the model has none (AutoModel). Raises `UnsupportedModelError` if
    the model has weights that no slot fills (a classification head).
    """
    nodes = dict(tree.modules())
    base = "" if "model" in nodes else "model."
    of_entry: dict[str, dict[str, TensorInfo]] = {entry.module: {} for entry in plan.entries}
    filled = set()
    for slot in slots:
        module = slot.module.removeprefix(base)
        if module not in nodes and not slot.module.startswith("model."):
            continue
        owner = longest_prefix(module, of_entry)
        if owner is None:
            raise UnsupportedModelError(f"transformers' model has no module {module}, which the GGUF has a tensor for")
        key = f"{module}.{slot.role}"
        of_entry[owner][key[len(owner) + 1 :]] = tensors[slot.gguf_name]
        filled.add(f"{module}.{family.parameter_of(slot.role)}")
    for path, node in nodes.items():
        for name in node.saved:
            if f"{path}.{name}" not in filled and name not in family.zero_where_absent:
                raise UnsupportedModelError(
                    f"{tree.root.class_name.rpartition('.')[2]} has the weight {path}.{name}, which no GGUF of this "
                    "architecture holds; load AutoModelForCausalLM, or AutoModel for the hidden states"
                )
    return [
        Assignment(entry, OPERATIONS[entry.op], of_entry[entry.module], plan.label(entry)) for entry in plan.entries
    ]
