"""The trees of transformers' models from their configs alone: `tree_of` without torch, in a millisecond.

Loading never looks here; it plans on the model that transformers makes. Tests hold both equal. What no test has seen,
a transformers whose files are others or a config with modules of other kinds, has no outline: then planning, too, has
transformers make the model, which costs seconds and changes nothing else.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers_kt.families.tree import TORCH_CLASSES, ModelTree, ModuleNode

MODULE = (TORCH_CLASSES["Module"], "builtins.object")
MODEL = (
    "transformers.modeling_utils.PreTrainedModel",
    TORCH_CLASSES["Module"],
    "transformers.modeling_utils.EmbeddingAccessMixin",
    "transformers.modeling_utils.ModuleUtilsMixin",
    "transformers.utils.hub.PushToHubMixin",
    "transformers.integrations.peft.PeftAdapterMixin",
    "transformers.distributed.mixin.DistributedMixin",
)
GENERATION = (
    "transformers.generation.utils.GenerationMixin",
    "transformers.generation.continuous_batching.continuous_api.ContinuousMixin",
)
LAYER = "transformers.modeling_layers.GradientCheckpointingLayer"
"""What modules, models, models that generate and decoder layers derive from, in Python's order."""

LINEAR = ModuleNode((TORCH_CLASSES["Linear"], *MODULE), parameters=("weight",))
EMBEDDING = ModuleNode((TORCH_CLASSES["Embedding"], *MODULE), parameters=("weight",))
SILU = ModuleNode(("transformers.activations.SiLUActivation", *MODULE))


@dataclass(frozen=True, slots=True)
class Outline:
    """The trees of a family. ``make`` gives that of a config, None for modules of kinds that it does not know.

    ``seen`` are, by model type, the `digest` of every transformers that the tests of outlines have passed with.
    ``class_names`` gives the dotted names of all classes in its trees.
    """

    make: Callable[[Any], ModelTree | None]
    seen: Mapping[str, tuple[str, ...]]
    class_names: Callable[[], frozenset[str]]

    def tree(self, config: Any) -> ModelTree | None:
        """What ``tree_of(AutoModelForCausalLM.from_config(config))`` gives; None where that is not known for certain.

        ``config`` is a `PlainConfig` or transformers' own.
        """
        tree = self.make(config)
        return tree if tree is not None and digest(config.model_type) in self.seen[config.model_type] else None

    def knows_class(self, name: str) -> bool:
        """Whether rules can match the class of that dotted name on its trees: one of theirs, or of torch.nn."""
        return name in self.class_names() or name.startswith("torch.nn.")


def digest(model_type: str) -> str | None:
    """Of the files in which the installed transformers defines config and model; None where they are not as files."""
    package = importlib.util.find_spec("transformers")  # finds, does not import
    if package is None or package.origin is None:
        return None
    folder = Path(package.origin).parent / "models" / model_type
    try:
        files = [(folder / f"{kind}_{model_type}.py").read_bytes() for kind in ("configuration", "modeling")]
    except OSError:
        return None
    return hashlib.sha256(b"".join(files)).hexdigest()
