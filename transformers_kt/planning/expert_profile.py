"""How often tokens chose each expert: what `transformers-kt profile` writes and ``kt_expert_profile=`` reads.

A file is JSON: ``format`` and ``version`` as below, the ``model`` it was made with, the number of ``tokens`` counted,
``top_k`` experts for each, and ``layers``: the number of a decoder layer to how often each of its experts was chosen.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import Self

from transformers_kt.errors import InputError
from transformers_kt.text import brief, listed

FORMAT, VERSION = "transformers-kt expert profile", 1
_AGAIN = "transformers-kt profile MODEL writes one"


@dataclass(frozen=True, slots=True)
class ExpertProfile:
    """``counts``: decoder layer -> choices of each of its experts, ``tokens`` times ``top_k`` in all."""

    model: str
    tokens: int
    top_k: int
    counts: Mapping[int, tuple[int, ...]]

    def busiest(self, layer: int) -> list[int]:
        """The experts of ``layer``, most chosen first; of equal ones the lower first."""
        counts = self.counts[layer]
        return sorted(range(len(counts)), key=lambda expert: -counts[expert])

    def share(self, layer: int, experts: int) -> float:
        """Of the choices in ``layer``, those that its busiest ``experts`` took: 0 to 1."""
        counts = sorted(self.counts[layer], reverse=True)
        return sum(counts[:experts]) / sum(counts)

    def require_fits(self, model: str, counts: Mapping[int, int]) -> None:
        """Raise `InputError` unless it is of a model with the MoE layers of ``counts`` and so many experts in each."""
        found = {layer: len(choices) for layer, choices in self.counts.items()}
        if found == dict(counts):
            return
        raise InputError(
            f"kt_expert_profile: the profile was made with {self.model}, which has {_described(found)}; {model} has "
            f"{_described(counts)}. Take a profile of this model: {_AGAIN}"
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        layers = {str(layer): list(counts) for layer, counts in sorted(self.counts.items())}
        facts = {"format": FORMAT, "version": VERSION, "model": self.model, "tokens": self.tokens, "top_k": self.top_k}
        # A layer to a line: the file is read by people too.
        lines = ",\n".join(f"  {json.dumps(layer)}: {json.dumps(counts)}" for layer, counts in layers.items())
        head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in facts.items())
        Path(path).write_text(f'{{\n{head} "layers": {{\n{lines}\n }}\n}}\n', encoding="utf-8")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Raises `InputError` for what is no such file, OSError where it cannot be read."""
        where = f"kt_expert_profile={os.fspath(path)}"
        try:
            said = json.loads(Path(path).read_bytes())
        except ValueError as error:
            raise InputError(f"{where} is no JSON: {error}. {_AGAIN}") from None
        if not isinstance(said, dict) or said.get("format") != FORMAT:
            raise InputError(f'{where}: its "format" is not {FORMAT!r}. {_AGAIN}')
        if said.get("version") != VERSION:
            raise InputError(f"{where} is of version {brief(said.get('version'))}; {VERSION} is accepted. {_AGAIN}")
        for key in ("tokens", "top_k"):
            if not _is_count(said.get(key)) or said[key] == 0:
                raise InputError(f"{where}: {key!r} is {brief(said.get(key))}; a whole number from 1 is accepted")
        layers = said.get("layers")
        if not isinstance(layers, dict) or not layers:
            raise InputError(f"{where}: 'layers' is {brief(layers)}; layer numbers with a list of counts are accepted")
        counts = {}
        for layer, choices in layers.items():
            if not (layer.isascii() and layer.isdecimal()) or not _are_counts(choices):
                raise InputError(
                    f"{where}: layer {brief(layer)} is {brief(choices)}; a layer number with a list of whole numbers "
                    "from 0 is accepted"
                )
            if sum(choices) != said["tokens"] * said["top_k"]:
                raise InputError(
                    f"{where}: the counts of layer {layer} sum to {sum(choices)}, not to {said['tokens']} tokens times "
                    f"{said['top_k']} choices. The file was changed; {_AGAIN}"
                )
            counts[int(layer)] = tuple(choices)
        return cls(str(said.get("model")), said["tokens"], said["top_k"], counts)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(map(_is_count, values))


def _described(experts: Mapping[int, int]) -> str:
    numbers = sorted(set(experts.values()))
    return f"{len(experts)} layers of {listed(map(str, numbers))} routed experts"
