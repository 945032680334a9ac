"""Rules and a model -> a plan: one decision per module, and the coarsest operations that these allow."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from transformers_kt.errors import RuleError
from transformers_kt.rules import ktransformers
from transformers_kt.rules.devices import CPU, DEVICES_ACCEPTED, Spread, backend_of, parse_device
from transformers_kt.rules.files import AUTO
from transformers_kt.rules.matching import Matcher, Site, is_subclass, walk, why_idle
from transformers_kt.rules.syntax import TORCH, Rule
from transformers_kt.text import brief, longest_prefix

Operations: TypeAlias = "Mapping[str, Sequence[str]]"
"""Family of operations -> dotted names of the classes that they can stand for, coarse before fine."""

DeviceMap: TypeAlias = "Mapping[str, str]"
"""Prefixes of module paths -> device, as accelerate has them: the longest that fits decides, "" is the rest."""

_LINEAR, _ROTARY = "linear", "rotary"
_NO_ROTARY = "transformers has one rotary embedding per model, not one in every attention"


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """What computes the module at path ``module``: the operation ``op``, or "torch" for the stock module itself.

    ``device`` is where it computes while generating ("cpu", "cuda:1"). ``rule`` is the number of the rule that decided,
    None where none did. ``notes`` say what became the nearest thing here.
    """

    module: str
    op: str
    device: str
    rule: int | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RuleList:
    """Rules in order of precedence, and where they came from."""

    rules: tuple[Rule, ...]
    source: str

    @property
    def class_names(self) -> set[str]:
        """The classes that they match."""
        return {rule.class_name for rule in self.rules if rule.class_name is not None}


@dataclass(frozen=True, slots=True)
class Plan:
    """One entry per replaced module and per kept module that owns tensors itself, in the order of the walk.

    ``source`` is "auto", the path of the YAML file, or "kt_rules" for a list. ``notes`` say, once each, what was asked
    for and became something else or nothing.
    """

    entries: tuple[PlanEntry, ...]
    source: str
    notes: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()

    def label(self, entry: PlanEntry) -> str | None:
        """File, number there and line of the rule that decided about ``entry``; None where none did, or "auto"."""
        if entry.rule is None or self.source == AUTO:
            return None
        return self.rules[entry.rule - 1].label


@dataclass(frozen=True, slots=True)
class _Part:
    """An entry; ``free`` if a coarser operation may take its place."""

    entry: PlanEntry
    free: bool


@dataclass(frozen=True, slots=True)
class _Inherited:
    """What the rule of an outer module means inside: ``always``; if it is earlier; or where no rule matches."""

    rule: Rule
    always: bool

    def decides_before(self, own: Rule | None) -> bool:
        if own is None or self.always:
            return True
        return self.rule.op != TORCH and self.rule.number < own.number


class Planner:
    """Makes one plan. `rules.make_plan` has the arguments."""

    def __init__(
        self,
        root: Site,
        rule_list: RuleList,
        operations: Operations,
        not_by_itself: Collection[str],
        kept: Collection[str],
        device_map: DeviceMap,
    ) -> None:
        self._root, self._list, self._operations = root, rule_list, operations
        self._not_by_itself, self._kept = not_by_itself, kept
        self._device_map = {prefix: _mapped_device(prefix, device) for prefix, device in device_map.items()}
        self._is_theirs = any(rule.theirs for rule in rule_list.rules)
        self._matcher = Matcher(rule_list.rules)
        self._kind_of: dict[str, str | None] = {}
        self._layers = {site.layer for site in walk(root) if site.layer is not None}
        self._rows_of: dict[int, dict[int, int]] = {}  # rule -> layer -> which of the rule's layers it is
        self._is_past_a_layer = False
        self._decided: set[int] = set()

    def plan(self) -> Plan:
        entries = tuple(self._dequantized(part.entry) for part in self._visit(self._root, None))
        notes = self._notes([entry.module for entry in entries[:3]])
        return Plan(entries, self._list.source, notes, self._list.rules)

    def _dequantized(self, entry: PlanEntry) -> PlanEntry:
        """Torch's linear layer in place of ours, where a rule asks for it and no coarser operation took the layer."""
        asks = entry.rule is not None and self._list.rules[entry.rule - 1].dequantizes
        is_alone = entry.device != CPU and entry.op == _op(_LINEAR, entry.device)
        return replace(entry, op=TORCH) if asks and is_alone else entry

    def _visit(self, site: Site, inherited: _Inherited | None) -> list[_Part]:
        if not site.holds_tensors:
            return []
        self._is_past_a_layer |= site.layer is not None
        own = self._matcher.first(site)
        rule = inherited.rule if inherited is not None and inherited.decides_before(own) else own
        if rule is not None and rule is own:
            self._check_class(rule, site)
            if not rule.theirs and rule.op in self._operations:
                return [self._ordered(rule, site)]
        return self._divided(site, rule, self._inside(rule, inherited))

    def _divided(self, site: Site, rule: Rule | None, below: _Inherited | None) -> list[_Part]:
        """The parts of a module that no rule gives to an operation by name: as few as may be."""
        keeps = not self._is_theirs if rule is None else rule.op == TORCH
        if rule is not None and (rule.theirs or keeps):
            self._decided.add(rule.number)
        parts = []
        if site.owns_tensors:
            parts.append(_Part(self._entry(site, TORCH, rule), free=not keeps))
        for child in site.below():
            parts.extend(self._visit(child, below))
        keeps |= site.path.rpartition(".")[2] in self._kept
        kind = None if keeps else self._kind(site.node.class_name)
        return parts if kind is None else self._coarsest(site, kind, rule, parts)

    @staticmethod
    def _inside(rule: Rule | None, inherited: _Inherited | None) -> _Inherited | None:
        if rule is None or (inherited is not None and inherited.always):
            return inherited
        if not rule.recursive:
            return _Inherited(rule, always=True)
        return inherited if rule.theirs else _Inherited(rule, always=False)

    def _ordered(self, rule: Rule, site: Site) -> _Part:
        """The entry for a module that ``rule`` gives to an operation by name, whole."""
        if not site.path:
            raise RuleError(
                f"{rule.label} matches the whole model, which no operation replaces; narrow the match by name"
            )
        entry = self._entry(site, rule.op, rule)
        for prefix, device in self._device_map.items():
            if prefix.startswith(f"{site.path}.") and device != entry.device:
                raise RuleError(
                    f"{rule.label} gives {site} to {rule.op} as a whole, but device_map puts {prefix} on {device} and "
                    f"the rest on {entry.device}; leave the op out of the rule, or {prefix} out of the map"
                )
        return _Part(entry, free=False)

    def _coarsest(self, site: Site, kind: str, rule: Rule | None, parts: list[_Part]) -> list[_Part]:
        """One operation for all ``parts`` of a module if they lie together and no rule ordered otherwise."""
        devices = {part.entry.device for part in parts}
        if len(devices) != 1 or not all(part.free for part in parts):
            return parts
        device = devices.pop()
        numbers = [part.entry.rule for part in parts if part.entry.rule is not None]
        if rule is not None and (not numbers or self._device(site, rule) == device):
            numbers = [rule.number]
        notes = dict.fromkeys(() if rule is None else rule.notes)
        for part in parts:
            notes.update(dict.fromkeys(part.entry.notes))
        number = numbers[0] if numbers else None
        entry = PlanEntry(site.path, _op(kind, device), device, number, tuple(notes))
        return [_Part(entry, free=True)]

    def _entry(self, site: Site, kind: str, rule: Rule | None) -> PlanEntry:
        device = self._device(site, rule)
        if rule is None:
            return PlanEntry(site.path, _op(kind, device), device, None)
        self._decided.add(rule.number)
        return PlanEntry(site.path, _op(kind, device), device, rule.number, rule.notes)

    def _device(self, site: Site, rule: Rule | None) -> str:
        prefix = longest_prefix(site.path, self._device_map)
        if prefix is not None:
            return self._device_map[prefix]
        if rule is None:
            return ktransformers.DEFAULT_DEVICE if self._is_theirs else CPU
        if isinstance(rule.device, Spread):
            return self._spread(rule, rule.device, site)
        return rule.device or CPU

    def _spread(self, rule: Rule, spread: Spread, site: Site) -> str:
        """The device of a layer's modules; of others the first, or the last if they come after the layers."""
        if rule.number not in self._rows_of:
            layers = sorted(layer for layer in self._layers if rule.speaks_of_layer(layer))
            self._rows_of[rule.number] = {layer: row for row, layer in enumerate(layers)}
        rows = self._rows_of[rule.number]
        if site.layer is not None:
            row = rows.get(site.layer, 0)
        elif self._is_past_a_layer and self._kind(site.node.class_name) != _ROTARY:
            row = len(rows) - 1
        else:
            row = 0  # the rotary embedding stands behind the layers in the tree, and feeds them
        return spread.device(row, max(1, len(rows)))

    def _kind(self, class_name: str) -> str | None:
        """The kind that ``auto`` takes for a class: the exact class, for a subclass may compute something else."""
        if class_name not in self._kind_of:
            claims = (
                kind
                for kind, classes in self._operations.items()
                if class_name in classes and kind not in self._not_by_itself
            )
            self._kind_of[class_name] = next(claims, None)
        return self._kind_of[class_name]

    def _check_class(self, rule: Rule, site: Site) -> None:
        """Raise `RuleError` if ``rule`` names an operation, or a class of KTransformers, that is for other modules."""
        names = self._operations.get(rule.op) or ktransformers.CLASSES_OF.get(rule.op, ())
        if names and not any(is_subclass(site.node.classes, name) for name in names):
            raise RuleError(
                f"{rule.label}: {rule.op} cannot stand for {site}, which is a {site.node.class_name}; it stands for "
                f"{', '.join(names)}. Narrow the match by class"
            )

    def _notes(self, examples: Sequence[str]) -> tuple[str, ...]:
        """Each note of a rule once, and KTransformers' rules that have nothing to do. Our idle rules are an error."""
        said: dict[str, list[Rule]] = {}
        for rule in self._list.rules:
            notes = rule.notes
            if rule.number not in self._decided and self._list.source != AUTO:
                reason, advice = why_idle(rule, self._list.rules, self._root, examples)
                if not rule.theirs:
                    raise RuleError(f"{rule.label} decides nothing: {reason}. {advice}")
                notes = (f"nothing to do: {_NO_ROTARY if rule.op == _ROTARY else reason}",)
            for note in notes:
                said.setdefault(note, []).append(rule)
        return tuple(f"{_labels(rules)}: {note}" for note, rules in said.items())


def _op(kind: str, device: str) -> str:
    return TORCH if kind == TORCH else f"{kind}_{backend_of(device)}"


def _mapped_device(prefix: str, device: str) -> str:
    parsed = parse_device(device)
    if parsed is None:
        raise RuleError(f"device_map: {prefix!r} is on {brief(device)}; {DEVICES_ACCEPTED} is expected")
    return parsed


def _labels(rules: Sequence[Rule]) -> str:
    """ "rules 2, 3 of my.yaml"; rules of several files each by its own label."""
    sources = {rule.place.source for rule in rules}
    if len(rules) == 1 or len(sources) > 1:
        return "; ".join(rule.label for rule in rules)
    return f"{sources.pop()}, rules {', '.join(str(rule.place.number) for rule in rules)}"
