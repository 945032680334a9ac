"""``quality()``: how far a model's predictions are from those of another one that computes the same, or should."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from tqdm.auto import tqdm

from transformers_kt.errors import CheckpointError, InputError
from transformers_kt.evaluation.divergence import Distances, distances, kept_rows
from transformers_kt.evaluation.passages import Passages, Texts, Window, cut, fingerprint, named_texts
from transformers_kt.evaluation.report import QualityReport
from transformers_kt.evaluation.saved_logits import (
    PIECE_ROWS,
    About,
    SavedLogits,
    nbytes_of,
    require_writable,
    write_logits,
)
from transformers_kt.modules.fused.cache_argument import CACHE_ARGUMENT
from transformers_kt.text import brief

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Model: TypeAlias = "str | os.PathLike[str] | PreTrainedModel"
"""A model that is loaded, or what ``from_pretrained`` loads it from."""

DEFAULT_CONTEXT = 512


def quality(
    model: Model,
    reference: Model,
    texts: Texts | None = None,
    *,
    gguf_path: str | os.PathLike[str] | None = None,
    kt_rules: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    context: int = DEFAULT_CONTEXT,
    save_logits: str | os.PathLike[str] | None = None,
) -> QualityReport:
    """Let both predict each token of ``texts`` from those before it, and say how far ``model`` is from ``reference``.

    Each of the two is a model that is loaded, a GGUF file, a folder, or a hub id: weights of transformers' own are
    computed by transformers in float32. ``reference`` may also be a file that `save_logits` wrote. ``gguf_path`` and
    ``kt_rules`` are those of ``from_pretrained``, for ``model``.

    ``texts`` is one, a list, or a mapping from names; without it those that are bundled, or those of the file of
    logits. They are cut into windows of ``context`` tokens, each read from an empty cache. ``tokenizer`` is needed
    where none is found beside the model.

    The reference runs first, and its logits go to a temporary file of 2 bytes for each token of text and of the
    vocabulary: models that are not loaded yet are never in memory together. ``save_logits`` keeps that file.

    Raises `InputError` before anything is computed where the two have other tokens, or the file others; and what
    loading raises.
    """
    ours = _Side(model, tokenizer, gguf_path=gguf_path, kt_rules=kt_rules)
    if SavedLogits.is_at(reference):
        if save_logits is not None:
            raise InputError(f"save_logits={save_logits}: the reference, {reference}, is a file of logits already")
        saved = SavedLogits(reference)
        _require_same(saved, ours, texts)
        return _compared(ours, saved)
    other = _Side(reference, tokenizer)
    mine, theirs = fingerprint(ours.tokenizer), fingerprint(other.tokenizer)
    if mine != theirs or ours.vocab != other.vocab:
        raise InputError(
            f"{ours.name} and {other.name} have other tokens: {ours.vocab} logits, vocabulary {mine}, and "
            f"{other.vocab} logits, vocabulary {theirs}. Models with the same vocabulary are compared"
        )
    context = min(context, ours.positions, other.positions)
    passages = cut(named_texts(texts), ours.tokenizer, context)
    with contextlib.ExitStack() as stack:
        path = save_logits or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "logits.npz"
        _save(other, passages, context, path)
        return _compared(ours, SavedLogits(path))


def save_logits(
    model: Model,
    path: str | os.PathLike[str],
    texts: Texts | None = None,
    *,
    gguf_path: str | os.PathLike[str] | None = None,
    kt_rules: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    context: int = DEFAULT_CONTEXT,
) -> int:
    """Write a file of logits that `quality` takes as ``reference``. Returns the number of predicted tokens.

    Arguments are those of `quality`. The file takes 2 bytes for each predicted token and each token of the vocabulary.
    """
    side = _Side(model, tokenizer, gguf_path=gguf_path, kt_rules=kt_rules)
    context = min(context, side.positions)
    passages = cut(named_texts(texts), side.tokenizer, context)
    _save(side, passages, context, path)
    return passages.tokens


class _Side:
    """One of the two models. Weights are loaded when it is first run."""

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase | None, **options: Any) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self._loaded: PreTrainedModel | None = None
        self._options = {key: value for key, value in options.items() if value is not None}
        if isinstance(model, str | os.PathLike):
            self.name = os.fspath(model)
            config = AutoConfig.from_pretrained(self.name, **self._options)
        elif not hasattr(model, "config"):
            raise InputError(
                f"{brief(model)} is no model; one that is loaded, a file, a folder or a hub id is accepted, and as the "
                "reference also a file that save_logits (--save-logits) wrote"
            )
        else:
            self.name, config, self._loaded = str(model.config.name_or_path), model.config, model
        if tokenizer is None:
            if not self.name:
                raise InputError("the model does not say where it is from; pass its tokenizer with tokenizer=")
            tokenizer = AutoTokenizer.from_pretrained(self.name, **self._options)
        self.tokenizer = tokenizer
        sizes = config.get_text_config()
        self.vocab, self.positions = sizes.vocab_size, sizes.max_position_embeddings

    @contextlib.contextmanager
    def running(self) -> Iterator[PreTrainedModel]:
        """The model, which goes again if it was loaded for this."""
        if self._loaded is not None:
            yield self._loaded
            return
        from transformers import AutoModelForCausalLM

        yield AutoModelForCausalLM.from_pretrained(self.name, dtype=torch.float32, **self._options)

    def title(self, model: PreTrainedModel) -> str:
        stock = f"transformers, {str(model.dtype).removeprefix('torch.')}"
        name = Path(self.name).name.removesuffix(".gguf") or type(model).__name__
        return f"{name} ({'transformers_kt' if hasattr(model, 'kt_report') else stock})"


def _require_same(saved: SavedLogits, side: _Side, texts: Texts | None) -> None:
    about, found = saved.about, fingerprint(side.tokenizer)
    if (about.tokenizer, about.vocab) != (found, side.vocab):
        raise InputError(
            f"{saved.path} was made with other tokens: {about.vocab} logits, vocabulary {about.tokenizer}; {side.name} "
            f"has {side.vocab} logits, vocabulary {found}. Save the logits of a model with this vocabulary"
        )
    if about.context > side.positions:
        raise InputError(
            f"{saved.path} has windows of {about.context} tokens; {side.name} has {side.positions} positions"
        )
    if texts is None:
        return
    difference = about.passages.first_difference(cut(named_texts(texts), side.tokenizer, about.context))
    if difference is not None:
        raise InputError(
            f"{saved.path} was made with other texts: {difference}. Leave texts= (--text) out, or save anew"
        )


def _save(side: _Side, passages: Passages, context: int, path: str | os.PathLike[str]) -> None:
    require_writable(path, nbytes_of(passages.tokens, side.vocab))
    with side.running() as model:
        title = side.title(model)
        about = About(title, fingerprint(side.tokenizer), side.vocab, context, passages)
        pieces = _pieces(model, passages, title)
        write_logits(path, about, (kept_rows(piece.logits, piece.next_ids) for piece in pieces))


def _compared(side: _Side, saved: SavedLogits) -> QualityReport:
    about = saved.about
    measured: dict[int, list[Distances]] = {}
    with side.running() as model:
        title = side.title(model)
        for rows, piece in zip(saved.pieces(), _pieces(model, about.passages, title), strict=True):
            measured.setdefault(piece.text, []).append(distances(rows, piece.logits, piece.next_ids))
    of_texts = {about.passages.names[text]: Distances.joined(parts) for text, parts in measured.items()}
    return QualityReport.of(title, about.title, about.context, of_texts)


class _Piece(NamedTuple):
    """``logits`` float32 (rows, vocab) of up to `PIECE_ROWS` places of a text, and int64 (rows,) what came there."""

    text: int
    logits: torch.Tensor
    next_ids: torch.Tensor


@torch.inference_mode()
def _pieces(model: PreTrainedModel, passages: Passages, title: str) -> Iterator[_Piece]:
    with tqdm(total=passages.tokens, unit="token", desc=title, disable=None) as bar:
        for window in passages.windows:
            for piece in _pieces_of(model, window):
                if not piece.logits.isfinite().all():
                    name = passages.names[window.text]
                    raise CheckpointError(f"the logits of {title} are not finite in {name}; its weights are damaged")
                bar.update(len(piece.logits))
                yield piece


def _pieces_of(model: PreTrainedModel, window: Window) -> Iterator[_Piece]:
    """The last token predicts nothing that is known, those before the first that is scored nothing that is asked."""
    ids = torch.tensor([window.ids])
    unscored = len(window.ids) - 1 - window.scored
    cache = None
    ends = [*range(unscored + PIECE_ROWS, len(window.ids) - 1, PIECE_ROWS), len(window.ids) - 1]
    for start, end in zip([0, *ends], ends, strict=False):
        out = model(input_ids=ids[:, start:end], use_cache=True, **{CACHE_ARGUMENT: cache})
        cache = out[CACHE_ARGUMENT]
        logits = out.logits[0, max(0, unscored - start) :].float()
        yield _Piece(window.text, logits, ids[0, end - len(logits) + 1 : end + 1])
