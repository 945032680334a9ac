"""``transformers-kt cost``: what a request costs on this machine, from a load that is measured."""

from __future__ import annotations

import copy
import json
import math
import threading
import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import transformers_kt._C as _C
from transformers_kt.cli.bench import about_here, numbers_from, title_of
from transformers_kt.cli.cost_report import CostReport, Load, Machine, Peer
from transformers_kt.cli.models import MODEL_HELP, located
from transformers_kt.errors import InputError
from transformers_kt.planning.plan import plan

_POSITIVE = "a number above 0"


def cost(
    model: str,
    *,
    prompt: int = 512,
    answer: int = 128,
    at_once: Sequence[int] = (1, 2, 4, 8),
    requests: int = 2,
    machine: Machine | None = None,
    peers: Sequence[Peer] = (),
) -> CostReport:
    """Loads the model and lets ``at_once`` clients ask ``requests`` times each, batched as `serve` does it.

    Raises `InputError` for prompts and answers that are too long together, and what loading raises.
    """
    positions = plan(model, gpus=[], context=1 << 40).context
    if prompt + answer > positions:
        raise InputError(
            f"a prompt of {prompt} tokens and an answer of {answer} do not fit into the {positions} positions of this "
            "model. Take fewer: --prompt, --answer"
        )
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, kt_rules="auto")
    _measured(loaded, 1, min(prompt, 8), 2, 1)  # pages and buffers are there from now on
    loads = [_measured(loaded, clients, prompt, answer, requests) for clients in at_once]
    about = {**about_here(), "threads": str(_C.thread_count())}
    return CostReport(title_of(model), about, loads, machine, peers)


class _Stopwatch:
    """An `Observer` that notes when first tokens come."""

    def __init__(self) -> None:
        self.first: dict[int, float] = {}

    def token(self, request: Any, seconds: float) -> None:
        self.first.setdefault(id(request), seconds)

    def passed(self, sequences: int) -> None: ...

    def ended(self, request: Any, outcome: str) -> None: ...


def _measured(model: Any, clients: int, prompt: int, answer: int, requests: int) -> Load:
    import torch

    from transformers_kt.cli.timing import random_tokens
    from transformers_kt.integration.batching import Batcher, Limits, Request

    config = copy.deepcopy(model.generation_config)
    # Random tokens are answered by random ones, among which may be an end.
    config.update(do_sample=False, min_new_tokens=answer, max_new_tokens=answer)
    stopwatch = _Stopwatch()
    batcher = Batcher(model, Limits(max_batch=clients, max_waiting=0), stopwatch)
    times: list[tuple[float, float]] = []
    errors: list[BaseException] = []

    def client(number: int) -> None:
        try:
            for turn in range(requests):
                ids = torch.tensor([random_tokens(prompt, model.config.vocab_size, 1 + number * requests + turn)])
                request = Request(model, {"input_ids": ids}, config, None)
                batcher.submit(request)
                request.done.result()
                times.append((stopwatch.first[id(request)], request.last_token - request.arrived))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    first, whole = zip(*times, strict=True)
    return Load(clients, prompt, answer, time.perf_counter() - start, batcher.prompt_seconds, first, whole)


def machine_of(
    price: float | None, years: float | None, watts: float | None, per_kwh: float | None, per_hour: float | None
) -> Machine | None:
    """The machine that these prices tell of; None where none is given. Raises `InputError` for half of a pair."""
    pairs = ((price, years, "--machine-price", "--lifetime-years"), (watts, per_kwh, "--watts", "--price-per-kwh"))
    for one, other, name, other_name in pairs:
        if (one is None) != (other is None):
            given, wanted = (name, other_name) if other is None else (other_name, name)
            raise InputError(f"{given} says what a machine costs only together with {wanted}: give both")
    if per_hour is not None:
        if price is not None or watts is not None:
            raise InputError(
                "--price-per-hour is all that a machine costs; leave it out, or --machine-price, --lifetime-years, "
                "--watts and --price-per-kwh"
            )
        return Machine.rented(per_hour)
    if price is None or years is None:
        if watts is not None:
            raise InputError("--watts needs --machine-price and --lifetime-years: electricity is the smaller part")
        return None
    return Machine.bought(price, years, watts or 0.0, per_kwh or 0.0)


def peer_of(text: str) -> Peer:
    """Reads NAME=IN/OUT, prices of a million tokens. Raises `InputError` for anything else."""
    name, _, prices = text.rpartition("=")
    try:
        into, out = map(float, prices.split("/"))
    except ValueError:
        into = out = math.nan
    if not name or not (0 <= into < math.inf and 0 <= out < math.inf):
        raise InputError(
            f"--compare {text}: NAME=IN/OUT is accepted, the prices of a million tokens of prompts and of answers, "
            "such as somebody=0.55/2.19"
        )
    return Peer(name, into, out)


def _price(help_text: str) -> Any:
    def checked(value: float | None) -> float | None:
        if value is not None and not 0 < value < math.inf:
            raise typer.BadParameter(f"{value}; {_POSITIVE} is accepted")
        return value

    return typer.Option(help=help_text, callback=checked)


def cost_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    answer: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 128,
    at_once: Annotated[str, typer.Option(metavar="N,N", help="How many clients ask at once.")] = "1,2,4,8",
    requests: Annotated[int, typer.Option(min=1, help="How often each of them asks.")] = 2,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads; one for each core that may be used if not given.")
    ] = None,
    machine_price: Annotated[float | None, _price("What the machine cost; with --lifetime-years.")] = None,
    lifetime_years: Annotated[float | None, _price("How long it will be used.")] = None,
    watts: Annotated[float | None, _price("What it takes when busy; with --price-per-kwh.")] = None,
    price_per_kwh: Annotated[float | None, _price("Price of electricity.")] = None,
    price_per_hour: Annotated[float | None, _price("What it costs where it is rented.")] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=IN/OUT", help="Prices of somebody else for a million tokens of prompts and of answers."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure what requests to MODEL cost on this machine: how many an hour, how fast, and for how much.

    The model is loaded, and asked by more and more clients at once, whose requests are computed together as `serve`
    does it. With prices of the machine it says what a request and a million tokens cost. Every assumption is printed.
    """
    machine = machine_of(machine_price, lifetime_years, watts, price_per_kwh, price_per_hour)
    peers = [peer_of(text) for text in compare or ()]
    if peers and machine is None:
        raise InputError("--compare needs a price of this machine: --price-per-hour, or --machine-price and its years")
    clients = numbers_from(1)(at_once)
    if threads is not None:
        _C.set_thread_count(threads)
    report = cost(
        located(model), prompt=prompt, answer=answer, at_once=clients, requests=requests, machine=machine, peers=peers
    )
    print(json.dumps(report.to_dict(), indent=1) if as_json else report)
