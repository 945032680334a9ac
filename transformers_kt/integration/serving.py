"""What differs in ``transformers serve`` where a model of ours answers: its server, with another queue.

transformers answers requests one after the other. Here they are answered at once (batching.py), a seed is that
request's alone, a client that goes away frees its place, too long a prompt or queue is refused with a status code, and
no stop string is part of an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hmac
import json
import logging
import sys
import weakref
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from transformers.cli.serve import Serve
from transformers.cli.serving import utils
from transformers.utils.import_utils import is_serve_available

from transformers_kt.errors import KtError, ServerBusyError, UnsupportedOperationError
from transformers_kt.integration.batching import Batcher, Limits, Request, sequences_of
from transformers_kt.integration.loaded_model import KtModelMixin

logger = logging.getLogger(__name__)

_BAD_REQUEST, _UNAUTHORIZED, _UNAVAILABLE = 400, 401, 503
_seed: ContextVar[int | None] = ContextVar("seed", default=None)
_stops: ContextVar[Sequence[str]] = ContextVar("stops", default=())
_answered: ContextVar[Request | None] = ContextVar("answered", default=None)


def require_server() -> None:
    """Raises UnsupportedOperationError where the packages are missing that transformers' server needs."""
    if not is_serve_available():
        raise UnsupportedOperationError(
            'serve needs fastapi, uvicorn and openai. Run: pip install "transformers-kt-experts[serve]"'
        )


class KtServe(Serve):  # type: ignore[misc]
    """transformers' server until it is stopped. ``options`` are its own; it blocks.

    More requests than ``limits`` let are refused. ``shutdown_seconds`` is what running answers are given when the
    server is stopped. With ``api_key`` each request but /health has to bring it.
    """

    def __init__(self, *, limits: Limits, shutdown_seconds: int, api_key: str | None, **options: Any) -> None:
        if options.get("continuous_batching"):
            raise UnsupportedOperationError(
                "--continuous-batching keeps keys in pages, which the attention of these models does not read. Leave "
                "it out: requests that come at once are computed together without it"
            )
        self._shutdown_seconds, self._api_key = shutdown_seconds, api_key
        KtGenerateManager.limits = limits
        _use_one_arena()
        _install()
        super().__init__(**options, non_blocking=True)

    def start_server(self) -> None:
        from fastapi import HTTPException

        app = self.server.config.app
        app.add_exception_handler(HTTPException, _say_as_openai_does)
        app.add_exception_handler(ServerBusyError, _ask_to_come_again)
        self._offer_metrics(app)
        for kind in (KtError, ValueError, TypeError, LookupError):
            app.add_exception_handler(kind, _refuse)
        app.add_middleware(_Gate, api_key=self._api_key)
        self.server.config.timeout_graceful_shutdown = self._shutdown_seconds
        self.server.run()

    def _offer_metrics(self, app: Any) -> None:
        from fastapi.responses import PlainTextResponse

        try:
            from transformers_kt.integration.metrics import Metrics
        except ImportError:
            logger.warning('no /metrics without prometheus_client: pip install "transformers-kt-experts[serve]"')
            return
        metrics = KtGenerateManager.observer = Metrics(lambda: KtGenerateManager.batchers)
        app.get("/metrics")(lambda: PlainTextResponse(metrics.text(), media_type=metrics.content_type))


def _use_one_arena() -> None:
    """Let threads that begin from now on share the C library's memory.

    Each request has a thread of its own, and glibc gives 8 arenas a core to threads, which keep what they once held:
    25 MB of 540 after 500 requests, 8 at a time. As one of these threads runs at a time, none waits for another here.
    """
    arena_max = -8  # M_ARENA_MAX of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(arena_max, 1)


def _install() -> None:
    from transformers.cli.serving import chat_completion, completion, response

    utils.GenerateManager = KtGenerateManager
    utils.BaseHandler._build_generation_config = _as_openai_means(utils.BaseHandler._build_generation_config)
    # Called with the request, while others are computed: it only notes the seed.
    utils.set_torch_seed = _seed.set
    for module in (chat_completion, response):
        module.parse_assistant_message = _without_stops(utils.parse_assistant_message)
    for module in (chat_completion, completion):
        module.CompletionUsage = _usage_with_cached_tokens
    response.compute_usage = _with_cached_tokens(response.compute_usage)

    class ResponseHandler(response.ResponseHandler):  # type: ignore[misc]
        async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
            # OpenAI's default. transformers streams unless told otherwise, which OpenAI's client cannot read.
            return await super().handle_request({"stream": False, **body}, request_id)

    response.ResponseHandler = ResponseHandler


