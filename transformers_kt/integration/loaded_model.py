"""What differs between a model filled from a GGUF and the stock model of its class."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.cache_utils import Cache

from transformers_kt.errors import InputError, UnsupportedOperationError
from transformers_kt.integration.loading import KtReport
from transformers_kt.integration.replaced_classes import ReplacedClasses
from transformers_kt.integration.torch_threads import one_torch_thread
from transformers_kt.modules.base import NotPickledAlone
from transformers_kt.modules.fused.cache_argument import CACHE_ARGUMENT
from transformers_kt.modules.fused.latent_cache import expect_length
from transformers_kt.rules import TORCH

if TYPE_CHECKING:
    from transformers_kt.planning.request import Call, Request

OBSERVABLE = "observable"
"""The bundled rules that keep every module under its own name."""

logger = logging.getLogger(__name__)


def refuse_training(what: str) -> NoReturn:
    raise UnsupportedOperationError(
        f"{what} is not possible: the weights are quantized GGUF blocks, whose kernels compute no gradients. To "
        "evaluate, where Trainer asks for training first, call model(input_ids, labels=...) under torch.no_grad(). "
        "Train the original checkpoint with stock transformers and convert the result to GGUF"
    )


def _refuse_saving(model: Any, what: str) -> NoReturn:
    raise UnsupportedOperationError(
        f"{what} is not possible: the weights are the blocks of {model.config.quantization_config.gguf_path}, which "
        "safetensors files of transformers cannot hold. Copy that file; model.config and the tokenizer can be saved"
    )


@contextlib.contextmanager
def _way_out_for_adapters() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        raise UnsupportedOperationError(
            f"{error} Layers of this model are computed whole: their linear layers are there with "
            f'kt_rules="{OBSERVABLE}"'
        ) from error


class Reload(NamedTuple):
    """How a model is loaded once more, as its pickle does in another process: the call, with plain values only."""

    module: str
    cls: str
    args: tuple[Any, ...]
    options: dict[str, Any]

    @classmethod
    def of(cls, call: Call, request: Request) -> Reload:
        source = {"gguf_path": request.gguf, "kt_rules": request.rules, **request.kt_options, **request.hub}
        kept = {name: value for name, value in call.options.items() if name != "output_loading_info"}
        return cls(call.cls.__module__, call.cls.__name__, (request.folder, *call.args), {**kept, **source})

    def __call__(self, state: Mapping[str, torch.Tensor], generation_config: Any) -> Any:
        loader = getattr(importlib.import_module(self.module), self.cls)
        model = loader.from_pretrained(*self.args, **self.options)
        model.load_state_dict(state, strict=False)
        if generation_config is not None:
            model.generation_config = generation_config
        return model


# For prompt tuning PEFT asks any model for this module, and then looks among the parameters of torch for one of as many
# rows as there are tokens: rows in GGUF blocks are none.
_EMBEDDING_OF_BERT = "embeddings.word_embeddings"

_SMALL_SHARE = 0.01  # of the weights: norms and routers stay far below


class KtModelMixin(NotPickledAlone):
    """What differs between a model filled from a GGUF and its stock class."""

    kt_report: KtReport
    kt_reload: Reload
    kt_parameters: int
    _warned_of_length = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickle holds how the model was loaded, and the tensors that are torch's. It loads from the GGUF again.

        So a spawned process gets a model of its own, as does who reads a file of torch.save.
        """
        state = dict(self.state_dict())  # type: ignore[attr-defined]
        return self.kt_reload, (state, getattr(self, "generation_config", None))

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        named = str(attn_implementation)
        ours = any(row.operation.startswith("attention") for row in self.kt_report.rows)
        if ours and any(word in named for word in ("flex", "flash", "paged")):
            raise UnsupportedOperationError(
                f'set_attn_implementation("{named}") is not possible: the attention of this model was replaced when it '
                f'was loaded. Load it with from_pretrained(..., attn_implementation="{named}")'
            )
        return super().set_attn_implementation(attn_implementation, *args, **kwargs)  # type: ignore[misc]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def get_submodule(self, target: str) -> nn.Module:
        if target == _EMBEDDING_OF_BERT:
            found: nn.Module = self.get_input_embeddings()  # type: ignore[attr-defined]
            return found
        return super().get_submodule(target)  # type: ignore[misc,no-any-return]

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of memory that the weights hold, packed ones included; of each module, ``kt_report.rows`` has them.

        accelerate's ``compute_module_sizes`` counts tensors of torch, of which packed weights are none.
        """
        return self.kt_report.nbytes

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As of the stock model: those in GGUF blocks are counted, of which torch knows nothing."""
        if only_trainable:
            return int(super().num_parameters(only_trainable, exclude_embeddings))  # type: ignore[misc]
        config: Any = self.config  # type: ignore[attr-defined]
        excluded = config.vocab_size * config.hidden_size if exclude_embeddings else 0
        return int(self.kt_parameters - excluded)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if (device is not None and device.type != "cpu") or dtype not in (None, torch.float32):
            self._refuse_move(f"to({', '.join(str(wanted) for wanted in (device, dtype) if wanted is not None)})")
        return self

    def cpu(self) -> Any:
        return self

    def float(self) -> Any:
        return self

    def cuda(self, device: Any = None) -> NoReturn:
        self._refuse_move("cuda()")

    def half(self) -> NoReturn:
        self._refuse_move("half()")

    def bfloat16(self) -> NoReturn:
        self._refuse_move("bfloat16()")

    def double(self) -> NoReturn:
        self._refuse_move("double()")

    def _refuse_move(self, what: str) -> NoReturn:
        raise UnsupportedOperationError(
            f"model.{what} is not possible: packed weights stay where they were loaded, on the CPU, where activations "
            "are float32. Leave the call out"
        )

    def train(self, mode: bool = True) -> Any:
        # What trains are torch's own modules: adapters, or what rules kept. Where a gradient would have to pass ours,
        # the operator says so.
        if mode and not any(parameter.requires_grad for parameter in self.parameters()):  # type: ignore[attr-defined]
            refuse_training("model.train()")
        return super().train(mode)  # type: ignore[misc]

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        if requires_grad:
            refuse_training("model.requires_grad_()")
        return super().requires_grad_(False)  # type: ignore[misc]

    def add_adapter(self, *args: Any, **kwargs: Any) -> Any:
        with _way_out_for_adapters():
            return super().add_adapter(*args, **kwargs)  # type: ignore[misc]

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        with _way_out_for_adapters():
            return super().load_adapter(*args, **kwargs)  # type: ignore[misc]

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> NoReturn:
        refuse_training("gradient checkpointing")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse_saving(self, "save_pretrained()")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse_saving(self, "push_to_hub()")

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedOperationError(
            "resize_token_embeddings() is not possible: the rows of the embedding are those of the GGUF"
        )

    def require_positions(self, tokens: int) -> None:
        """Raises InputError for a prompt of more tokens than the model has positions."""
        positions = self.config.max_position_embeddings  # type: ignore[attr-defined]
        if tokens > positions:
            raise InputError(_too_long(tokens, positions))

    def _prepare_generated_length(
        self,
        generation_config: Any,
        has_default_max_length: bool,
        has_default_min_length: bool,
        model_input_name: str,
        input_ids_length: int,
        inputs_tensor: torch.Tensor,
    ) -> Any:
        """Let generation end at the model's last position, as at a stop token: an error then would lose the text."""
        generation_config = super()._prepare_generated_length(  # type: ignore[misc]
            generation_config,
            has_default_max_length,
            has_default_min_length,
            model_input_name,
            input_ids_length,
            inputs_tensor,
        )
        positions = self.config.max_position_embeddings  # type: ignore[attr-defined]
        self.require_positions(input_ids_length)  # checked here: in chunked prefill the guard would see it late
        # Embeddings come in place of ids, which then count from zero.
        given = inputs_tensor.shape[1] if model_input_name == "inputs_embeds" and input_ids_length == 0 else 0
        # Prompt lookup guesses this many tokens past the end of the text, whatever the maximum.
        guessed = generation_config.prompt_lookup_num_tokens or 0
        most = max(positions - given - guessed, input_ids_length + 1)
        if generation_config.max_length > most:
            if not self._warned_of_length:
                self._warned_of_length = True
                logger.warning("generation will end at the model's last position: %d tokens in all", positions)
            generation_config.max_length = most
        return generation_config


