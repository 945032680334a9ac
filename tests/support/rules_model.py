"""A small tree of torch modules, operations for it, and what tests of rules do with both again and again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from transformers_kt.errors import RuleError
from transformers_kt.families.tree import dotted, tree_of
from transformers_kt.rules import load_rules, make_plan


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.o_proj = nn.Linear(4, 4)


class SlidingAttention(Attention):
    pass


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attn": attention, "mlp": Mlp()}) for attention in (Attention(), SlidingAttention())
        )
        self.norm = nn.LayerNorm(4)


TREE = tree_of(Model())

OPERATIONS: Any = {
    family: (dotted(replaced),) for family, replaced in (("linear", nn.Linear), ("attention", Attention))
}

LINEARS = [f"layers.{layer}.{name}" for layer in (0, 1) for name in ("attn.q_proj", "attn.o_proj", "mlp.up")]


def plan_of(*rule_dicts: dict[str, Any], **options: Any) -> dict[str, str]:
    plan = make_plan(TREE, load_rules(list(rule_dicts), OPERATIONS), OPERATIONS, **options)
    return {entry.module: entry.op for entry in plan.entries}


def devices_of(*rule_dicts: dict[str, Any], **options: Any) -> dict[str, str]:
    plan = make_plan(TREE, load_rules(list(rule_dicts), OPERATIONS), OPERATIONS, **options)
    return {entry.module: entry.device for entry in plan.entries}


def rule(op: str, recursive: bool | None = None, **match: str) -> dict[str, Any]:
    found: dict[str, Any] = {"match": match, "replace": {"op": op}}
    if recursive is not None:
        found["recursive"] = recursive
    return found


def message_of(*rule_dicts: Any) -> str:
    with pytest.raises(RuleError) as caught:
        plan_of(*rule_dicts)
    return str(caught.value)


RULE_1 = "- match: {name: embed}\n  replace: torch\n\n"
"""YAML of a rule; what comes after it is rule 2, in line 4."""


def written(folder: Path, text: str) -> Path:
    """A file of rules with ``text`` in it."""
    path = folder / "my.yaml"
    path.write_text(text)
    return path
