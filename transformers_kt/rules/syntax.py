"""One rule, as YAML or Python has it -> a validated `Rule`. The language is described in `rules`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import regex

from transformers_kt.errors import RuleError
from transformers_kt.families.tree import TORCH_CLASSES
from transformers_kt.rules import ktransformers
from transformers_kt.rules.checks import require_keys
from transformers_kt.rules.devices import BACKENDS, CPU, DEVICES_ACCEPTED, Spread, backend_of, parse_spread
from transformers_kt.rules.files import AUTO, Item, Place
from transformers_kt.text import brief, nearest

TORCH = "torch"
_DEFAULT = "default"
_RULE_KEYS = ("match", "replace", "recursive")
_MATCH_KEYS = ("name", "class", "layers")
_REPLACE_KEYS = ("op", "device", "class", "kwargs")
_THEIRS = {"class", "kwargs"}
_LONGEST_PATTERN = 4096
_LAYERS = re.compile(r"\s*(\d{1,5})\s*(-\s*(\d{1,5})?\s*)?")


@dataclass(frozen=True, slots=True)
class Rule:
    """One validated rule.

    ``number`` counts from 1 in the order of precedence, through all files. ``op`` is "auto", "torch", or a kind
    ("experts"), of which ``device`` chooses the backend. ``device`` is None where the rule names none. ``theirs``: the
    rule is in KTransformers' language; where a linear layer on a GPU that ``dequantizes`` becomes torch's.
    """

    number: int
    place: Place
    name: regex.Pattern[str] | None
    class_name: str | None
    layers: tuple[tuple[int, int | None], ...] | None
    op: str
    device: str | Spread | None
    recursive: bool
    theirs: bool = False
    notes: tuple[str, ...] = ()
    dequantizes: bool = False

    @property
    def label(self) -> str:
        """File, number in the file, and line."""
        return str(self.place)

    @property
    def speaks_of_the_inside(self) -> bool:
        """Whether what the rule says of a module holds for everything in it, too."""
        return not self.recursive or not (self.theirs or self.op == TORCH)

    def speaks_of_layer(self, layer: int | None) -> bool:
        if self.layers is None:
            return True
        return layer is not None and any(
            first <= layer and (last is None or layer <= last) for first, last in self.layers
        )


def validated_rule(item: Item, number: int, operations: Collection[str]) -> Rule:
    """The rule that ``item`` holds. Raises `RuleError`, naming file, rule and line, if anything in it is not known."""
    value, place = item
    label = str(place)
    require_keys(value, _RULE_KEYS, label, "a rule")
    for key in ("match", "replace"):
        if key not in value:
            raise RuleError(f"{label} has no {key!r}; a rule has {', '.join(_RULE_KEYS)}")
    match, replace = value["match"], value["replace"]
    require_keys(match, _MATCH_KEYS, f"{label}, match", "match")
    if not match:
        raise RuleError(f"{label}, match is empty; it needs {' or '.join(_MATCH_KEYS)}")
    for key in ("name", "class"):
        if not isinstance(match.get(key, ""), str):
            raise RuleError(f"{label}, match.{key} is {brief(match[key])}; a string is expected")
    recursive = value.get("recursive", True)
    if not isinstance(recursive, bool):
        raise RuleError(f"{label}, recursive is {brief(recursive)}; true or false is expected")
    op, device, theirs, notes, dequantizes = _replacement(replace, label, operations)
    return Rule(
        number,
        place,
        _compiled(match["name"], label) if "name" in match else None,
        _class_name(match["class"], label) if "class" in match else None,
        _layers(match["layers"], label) if "layers" in match else None,
        op,
        device,
        recursive,
        theirs,
        notes,
        dequantizes,
    )


def everything_auto() -> Rule:
    """The one rule of kt_rules="auto"."""
    return Rule(1, Place(AUTO, 1, None), regex.compile(""), None, None, AUTO, None, recursive=True)


def _replacement(
    replace: Any, label: str, operations: Collection[str]
) -> tuple[str, str | Spread | None, bool, tuple[str, ...], bool]:
    """Op, device, whether it is KTransformers' language, notes, and whether a linear layer is dequantized."""
    if isinstance(replace, str):
        replace = {"op": replace}
    require_keys(replace, _REPLACE_KEYS, f"{label}, replace", "replace")
    if replace.keys() & _THEIRS:
        found = ktransformers.read_replacement(replace, label)
        return found.kind, found.device, True, found.notes, found.dequantizes
    if not replace:
        raise RuleError(f"{label}, replace names neither op nor device; {_known_ops(operations)}")
    op, its_device = _op(replace.get("op", AUTO), label, operations)
    if "device" not in replace:
        return op, its_device, False, (), False
    device = parse_spread(replace["device"])
    if device is None:
        hint = nearest(replace["device"], [CPU, "cuda"])
        raise RuleError(
            f'{label}, replace.device is {brief(replace["device"])}{hint}; {DEVICES_ACCEPTED} is expected, or "cuda*4" '
            "to split the layers over four"
        )
    if its_device is not None and (its_device == CPU) != (device == CPU):
        raise RuleError(
            f"{label}, replace puts {replace['op']} on {replace['device']}; leave the device out, or write op: {op}"
        )
    return op, device, False, (), False


