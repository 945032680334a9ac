"""``transformers-kt serve`` with OpenAI's own client: what it answers, to whom, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pexpect
import pytest

openai = pytest.importorskip("openai", reason="the extra test brings OpenAI's client")
pytest.importorskip("fastapi", reason="the extra serve brings what transformers' server needs")
pytest.importorskip("uvicorn", reason="the extra serve brings what transformers' server needs")

from hub_cache import Hub  # noqa: E402
from openai import Stream  # noqa: E402
from openai.types.chat import ChatCompletionChunk  # noqa: E402
from server_load import MODEL, Server, put_under_load, server  # noqa: E402

QUESTIONS = [f"What is {left} + {right}?" for left, right in ((486, 57), (1, 2), (999, 999), (64, 64))]
AT_ONCE, WAITING = 4, 1
END_OF_SENTENCE = 1
ENDLESS: dict[str, Any] = {"max_tokens": 1500, "logit_bias": {str(END_OF_SENTENCE): -100}}
"""An answer that only its length ends; seconds, where others take tenths."""


@pytest.fixture(scope="module")
def served() -> Iterator[Server]:
    limits = ("--max-batch", str(AT_ONCE), "--max-waiting", str(WAITING), "--cache-gb", "0.06")
    with server(*limits, "--api-key", "sesame", api_key="sesame") as started:
        yield started


def whole(answer: Any) -> tuple[str, str, str]:
    """Thoughts, answer and why it ended."""
    (choice,) = answer.choices
    return choice.message.reasoning_content or "", choice.message.content or "", choice.finish_reason


def joined(stream: Any) -> tuple[str, str, str]:
    """The same of a stream."""
    thoughts = content = reason = ""
    for chunk in stream:
        (choice,) = chunk.choices
        thoughts += getattr(choice.delta, "reasoning_content", None) or ""
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
    return thoughts, content, reason


def test_thoughts_and_answer_come_apart_and_usage_counts_both(served: Server) -> None:
    answer = served.ask(QUESTIONS[0])
    thoughts, content, reason = whole(answer)
    assert thoughts.startswith("486 + 57\nOnes: 6 + 7 = 13")
    assert (content, reason) == ("486 + 57 = 543", "stop")
    assert "think>" not in thoughts + content
    usage = answer.usage
    assert usage.prompt_tokens == 16
    assert usage.completion_tokens > 50
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_second_turn_is_given_the_answer_and_not_the_thoughts(served: Server) -> None:
    first = served.ask(QUESTIONS[0]).choices[0].message
    messages = [
        {"role": "user", "content": QUESTIONS[0]},
        first.model_dump(include={"role", "content"}),
        {"role": "user", "content": QUESTIONS[1]},
    ]
    answer = served.client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    assert whole(answer)[1].endswith("= 3")


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 7}], ids=["greedy", "seeded"])
def test_answers_given_at_once_are_those_given_alone(served: Server, options: dict[str, Any]) -> None:
    alone = [whole(served.ask(question, **options)) for question in QUESTIONS]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert list(pool.map(lambda question: whole(served.ask(question, **options)), QUESTIONS)) == alone
        streams = pool.map(lambda question: joined(served.ask(question, stream=True, **options)), QUESTIONS)
        assert list(streams) == alone
    counts = served.metrics()
    passes, sequences = (counts[f"transformers_kt_sequences_per_pass_{what}"] for what in ("count", "sum"))
    assert sequences > passes, "none was computed with another"


def test_what_an_earlier_prompt_began_with_is_not_computed_again(served: Server) -> None:
    question = f"{QUESTIONS[0]} {QUESTIONS[3]}"
    first, *others = (served.ask(question, max_tokens=20) for _ in range(3))
    stream = list(served.ask(question, max_tokens=20, stream=True))
    usages = [answer.usage for answer in (first, *others, stream[-1])]
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages]
    # All but the last, which has to be computed.
    assert cached[0] < cached[1] == cached[2] == cached[3] == usages[0].prompt_tokens - 1
    assert [whole(answer) for answer in others] == [whole(first)] * 2


def test_metrics_count_what_was_answered(served: Server) -> None:
    before = served.metrics()
    answer = served.ask(QUESTIONS[0])
    with pytest.raises(openai.BadRequestError):
        served.ask("What is 1 + 2? " * 400)
    after = served.metrics()

    def added(name: str) -> float:
        return after[f"transformers_kt_{name}"] - before[f"transformers_kt_{name}"]

    assert added('requests_total{outcome="answered"}') == added("time_to_first_token_seconds_count") == 1
    assert added("prompt_tokens_total") == answer.usage.prompt_tokens
    assert added("cached_tokens_total") == answer.usage.prompt_tokens_details.cached_tokens
    assert added("generated_tokens_total") == answer.usage.completion_tokens
    assert added("time_per_token_seconds_count") == answer.usage.completion_tokens - 1
    assert after["transformers_kt_requests_running"] == after["transformers_kt_requests_waiting"] == 0
    assert 0 < after["transformers_kt_kept_bytes"] <= 6e7
    assert after["process_resident_memory_bytes"] == pytest.approx(served.rss, rel=0.1)


def test_seeds_are_heard_and_do_not_outlast_their_request(served: Server) -> None:
    def answer(**seed: int) -> tuple[str, str, str]:
        return whole(served.ask(QUESTIONS[2], temperature=5.0, max_tokens=20, **seed))

    assert answer(seed=1) == answer(seed=1) != answer(seed=2)
    seeded_then_not = []
    for _ in range(2):
        answer(seed=1)
        seeded_then_not.append(answer())
    assert seeded_then_not[0] != seeded_then_not[1]


@pytest.mark.parametrize("stop", ["= 13, write", ["nothing", "6 + 7"], "57 = "])
def test_an_answer_ends_before_its_stop_string(served: Server, stop: Any) -> None:
    """In the thoughts and in the answer; over more than one token each."""
    thoughts, content, _ = whole(served.ask(QUESTIONS[0]))
    stops = [stop] if isinstance(stop, str) else stop
    if any(text in thoughts for text in stops):
        expected = (thoughts[: min(thoughts.find(text) for text in stops if text in thoughts)].rstrip(), "", "stop")
    else:
        expected = (thoughts, content[: content.find(stop)].rstrip(), "stop")
    found = [whole(served.ask(QUESTIONS[0], stop=stop)), joined(served.ask(QUESTIONS[0], stop=stop, stream=True))]
    for thoughts, content, reason in found:
        assert (thoughts.rstrip(), content.rstrip(), reason) == expected


# What Open WebUI 0.6 to 0.9 sends to an endpoint of OpenAI's API: a turn of the chat with the usage switch on, then its
# own questions about the chat, for a title and for tags. From backend/open_webui/routers/tasks.py and openai.py; the
# wording of the questions is ours.
CHAT = [{"role": "user", "content": QUESTIONS[0]}]
OPEN_WEBUI: dict[str, dict[str, Any]] = {
    "chat": {"stream": True, "stream_options": {"include_usage": True}, "messages": CHAT, "temperature": 0, "seed": 1},
    "title": {
        "stream": False,
        "messages": [
            {"role": "user", "content": f"### Task:\nName this chat.\n<chat_history>\n{CHAT}\n</chat_history>"}
        ],
        "max_completion_tokens": 1000,
    },
    "tags": {"stream": False, "messages": [{"role": "user", "content": f"### Task:\nTag this chat: {CHAT}"}]},
}


def test_open_webui_finds_the_model_and_has_its_requests_answered(served: Server) -> None:
    get, post = served.client.get, served.client.post
    (model,) = get("/models", cast_to=dict[str, Any])["data"]
    for kind, body in OPEN_WEBUI.items():
        sent = {"model": model["id"], **body}
        if body["stream"]:
            answer = joined(
                post(
                    "/chat/completions",
                    body=sent,
                    cast_to=ChatCompletionChunk,
                    stream=True,
                    stream_cls=Stream[ChatCompletionChunk],
                )
            )
            assert answer[1:] == ("486 + 57 = 543", "stop")
        else:
            (choice,) = post("/chat/completions", body=sent, cast_to=dict[str, Any])["choices"]
            assert isinstance(choice["message"]["content"], str), kind


def test_the_other_endpoints_answer(served: Server) -> None:
    text = served.client.completions.create(model=MODEL, prompt="What is 1 + 2?", max_tokens=5, temperature=0)
    assert (text.choices[0].finish_reason, text.usage.completion_tokens) == ("length", 5)
    response = served.client.responses.create(model=MODEL, input=QUESTIONS[0], temperature=0)
    assert response.output_text == "486 + 57 = 543"
    assert [model.id for model in served.client.models.list()] == [MODEL]


@pytest.mark.parametrize("stream", [False, True])
def test_an_overlong_prompt_is_answered_with_400_and_what_to_do(served: Server, stream: bool) -> None:
    with pytest.raises(
        openai.BadRequestError, match=r"tokens long; this model has 2048 positions\. Shorten the prompt"
    ):
        served.ask("What is 1 + 2? " * 400, stream=stream)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": []}, "400"),
        ({"messages": "hi"}, "TypeError"),
        ({"messages": [{"role": "user"}], "temperature": "hot"}, "could not convert string to float"),
        ({"messages": [{"role": "user", "content": "hi"}], "temperature": -1}, "temperature"),
    ],
)
def test_a_request_that_makes_no_sense_is_answered_with_400(served: Server, body: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        served.client.post("/chat/completions", body={"model": MODEL, **body}, cast_to=dict)


def test_an_error_amid_a_stream_reaches_the_client(served: Server) -> None:
    """With quotation marks and line ends, as messages of transformers have them."""
    with pytest.raises(openai.APIError) as raised:
        joined(served.ask(QUESTIONS[0], stream=True, extra_body={"generation_config": '{"num_beams": 2}'}))
    assert "`streamer` cannot be used with beam search" in str(raised.value.body)


def seconds_to_answer(served: Server, **options: Any) -> float:
    start = time.monotonic()
    served.ask(QUESTIONS[1], **options)
    return time.monotonic() - start


def test_streams_that_are_left_free_the_server_which_refuses_more_than_may_wait(served: Server) -> None:
    a_hundred_tokens_s = seconds_to_answer(served, **{**ENDLESS, "max_tokens": 100})
    streams = [served.ask(question, stream=True, **ENDLESS) for question in (*QUESTIONS, QUESTIONS[0])]
    with pytest.raises(
        openai.InternalServerError, match=f"{AT_ONCE} requests are answered and {WAITING} wait"
    ) as refused:
        served.ask(QUESTIONS[1])
    assert (refused.value.status_code, refused.value.response.headers["retry-after"]) == (503, "1")
    assert served.health() == 200
    for stream in streams[1:]:
        stream.close()
    next(iter(streams[0]))
    streams[0].close()
    start = time.monotonic()
    while True:
        with contextlib.suppress(openai.InternalServerError):  # until the server has seen it
            assert whole(served.ask(QUESTIONS[1]))[1].endswith("= 3")
            break
    assert time.monotonic() - start < 20 * a_hundred_tokens_s, "what was left was computed: 75 times a hundred tokens"


def test_a_client_that_gives_up_waiting_frees_the_server(served: Server) -> None:
    a_hundred_tokens_s = seconds_to_answer(served, **{**ENDLESS, "max_tokens": 100})
    impatient = served._replace(client=served.client.with_options(timeout=a_hundred_tokens_s))

    def give_up(question: str) -> None:
        with pytest.raises(openai.APITimeoutError):
            impatient.ask(question, **ENDLESS)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(give_up, QUESTIONS[:2]))
    assert seconds_to_answer(served) < 10 * a_hundred_tokens_s, "what was left was computed: 30 times a hundred tokens"


def test_without_the_key_there_is_nothing_but_health(served: Server) -> None:
    assert served.health() == 200
    for key in ("none", ""):
        with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer KEY"):
            served.client.with_options(api_key=key or "x").models.list()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{served.url}/v1/models", timeout=10)


def memory_beside_kept_keys(served: Server) -> float:
    return served.rss - served.metrics()["transformers_kt_kept_bytes"]


def test_memory_stays_as_it_is_under_load(served: Server) -> None:
    """make load-server does it for longer: 547.9 MB after the first hundred requests, 548.2 after four."""
    put_under_load(served, 24, AT_ONCE)
    before = memory_beside_kept_keys(served)
    put_under_load(served, 32, AT_ONCE)
    assert memory_beside_kept_keys(served) - before < 4e6


@pytest.fixture(scope="module")
def keyless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its model has a name on the hub."""
    folder = tmp_path_factory.mktemp("hub")
    (weights,) = Path(MODEL).glob("*.gguf")
    Hub(folder).put("org/tiny", weights, weights.name)
    with server("--shutdown-seconds", "1", model=f"org/tiny:{weights.name}", hub=folder) as started:
        yield started


