"""One model on disk or on the hub: a GGUF file, or the shards of one, whatever part of it the user named."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from glob import escape
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from transformers_kt.errors import CheckpointError, CheckpointNotFoundError, KtError
from transformers_kt.gguf.other_files import part_of
from transformers_kt.gguf.reader import GgufFile, Metadata, TensorInfo
from transformers_kt.text import listed

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Other layouts of experts than a stack each of gate, up and down.
_FUSED_EXPERTS = re.compile(r"blk\.\d+\.ffn_gate_up_exps\.weight")
_SINGLE_EXPERT = re.compile(r"(?P<layer>blk\.\d+\.ffn_(gate|up|down))\.(?P<expert>\d{1,5})\.weight")

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.gguf")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_HUB = re.compile(rf"(?P<repo>{_REPOSITORY.pattern}):(?P<wanted>.+)")
_GLOB_CHARACTERS = frozenset("*?[")

# What lies beside models in many folders and is none: vision projectors, quantization statistics, adapters.
_OTHER_NAMES = ("mmproj", "imatrix")
_OTHER_ARCHITECTURES = ("clip", "imatrix", "controlvector")

_listed = partial(listed, most=10)  # names of files, which lists of shards are full of


class HubOptions(TypedDict, total=False):
    """What `open_checkpoint` passes on to huggingface_hub."""

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    force_download: bool
    local_files_only: bool


class _Part(NamedTuple):
    """Bytes of a tensor of a file, from ``start`` of that tensor on."""

    file: GgufFile
    name: str
    start: int = 0


class Checkpoint:
    """The tensors and metadata of one model, over all its shards, in file order.

    Experts are shown as one stack for each of gate, up and down, however the files have them.

    Raises `CheckpointError` if ``files`` do not belong together.
    """

    def __init__(self, files: Sequence[GgufFile]) -> None:
        self.files = tuple(files)
        _check_shards(self.files)
        # Writers put the metadata into the first shard; the others only say which shard they are.
        self.metadata: Metadata = self.files[0].metadata
        self._parts: dict[str, tuple[_Part, ...]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            self.tensors |= file.tensors
            self._parts |= {name: (_Part(file, name),) for name in file.tensors}
        self._split_fused_experts()
        self._stack_single_experts()

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path}: {len(self.files)} files, {len(self.tensors)} tensors, {self.nbytes} bytes>"

    @property
    def path(self) -> Path:
        """The first file: the name of this checkpoint in messages."""
        return self.files[0].path

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data over all shards."""
        return sum(file.nbytes for file in self.files)

    def require_weights(self) -> None:
        """Raise `CheckpointError` for a file without tensors: a vocabulary makes a tokenizer, not a model."""
        if not self.tensors:
            raise CheckpointError(
                f"{self.path} holds a vocabulary and no weights (0 tensors); AutoTokenizer loads it, a model needs the "
                "file with the weights"
            )

    def data(self, name: str, start: int = 0, end: int | None = None) -> npt.NDArray[np.uint8]:
        """Bytes ``start`` to ``end`` of tensor ``name``, all by default: uint8, one-dimensional, read-only, a copy.

        Raises `GgufFormatError` where the file changed since it was opened, or cannot be read.
        """
        end = self.tensors[name].nbytes if end is None else end
        parts = self._parts[name]
        if len(parts) == 1:
            return parts[0].file.data(parts[0].name, start, end)
        # All parts are of one size.
        each = self.tensors[name].nbytes // len(parts)
        pieces = []
        while start < end:
            part, skipped = parts[start // each], start % each
            stop = min(each, skipped + end - start)
            pieces.append(part.file.data(part.name, part.start + skipped, part.start + stop))
            start += stop - skipped
        stored = np.concatenate(pieces)
        stored.flags.writeable = False
        return stored

    def places(self, name: str) -> list[tuple[int, int]]:
        """(file descriptor, offset) of each part of tensor ``name``, which follow each other and have one size: for who
        reads without Python, inside of `reading`."""
        return [part.file.place(part.name, part.start) for part in self._parts[name]]

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """While somebody reads from `places`: raises `GgufFormatError` for an OSError or EOFError that leaves it, whose
        attributes ``part`` and ``position`` say where, and where a file was written to meanwhile."""
        parts = self._parts[name]
        try:
            yield
        except (OSError, EOFError) as error:
            part = parts[error.part]  # type: ignore[union-attr]
            part.file.refuse_read(part.name, part.start + error.position, error)  # type: ignore[union-attr]
        for file, part_name in {part.file: part.name for part in parts}.items():
            file.require_unchanged(part_name)

    def _split_fused_experts(self) -> None:
        """Show ``ffn_gate_up_exps`` (experts, 2 * intermediate, hidden) as the two stacks it is made of."""
        for name in [name for name in self.tensors if _FUSED_EXPERTS.fullmatch(name)]:
            fused = self.tensors[name]
            halves = [name.replace("gate_up", half) for half in ("gate", "up")]
            if len(fused.shape) != 3 or fused.shape[1] % 2 or any(half in self.tensors for half in halves):
                continue
            (whole,) = self._parts.pop(name)
            experts, rows, cols = fused.shape
            nbytes = fused.nbytes // 2
            each = nbytes // experts
            for number, half in enumerate(halves):
                starts = range(number * each, fused.nbytes, 2 * each)
                self._parts[half] = tuple(_Part(whole.file, name, start) for start in starts)
                shape, is_last = (experts, rows // 2, cols), fused.is_last and number > 0
                self.tensors[half] = replace(fused, name=half, shape=shape, nbytes=nbytes, is_last=is_last)
            del self.tensors[name]

    def _stack_single_experts(self) -> None:
        """Show a matrix per expert, as files of 2023 have them, as the stack that today's converter makes of them.

        Experts of different types or shapes, or with one missing, stay as they are.
        """
        stacks: dict[str, dict[int, str]] = {}
        for name in self.tensors:
            if match := _SINGLE_EXPERT.fullmatch(name):
                stacks.setdefault(f"{match['layer']}_exps.weight", {})[int(match["expert"])] = name
        for stack, names in stacks.items():
            infos = [self.tensors[names[number]] for number in sorted(names)]
            first = infos[0]
            if stack in self.tensors or sorted(names) != [*range(len(names))] or len(first.shape) != 2:
                continue
            if any((info.ggml_type, info.shape) != (first.ggml_type, first.shape) for info in infos):
                continue
            self._parts[stack] = tuple(part for info in infos for part in self._parts.pop(info.name))
            shape, nbytes = (len(infos), *first.shape), len(infos) * first.nbytes
            self.tensors[stack] = replace(first, name=stack, shape=shape, nbytes=nbytes, is_last=False)
            for info in infos:
                del self.tensors[info.name]


def open_checkpoint(gguf_path: str | Path, **hub: Unpack[HubOptions]) -> Checkpoint:
    """Open the model at ``gguf_path``: a file, any shard, a folder that holds one model, or hub "org/repo:wanted".

    ``wanted`` is a file's name, a pattern with * or ?, or a piece of the name such as "Q4_K_M". What exists on disk
    wins over the hub. Only headers are read; from the hub, all shards are downloaded.

    Raises `CheckpointNotFoundError` (nothing there, a shard missing), `CheckpointError` (several models, shards that
    do not belong together), `GgufFormatError`, `UnsupportedTypeError`.
    """
    path = Path(gguf_path).expanduser()
    if path.is_dir():
        paths = _one_model_in(path)
    elif path.exists():
        paths = _with_siblings(path)
    elif match := _HUB.fullmatch(str(gguf_path)):
        paths = _downloaded(match["repo"], match["wanted"], hub)
    else:
        raise CheckpointNotFoundError(
            f'{path} does not exist. A GGUF file, a folder holding one, or hub "org/repo:file.gguf" is accepted'
            + _what_is_there(path.parent)
        )
    return Checkpoint([GgufFile(shard) for shard in paths])


class HubFiles(NamedTuple):
    """What a hub repository has: the names of all files, and of each GGUF model that of its first part."""

    names: list[str]
    models: list[str]


def files_on_hub(repo: str, **hub: Unpack[HubOptions]) -> HubFiles | None:
    """What is in the repository, or in its copy in the cache where the hub cannot be asked; None if nothing is known.

    ``repo`` may be any text.
    """
    if _REPOSITORY.fullmatch(repo) is None:
        return None
    try:
        names = _names_on_hub(repo, hub)
    except CheckpointNotFoundError:
        return None
    return HubFiles(names, [parts[0] for parts in _models(names).values()])


def is_hub_name(text: str) -> bool:
    """Whether ``text`` has the form "org/repo:wanted", which `open_checkpoint` looks up on the hub."""
    return _HUB.fullmatch(text) is not None


def cached_file(repo: str, name: str, **hub: Unpack[HubOptions]) -> Path | None:
    """The file ``name`` of a hub repository, downloaded unless the cache has it; None where it cannot be had."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, name, **hub))
    except Exception:  # of the network, the hub, the name: whoever asked for the file then says it better
        return None


class _Shard(NamedTuple):
    stem: str  # with the folder
    number: int  # from 1
    total: int


def _shard(name: str) -> _Shard | None:
    """What ``name`` (with or without folders) says about itself; None for an unsplit file."""
    match = _SHARD.fullmatch(name)
    shard = _Shard(match["stem"], int(match["number"]), int(match["total"])) if match else None
    return shard if shard and 1 <= shard.number <= shard.total else None


def _models(names: Iterable[str]) -> dict[str, list[str]]:
    """GGUF file names grouped by the model they are of, keyed by how to show it; shards in order, gaps not noticed."""
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        base = PurePosixPath(name).name.lower()
        if not base.endswith(".gguf") or base.startswith(".") or any(other in base for other in _OTHER_NAMES):
            continue
        shard = _shard(name)
        models.setdefault(f"{shard.stem}-*-of-{shard.total:05}.gguf" if shard else name, []).append(name)
    return models


def _shard_names(name: str) -> list[str]:
    """The names of all shards of the model that ``name`` is part of."""
    shard = _shard(name)
    if shard is None:
        return [name]
    return [f"{shard.stem}-{number:05}-of-{shard.total:05}.gguf" for number in range(1, shard.total + 1)]


def _with_siblings(path: Path) -> list[Path]:
    paths = [path.parent / name for name in _shard_names(path.name)]
    missing = [shard.name for shard in paths if not shard.exists()]
    if missing:
        raise CheckpointNotFoundError(
            f"{path.parent}: {path.name} is one of {len(paths)} shards. {_listed(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing; put all of them into one folder"
        )
    return paths


def _one_model_in(folder: Path) -> list[Path]:
    models = _models(entry.name for entry in folder.iterdir() if entry.is_file())
    candidates = {shown: names for shown, names in models.items() if _may_be_model(folder / names[0])}
    if not candidates:
        raise CheckpointNotFoundError(f"{folder} holds no GGUF model" + _what_is_there(folder) + _parts_hint(folder))
    if len(candidates) > 1:
        raise CheckpointError(
            f"{folder} holds {len(candidates)} models: {_listed(candidates)}. Name the file of the one to load (of a "
            "split model, any shard)"
        )
    (names,) = candidates.values()
    return _with_siblings(folder / names[0])


def _may_be_model(path: Path) -> bool:
    """Whether the file calls itself a model. A damaged one counts, so that its damage is reported, not its absence."""
    try:
        metadata = GgufFile(path).metadata
    except KtError:
        return True
    kind, architecture = metadata.get("general.type", "model"), metadata.get("general.architecture")
    return str(kind) == "model" and str(architecture) not in _OTHER_ARCHITECTURES


def _downloaded(repo: str, wanted: str, hub: HubOptions) -> list[Path]:
    names = _names_on_hub(repo, hub)
    models = {shown: parts for shown, parts in _models(names).items() if any(_fits(part, wanted) for part in parts)}
    if not models:
        on_hub = [name for name in names if name.lower().endswith(".gguf")]
        raise CheckpointNotFoundError(
            f"hub repository {repo} has no GGUF model that fits {wanted!r}; it has "
            + (_listed(on_hub) if on_hub else "no .gguf file at all")
        )
    if len(models) > 1:
        raise CheckpointError(
            f"{wanted!r} fits {len(models)} models in hub repository {repo}: {_listed(models)}. Name one of them"
        )
    (parts,) = models.values()
    needed = _shard_names(parts[0])
    missing = [name for name in needed if name not in names]
    if missing:
        raise CheckpointNotFoundError(
            f"hub repository {repo} (its copy in the cache, where the hub cannot be asked) lacks {_listed(missing)}"
        )
    folder = Path(_snapshot(repo, [escape(name) for name in needed], hub))
    absent = [name for name in needed if not (folder / name).exists()]
    if absent:
        raise CheckpointNotFoundError(
            f"{_listed(absent)} of hub repository {repo} could not be downloaded and the cache has no copy"
        )
    return [folder / name for name in needed]


def _fits(name: str, wanted: str) -> bool:
    if _GLOB_CHARACTERS.intersection(wanted):
        return name == wanted or fnmatchcase(name, wanted) or fnmatchcase(PurePosixPath(name).name, wanted)
    if wanted.lower().endswith(".gguf"):
        return name == wanted
    return wanted.lower() in name.lower()


def _names_on_hub(repo: str, hub: HubOptions) -> list[str]:
    """All file names in the repository; those in the cache where the hub cannot be asked."""
    # Imported here, for it takes half a second and most models are local.
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if not hub.get("local_files_only"):
        try:
            names: list[str] = list_repo_files(repo, revision=hub.get("revision"), token=hub.get("token"))
            return names
        except GatedRepoError as error:
            raise CheckpointNotFoundError(
                f"hub repository {repo} is gated: accept its terms on the hub and log in (`hf auth login`)"
            ) from error
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
            raise CheckpointNotFoundError(f"hub repository {repo} was not found: {error}") from error
        except Exception:
            hub = {**hub, "local_files_only": True}
    folder = Path(_snapshot(repo, None, {**hub, "local_files_only": True}))
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _snapshot(repo: str, allow_patterns: list[str] | None, hub: HubOptions) -> str:
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(repo, allow_patterns=allow_patterns, **hub))
    except Exception as error:
        if isinstance(error, KtError):
            raise
        raise CheckpointNotFoundError(f"hub repository {repo} could not be fetched: {error}") from error


def _check_shards(files: Sequence[GgufFile]) -> None:
    """That the files say they are shards 0, 1, 2, ... of one model, and hold as many tensors as they should."""
    tensor_count = sum(len(file.tensors) for file in files)
    expected = {"split.count": len(files), "split.tensors.count": tensor_count}
    seen: dict[str, Path] = {}
    for number, file in enumerate(files):
        stated = file.metadata
        if len(files) == 1 and "split.count" not in stated:
            continue
        for key, value in {"split.no": number, **expected}.items():
            if type(stated.get(key)) is not int or stated[key] != value:
                found = repr(stated[key]) if key in stated else "missing"
                if len(files) == 1 and type(stated["split.count"]) is int and stated["split.count"] > 1:
                    raise CheckpointError(
                        f"{file.path}: split.count is {stated['split.count']}, but the name does not say which of the "
                        "shards it is, so the others are not found. Give all of them their own names again: "
                        f"NAME-{_stated_number(stated)}-of-{stated['split.count']:05}.gguf"
                    )
                where = f"number {number + 1} of {len(files)} files" if len(files) > 1 else "the only file"
                raise CheckpointError(
                    f"{file.path}: {key} is {found}, {value} is expected: this is {where}, with {tensor_count} tensors "
                    "in all. The shards are not of one model, or were renamed; get them again under their own names"
                )
        for name in file.tensors:
            if name in seen:
                raise CheckpointError(
                    f"tensor {name} is in both {seen[name]} and {file.path}; the shards are not of one model"
                )
            seen[name] = file.path


def _stated_number(stated: Metadata) -> str:
    number = stated.get("split.no")
    return f"{number + 1:05}" if type(number) is int else "00001"


def _parts_hint(folder: Path) -> str:
    found = sorted(entry.name for entry in folder.iterdir() if ".gguf" in entry.name and part_of(entry.name))
    return f". About {found[0]}: {part_of(found[0])}" if found else ""


def _what_is_there(folder: Path) -> str:
    """A clause for messages: what a folder holds, with the subfolders that do hold GGUF files."""
    if not folder.is_dir():
        return f"; {folder} does not exist either"
    entries = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    return f"; {folder} holds {_listed(entries)}" if entries else f"; {folder} is empty"
