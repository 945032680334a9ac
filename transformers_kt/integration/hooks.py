"""Teaches ``from_pretrained`` our arguments when transformers' modules are there, without importing any of them.

Importing models costs seconds and hundreds of megabytes, which a plan does not need. So classes are wrapped at once if
their module is imported already, else right after its import: a finder at the front of ``sys.meta_path`` lets the
other finders find the module, and adds our step to its execution. A wrapped function imports what it needs when it is
called with our arguments.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from transformers_kt.planning.request import SOURCE_OPTIONS, Call, read_request, without

WRAPPED = "_wrapped_by_transformers_kt"
_LOADERS_OF_MODELS = ("load_model", "load_auto_model")


def install() -> None:
    """Wrap ``from_pretrained`` of models, configs and tokenizers, now or when they come. A second call does nothing."""
    if not any(repr(type(finder)) == repr(_Finder) for finder in sys.meta_path):  # not again after a reload
        sys.meta_path.insert(0, _Finder())
    for name, wrap_classes in _WRAPPERS.items():
        if name in sys.modules:
            wrap_classes(importlib.import_module(name))  # waits while another thread imports it


def wrap(owner: Any, loader: str) -> None:
    """Let the function ``loader`` of our `from_pretrained` answer the calls of ``owner``'s that have our arguments."""
    bound = vars(owner).get("from_pretrained")
    if bound is None or hasattr(bound.__func__, WRAPPED):
        return
    stock = bound.__func__

    @functools.wraps(stock)
    def from_pretrained(cls: type, *args: Any, **options: Any) -> Any:
        request = read_request(args[0] if args else options.get("pretrained_model_name_or_path"), options)
        if request is None:
            if loader in _LOADERS_OF_MODELS:
                _loaders()  # a folder saved with our quantization_config is refused with our words
            return stock(cls, *args, **options)
        answer = getattr(_loaders(), loader)
        return answer(Call(stock, cls, args[1:], without(options, SOURCE_OPTIONS)), request)

    setattr(from_pretrained, WRAPPED, True)
    owner.from_pretrained = classmethod(from_pretrained)


def _loaders() -> ModuleType:
    from transformers_kt.integration import from_pretrained, quantizer

    quantizer.install()
    return from_pretrained


def _wrap_auto_models(module: Any) -> None:
    # Every Auto class has its own copy of from_pretrained.
    for auto_class in list(vars(module).values()):
        if isinstance(auto_class, type) and issubclass(auto_class, module._BaseAutoModelClass):
            wrap(auto_class, "load_auto_model")


def _skip_adapter_search(module: Any) -> None:
    """Where PEFT is installed, ``pipeline`` looks for an adapter beside its model, and takes a file for a hub id."""
    stock = getattr(module, "find_adapter_config_file", None)
    if stock is None or hasattr(stock, WRAPPED):
        return

    @functools.wraps(stock)
    def find_adapter_config_file(model_id: Any, *args: Any, **options: Any) -> Any:
        return None if read_request(model_id, {}) is not None else stock(model_id, *args, **options)

    setattr(find_adapter_config_file, WRAPPED, True)
    module.find_adapter_config_file = find_adapter_config_file


_WRAPPERS: Mapping[str, Callable[[Any], None]] = {
    "transformers.pipelines": _skip_adapter_search,
    "transformers.modeling_utils": lambda module: wrap(module.PreTrainedModel, "load_model"),
    "transformers.models.auto.modeling_auto": _wrap_auto_models,
    "transformers.models.auto.configuration_auto": lambda module: wrap(module.AutoConfig, "load_config"),
    "transformers.models.auto.tokenization_auto": lambda module: wrap(module.AutoTokenizer, "load_tokenizer"),
}
"""Module of transformers -> what wraps its classes or functions."""


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what the finders behind it find. Reloading a module passes here too."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        wrap_classes = _WRAPPERS.get(fullname)
        if wrap_classes is None:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            # In the loader that is there, for inspect and importlib.resources look at its type and its other methods.
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if module.__name__ == fullname:  # in a zip all modules have one loader
                    wrap_classes(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
