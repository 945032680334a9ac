"""What answers cost: arithmetic over measured loads, and how it is shown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers_kt.planning.tables import new_table, rendered

if TYPE_CHECKING:
    from rich.table import Table

_HOURS_PER_YEAR = 8766.0
_SLOW = 0.95
"""The share of requests that are faster than the slow ones shown."""


class Machine(NamedTuple):
    """What an hour of it costs, in whatever currency the prices are."""

    price_per_hour: float
    assumption: str

    @classmethod
    def rented(cls, price_per_hour: float) -> Machine:
        return cls(price_per_hour, f"the machine costs {price_per_hour:g} an hour")

    @classmethod
    def bought(cls, price: float, years: float, watts: float = 0.0, price_per_kwh: float = 0.0) -> Machine:
        power = watts / 1000 * price_per_kwh
        total = price / (years * _HOURS_PER_YEAR) + power
        said = f"the machine costs {price:g} and lasts {years:g} years of {_HOURS_PER_YEAR:,.0f} hours"
        said += f", and takes {watts:g} W at {price_per_kwh:g} per kWh" if power else ", electricity left out"
        return cls(total, f"{said}: {total:.4g} an hour")


class Peer(NamedTuple):
    """Prices of somebody else, for a million tokens."""

    name: str
    per_million_prompt: float
    per_million_answer: float

    def per_request(self, prompt: int, answer: int) -> float:
        return (prompt * self.per_million_prompt + answer * self.per_million_answer) / 1e6


@dataclass(frozen=True, slots=True)
class Load:
    """What was measured with ``at_once`` clients, each of which asks again once it is answered.

    ``first`` and ``whole`` are the seconds from each request to its first and its last token, ``seconds`` those from
    the first request to the last token of all, of which ``prompt_seconds`` went into prompts.
    """

    at_once: int
    prompt: int
    answer: int
    seconds: float
    prompt_seconds: float
    first: tuple[float, ...]
    whole: tuple[float, ...]

    @property
    def requests_per_hour(self) -> float:
        return 3600 * len(self.whole) / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all answers together, the time for prompts included."""
        return len(self.whole) * self.answer / self.seconds

    @property
    def tokens_per_second_each(self) -> float:
        """What a user sees, after the first token."""
        return statistics.median((self.answer - 1) / (w - f) for f, w in zip(self.first, self.whole, strict=True))

    def costs(self, machine: Machine) -> Costs:
        requests, price = len(self.whole), machine.price_per_hour / 3600
        answering = self.seconds - self.prompt_seconds
        return Costs(
            price * self.seconds / requests,
            price * self.prompt_seconds / (requests * self.prompt) * 1e6,
            price * answering / (requests * self.answer) * 1e6,
        )


class Costs(NamedTuple):
    per_request: float
    per_million_prompt: float
    per_million_answer: float


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of ``values`` that ``share`` of them do not pass."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


@dataclass(frozen=True, slots=True)
class CostReport:
    """``about`` says where the figures are from; without a ``machine`` there are speeds alone."""

    title: str
    about: Mapping[str, str]
    loads: Sequence[Load]
    machine: Machine | None
    peers: Sequence[Peer]

    def to_dict(self) -> dict[str, Any]:
        """Plain values all through, fit for JSON."""
        return {
            "title": self.title,
            "about": dict(self.about),
            "assumptions": list(self._assumptions()),
            "price_per_hour": None if self.machine is None else self.machine.price_per_hour,
            "loads": [self._load_dict(load) for load in self.loads],
            "peers": [
                {**peer._asdict(), "per_request": peer.per_request(self._prompt, self._answer)} for peer in self.peers
            ],
        }

    def _load_dict(self, load: Load) -> dict[str, Any]:
        costs = None if self.machine is None else load.costs(self.machine)._asdict()
        rates = ("requests_per_hour", "tokens_per_second", "tokens_per_second_each")
        latency = {
            f"{name}_s": {"median": statistics.median(values), "p95": percentile(values, _SLOW)}
            for name, values in (("first_token", load.first), ("whole", load.whole))
        }
        return {**asdict(load), **{rate: getattr(load, rate) for rate in rates}, **latency, "costs": costs}

    def __str__(self) -> str:
        tables = [self._speeds()] if self.machine is None else [self._speeds(), self._costs(self.machine)]
        assumptions = "\n".join(("Assumed:", *(f"- {each}" for each in self._assumptions())))
        return rendered(self.title, *tables, assumptions)

    @property
    def _prompt(self) -> int:
        return self.loads[0].prompt

    @property
    def _answer(self) -> int:
        return self.loads[0].answer

    def _assumptions(self) -> Iterator[str]:
        yield (
            f"a request has a prompt of {self._prompt:,} tokens, of which nothing is used again, and an answer of "
            f"{self._answer:,}"
        )
        yield "clients are that many at once all the time, and ask again as soon as they are answered"
        yield f"measured in this process on {self.about['CPU']}, {self.about['threads']} threads; HTTP is not counted"
        if self.machine is not None:
            yield f"{self.machine.assumption}; it is busy all day and night, with nothing else"
            yield "a prompt costs the time in which it is read, an answer the rest"
            yield "money is in the currency of the prices given; people, network and rooms are left out"

    def _speeds(self) -> Table:
        columns = ["requests\nat once", "requests\nan hour", "tokens/s\nin all", "tokens/s\neach"]
        columns += ["first token\nmedian", "95%", "whole\nmedian", "95%"]
        table = new_table(*columns, numbers=columns)
        table.show_footer = False
        for load in self.loads:
            table.add_row(
                f"{load.at_once}",
                f"{load.requests_per_hour:,.0f}",
                f"{load.tokens_per_second:,.1f}",
                f"{load.tokens_per_second_each:,.1f}",
                *(_seconds(value) for values in (load.first, load.whole)
                  for value in (statistics.median(values), percentile(values, _SLOW))),
            )  # fmt: skip
        return table

    def _costs(self, machine: Machine) -> Table:
        columns = ("", "a thousand\nrequests", "a million tokens\nof prompts", "of answers")
        table = new_table(*columns, numbers=columns[1:])
        table.show_footer = False
        for load in self.loads:
            table.add_row(f"here, {load.at_once} at once", *_priced(*load.costs(machine)))
        for peer in self.peers:
            per_request = peer.per_request(self._prompt, self._answer)
            table.add_row(peer.name, *_priced(per_request, peer.per_million_prompt, peer.per_million_answer))
        return table


def _priced(per_request: float, *per_million: float) -> Iterator[str]:
    return (f"{price:#.3g}" for price in (1000 * per_request, *per_million))


def _seconds(value: float) -> str:
    return f"{value:.3g} s"
