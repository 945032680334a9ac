"""``transformers-kt inspect``: what is in a file, and whether it would load. Reads headers only, without torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from transformers_kt.cli.models import MODEL_HELP, NOT_ALL_WELL, located
from transformers_kt.errors import KtError
from transformers_kt.families.from_gguf import notes_from_gguf, require_tokenizer
from transformers_kt.families.registry import families
from transformers_kt.gguf.facts import Facts
from transformers_kt.gguf.reader import StringArray
from transformers_kt.planning.plan import plan
from transformers_kt.planning.report import PlanReport
from transformers_kt.planning.request import read_request
from transformers_kt.planning.tables import new_table, ranges, rendered
from transformers_kt.rules import AUTO
from transformers_kt.text import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from transformers_kt.gguf.checkpoint import Checkpoint
    from transformers_kt.planning.request import Request

DEFAULT_CONTEXT = 4096
_LAYER = re.compile(r"(?<=^blk\.)\d+(?=\.)")
_WIDEST_LAYERS = 20
_ROUTED_EXPERTS = re.compile(r"\.ffn_(gate|up|down)_exps\.")
_SIZES = {
    "block_count": "layers",
    "embedding_length": "hidden size",
    "attention.head_count": "attention heads",
    "expert_count": "experts",
    "expert_used_count": "experts per token",
    "context_length": "context",
}
"""Keys of GGUF, below the architecture's name -> what they are called here."""
_SPECIAL_TOKENS = {"bos": "begins a text", "eos": "ends an answer"}


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors of one type and shape, the same in all but their layer, whose number ``name`` has as *.

    ``layers`` are their numbers in short, "" outside layers. ``shape`` is row-major, that of each tensor; ``nbytes``
    are those of all.
    """

    name: str
    layers: str
    count: int
    ggml_type: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def weights(self) -> int:
        return self.count * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """``source`` is the file or model folder that it comes from. Of a file, ``rules`` is the name of its way to cut
    text, ``special`` what begins and ends a text, ``template_characters`` the length of the chat template."""

    source: str
    rules: str | None = None
    tokens: int | None = None
    special: Mapping[str, str] | None = None
    template_characters: int | None = None


@dataclass(frozen=True, slots=True)
class FileReport:
    """What `inspect_model` found. Sizes are in bytes. ``memory`` is None where the file cannot be planned with.

    ``refusals`` say why loading would fail, wherever; ``memory`` what it takes, and what is free here.
    """

    name: str
    files: Sequence[str]
    nbytes: int
    architecture: str
    about: str | None
    parameters: int
    active_parameters: int
    sizes: Mapping[str, int]
    types: Mapping[str, int]
    groups: Sequence[TensorGroup]
    tokenizer: Tokenizer
    notes: Sequence[str]
    refusals: Sequence[str]
    memory: Mapping[str, int] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values all through, fit for JSON."""
        return {**asdict(self), "bits_per_weight": self.bits_per_weight}

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(1, self.parameters)

    def __str__(self) -> str:
        remarks = [*(f"Note: {note}" for note in self.notes), *self._verdict()]
        return rendered(self.name, self._facts_table(), self._tensor_table(), *remarks)

    def _facts_table(self) -> Table:
        table = new_table("what", "value")
        table.show_footer = table.show_header = False
        for name, value in self._facts():
            table.add_row(name, value)
        return table

    def _facts(self) -> Iterator[tuple[str, str]]:
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        yield "file", f"{self.files[0]}{more}, {format_bytes(self.nbytes)} of weights"
        yield "architecture", self.architecture + (f": {self.about}" if self.about else ", which is not computed here")
        active = ""
        if self.active_parameters < self.parameters:
            active = f", of which a token uses {_counted(self.active_parameters)}"
        yield "parameters", f"{_counted(self.parameters)}{active}; {self.bits_per_weight:.2f} bits each"
        sizes = [
            f"{number:,} {name}" if name == "layers" else f"{name} {number:,}" for name, number in self.sizes.items()
        ]
        if sizes:
            yield "sizes", ", ".join(sizes)
        yield "types", ", ".join(f"{name} {nbytes / max(1, self.nbytes):.1%}" for name, nbytes in self.types.items())
        found = self.tokenizer
        if found.tokens is None:
            yield "tokenizer", f"of {found.source}, with its chat template"
        else:
            special = "".join(f"; {token!r} {what}" for what, token in (found.special or {}).items())
            yield "tokenizer", f"{found.tokens:,} tokens, cut by the rules of {found.rules!r}{special}"
            template = found.template_characters
            yield "chat template", "none: chat needs one" if template is None else f"{template:,} characters"
        if self.memory:
            needed, context, free = (self.memory[key] for key in ("needed", "context", "free"))
            yield (
                "memory",
                (f"{format_bytes(needed)} with {context:,} tokens of context, {format_bytes(free)} are free here"),
            )
            yield "a token reads", f"{format_bytes(self.memory['read_per_token'])} of weights"

    def _tensor_table(self) -> Table:
        numbers = ("count", "memory")
        table = new_table("tensors", "layers", "type", "shape of each", *numbers, numbers=numbers)
        table.columns[0].footer = "all"
        table.columns[1].max_width = _WIDEST_LAYERS
        table.columns[4].footer = f"{sum(group.count for group in self.groups):,}"
        table.columns[5].footer = format_bytes(self.nbytes)
        for group in self.groups:
            shape = " x ".join(f"{size:,}" for size in group.shape)
            size = format_bytes(group.nbytes)
            # Folded between numbers.
            table.add_row(group.name, group.layers.replace(",", ", "), group.ggml_type, shape, f"{group.count:,}", size)
        return table

    def _verdict(self) -> list[str]:
        if self.refusals:
            return [f"Would be refused: {refusal}" for refusal in self.refusals]
        assert self.memory is not None
        short = self.memory["needed"] - self.memory["free"]
        if short > 0:
            return [f"The file is in order, but does not fit into this machine: {format_bytes(short)} too little."]
        return ["Loads: every tensor has its place and a kernel."]


