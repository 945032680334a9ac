"""What differs in ``transformers serve`` where a model of ours answers: its server, with the gaps of its queue filled.

transformers answers requests one after the other, in a thread of their own. Here a seed is that request's alone, a
client that goes away frees its place, too long a prompt or queue is refused with a status code, and no stop string is
part of an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from transformers.cli.serve import Serve
from transformers.cli.serving import utils
from transformers.utils.import_utils import is_serve_available

from transformers_kt.errors import KtError, UnsupportedOperationError
from transformers_kt.integration.loaded_model import KtModelMixin

logger = logging.getLogger(__name__)

_BAD_REQUEST, _UNAUTHORIZED, _UNAVAILABLE = 400, 401, 503
_seed: ContextVar[int | None] = ContextVar("seed", default=None)
_stops: ContextVar[Sequence[str]] = ContextVar("stops", default=())


def require_server() -> None:
    """Raises UnsupportedOperationError where the packages are missing that transformers' server needs."""
    if not is_serve_available():
        raise UnsupportedOperationError(
            'serve needs fastapi, uvicorn and openai. Run: pip install "transformers-kt-experts[serve]"'
        )


class KtServe(Serve):  # type: ignore[misc]
    """transformers' server until it is stopped. ``options`` are its own; it blocks.

    ``max_waiting`` requests wait while one is answered, more are refused. ``shutdown_seconds`` is what running answers
    are given when the server is stopped. With ``api_key`` each request but /health has to bring it.
    """

    def __init__(self, *, max_waiting: int, shutdown_seconds: int, api_key: str | None, **options: Any) -> None:
        if options.get("continuous_batching"):
            raise UnsupportedOperationError(
                "--continuous-batching keeps keys in pages, which the attention of these models does not read. Leave "
                "it out: requests are then answered one after the other"
            )
        self._shutdown_seconds, self._api_key = shutdown_seconds, api_key
        KtGenerateManager.max_waiting = max_waiting
        _install()
        super().__init__(**options, non_blocking=True)

    def start_server(self) -> None:
        from fastapi import HTTPException

        app = self.server.config.app
        app.add_exception_handler(HTTPException, _say_as_openai_does)
        for kind in (KtError, ValueError, TypeError, LookupError):
            app.add_exception_handler(kind, _refuse)
        app.add_middleware(_Gate, api_key=self._api_key)
        self.server.config.timeout_graceful_shutdown = self._shutdown_seconds
        self.server.run()


def _install() -> None:
    from transformers.cli.serving import chat_completion, response

    utils.GenerateManager = KtGenerateManager
    utils.BaseHandler._build_generation_config = _as_openai_means(utils.BaseHandler._build_generation_config)
    # Called with the request, while others are computed: it only notes the seed.
    utils.set_torch_seed = _seed.set
    for module in (chat_completion, response):
        module.parse_assistant_message = _without_stops(utils.parse_assistant_message)

    class ResponseHandler(response.ResponseHandler):  # type: ignore[misc]
        async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
            # OpenAI's default. transformers streams unless told otherwise, which OpenAI's client cannot read.
            return await super().handle_request({"stream": False, **body}, request_id)

    response.ResponseHandler = ResponseHandler


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


def _cut(text: str) -> str:
    """``text`` up to the first stop string of the request that this task answers."""
    return text[: min((found for stop in _stops.get() if (found := text.find(stop)) >= 0), default=None)]


async def _refuse(request: Any, error: Exception) -> Any:
    logger.warning("refused: %s", error, exc_info=not isinstance(error, KtError))
    said = str(error) if isinstance(error, KtError | ValueError) else f"{type(error).__name__}: {error}"
    return _error(_BAD_REQUEST, said)


async def _say_as_openai_does(request: Any, error: Any) -> Any:
    return _error(error.status_code, error.detail, error.headers)


def _error(status: int, message: Any, headers: Any = None) -> Any:
    """In the form in which OpenAI's client finds the message."""
    from fastapi.responses import JSONResponse

    kind = "server_error" if status >= _UNAVAILABLE else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": error}, status, headers)


# ---- The queue -------------------------------------------------------------------------------------------------------


