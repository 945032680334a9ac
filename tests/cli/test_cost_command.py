"""``transformers-kt cost``: what it says follows from what was measured, and every assumption is said."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from transformers_kt.cli import build_app
from transformers_kt.cli.cost import machine_of, peer_of
from transformers_kt.cli.cost_report import CostReport, Costs, Load, Machine, Peer, percentile
from transformers_kt.errors import InputError

# Ten requests of 1,000 tokens and 101 in 100 s, of which 20 went into prompts.
LOAD = Load(
    2, 1000, 101, 100.0, 20.0, tuple(float(n) for n in range(1, 11)), tuple(float(n + 10) for n in range(1, 11))
)


def test_rates_follow_from_the_times() -> None:
    assert LOAD.requests_per_hour == 360
    assert LOAD.tokens_per_second == 10.1
    assert LOAD.tokens_per_second_each == 10
    assert [percentile(LOAD.first, share) for share in (0.5, 0.9, 0.95, 1)] == [5, 9, 10, 10]


def test_costs_are_shares_of_the_hour_and_add_up() -> None:
    costs = LOAD.costs(Machine.rented(36.0))
    assert costs == Costs(pytest.approx(0.1), pytest.approx(20.0), pytest.approx(0.8 / 1010 * 1e6))
    request = (1000 * costs.per_million_prompt + 101 * costs.per_million_answer) / 1e6
    assert request == pytest.approx(costs.per_request)
    assert Peer("somebody", 0.5, 2.0).per_request(1000, 100) == pytest.approx(0.0007)


def test_a_machine_that_was_bought_costs_its_price_over_its_life_and_its_power() -> None:
    assert Machine.bought(8766, 1).price_per_hour == pytest.approx(1.0)
    assert Machine.bought(8766, 2, 400, 0.25).price_per_hour == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("prices", "words"),
    [
        ((1000.0, None, None, None, None), "--machine-price says what a machine costs only together with --lifetime"),
        ((None, 3.0, None, None, None), "--lifetime-years says .* together with --machine-price"),
        ((1000.0, 3.0, 300.0, None, None), "--watts says .* together with --price-per-kwh"),
        ((None, None, 300.0, 0.3, None), "--watts needs --machine-price and --lifetime-years"),
        ((1000.0, 3.0, None, None, 0.5), "--price-per-hour is all that a machine costs"),
    ],
)
def test_half_of_a_price_is_refused(prices: tuple[float | None, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        machine_of(*prices)


@pytest.mark.parametrize("text", ["somebody", "=1/2", "a=1", "a=1/x", "a=-1/2", "a=1/inf", "a=nan/1"])
def test_prices_of_others_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="NAME=IN/OUT is accepted"):
        peer_of(text)


def test_a_name_may_have_an_equals_sign() -> None:
    assert peer_of("a=b=0.55/2.19") == Peer("a=b", 0.55, 2.19)


def test_every_assumption_is_printed() -> None:
    about = {"CPU": "a CPU", "threads": "2"}
    report = CostReport("model", about, [LOAD], Machine.bought(8766, 2, 400, 0.25), [Peer("somebody", 0.5, 2.0)])
    text = " ".join(str(report).split())
    for words in ("8766 and lasts 2 years", "400 W at 0.25 per kWh: 0.6 an hour", "a CPU, 2 threads", "busy all day"):
        assert words in text
    assert "somebody" in text
    assert "rooms are left out" not in str(CostReport("model", about, [LOAD], None, []))


def test_it_measures_loads_and_prices_them() -> None:
    args = ("--prompt", "40", "--answer", "10", "--at-once", "1,3", "--requests", "2", "--compare", "somebody=0.5/2")
    command = [
        sys.executable,
        "-m",
        "transformers_kt.cli",
        "cost",
        "tiny-r1",
        *args,
        "--price-per-hour",
        "0.5",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [load["at_once"] for load in report["loads"]] == [1, 3]
    for load in report["loads"]:
        assert len(load["whole"]) == 2 * load["at_once"]
        assert all(
            0 < first < whole < load["seconds"] for first, whole in zip(load["first"], load["whole"], strict=True)
        )
        assert 0 < load["prompt_seconds"] < load["seconds"]
        requests_per_hour = load["requests_per_hour"]
        assert load["costs"]["per_request"] == pytest.approx(0.5 / requests_per_hour)
    assert report["peers"][0]["per_request"] == pytest.approx(40e-6 * 0.5 + 10e-6 * 2)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ("--prompt", "2000", "--answer", "100"),
            "a prompt of 2000 tokens and an answer of 100 do not fit into the 2048 positions of this model. Take fewer",
        ),
        (("--compare", "somebody=1/2"), "--compare needs a price of this machine"),
        (("--price-per-hour", "-1"), "-1.0; a number above 0 is accepted"),
        (("--at-once", "0"), "numbers from 1 on"),
    ],
)
def test_what_cannot_be_measured_is_refused(args: tuple[str, ...], words: str) -> None:
    result = CliRunner().invoke(build_app(), ["cost", "tiny-r1", *args])
    assert result.exit_code != 0
    assert words in " ".join(f"{result.output} {result.exception}".replace("│", " ").split())
