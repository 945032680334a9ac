"""Requests at a server of OpenAI's API, half of whose clients go away, and what memory the server holds meanwhile.

python tests/support/server_load.py starts `transformers-kt serve` with the bundled model and puts it under load.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import openai
import psutil

from transformers_kt.assets import bundled_model

MODEL = str(bundled_model())


class Server(NamedTuple):
    process: subprocess.Popen[str]
    client: openai.OpenAI
    url: str
    model: str

    @property
    def rss(self) -> int:
        """Bytes of memory that the process holds."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def ask(self, question: str, **options: Any) -> Any:
        messages = [{"role": "user", "content": question}]
        return self.client.chat.completions.create(model=self.model, messages=messages, **{"temperature": 0, **options})

    def metrics(self) -> dict[str, float]:
        """What the server counts: a name with its labels -> value."""
        request = urllib.request.Request(
            f"{self.url}/metrics", headers={"Authorization": f"Bearer {self.client.api_key}"}
        )
        lines = urllib.request.urlopen(request, timeout=10).read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def health(self) -> int:
        return int(urllib.request.urlopen(f"{self.url}/health", timeout=10).status)


@contextlib.contextmanager
def server(*options: str, api_key: str = "none", model: str = MODEL, hub: Path | None = None) -> Iterator[Server]:
    """`transformers-kt serve` with the model, the bundled one unless another is named; ends with it. ``hub`` is a
    cache of the hub."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers_kt.cli", "serve", model, "--port", str(port), *options]
    cache = {} if hub is None else {"HF_HUB_CACHE": str(hub)}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **cache}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    url = f"http://127.0.0.1:{port}"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0, timeout=120)
    try:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if "running on http" in line:
                break
        else:
            raise RuntimeError("".join(said))
        # Read on, for a full pipe would stop the server.
        with ThreadPoolExecutor(1) as reader:
            reader.submit(process.stderr.read)
            try:
                yield Server(process, client, url, model)
            finally:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
    finally:
        process.kill()
        process.wait()


def put_under_load(server: Server, requests: int, at_once: int) -> list[str]:
    """Answers to ``requests`` questions, ``at_once`` at a time; of every second the client goes away at its beginning.

    Raises AssertionError where an answer that was waited for is wrong.
    """

    # Who has left frees a place when the server notices; whoever finds none until then is refused, and asks again.
    patient = server._replace(client=server.client.with_options(max_retries=8))

    def one(number: int) -> str:
        left, right = 100 + number, 7 * number % 100
        question = f"What is {left} + {right}?"
        if number % 4 == 1:  # leaves a stream
            stream = patient.ask(question, stream=True, max_tokens=1000)
            for _chunk, _ in zip(stream, range(3), strict=False):
                pass
            stream.close()
            return "left"
        if number % 4 == 3:  # leaves while it waits for the whole
            with contextlib.suppress(openai.APITimeoutError, openai.InternalServerError):
                server.client.with_options(timeout=0.02).chat.completions.create(
                    model=server.model, messages=[{"role": "user", "content": question}], max_tokens=1000
                )
            return "left"
        content = str(patient.ask(question, max_tokens=1000).choices[0].message.content)
        assert content.endswith(f"= {left + right}"), (question, content)
        return content

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, range(requests)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    with server("--cache-gb", "0.05") as served:
        for number in range(asked.rounds):
            start = time.monotonic()
            answers = put_under_load(served, asked.requests, asked.at_once)
            left = answers.count("left")
            print(
                f"round {number + 1}: {asked.requests} requests, {asked.at_once} at a time, {left} left by their "
                f"clients, {time.monotonic() - start:.1f} s, {served.rss / 1e6:.1f} MB resident, of which "
                f"{served.metrics()['transformers_kt_kept_bytes'] / 1e6:.1f} MB are kept keys",
                flush=True,
            )


if __name__ == "__main__":
    main()