class _Turn:
    """A request's place in the queue, until it is answered or its client has gone."""

    def __init__(self, leave: Callable[[_Turn], None]) -> None:
        self._leave = leave
        self._cancelled = threading.Event()
        self._seed = _seed.get()

    def cancel(self) -> None:
        self._cancelled.set()
        self._leave(self)

    def generate(self, model: Any, **options: Any) -> Any:
        """In the thread of the model. None if the client has gone before."""
        try:
            if self._cancelled.is_set():
                return None
            with _seeded(self._seed):
                return model.generate(**options, stopping_criteria=[self._has_gone])
        finally:
            self._leave(self)

    def _has_gone(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._cancelled.is_set())


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Choose tokens by ``seed``, and after it go on as if nothing had been chosen."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _seed_as_transformers_does() -> None:
    if (seed := _seed.get()) is not None:
        torch.manual_seed(seed)


class _Streamer(utils.DirectStreamer):  # type: ignore[misc]
    """Text without the stop string that ended it. What may be the beginning of one is held back."""

    def __init__(self, turn: _Turn, stops: Sequence[str], *args: Any, **options: Any) -> None:
        self._turn, self._stops = turn, stops
        self._held: Any = ""
        self._stopped = False
        super().__init__(*args, **options)

    def cancel(self) -> None:
        super().cancel()
        self._turn.cancel()

    def _enqueue(self, item: Any) -> None:
        if not self._stops or self._stopped:
            if not self._stopped or not isinstance(item, str):
                super()._enqueue(item)
            return
        if type(item) is not type(self._held):  # an end, a tool call, or the answer after the thoughts
            self._send(self._held)
            self._held = ""
        if not isinstance(item, str):
            super()._enqueue(item)
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


def _begun(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters of ``text`` are the beginning of a stop string."""
    most = min(len(text), max(map(len, stops)) - 1)
    return next((n for n in range(most, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)


class KtGenerateManager(utils.GenerateManager):  # type: ignore[misc]
    """As that of transformers, whose code answers for all models but ours."""

    max_waiting = 64

    def __init__(self) -> None:
        super().__init__()
        self._turns: set[_Turn] = set()

    def _new_turn(self, model: Any, inputs: Any, gen_config: Any) -> _Turn:
        from fastapi import HTTPException

        if len(self._turns) > self.max_waiting:
            raise HTTPException(
                _UNAVAILABLE,
                f"one request is answered and {self.max_waiting} wait, as many as this server lets. Try again later, "
                "or start it with a larger --max-waiting",
                headers={"Retry-After": "1"},
            )
        model.require_positions(inputs["input_ids"].shape[-1])
        stops = gen_config.stop_strings or ()
        _stops.set([stops] if isinstance(stops, str) else list(filter(None, stops)))
        turn = _Turn(self._turns.discard)
        self._turns.add(turn)
        return turn

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[asyncio.Queue[Any], Any]:
        if not isinstance(model, KtModelMixin):
            _seed_as_transformers_does()
            stock: tuple[asyncio.Queue[Any], Any] = super().generate_streaming(
                model, processor, inputs, gen_config, request_id, response_parser
            )
            return stock
        turn = self._new_turn(model, inputs, gen_config)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        tokenizer = getattr(processor, "tokenizer", processor)._tokenizer
        streamer = _Streamer(turn, _stops.get(), tokenizer, loop, queue, response_parser=response_parser)

        def answer() -> None:
            last = None
            try:
                turn.generate(model, **inputs, streamer=streamer, generation_config=gen_config, tokenizer=processor)
            except utils._GenerationCancelled:
                pass
            except Exception as error:
                # The handlers put it between quotes.
                last = utils._StreamError(json.dumps(str(error))[1:-1])
            loop.call_soon_threadsafe(queue.put_nowait, last)

        self.submit(answer)
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
        turn = self._new_turn(model, inputs, gen_config)
        options = {**inputs, "generation_config": gen_config, "tokenizer": processor}
        # Shielded: to cancel what the thread works on would end the thread.
        done = asyncio.wrap_future(self.submit(turn.generate, model, **options))
        done.add_done_callback(lambda done: done.exception())  # seen, also where nobody waits any more
        try:
            sequences = await asyncio.shield(done)
        except asyncio.CancelledError:
            turn.cancel()
            raise
        length = inputs["input_ids"].shape[-1]
        generated = sequences[0, length:]
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
