"""Requests to one model, answered at once: how many run, who waits, what each may use again of those before.

Each is a call of the stock ``generate`` with options of its own, in a thread of its own; `Rounds` makes of their passes
one. Its prompt is computed before, in pieces.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import torch
from transformers import DynamicCache

from transformers_kt.errors import ServerBusyError
from transformers_kt.families.registry import dims_of
from transformers_kt.integration.kept_caches import KeptCaches
from transformers_kt.integration.rounds import Rounds
from transformers_kt.integration.torch_threads import one_torch_thread
from transformers_kt.modules.fused.base_model import has_fast_path
from transformers_kt.modules.fused.cache_argument import CACHE_ARGUMENT
from transformers_kt.planning.hardware import free_memory

logger = logging.getLogger(__name__)

# How long a piece of a prompt may take while others wait for their next token, and while nobody does.
_STALL_S, _ALONE_S = 1.0, 2.0
_PIECE_TOKENS = range(32, 513)  # of all pieces; the first is among the smallest, to tell the speed by
_FLOAT_BYTES = 4

# With these, generate() has caches of its own, or several sequences: it computes the prompt itself, at one go.
_OWN_CACHE = ("cache_implementation", "prompt_lookup_num_tokens", "guidance_scale", "dola_layers", "penalty_alpha")
_SEVERAL = ("num_beams", "num_return_sequences")


class Limits(NamedTuple):
    """``cache_bytes``: of the keys of those that run, of which there may always be one, and of finished ones that are
    kept; None: a quarter of the memory that is free when the first request comes."""

    max_batch: int = 16
    max_waiting: int = 64
    cache_bytes: int | None = None


class Request:
    """One call of ``generate``, until `done` has what that gives: None for one that was cancelled before it began."""

    def __init__(self, model: Any, inputs: Mapping[str, Any], generation_config: Any, seed: int | None, **options: Any):
        self.model, self.inputs, self.config, self.options = model, dict(inputs), generation_config, options
        self.ids: list[int] = inputs["input_ids"][0].tolist()
        self.seed = seed
        self.done: Future[Any] = Future()
        self.reused = 0
        """Tokens of the prompt whose keys were there."""
        self.generated = 0
        self.arrived, self.last_token = time.perf_counter(), 0.0
        self._cancelled = threading.Event()
        self._leave: Callable[[Request], None] = lambda _: None

    def cancel(self) -> None:
        """It ends at its next token, or does not begin."""
        self._cancelled.set()
        self._leave(self)

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def most_tokens(self) -> int:
        """Of the prompt and of the longest answer."""
        positions: int = self.model.config.max_position_embeddings
        answer = self.config.max_new_tokens
        longest = self.config.max_length if answer is None else len(self.ids) + answer
        return min(positions, max(longest or positions, len(self.ids)))

    @property
    def sequences(self) -> int:
        most = 1
        for option in _SEVERAL:
            most *= getattr(self.config, option, None) or 1
        return most

    @property
    def takes_a_cache(self) -> bool:
        """Whether ``generate`` goes on from the keys of its prompt as it would have computed them."""
        mask = self.inputs.get("attention_mask")
        owns = any(getattr(self.config, option, None) for option in _OWN_CACHE)
        is_plain = set(self.inputs) <= {"input_ids", "attention_mask"} and (mask is None or bool(mask.all()))
        return is_plain and not owns and self.sequences == 1 and getattr(self.config, "use_cache", True) is not False


class Observer(Protocol):
    """Who is told how requests fare, by the threads that answer them."""

    def token(self, request: Request, seconds: float) -> None:
        """One more, ``seconds`` after the one before, or after the request came."""

    def passed(self, sequences: int) -> None:
        """A pass over one token of each of so many requests."""

    def ended(self, request: Request, outcome: str) -> None:
        """ "answered", "cancelled", "failed" or "refused"."""


class Batcher:
    """Answers requests to ``model``, as many at once as ``limits`` let. It does not keep the model alive."""

    def __init__(self, model: Any, limits: Limits, observer: Observer | None = None) -> None:
        config = model.config
        token_bytes = dims_of(config).cache_values * _FLOAT_BYTES * config.num_hidden_layers
        self.is_batching = has_fast_path(model)
        self._rounds = Rounds() if observer is None else Rounds(observer.passed)
        self.kept = KeptCaches()
        self._token_bytes: int = token_bytes
        self._limits, self._observer = limits, observer
        self._cache_bytes = free_memory().nbytes // 4 if limits.cache_bytes is None else limits.cache_bytes
        self._lock = threading.Lock()
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._piece_rate: float | None = None
        self.prompt_seconds = 0.0
        """Time in which pieces of prompts were computed."""
        if not self.is_batching:
            logger.warning(
                "requests are answered one after the other: to be computed together, all layers and the head have to "
                "be those of this package on the CPU, and no hook may watch them"
            )

    def submit(self, request: Request) -> None:
        """Answer it as soon as there is room. Raises ServerBusyError where too many wait."""
        with self._lock:
            runs_now = not self.waiting and self._fits(request)
            if not runs_now and len(self.waiting) >= self._limits.max_waiting:
                self._tell_end(request, "refused")
                raise ServerBusyError(
                    f"{len(self.running)} requests are answered and {len(self.waiting)} wait, as many as this server "
                    "lets. Try again later, or start it with a larger --max-waiting"
                )
            request._leave = self._forget
            self.waiting.append(request)
            self._admit()

    def _fits(self, request: Request) -> bool:
        """Whether it may run with those that do."""
        most = self._limits.max_batch if self.is_batching else 1
        has_memory = not self.running or self._nbytes(*self.running, request) <= self._cache_bytes
        return len(self.running) < most and has_memory

    def _nbytes(self, *requests: Request) -> int:
        return sum(request.most_tokens * request.sequences for request in requests) * self._token_bytes

    def _admit(self) -> None:
        """Under the lock."""
        while self.waiting and self._fits(self.waiting[0]):
            request = self.waiting.popleft()
            self.running.append(request)
            threading.Thread(target=self._run, args=(request,), daemon=True).start()
        self.kept.make_room(max(0, self._cache_bytes - self._nbytes(*self.running)))

    def _forget(self, request: Request) -> None:
        """A cancelled one that waits; one that runs ends by itself."""
        with self._lock:
            if request not in self.waiting:
                return
            self.waiting.remove(request)
            self._admit()
        self._tell_end(request, "cancelled")
        request.done.set_result(None)

    def _run(self, request: Request) -> None:
        output, error = None, None
        try:
            with one_torch_thread(), self._rounds.taking_part(request.seed) as before_piece:
                output = self._answer(request, before_piece)
        except BaseException as raised:
            error = raised
        with self._lock:
            self.running.remove(request)
            self._admit()
        cancelled = request.is_cancelled
        self._tell_end(request, "cancelled" if cancelled else "answered" if error is None else "failed")
        # Rings of references would keep its tensors until the next collection: the streamer knows the request, an
        # error the variables of its frames.
        request.options, request.inputs = {}, {}
        if error is None:
            request.done.set_result(output)
        else:
            request.done.set_exception(error)
            error = None

    def _answer(self, request: Request, before_piece: Callable[[], bool]) -> Any:
        cache, options = None, dict(request.options)
        if self.is_batching and request.takes_a_cache:
            cache = self._begun_cache(request, before_piece)
            options[CACHE_ARGUMENT] = cache
        if request.is_cancelled:
            return None
        output = request.model.generate(
            **request.inputs,
            generation_config=request.config,
            stopping_criteria=[functools.partial(self._after_token, request)],
            **options,
        )
        if cache is not None:
            self.kept.keep(sequences_of(output)[0, : cache.get_seq_length()].tolist(), cache)
        return output

    @torch.no_grad()
    def _begun_cache(self, request: Request, before_piece: Callable[[], bool]) -> Any:
        """The keys of the prompt but its last token, with which ``generate`` begins."""
        cache, request.reused = self.kept.begin(request.ids[:-1])
        if cache is None:
            cache = DynamicCache(config=request.model.config)
        done, end = request.reused, len(request.ids) - 1
        while done < end and not request.is_cancelled:
            others_wait = before_piece()
            piece = request.inputs["input_ids"][:, done : min(end, done + self._piece_size(others_wait))]
            start = time.perf_counter()
            request.model.base_model(input_ids=piece, use_cache=True, **{CACHE_ARGUMENT: cache})
            done += piece.shape[1]
            seconds = time.perf_counter() - start
            self.prompt_seconds += seconds
            if piece.shape[1] >= _PIECE_TOKENS.start:
                self._piece_rate = piece.shape[1] / seconds
        return cache

    def _piece_size(self, others_wait: bool) -> int:
        if self._piece_rate is None:
            return _PIECE_TOKENS.start
        wanted = int(self._piece_rate * (_STALL_S if others_wait else _ALONE_S))
        return min(max(wanted, _PIECE_TOKENS.start), _PIECE_TOKENS.stop - 1)

    def _after_token(self, request: Request, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        now = time.perf_counter()
        request.generated = input_ids.shape[1] - len(request.ids)
        if self._observer is not None:
            self._observer.token(request, now - (request.last_token or request.arrived))
        request.last_token = now
        return torch.full((len(input_ids),), request.is_cancelled)

    def _tell_end(self, request: Request, outcome: str) -> None:
        if self._observer is not None:
            self._observer.ended(request, outcome)


def sequences_of(output: Any) -> torch.Tensor:
    """The token ids in what ``generate`` gave: int64 (sequences, tokens)."""
    found: torch.Tensor = getattr(output, "sequences", output)
    return found
