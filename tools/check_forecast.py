"""Whether models decode as fast as `transformers-kt doctor` forecasts: within 20% of what `bench` measures.

    python tools/check_forecast.py tiny-r1 v2-lite.gguf --rounds 3

The two commands alternate, each in a process of its own, as users run them; the median of the rounds' ratios counts.
Run it while nothing else runs: what other processes take from one of the two is no error of the forecast.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from statistics import median
from typing import Any

from transformers_kt.cli.models import NOT_ALL_WELL

WITHIN = 0.2


def said(*command: str) -> Any:
    """The JSON of a command; `doctor` may end with advice."""
    whole = [sys.executable, "-m", "transformers_kt.cli", *command, "--json"]
    done = subprocess.run(whole, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if done.returncode not in (0, NOT_ALL_WELL):
        raise SystemExit(f"{' '.join(whole)} ended with {done.returncode}")
    return json.loads(done.stdout)


def ratio(model: str) -> float:
    """Measured over expected tokens per second of decoding."""
    expected = said("doctor", model)["model"]["expected"]
    figures = said("bench", model, "--prompt", "8", "--depth", "0", "--rounds", "3")["figures"]
    (measured,) = (figure["median"] for figure in figures if figure["prompt"] is None)
    print(
        f"{model}: {expected:,.1f} tokens/s expected, {measured:,.1f} measured: {measured / expected:.2f}", flush=True
    )
    return float(measured / expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found = {model: median(ratio(model) for _ in range(args.rounds)) for model in args.models}
    for model, share in found.items():
        print(f"{model}: {share:.0%} of the forecast")
    if missed := [model for model, share in found.items() if abs(share - 1) > WITHIN]:
        raise SystemExit(f"more than {WITHIN:.0%} off: {', '.join(missed)}")


if __name__ == "__main__":
    main()