def inspect_model(model: str, context: int = DEFAULT_CONTEXT) -> FileReport:
    """What is in the GGUF that ``model`` leads to, and what loading it would say.

    Raises `KtError` where the headers themselves cannot be read: no such file, a shard missing, a damaged header.
    """
    request = read_request(model, {"kt_rules": AUTO})
    assert request is not None  # kt_rules is there
    checkpoint = request.open()
    facts = Facts(checkpoint)
    refusals: list[str] = []
    planned, notes = _planned(request, checkpoint, context, refusals)
    tokenizer = _tokenizer(request, checkpoint, refusals)
    known = (family.about for family in families() if facts.architecture in family.architectures)
    groups = _groups(checkpoint)
    types: dict[str, int] = {}
    for group in sorted(groups, key=lambda group: -group.nbytes):
        types[group.ggml_type] = types.get(group.ggml_type, 0) + group.nbytes
    sizes = {
        name: int(checkpoint.metadata[facts.prefix + key])
        for key, name in _SIZES.items()
        if type(checkpoint.metadata.get(facts.prefix + key)) is int
    }
    share = sizes.get("experts per token", 1) / max(1, sizes.get("experts", 1))
    return FileReport(
        name=str(checkpoint.metadata.get("general.name") or request.title),
        files=[str(file.path) for file in checkpoint.files],
        nbytes=checkpoint.nbytes,
        architecture=str(facts.architecture),
        about=next(known, None),
        parameters=sum(group.weights for group in groups),
        active_parameters=round(sum(group.weights * (share if _is_routed(group) else 1.0) for group in groups)),
        sizes=sizes,
        types=dict(sorted(types.items(), key=lambda item: -item[1])),
        groups=groups,
        tokenizer=tokenizer,
        notes=notes,
        refusals=refusals,
        memory=None if planned is None else _memory(planned),
    )