class KtGenerationMixin:
    """What differs in a model that generates, beside `KtModelMixin`."""

    kt_report: KtReport

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As that of the stock class, with torch set to one thread unless it computes part of the model itself.

        Otherwise torch only chooses tokens. Its threads spin for milliseconds after comparing 100,000 logits and take
        cores from the kernels: 5 of 60 ms a token on two cores.
        """
        asked = kwargs.get("generation_config") or getattr(self, "generation_config", None)
        if kwargs.get("use_mtp", getattr(asked, "use_mtp", None)):
            raise UnsupportedOperationError(
                "use_mtp=True is not possible: the layer that predicts further tokens is not loaded from a GGUF. "
                "generate(prompt_lookup_num_tokens=...) or generate(assistant_model=...) guess tokens ahead"
            )
        left_to_torch = sum(row.nbytes for row in self.kt_report.rows if row.operation == TORCH)
        if left_to_torch > _SMALL_SHARE * self.kt_report.nbytes:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        with one_torch_thread():
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The cache hears how long it may become: GPUs reserve room, which captured steps depend on."""
        out = super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )
        expect_length(model_kwargs.get(CACHE_ARGUMENT), generation_config.max_length)
        return out

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        refuse_pages("init_continuous_batching()")

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> NoReturn:
        refuse_pages("continuous batching")

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        refuse_pages("generate_batch()")