def _op(op: Any, label: str, operations: Collection[str]) -> tuple[str, str | None]:
    """Family and device of an op: ("experts", "cpu") for "experts_cpu", ("experts", None) for "experts"."""
    if op in (_DEFAULT, TORCH):
        return TORCH, None
    if op == AUTO:
        return AUTO, None
    if isinstance(op, str):
        if op in operations:
            return op, None
        kind, _, backend = op.rpartition("_")
        if kind in operations and backend in BACKENDS:
            return kind, CPU if backend == backend_of(CPU) else ktransformers.DEFAULT_DEVICE
    with_backends = (f"{kind}_{backend}" for kind in operations for backend in BACKENDS)
    spelt = [*operations, *with_backends, AUTO, TORCH, _DEFAULT]
    raise RuleError(f"{label}, replace has the unknown op {brief(op)}{nearest(op, spelt)}; {_known_ops(operations)}")


def _known_ops(operations: Collection[str]) -> str:
    return f"known ops are {', '.join(operations)} (each with _cpu or _gpu too), {AUTO}, {TORCH}, {_DEFAULT}"


def _compiled(pattern: str, label: str) -> regex.Pattern[str]:
    # Of the regex package, which transformers needs too: unlike re it can give up a search that would take years.
    if len(pattern) > _LONGEST_PATTERN:
        raise RuleError(f"{label}, match.name has {len(pattern)} characters; up to {_LONGEST_PATTERN} are accepted")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what future versions may read otherwise
            return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise RuleError(f"{label}, match.name is no valid regex: {brief(pattern)}: {error}") from None


def _class_name(name: str, label: str) -> str:
    where = f"{label}, match"
    package, dot, cls = name.rpartition(".")
    if not dot:
        raise RuleError(f"{where} has the class {brief(name)}; a dotted name such as torch.nn.Linear is expected")
    if package == "torch.nn" and cls not in TORCH_CLASSES:
        _require_class_of_torch(cls, name, where)
    return ktransformers.stock_class(name, where)


def _require_class_of_torch(cls: str, name: str, where: str) -> None:
    from torch import nn  # only here: a second, for what hardly any rule names

    if not isinstance(vars(nn).get(cls), type):
        hint = nearest(cls, [key for key, value in vars(nn).items() if isinstance(value, type)])
        raise RuleError(f"{where} has the unknown class {brief(name)}{hint}; torch.nn has no {brief(cls)}")


def _layers(value: Any, label: str) -> tuple[tuple[int, int | None], ...]:
    """First and last of each range: "3,7-9,20-" -> ((3, 3), (7, 9), (20, None))."""
    parts = value if isinstance(value, list | tuple) else value.split(",") if isinstance(value, str) else [value]
    ranges = tuple(_layer_range(part) for part in parts)
    found = tuple(part for part in ranges if part is not None)
    if not found or len(found) < len(ranges):
        raise RuleError(
            f'{label}, match.layers is {brief(value)}; 3, "30-60", "40-" (to the last), "3,7-9" or a list of such is '
            "expected"
        )
    return found


def _layer_range(part: Any) -> tuple[int, int | None] | None:
    if isinstance(part, int) and not isinstance(part, bool):
        return (part, part) if part >= 0 else None
    match = _LAYERS.fullmatch(part) if isinstance(part, str) else None
    if match is None:
        return None
    first = int(match[1])
    last = first if match[2] is None else None if match[3] is None else int(match[3])
    return None if last is not None and last < first else (first, last)
