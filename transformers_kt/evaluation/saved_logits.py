"""A file of logits: what a reference said, so that a model too large to keep beside others has to run once.

It is an uncompressed .npz archive. ``about`` holds JSON: the format, the reference's title, its tokenizer's
fingerprint, the texts' names and windows of token ids. Pieces follow in the order of the windows, each of up to
`PIECE_ROWS` predicted tokens: ``0.codes``, ``0.low``, ``0.step``, ``0.best``, ``0.loss``, ``1.codes`` and so on, the
fields of `Rows`. A predicted token takes 2 bytes for each token of the vocabulary: 259 kB for one of 129,280.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transformers_kt.errors import InputError
from transformers_kt.evaluation.divergence import Rows
from transformers_kt.evaluation.passages import Passages, Window
from transformers_kt.text import brief, format_bytes

PIECE_ROWS = 128
_FORMAT = "transformers_kt logits 1"
_ABOUT = "about"


@dataclass(frozen=True, slots=True)
class About:
    """``title`` names the reference, ``tokenizer`` is the fingerprint of its tokenizer, ``vocab`` counts its logits."""

    title: str
    tokenizer: str
    vocab: int
    context: int
    passages: Passages

    def to_json(self) -> str:
        return json.dumps(
            {
                "format": _FORMAT,
                **{name: getattr(self, name) for name in ("title", "tokenizer", "vocab", "context")},
                "names": self.passages.names,
                "windows": self.passages.windows,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> About:
        """Raises ValueError, TypeError or KeyError where ``text`` is something else."""
        found = json.loads(text)
        if found["format"] != _FORMAT:
            raise ValueError(f"its format is {brief(found['format'])}")
        windows = tuple(Window(number, tuple(ids), scored) for number, ids, scored in found["windows"])
        passages = Passages(tuple(found["names"]), windows)
        return cls(found["title"], found["tokenizer"], found["vocab"], found["context"], passages)


def nbytes_of(tokens: int, vocab: int) -> int:
    """About the size of a file of so many predicted tokens."""
    return 2 * tokens * vocab


def require_writable(path: str | os.PathLike[str], nbytes: int) -> None:
    """Raises `InputError` where a file of ``nbytes`` cannot be written to ``path``."""
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise InputError(f"logits cannot be saved to {path}: there is no folder {folder}")
    if (free := shutil.disk_usage(folder).free) < nbytes:
        raise InputError(
            f"logits of {format_bytes(nbytes)} do not fit into {folder}, where {format_bytes(free)} are free. Take "
            "fewer or shorter texts, or another folder (of temporary files: TMPDIR)"
        )


def write_logits(path: str | os.PathLike[str], about: About, pieces: Iterable[Rows]) -> None:
    """Write piece after piece; a file that is not finished does not stay."""
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
            _add(archive, _ABOUT, np.array(about.to_json()))
            for number, rows in enumerate(pieces):
                for name, tensor in rows._asdict().items():
                    _add(archive, f"{number}.{name}", tensor.numpy())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _add(archive: zipfile.ZipFile, name: str, array: np.ndarray[Any, Any]) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


class SavedLogits:
    """A file that `write_logits` wrote. Raises `InputError` where it is none, or damaged."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with self._explained():
            self._archive = np.load(self.path, allow_pickle=False)
            self.about = About.from_json(str(self._archive[_ABOUT]))

    @staticmethod
    def is_at(path: Any) -> bool:
        """Whether ``path`` names a file that looks like one."""
        return isinstance(path, str | os.PathLike) and Path(path).is_file() and zipfile.is_zipfile(path)

    def pieces(self) -> Iterator[Rows]:
        for number in range(sum(-(-window.scored // PIECE_ROWS) for window in self.about.passages.windows)):
            with self._explained():
                rows = Rows(*(torch.from_numpy(self._archive[f"{number}.{name}"]) for name in Rows._fields))
            yield rows

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{self.path} is no file of saved logits, or damaged ({error}); one that save_logits= (--save-logits) "
                "wrote is accepted"
            ) from error