def refuse_pages(what: str) -> NoReturn:
    raise UnsupportedOperationError(
        f"{what} is not possible: it keeps keys in pages, which this model's attention does not read. "
        "generate() takes several prompts as one left-padded batch"
    )


# The first arguments of a base model's forward, in order.
_FORWARD_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "cache", "inputs_embeds")


class InputGuard:
    """A forward pre-hook that refuses token ids and positions out of range, outputs that no module records, and patches
    that no module would call."""

    def __init__(self, config: Any, lost_outputs: Collection[str], replaced: ReplacedClasses) -> None:
        self._config = config
        self._replaced = replaced
        self._vocab_size = config.vocab_size
        self._positions = config.max_position_embeddings
        self._lost_outputs = lost_outputs

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._replaced.require_unpatched()
        if args:
            kwargs = {**dict(zip(_FORWARD_ARGUMENTS, args, strict=False)), **kwargs}
        for output in self._lost_outputs:
            if kwargs.get(output) or getattr(self._config, output, False):
                raise UnsupportedOperationError(
                    f"{output}=True cannot be served: the modules that give them were replaced. Load with "
                    + (
                        'attn_implementation="eager"'
                        if "attentions" in output
                        else f'kt_rules="{OBSERVABLE}", or rules of your own that keep them (op: torch)'
                    )
                )
        input_ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        tokens = None
        if input_ids is not None:
            tokens = _shape_of("input_ids", input_ids, ("batch", "tokens"), _IDS)
            self._check_ids(input_ids)
        if embeddings is not None:
            *shape, width = _shape_of("inputs_embeds", embeddings, ("batch", "tokens", "hidden"), _FLOATS)
            if width != self._config.hidden_size:
                raise InputError(
                    f"inputs_embeds has shape {tuple(embeddings.shape)}; this model's embeddings are "
                    f"{self._config.hidden_size} wide, as get_input_embeddings() gives them"
                )
            tokens = tokens or tuple(shape)
        if tokens is not None:
            _check_positions(kwargs.get("position_ids"), tokens)
            _check_mask(kwargs.get("attention_mask"), tokens)
        last = self._last_position(kwargs, input_ids)
        if last >= self._positions:
            raise InputError(_too_long(last + 1, self._positions))

    def _check_ids(self, input_ids: torch.Tensor) -> None:
        if not _has_values(input_ids):
            return
        low, high = _extremes(input_ids)
        if low < 0 or high >= self._vocab_size:
            raise InputError(
                f"input_ids holds the token id {low if low < 0 else high}; this model has 0 to {self._vocab_size - 1}. "
                "Use the tokenizer that belongs to the model"
            )

    def _last_position(self, kwargs: Mapping[str, Any], input_ids: torch.Tensor | None) -> int:
        position_ids = kwargs.get("position_ids")
        if position_ids is not None:
            low, high = _extremes(position_ids) if position_ids.numel() and _has_values(position_ids) else (0, 0)
            if low < 0:
                raise InputError(f"position_ids holds {low}; positions count from 0")
            return high
        past = kwargs.get("cache", kwargs.get("past_key_values"))  # the name changed in transformers 5.24
        tokens = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        length = 0 if tokens is None else tokens.shape[1]
        if past is not None and not isinstance(past, Cache):
            raise InputError(
                f"the cache is a {type(past).__name__}; a Cache of transformers is taken, such as DynamicCache(); of "
                "pairs of keys and values, DynamicCache(pairs)"
            )
        return length - 1 + (0 if past is None else int(past.get_seq_length()))


