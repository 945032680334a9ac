"""A model as a tree of names: what rules match and plans speak of, without the modules themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

TORCH_CLASSES: Mapping[str, str] = {
    "Embedding": "torch.nn.modules.sparse.Embedding",
    "Linear": "torch.nn.modules.linear.Linear",
    "Module": "torch.nn.modules.module.Module",
    "ModuleList": "torch.nn.modules.container.ModuleList",
}
"""The classes of torch.nn in the models of transformers -> where torch defines them."""

_BASE = "model"


@dataclass(frozen=True, slots=True)
class ModuleNode:
    """One module. ``classes`` are the dotted names of its class and of all that derives from, in Python's order.

    ``parameters`` and ``buffers`` name those that it owns itself, ``unsaved`` those of the buffers that no checkpoint
    holds. Equal modules may be one node.
    """

    classes: tuple[str, ...]
    children: Mapping[str, ModuleNode] = field(default_factory=lambda: MappingProxyType({}))
    parameters: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    unsaved: tuple[str, ...] = ()

    @property
    def class_name(self) -> str:
        return self.classes[0]

    @property
    def owns_tensors(self) -> bool:
        return bool(self.parameters or self.buffers)

    @property
    def holds_tensors(self) -> bool:
        return self.owns_tensors or any(child.holds_tensors for child in self.children.values())

    @property
    def saved(self) -> Iterator[str]:
        """Names of the tensors that a checkpoint of the model has for this module."""
        yield from self.parameters
        yield from (name for name in self.buffers if name not in self.unsaved)


@dataclass(frozen=True, slots=True)
class ModelTree:
    """A whole model. ``is_base``: it has no head, as AutoModel gives it."""

    root: ModuleNode
    is_base: bool = False

    def modules(self) -> Iterator[tuple[str, ModuleNode]]:
        """Path and node of every module, outer before inner, in torch's order. The root's path is empty."""
        return _below("", self.root)

    def at(self, path: str) -> ModuleNode:
        """The module at ``path``, which must be there."""
        node = self.root
        for name in filter(None, path.split(".")):
            node = node.children[name]
        return node


def tree_of(model: nn.Module) -> ModelTree:
    """The tree of a real model; the meta device will do."""
    is_base = getattr(model, "base_model_prefix", None) == _BASE and getattr(model, "base_model", None) is model
    return ModelTree(node_of(model), is_base)


def node_of(module: nn.Module) -> ModuleNode:
    """``module`` with all in it."""
    return ModuleNode(
        tuple(map(dotted, type(module).__mro__)),
        {name: node_of(child) for name, child in module.named_children()},
        tuple(name for name, _ in module.named_parameters(recurse=False)),
        tuple(name for name, _ in module.named_buffers(recurse=False)),
        tuple(sorted(module._non_persistent_buffers_set)),
    )


def dotted(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _below(path: str, node: ModuleNode) -> Iterator[tuple[str, ModuleNode]]:
    yield path, node
    for name, child in node.children.items():
        yield from _below(f"{path}.{name}" if path else name, child)