def _planned(
    request: Request, checkpoint: Checkpoint, context: int, refusals: list[str]
) -> tuple[PlanReport | None, tuple[str, ...]]:
    """The plan for a CPU, and what the file leaves open; why there is none is added to ``refusals``."""
    try:
        notes = notes_from_gguf(checkpoint) if request.folder is None else ()
        report = plan(request.folder, gguf_path=request.gguf, gpus=[], context=context)
    except KtError as error:
        refusals.append(str(error))
        return None, ()
    refusals += (problem for problem in report.problems if not problem.startswith("Does not fit"))
    return report, notes


def _memory(report: PlanReport) -> dict[str, int]:
    (cpu,) = report.devices
    return {
        "context": report.context,
        "needed": cpu.needed,
        "free": cpu.capacity,
        "read_per_token": cpu.read_per_token,
    }


def _tokenizer(request: Request, checkpoint: Checkpoint, refusals: list[str]) -> Tokenizer:
    folder = Path(request.folder or "")
    if request.folder is not None and (not folder.is_dir() or (folder / "tokenizer.json").exists()):
        return Tokenizer(request.folder)
    metadata = checkpoint.metadata
    tokens = metadata.get("tokenizer.ggml.tokens")
    rules = str(metadata.get("tokenizer.ggml.pre"))
    template = metadata.get("tokenizer.chat_template")
    special = {}
    try:
        require_tokenizer(checkpoint)
        count = len(tokens) if isinstance(tokens, StringArray) else 0
        for key, what in _SPECIAL_TOKENS.items():
            number = metadata.get(f"tokenizer.ggml.{key}_token_id", -1)
            if isinstance(tokens, StringArray) and 0 <= number < count:
                special[what] = tokens[number]
    except KtError as error:
        refusals.append(str(error))
    characters = len(template) if isinstance(template, str) and template else None
    return Tokenizer(str(checkpoint.path), rules, len(tokens or ()), special, characters)


def _groups(checkpoint: Checkpoint) -> list[TensorGroup]:
    """In the order of the file."""
    found: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    sizes: dict[tuple[str, str, tuple[int, ...]], int] = {}
    for name, info in checkpoint.tensors.items():
        key = (_LAYER.sub("*", name), info.ggml_type.name, info.shape)
        found.setdefault(key, []).append(name)
        sizes[key] = sizes.get(key, 0) + info.nbytes
    groups = []
    for (name, ggml_type, shape), names in found.items():
        layers = ranges(sorted(int(match[0]) for match in map(_LAYER.search, names) if match))
        groups.append(TensorGroup(name, layers, len(names), ggml_type, shape, sizes[name, ggml_type, shape]))
    return groups


def _is_routed(group: TensorGroup) -> bool:
    return _ROUTED_EXPERTS.search(group.name) is not None


def _counted(number: int) -> str:
    """671 billion, 4.2 million."""
    for unit, word in ((10**9, "billion"), (10**6, "million")):
        if number >= unit:
            return f"{number / unit:.3g} {word}"
    return f"{number:,}"


def inspect_command(
    model: Annotated[str, typer.Argument(metavar="FILE", help=MODEL_HELP)],
    context: Annotated[int, typer.Option(min=1, help="Tokens of conversation to count memory for.")] = DEFAULT_CONTEXT,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what is in a model file, how much memory it takes, and whether it would load.

    Reads the first megabytes only, in well under a second, however large the file is. A file on the hub is downloaded
    first. Ends with 0 if the file would load, with 3 if it would be refused, and says why.
    """
    report = inspect_model(located(model), context)
    print(json.dumps(report.to_dict(), indent=1) if as_json else report)
    if report.refusals:
        raise typer.Exit(NOT_ALL_WELL)
