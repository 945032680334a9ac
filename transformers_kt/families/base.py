"""What a family of models is, as data. Everything that differs between families is a field of `Family`.

``config`` stands for transformers' config of a model, or a `PlainConfig` with the same names. Only a family knows
these names; everybody else asks for `Dims`, `MlaDims` and `Router`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from transformers_kt.families.outline import Outline
from transformers_kt.families.tree import ModuleNode
from transformers_kt.gguf.facts import Facts
from transformers_kt.gguf.tokenizer_rules import TokenizerRules


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """A place in the model that one GGUF tensor fills.

    ``role`` is what the tensor is to its module: the name of its parameter or buffer, or one of the roles of
    `Family.merges`: "gate" | "up" | "down" (of a stack of experts), "k_b" | "v_b" (the two halves of
    ``kv_b_proj.weight``, the first one transposed). ``shape`` is row-major, as torch has it, and follows from the
    config alone.
    """

    gguf_name: str
    module: str
    role: str
    shape: tuple[int, ...]
    optional: bool = False


class TensorRow(NamedTuple):
    """A `TensorSlot` of every layer, whatever the sizes of the model."""

    gguf_name: str  # below "blk.N." for a layer's tensors
    module: str  # below "model.layers.N." for a layer's tensors
    role: str
    shape: tuple[str, ...]  # names of `Family.sizes`
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Dims:
    """What planning asks of any model. ``experts`` of each layer that has some, of which ``top_k`` compute a token.

    ``cache_values`` is what a token adds to the KV cache of a layer. ``work_values`` are the activations of one token
    that are alive at once in a layer, all counted, whatever could share its place.
    """

    layers: int
    vocab: int
    context: int
    experts: int
    top_k: int
    cache_values: int
    work_values: int


@dataclass(frozen=True, slots=True)
class MlaDims:
    """Multi-head latent attention: widths of one head's key without and with rotation, of its value, of the latent."""

    hidden: int
    heads: int
    nope: int
    rope: int
    value: int
    latent: int


@dataclass(frozen=True, slots=True)
class Router:
    """How experts are chosen: the ``top_k`` best of the ``top_groups`` best groups, by sigmoid or softmax."""

    sigmoid: bool
    groups: int
    top_groups: int
    top_k: int
    normalize: bool
    scale: float


class Example(NamedTuple):
    """A published file, by what it takes: bytes of memory with 4,096 tokens of context, and read for each token."""

    memory: int
    read_per_token: int


class Merge(NamedTuple):
    """A parameter of a stock module that GGUF holds under ``roles``; ``join`` makes its float32 values of theirs."""

    roles: tuple[str, ...]
    join: Callable[..., npt.NDArray[np.float32]]


def _gate_up(gate: npt.NDArray[np.float32], up: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(experts, 2 * intermediate, hidden) of two (experts, intermediate, hidden)."""
    return np.concatenate((gate, up), axis=1)


def _unchanged(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return values


class ResponseTemplate(NamedTuple):
    """``template``, as tokenizers of transformers have it, for a chat template in which all ``markers`` occur."""

    markers: tuple[str, ...]
    template: Mapping[str, Any]


EXPERT_MERGES: Mapping[str, Merge] = {
    "gate_up_proj": Merge(("gate", "up"), _gate_up),
    "down_proj": Merge(("down",), _unchanged),
}
"""Those of the experts of every MoE model of transformers."""

Limit = Callable[[ModuleNode, Any], "str | None"]
"""Why an operation cannot stand for this module of a config, or None."""


@dataclass(frozen=True, slots=True)
class PlainConfigs:
    """What a config.json of the family may hold so that planning needs no config class of transformers.

    ``defaults`` are those of the config classes, by model type and name; None where a config without the value is none
    to plan with. ``may_be_none`` are the names whose value may be null. A config that states one of ``other_names``, or
    whose values are ``refused``, is left to transformers.
    """

    defaults: Mapping[str, Mapping[str, Any]]
    may_be_none: tuple[str, ...] = ()
    other_names: tuple[str, ...] = ()
    refused: Callable[[str, Mapping[str, Any]], bool] = lambda model_type, values: False


@dataclass(frozen=True, slots=True)
class Family:
    """Models that have the same tensors and the same modules.

    ``about`` says in a few words which models these are. ``architectures`` are values of general.architecture,
    ``model_types`` those of the ``model_type`` of configs, which transformers has classes for. ``aliases`` are values
    that it has none for, with the one that computes the same; ``language_parts`` those of models that have more parts,
    with the key of the language model's config there and its ``model_type`` where that does not say it.

    ``stock_classes`` are the dotted names of transformers' classes that an operation can stand for, by operation
    ("experts", "attention", ...), and those that are fused ("decoder_layer", "base_model"). What it lacks stays as
    transformers has it. ``limits`` are the family's own to an operation.

    ``layer_rows`` gives the tensors of each layer in the order of the forward pass. The names in the checkpoint, its
    second argument, only decide between spellings. ``unread`` are names of a layer's tensors that a checkpoint may
    hold beside those. ``zero_where_absent`` are buffers that files leave out where they would be zero.

    ``keys_from`` is the tensor of a layer from which the keys in the KV cache come: the cache lies where it does.
    ``read_by_others`` are names of modules whose weights the code of another module reads, so that they stay
    transformers'. ``examples`` are files to tell a machine by.
    """

    name: str
    about: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    dims: Callable[[Any], Dims]
    sizes: Callable[[Any], Mapping[str, int]]
    layer_rows: Callable[[Any, Collection[str]], Sequence[Sequence[TensorRow]]]
    config_values: Callable[[Facts], dict[str, Any]]
    stock_classes: Mapping[str, tuple[str, ...]]
    keys_from: str
    aliases: Mapping[str, str] = field(default_factory=dict)
    language_parts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    limits: Mapping[str, tuple[Limit, ...]] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    merges: Mapping[str, Merge] = field(default_factory=lambda: EXPERT_MERGES)
    zero_where_absent: tuple[str, ...] = ()
    read_by_others: tuple[str, ...] = ()
    mla: Callable[[Any], MlaDims] | None = None
    router: Callable[[Any], Router] | None = None
    tokenizers: Mapping[str, TokenizerRules] = field(default_factory=dict)
    examples: Mapping[str, Example] = field(default_factory=dict)
    responses: tuple[ResponseTemplate, ...] = ()
    plain: PlainConfigs | None = None
    outline: Outline | None = None

    def parameter_of(self, role: str) -> str:
        """The parameter or buffer of the stock module that a tensor of ``role`` fills, alone or with others."""
        return next((name for name, merge in self.merges.items() if role in merge.roles), role)
