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
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from transformers_kt.errors import KtError
from transformers_kt.families.registry import response_template
from transformers_kt.planning.request import (
    NAME_OPTIONS,
    SOURCE_OPTIONS,
    Call,
    Request,
    read_request,
    request_after,
    without,
)

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
        named = args or [options[key] for key in NAME_OPTIONS if key in options]
        request = read_request(named[0] if named else None, options)
        if request is None:
            if loader in _LOADERS_OF_MODELS:
                _loaders()  # a folder saved with our quantization_config is refused with our words
            try:
                return stock(cls, *args, **options)
            except (OSError, ValueError) as failure:
                request = _request_after(failure, loader, named, options)
                if request is None:
                    raise
        answer = getattr(_loaders(), loader)
        return answer(Call(stock, cls, args[1:], without(options, SOURCE_OPTIONS)), request)

    setattr(from_pretrained, WRAPPED, True)
    owner.from_pretrained = classmethod(from_pretrained)


def _request_after(failure: Exception, loader: str, named: Sequence[Any], options: Mapping[str, Any]) -> Request | None:
    """What a call that failed asks of us after all, if it does."""
    asked_while_loading = loader == "load_generation_config" and "_from_auto" in options  # it may be missing
    if isinstance(failure, KtError) or not named or loader == "refuse_media" or asked_while_loading:
        return None
    request = request_after(failure, named[0], options)
    if request is None or loader in _LOADERS_OF_MODELS:
        return request
    return replace(request, folder=None)  # what is not in the repository the GGUF has


def _loaders() -> ModuleType:
    from transformers_kt.integration import from_pretrained, quantizer

    quantizer.install()
    return from_pretrained


def _wrap_auto_models(module: Any) -> None:
    # Every Auto class has its own copy of from_pretrained.
    for auto_class in list(vars(module).values()):
        if isinstance(auto_class, type) and issubclass(auto_class, module._BaseAutoModelClass):
            wrap(auto_class, "load_auto_model")


def _answer_for_pipelines(module: Any) -> None:
    """``pipeline`` asks the hub about its model; of a GGUF on this machine we know the answers.

    Without a task it asks for that, and where PEFT is installed for an adapter.
    """
    _answer(module, "get_task", "text-generation")
    _answer(module, "find_adapter_config_file", None)


def _answer(module: Any, name: str, answer: Any) -> None:
    """Let the function ``name``, whose first argument is a model's name, give ``answer`` where the model is for us."""
    stock = getattr(module, name, None)
    if stock is None or hasattr(stock, WRAPPED):
        return

    @functools.wraps(stock)
    def answered(model: Any, *args: Any, **options: Any) -> Any:
        if read_request(model, {}) is not None:
            return answer
        try:
            return stock(model, *args, **options)
        except RuntimeError as failure:
            if request_after(failure, model, {}) is None:
                raise
            return answer

    setattr(answered, WRAPPED, True)
    setattr(module, name, answered)


def _separate_thoughts(module: Any) -> None:
    """Let ``transformers serve`` know the response templates of our families, where a tokenizer brings none.

    Not on the tokenizer: with one, pipelines would show special tokens in every text.
    """
    stock = module.get_response_template

    @functools.wraps(stock)
    def get_response_template(processor: Any, model: Any) -> Any:
        template = stock(processor, model)
        if template is not None or not hasattr(model, "kt_report"):
            return template
        return response_template(getattr(processor, "chat_template", None))

    module.get_response_template = get_response_template


_WRAPPERS: Mapping[str, Callable[[Any], None]] = {
    "transformers.pipelines": _answer_for_pipelines,
    "transformers.cli.serving.utils": _separate_thoughts,
    "transformers.modeling_utils": lambda module: wrap(module.PreTrainedModel, "load_model"),
    "transformers.models.auto.modeling_auto": _wrap_auto_models,
    "transformers.models.auto.configuration_auto": lambda module: wrap(module.AutoConfig, "load_config"),
    "transformers.models.auto.tokenization_auto": lambda module: wrap(module.AutoTokenizer, "load_tokenizer"),
    # The processor of a language model is its tokenizer.
    "transformers.models.auto.processing_auto": lambda module: wrap(module.AutoProcessor, "load_tokenizer"),
    "transformers.configuration_utils": lambda module: wrap(module.PreTrainedConfig, "load_config_of_class"),
    "transformers.tokenization_utils_base": lambda module: wrap(
        module.PreTrainedTokenizerBase, "load_tokenizer_of_class"
    ),
    "transformers.generation.configuration_utils": lambda module: wrap(
        module.GenerationConfig, "load_generation_config"
    ),
    "transformers.models.auto.image_processing_auto": lambda module: wrap(module.AutoImageProcessor, "refuse_media"),
    "transformers.models.auto.video_processing_auto": lambda module: wrap(module.AutoVideoProcessor, "refuse_media"),
    "transformers.models.auto.feature_extraction_auto": lambda module: wrap(
        module.AutoFeatureExtractor, "refuse_media"
    ),
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
