"""A plan for a model, the tensors that each of its entries gets, and whether its operations can take them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from transformers_kt.errors import RuleError, UnsupportedModelError, UnsupportedTypeError
from transformers_kt.planning.operations import require_dequantizable
from transformers_kt.rules import make_plan
from transformers_kt.text import longest_prefix

if TYPE_CHECKING:
    from transformers_kt.families.base import Family, TensorSlot
    from transformers_kt.families.tree import ModelTree
    from transformers_kt.gguf.reader import TensorInfo
    from transformers_kt.planning.operations import Operation
    from transformers_kt.rules import DeviceMap, Plan, PlanEntry, RuleList

    Operations = Mapping[str, Operation]

ATTENTION_OP = "attention_cpu"
_ROTARY_OP = "rotary_cpu"


@dataclass(frozen=True, slots=True)
class Assignment:
    """One entry of the plan with its tensors. The keys are paths relative to the module: "kv_b_proj.k_b".

    ``rule`` names file, number and line of the rule that decided, for messages; None where "auto" did.
    """

    entry: PlanEntry
    tensors: Mapping[str, TensorInfo]
    rule: str | None = None

    @property
    def stored_bytes(self) -> int:
        """Bytes to read from the checkpoint."""
        return sum(info.nbytes for info in self.tensors.values())

    @contextmanager
    def with_rule_context(self) -> Iterator[None]:
        """Start the message of a refusal with the rule that gave the module to this operation."""
        try:
            yield
        except (UnsupportedModelError, UnsupportedTypeError) as error:
            if self.rule is None:
                raise
            raise type(error)(f"{self.rule}: {error}") from None


def resolve_plan(
    tree: ModelTree, rules: RuleList, operations: Operations, attention: str | None, device_map: DeviceMap | None
) -> Plan:
    """The plan for the model, after resolving what attention and its neighbours must agree on.

    ``attention`` is the attn_implementation that is to stand in place of ours, None for ours.
    """
    not_by_itself = [ATTENTION_OP, _ROTARY_OP] if attention else []
    plan = make_plan(tree, rules, operations, not_by_itself, device_map=device_map)
    if attention and plan.uses(ATTENTION_OP):
        raise RuleError(
            f"{plan.source} gives attention to {ATTENTION_OP}, but attn_implementation={attention!r} asks for "
            "transformers' own; leave one of them out"
        )
    if plan.uses(_ROTARY_OP) and keeps_attention(tree, plan, operations):
        # Its one table of cosines and sines is nothing that stock attention could read.
        plan = make_plan(tree, rules, operations, [*not_by_itself, _ROTARY_OP], device_map=device_map)
        if plan.uses(_ROTARY_OP):
            raise RuleError(
                f"{plan.source} gives rotary embeddings to {_ROTARY_OP}, which feeds {ATTENTION_OP} only, and keeps "
                "some attention stock; keep the rotary embedding (op: torch) as well"
            )
    return plan


def keeps_attention(tree: ModelTree, plan: Plan, operations: Operations) -> bool:
    """Whether some attention of the model stays stock."""
    stock = operations[ATTENTION_OP].replaces
    in_all = sum(not set(stock).isdisjoint(node.classes) for _, node in tree.modules())
    return in_all > sum(entry.op == ATTENTION_OP for entry in plan.entries)


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
    return [Assignment(entry, of_entry[entry.module], plan.label(entry)) for entry in plan.entries]


def require_supported(tree: ModelTree, config: Any, assignments: Iterable[Assignment], operations: Operations) -> None:
    """Raise `UnsupportedModelError` if an operation cannot stand for its module or has no use for a tensor."""
    for assignment in assignments:
        entry = assignment.entry
        if entry.op in operations:
            with assignment.with_rule_context():
                operations[entry.op].require_supported(tree.at(entry.module), config, entry.module)
                operations[entry.op].require_use(assignment.tensors, entry.module)


def check_types(assignments: Iterable[Assignment], operations: Operations) -> None:
    """Raise `UnsupportedTypeError` if a module cannot take the types it would get."""
    for assignment in assignments:
        with assignment.with_rule_context():
            if assignment.entry.op in operations:
                operations[assignment.entry.op].check_types(assignment.tensors)
            else:
                _check_dequantizable(assignment)


def memory_needed(assignments: Iterable[Assignment], operations: Operations, config: Any) -> int:
    """Bytes that the weights will take: what each operation says, float32 in stock modules."""
    return sum(
        operations[assignment.entry.op].memory_needed(assignment.tensors, config)
        if assignment.entry.op in operations
        else sum(4 * int(np.prod(info.shape)) for info in assignment.tensors.values())
        for assignment in assignments
    )


def _check_dequantizable(assignment: Assignment) -> None:
    for role, info in assignment.tensors.items():
        require_dequantizable(info, f"{role} of {assignment.entry.module}")