_IDS = (torch.int64, torch.int32)  # as torch's embedding takes them
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_POSITIONS = (*_IDS, torch.int16, torch.int8, torch.uint8, *_FLOATS, torch.float64)


def _shape_of(name: str, given: Any, axes: Sequence[str], dtypes: Collection[torch.dtype]) -> tuple[int, ...]:
    """The shape of an argument; raises InputError where it has other axes, another dtype or no elements."""
    if not isinstance(given, torch.Tensor):
        raise InputError(f"{name} is a {type(given).__name__}; a tensor ({', '.join(axes)}) is taken")
    shape = tuple(given.shape)
    if len(shape) != len(axes):
        raise InputError(f"{name} has shape {shape}; ({', '.join(axes)}) is taken")
    if given.dtype not in dtypes:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(f"{name} is of dtype {given.dtype}, shape {shape}; {accepted} are taken")
    if not given.numel():
        raise InputError(
            f"{name} is empty, of shape {shape}; at least one token is needed, such as the one that begins a text "
            "(tokenizer.bos_token_id)"
        )
    return shape


def _check_positions(positions: Any, tokens: tuple[int, ...]) -> None:
    if positions is None:
        return
    length = tokens[1]
    if (shape := _shape_of("position_ids", positions, ("batch", "tokens"), _POSITIONS)) not in (tokens, (1, length)):
        raise InputError(f"position_ids has shape {shape} for tokens of shape {tokens}; (1, {length}) or {tokens} fits")
    if positions.is_floating_point() and _has_values(positions) and bool((positions != positions.floor()).any()):
        raise InputError(
            f"position_ids of dtype {positions.dtype}, shape {shape}, holds fractions; this model rotates by whole "
            "positions. Round them"
        )


def _check_mask(mask: Any, tokens: tuple[int, ...]) -> None:
    if mask is None:
        return
    axes = "(batch, keys) or (batch, 1, tokens, keys)"
    if not isinstance(mask, torch.Tensor):
        raise InputError(f"attention_mask is a {type(mask).__name__}; a tensor {axes} is taken")
    batch, length = tokens
    shape = tuple(mask.shape)
    if len(shape) == 2 and shape[0] == batch:
        return
    # Whole numbers in four dimensions are the ranges that our own mask function makes, and no mask of anybody else.
    is_ranges = mask.dtype == torch.int32 and shape[1:] == (1, length, 2)
    if len(shape) != 4 or shape[0] not in (1, batch) or shape[2] not in (1, length):
        raise InputError(f"attention_mask has shape {shape} for tokens of shape {tokens}; {axes} is taken")
    if not (is_ranges or mask.dtype == torch.bool or mask.is_floating_point()):
        raise InputError(
            f"attention_mask of shape {shape} is of dtype {mask.dtype}; in four dimensions bool or float is taken"
        )


def _has_values(tensor: torch.Tensor) -> bool:
    """False while somebody traces or exports, when tensors have shapes and nothing else."""
    return not (torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or tensor.is_meta)


def _extremes(ids: torch.Tensor) -> tuple[int, int]:
    if ids.numel() == 1:  # decoding: one read in place of a reduction
        value = int(ids)
        return value, value
    low, high = torch.aminmax(ids)
    return int(low), int(high)


def _too_long(tokens: int, positions: int) -> str:
    return f"the input is {tokens} tokens long; this model has {positions} positions. Shorten the prompt"
