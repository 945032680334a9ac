"""Config, generation config and tokenizer of a model from its GGUF alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers_kt.errors import GgufFormatError
from transformers_kt.families.registry import families, family_in
from transformers_kt.gguf.checkpoint import Checkpoint
from transformers_kt.gguf.facts import Facts
from transformers_kt.gguf.generation import generation_options, sampling_notes
from transformers_kt.gguf.reader import GgufFile
from transformers_kt.gguf.tokenizer_rules import TokenizerRules

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast


def config_values(source: Checkpoint | GgufFile | Mapping[str, Any]) -> dict[str, Any]:
    """What `config_from_gguf` states, as a config.json would have it, without transformers. Raises as that does, but
    not for what transformers alone refuses."""
    facts = Facts(source)
    return family_in(facts).config_values(facts)


def notes_from_gguf(source: Checkpoint | GgufFile | Mapping[str, Any]) -> tuple[str, ...]:
    """What `config_from_gguf` and `generation_config_from_gguf` take for granted of ``source`` or leave out, a sentence
    each. Raises as `config_values` does."""
    facts = Facts(source)
    family_in(facts).config_values(facts)
    return (*facts.notes(), *sampling_notes(facts))


def config_from_gguf(source: Checkpoint | GgufFile | Mapping[str, Any]) -> PreTrainedConfig:
    """The config of the model in ``source``. Metadata suffice; tensors, where given, decide what they leave open.

    Raises `UnsupportedModelError` for an unknown architecture or a feature that transformers' models lack,
    `GgufFormatError` for metadata that is missing or makes no sense.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    values = config_values(source)
    config_class = CONFIG_MAPPING[values.pop("model_type")]
    try:
        config: PreTrainedConfig = config_class(**values)
    except StrictDataclassError as error:
        raise GgufFormatError(f"{Facts(source).name}: the metadata makes no valid config: {error}") from error
    return config


def generation_config_from_gguf(source: Checkpoint | GgufFile | Mapping[str, Any]) -> GenerationConfig:
    """The token ids that start, end and pad generation, and how to sample where the file says so.

    Every id that ends a turn is an end. Raises as `transformers_kt.gguf.generation.generation_options` does.
    """
    from transformers import GenerationConfig

    facts = Facts(source)
    family_in(facts)
    return GenerationConfig(**generation_options(facts))


def tokenizer_from_gguf(source: Checkpoint | GgufFile | Mapping[str, Any], **options: Any) -> PreTrainedTokenizerFast:
    """The tokenizer that ``source`` describes, with its chat template; ``options`` override what it says.

    A file may name any tokenizer that some family has: they are named apart from architectures. Raises as
    `transformers_kt.gguf.tokenizer.build_tokenizer` does.
    """
    from transformers_kt.gguf.tokenizer import build_tokenizer

    return build_tokenizer(source, _tokenizer_rules(), **options)


def require_tokenizer(source: Checkpoint | GgufFile | Mapping[str, Any]) -> None:
    """Raise what `tokenizer_from_gguf` would raise, but for merges that do not fit, without transformers."""
    from transformers_kt.gguf.tokenizer import require_vocabulary

    require_vocabulary(source, _tokenizer_rules())


def _tokenizer_rules() -> dict[str, TokenizerRules]:
    return {name: rules for family in families() for name, rules in family.tokenizers.items()}
