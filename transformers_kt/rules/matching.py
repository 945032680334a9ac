"""Which rules speak of which modules, and why a rule speaks of none."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from transformers_kt.errors import RuleError
from transformers_kt.families.tree import TORCH_CLASSES, ModelTree, ModuleNode, dotted
from transformers_kt.rules.syntax import Rule
from transformers_kt.text import layer_number, nearest

_BASE = "model"
_LONGEST_SEARCH_S = 1


class Site(NamedTuple):
    """A module in its place. ``name`` is what rules see: its path in the causal language model."""

    path: str
    name: str
    layer: int | None
    node: ModuleNode

    def below(self) -> Iterator[Site]:
        for name, child in self.node.children.items():
            dot = "." if self.path else ""
            yield _site(f"{self.path}{dot}{name}", f"{self.name}{'.' if self.name else ''}{name}", child)

    @property
    def holds_tensors(self) -> bool:
        return self.node.holds_tensors

    @property
    def owns_tensors(self) -> bool:
        return self.node.owns_tensors

    def __str__(self) -> str:
        return self.path or "the model itself"


def root_site(tree: ModelTree) -> Site:
    """The model. One without head, as AutoModel gives, has the names that it would have inside one with a head."""
    return _site("", _BASE if tree.is_base else "", tree.root)


def walk(site: Site) -> Iterator[Site]:
    """``site`` and all below it, in the order of the tree."""
    yield site
    for child in site.below():
        yield from walk(child)


def _site(path: str, name: str, node: ModuleNode) -> Site:
    return Site(path, name, layer_number(name), node)


class Matcher:
    """Finds the first rule that matches a module. Classes are compared once per class, not once per module."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = rules
        self._for_class: dict[tuple[str, ...], tuple[Rule, ...]] = {}

    def first(self, site: Site) -> Rule | None:
        classes = site.node.classes
        if classes not in self._for_class:
            self._for_class[classes] = tuple(rule for rule in self._rules if _fits_class(rule, classes))
        return next((rule for rule in self._for_class[classes] if _fits_place(rule, site)), None)


def matches(rule: Rule, site: Site) -> bool:
    return _fits_place(rule, site) and _fits_class(rule, site.node.classes)


def is_subclass(classes: Collection[str], class_name: str) -> bool:
    """Whether a class that derives from all of ``classes`` is that of the dotted name. Nothing is imported."""
    return class_name in classes or _defined_as(class_name) in classes


def _defined_as(class_name: str) -> str:
    """Where a class is defined: torch.nn.Linear in torch.nn.modules.linear."""
    package, _, name = class_name.rpartition(".")
    if package == "torch.nn" and name in TORCH_CLASSES:
        return TORCH_CLASSES[name]
    # A model that has other classes has brought in the module that defines them.
    alias = vars(sys.modules[package]).get(name) if package in sys.modules else None
    return dotted(alias) if isinstance(alias, type) else class_name


def why_idle(rule: Rule, rules: Sequence[Rule], root: Site, examples: Sequence[str]) -> tuple[str, str]:
    """Why ``rule`` decides about no module, and what to do. ``examples`` are paths of modules that rules can match."""
    found = next(_matched(rule, root, ()), None)
    if found is None:
        return (
            f"no module matches {_criteria(rule)}{_nearest_class(rule, root)}",
            f"Modules have names like {', '.join(examples)}{_layers_there(rule, root)}; a regex is searched in the "
            "name, a class is a dotted name. Correct the match or remove the rule",
        )
    site, above = found
    for earlier in rules[: rule.number - 1]:
        if matches(earlier, site):
            shown = _shown(earlier, rule)
            return f"what it matches first, {site}, is taken by {shown} before it", f"Put it above {shown} or remove it"
    for outer in above:
        for other in rules:
            if other.speaks_of_the_inside and matches(other, outer):
                shown = _shown(other, rule)
                return (
                    f"what it matches first, {site}, lies inside a module, {outer}, of which {shown} speaks as a whole",
                    f"Put it above {shown} and give that one op: auto or torch, or remove it",
                )
    return (
        f"what it matches first, {site}, holds no weights, or none that no other rule decides about",
        "Match what is in it or remove the rule",
    )


def _nearest_class(rule: Rule, root: Site) -> str:
    """A hint if the class is one that no module of the model has, but which looks like one of theirs."""
    classes = {site.node.class_name for site in walk(root)}
    return "" if rule.class_name in classes else nearest(rule.class_name, sorted(classes))


def _layers_there(rule: Rule, root: Site) -> str:
    layers = [site.layer for site in walk(root) if site.layer is not None]
    return f", in layers 0 to {max(layers)}" if rule.layers is not None and layers else ""


def _matched(rule: Rule, site: Site, above: tuple[Site, ...]) -> Iterator[tuple[Site, tuple[Site, ...]]]:
    if matches(rule, site):
        yield site, above
    for child in site.below():
        yield from _matched(rule, child, (*above, site))


def _fits_class(rule: Rule, classes: Collection[str]) -> bool:
    return rule.class_name is None or is_subclass(classes, rule.class_name)


def _fits_place(rule: Rule, site: Site) -> bool:
    if rule.name is None or not rule.speaks_of_layer(site.layer):
        return rule.speaks_of_layer(site.layer)
    try:
        return rule.name.search(site.name, timeout=_LONGEST_SEARCH_S) is not None
    except TimeoutError:
        raise RuleError(
            f"{rule.label}, match.name takes more than {_LONGEST_SEARCH_S} s on the module {site}: "
            f"'{rule.name.pattern}'. Repetitions of what can match in many ways, as (a+)+ and (a|a)+, take that long; "
            "write it without"
        ) from None


def _criteria(rule: Rule) -> str:
    parts = [] if rule.name is None else [f"name '{rule.name.pattern}'"]
    if rule.class_name is not None:
        parts.append(f"class {rule.class_name}")
    if rule.layers is not None:
        ranges = (
            f"{first}" if first == last else f"{first}-{'' if last is None else last}" for first, last in rule.layers
        )
        parts.append(f"layers {','.join(ranges)}")
    return " and ".join(parts)


def _shown(other: Rule, rule: Rule) -> str:
    return f"rule {other.place.number}" if other.place.source == rule.place.source else other.label