def test_transformers_chat_goes_over_two_turns(keyless: Server, tmp_path: Path) -> None:
    """It sends no key. Its second turn holds the first answer: with thoughts in it, it would be another prompt."""
    command = ["-m", "transformers.cli.transformers", "chat", keyless.model, keyless.url, "do_sample=False"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}  # else the hub's client asks no server, this one neither
    chat = pexpect.spawn(
        sys.executable, command, env=environment, timeout=120, encoding="utf-8", dimensions=(60, 200), cwd=tmp_path
    )
    chat.expect("already loaded")
    for question, total in ((QUESTIONS[0], 543), (QUESTIONS[1], 3)):
        chat.sendline(question)
        chat.expect(rf"{question[8:-1].replace('+', '.')} = {total}\b")
    chat.sendline("!exit")
    chat.expect(pexpect.EOF)


def test_a_server_that_is_stopped_gives_answers_their_time_and_ends(keyless: Server) -> None:
    stream = iter(keyless.ask(QUESTIONS[0], stream=True, **ENDLESS))
    next(stream)
    keyless.process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    with pytest.raises(openai.APIError):
        for _chunk in stream:
            pass
    assert keyless.process.wait(30) in (0, -signal.SIGTERM)
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--continuous-batching",), "--continuous-batching keeps keys in pages"),
        (("--rules", "nosuch"), "there are no rules named 'nosuch'; --kt-rules takes"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(options: tuple[str, ...], words: str) -> None:
    command = [sys.executable, "-m", "transformers_kt.cli", "serve", MODEL, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_help_has_the_options_of_both_servers() -> None:
    command = [sys.executable, "-m", "transformers_kt.cli", "serve", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={"COLUMNS": "120", **os.environ})
    for option in ("--rules", "--max-waiting", "--api-key", "--attn-implementation", "--model-timeout", "127.0.0.1"):
        assert option in done.stdout
