"""Options that `chat` and `ask` share, and what they load with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

import transformers_kt._C as _C
from transformers_kt.cli.models import BUNDLED, located
from transformers_kt.errors import InputError
from transformers_kt.rules import AUTO

if TYPE_CHECKING:
    from transformers_kt.cli.conversation import Conversation
    from transformers_kt.cli.screen import Screen

GgufPath = Annotated[
    str | None,
    typer.Option(help="The weights, where MODEL is only the folder or hub id with their config and tokenizer."),
]
Rules = Annotated[
    str,
    typer.Option(
        help="Which part is computed where: auto, a YAML file, or the name of bundled rules.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", "-t", min=1, help="Threads; one for each core that may be used if not given."),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens that an answer has at most; a word has one or two.")]
ForceThink = Annotated[
    bool, typer.Option("--force-think", help="Begin answers with a thought, where the model would not think by itself.")
]
System = Annotated[
    str | None, typer.Option(help="What the model is told before the conversation: its role, its rules.")
]
Temperature = Annotated[
    float | None,
    typer.Option(
        min=0, help="How freely words are chosen: 0 always takes the likeliest. If not given, as the model says."
    ),
]
TopP = Annotated[
    float | None, typer.Option(min=0, max=1, help="Choose among the likeliest tokens that have this share together.")
]
TopK = Annotated[int | None, typer.Option(min=1, help="Choose among this many of the likeliest tokens.")]
MinP = Annotated[
    float | None, typer.Option(min=0, max=1, help="Leave out tokens less likely than this share of the likeliest.")
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(min=0.01, help="Above 1, words that were said become less likely.")
]
Seed = Annotated[int | None, typer.Option(help="Makes chosen words the same at each run.")]
ChunkSize = Annotated[
    int, typer.Option("--chunk-size", min=1, help="Tokens of a prompt to compute at a time. No result depends on it.")
]


_ARGUMENTS = ("model_path", "temperature", "top_p", "top_k", "min_p")
OPTIONS = {argument: f"--{argument.replace('_', '-')}" for argument in _ARGUMENTS}
"""Arguments, as messages name them -> options."""


_OF_LOCAL_CHAT = {"cpu-infer": "threads", "optimize-rule-path": "kt-rules", "optimize-config-path": "kt-rules"}


def our_spelling(option: str) -> str:
    """``gguf_path`` as ``gguf-path``, ``cpu_infer`` as ``threads``: the options of KTransformers' local_chat."""
    dashed = option.replace("_", "-")
    return _OF_LOCAL_CHAT.get(dashed, dashed)


def sampling(**given: float | None) -> dict[str, Any]:
    """Options of `generate`: those that are given, and whether to sample."""
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if options.get("temperature") == 0:
        others = sorted(set(options) - {"temperature", "repetition_penalty"})
        if others:
            raise InputError(
                f"temperature=0 always takes the likeliest token; {', '.join(f'{name}=' for name in others)} has no "
                "meaning beside it. Leave one of them out"
            )
        options.pop("temperature")
        return {**options, "do_sample": False}
    return {**options, "do_sample": True} if set(options) - {"repetition_penalty"} else options


def loaded_conversation(
    model: str | None,
    gguf_path: str | None,
    kt_rules: str,
    threads: int | None,
    seed: int | None,
    screen: Screen,
    **options: Any,
) -> Conversation:
    """A conversation with the model, which is loaded: the bundled one if none is named.

    ``options`` are those of `Conversation`.

    Raises `KtError` where the model is refused or has no chat template.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from transformers_kt.cli.conversation import Conversation

    if threads is not None:
        _C.set_thread_count(threads)
    if seed is not None:
        set_seed(seed)
    if model is None and gguf_path is None:
        model = BUNDLED
    name = None if model is None else located(model)
    tokenizer = AutoTokenizer.from_pretrained(name, gguf_path=gguf_path, kt_rules=AUTO)
    if tokenizer.chat_template is None:
        raise InputError(
            f"{name or gguf_path} has no chat template, which says where a question ends and an answer begins: it is "
            "a base model, or its file was made without. Name the folder or hub id of the chat model, and the weights "
            "with gguf_path="
        )
    loaded = AutoModelForCausalLM.from_pretrained(name, gguf_path=gguf_path, kt_rules=kt_rules)
    return Conversation(loaded, tokenizer, screen, **options)