def _usage_with_cached_tokens(**counts: Any) -> Any:
    from openai.types.completion_usage import CompletionUsage, PromptTokensDetails

    return CompletionUsage(**counts, prompt_tokens_details=PromptTokensDetails(cached_tokens=_cached_tokens()))


def _with_cached_tokens(compute_usage: Callable[..., Any]) -> Callable[..., Any]:
    def computed(*counts: int) -> Any:
        usage = compute_usage(*counts)
        usage.input_tokens_details.cached_tokens = _cached_tokens()
        return usage

    return computed


def _cached_tokens() -> int:
    request = _answered.get()
    return 0 if request is None else request.reused


def _as_openai_means(build: Callable[..., Any]) -> Callable[..., Any]:
    """A temperature above 0 asks for sampling, also of a model that by its own config takes the likeliest token; a
    bias may be an integer."""

    def built(handler: Any, body: dict[str, Any], *args: Any, **options: Any) -> Any:
        if isinstance(biases := body.get("logit_bias"), dict):
            body["logit_bias"] = {token: float(bias) for token, bias in biases.items()}
        config = build(handler, body, *args, **options)
        if body.get("temperature") or (body.get("temperature") is None and body.get("top_p") is not None):
            config.do_sample = True
        return config

    return built


def _without_stops(parse: Callable[..., Any]) -> Callable[..., Any]:
    def parsed(processor: Any, model: Any, generated: Any, *args: Any, **options: Any) -> Any:
        if _stops.get():
            # Before it is parsed: that strips spaces, with which stop strings may end.
            generated = _cut(getattr(processor, "tokenizer", processor).decode(generated))
        return parse(processor, model, generated, *args, **options)

    return parsed


def _heard_stops(gen_config: Any) -> Sequence[str]:
    """Those of the request, from now on those of the task that answers it."""
    stops = gen_config.stop_strings or ()
    _stops.set([stops] if isinstance(stops, str) else list(filter(None, stops)))
    return _stops.get()


def _cut(text: str) -> str:
    """``text`` up to the first stop string of the request that this task answers."""
    return text[: min((found for stop in _stops.get() if (found := text.find(stop)) >= 0), default=None)]


async def _refuse(request: Any, error: Exception) -> Any:
    logger.warning("refused: %s", error, exc_info=not isinstance(error, KtError))
    said = str(error) if isinstance(error, KtError | ValueError) else f"{type(error).__name__}: {error}"
    return _error(_BAD_REQUEST, said)


async def _ask_to_come_again(request: Any, error: Exception) -> Any:
    return _error(_UNAVAILABLE, str(error), {"Retry-After": "1"})


async def _say_as_openai_does(request: Any, error: Any) -> Any:
    return _error(error.status_code, error.detail, error.headers)


def _error(status: int, message: Any, headers: Any = None) -> Any:
    """In the form in which OpenAI's client finds the message."""
    from fastapi.responses import JSONResponse

    kind = "server_error" if status >= _UNAVAILABLE else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": error}, status, headers)


def _seed_as_transformers_does() -> None:
    if (seed := _seed.get()) is not None:
        torch.manual_seed(seed)


class _Streamer(utils.DirectStreamer):  # type: ignore[misc]
    """Text without the stop string that ended it. What may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str], *args: Any, **options: Any) -> None:
        self._stops = stops
        self._held: Any = ""
        self._stopped = False
        self.request: Request | None = None
        super().__init__(*args, **options)

    def cancel(self) -> None:
        super().cancel()
        if self.request is not None:
            self.request.cancel()

    def _enqueue(self, item: Any) -> None:
        if not self._stops or self._stopped:
            if not self._stopped or not isinstance(item, str):
                self._pass_on(item)
            return
        if type(item) is not type(self._held):  # an end, a tool call, or the answer after the thoughts
            self._send(self._held)
            self._held = ""
        if not isinstance(item, str):
            self._pass_on(item)
            return
        text, kind = self._held + item, type(item)
        at = min((found for stop in self._stops if (found := text.find(stop)) >= 0), default=None)
        self._stopped = at is not None
        begun = 0 if self._stopped else _begun(text, self._stops)
        self._send(kind(text[: len(text) - begun if at is None else at]))
        self._held = kind(text[len(text) - begun :]) if begun else kind("")

    def _send(self, text: str) -> None:
        if text:
            super()._enqueue(text)

    def _pass_on(self, item: Any) -> None:
        # The end comes when the request has left its place, which its client may want again at once.
        if item is not None:
            super()._enqueue(item)


def _begun(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters of ``text`` are the beginning of a stop string."""
    most = min(len(text), max(map(len, stops)) - 1)
    return next((n for n in range(most, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)


class KtGenerateManager(utils.GenerateManager):  # type: ignore[misc]
    """As that of transformers, whose code answers for all models but ours."""

    limits = Limits()
    observer: Any = None
    batchers: ClassVar[list[Batcher]] = []

    def __init__(self) -> None:
        super().__init__()
        self._batcher: Batcher | None = None
        self._model: Callable[[], Any] = lambda: None

    def _submit(self, model: Any, inputs: Any, gen_config: Any, **options: Any) -> Request:
        """Raises what the client is told: InputError or ServerBusyError."""
        model.require_positions(inputs["input_ids"].shape[-1])
        request = Request(model, inputs, gen_config, _seed.get(), **options)
        _answered.set(request)
        self._batcher_of(model).submit(request)
        return request

    def _batcher_of(self, model: Any) -> Batcher:
        """Of a model that was loaded anew, it is another."""
        if self._batcher is None or self._model() is not model:
            self._forget_batcher()
            self._batcher = Batcher(model, self.limits, self.observer)
            self._model = weakref.ref(model, lambda _: self._forget_batcher())
            self.batchers.append(self._batcher)
        return self._batcher

    def _forget_batcher(self) -> None:
        if self._batcher is not None:
            self.batchers.remove(self._batcher)
            self._batcher = None

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[asyncio.Queue[Any], Any]:
        if not isinstance(model, KtModelMixin):
            _seed_as_transformers_does()
            stock: tuple[asyncio.Queue[Any], Any] = super().generate_streaming(
                model, processor, inputs, gen_config, request_id, response_parser
            )
            return stock
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        tokenizer = getattr(processor, "tokenizer", processor)._tokenizer
        streamer = _Streamer(_heard_stops(gen_config), tokenizer, loop, queue, response_parser=response_parser)
        request = streamer.request = self._submit(model, inputs, gen_config, streamer=streamer, tokenizer=processor)

        def end(done: Future[Any]) -> None:
            error = done.exception()
            is_left = error is None or isinstance(error, utils._GenerationCancelled)
            # The handlers put it between quotes.
            last = None if is_left else utils._StreamError(json.dumps(str(error))[1:-1])
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(queue.put_nowait, last)

        request.done.add_done_callback(end)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Any]:
        if not isinstance(model, KtModelMixin):
            _seed_as_transformers_does()
            stock: tuple[str, int, Any] = await super().generate_non_streaming(
                model, processor, inputs, gen_config, request_id
            )
            return stock
        _heard_stops(gen_config)
        request = self._submit(model, inputs, gen_config, tokenizer=processor)
        try:
            # Shielded: what the thread has yet to set cannot be cancelled.
            output = await asyncio.shield(asyncio.wrap_future(request.done))
        except asyncio.CancelledError:
            request.cancel()
            raise
        length = inputs["input_ids"].shape[-1]
        generated = sequences_of(output)[0, length:]
        return _cut(processor.decode(generated, skip_special_tokens=True)), length, generated


# ---- HTTP ------------------------------------------------------------------------------------------------------------

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class _Gate:
    """Lets in who has the key, and cancels the answer whose client goes away. For ASGI.

    transformers' handlers notice that only between two pieces of a stream.
    """

    def __init__(self, app: Any, api_key: str | None) -> None:
        self._app = app
        self._key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._key is not None and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._key):
                refusal = _error(_UNAUTHORIZED, "this server asks for its API key: Authorization: Bearer KEY")
                await refusal(scope, receive, send)
                return
        messages = asyncio.Queue[_Message]()
        answer = asyncio.ensure_future(self._app(scope, messages.get, send))

        async def listen() -> None:
            while True:
                message = await receive()
                messages.put_nowait(message)
                if message["type"] == "http.disconnect":
                    answer.cancel()
                    return

        listener = asyncio.ensure_future(listen())
        try:
            await asyncio.wait([answer])
        finally:
            listener.cancel()
            answer.cancel()
        if not answer.cancelled() and (error := answer.exception()) is not None:
            raise error
