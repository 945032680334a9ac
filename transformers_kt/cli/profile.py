"""``transformers-kt profile``: which experts of a model its texts choose, for experts in the memory of a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from transformers_kt.assets import bundled_texts
from transformers_kt.cli import options
from transformers_kt.cli.models import MODEL_HELP, located
from transformers_kt.errors import InputError
from transformers_kt.planning.expert_profile import ExpertProfile
from transformers_kt.planning.tables import new_table, rendered
from transformers_kt.text import layer_number

if TYPE_CHECKING:
    import torch

_AT_ONCE = 1024
"""Tokens that see each other."""
# Routers are to stand outside our operations, where each call of the experts can be watched.
_RULES = [
    {"match": {"name": r"\.experts$"}, "replace": {"op": "experts"}},
    {"match": {"name": ""}, "replace": {"op": "auto"}},
]
_SHARES = (8, 4, 2)


def profile_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    texts: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[TEXT]...",
            exists=True,
            dir_okay=False,
            help="Text files of the kind that the model is to read and write. Without any, four bundled pages.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("experts.json"),
    gguf_path: options.GgufPath = None,
    threads: options.Threads = None,
) -> None:
    """Count how often MODEL chooses each of its routed experts on some texts, and write that as a small JSON.

    Routed experts are the parts of a layer of which each token takes a few. kt_expert_profile= puts the most chosen
    ones into the memory of a GPU. Everything is computed on the CPU.
    """
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: there is no folder {output.parent}. Make it first, or name another file")
    read = {str(path): _text_of(path) for path in texts or ()} or bundled_texts()
    profile = _profile(model, gguf_path, threads, read)
    profile.write(output)
    print(_summary(profile, output))


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8 ({error}). Convert it, or leave it out") from None


def _profile(model: str, gguf_path: str | None, threads: int | None, texts: Mapping[str, str]) -> ExpertProfile:
    import torch
    from tqdm import tqdm
    from transformers import AutoModel, AutoTokenizer

    import transformers_kt._C as _C
    from transformers_kt.families.registry import dims_of

    if threads is not None:
        _C.set_thread_count(threads)
    name = located(model)
    tokenizer = AutoTokenizer.from_pretrained(name, gguf_path=gguf_path, kt_rules="auto")
    ids = {source: tokenizer(text, verbose=False).input_ids for source, text in texts.items()}
    if empty := [source for source, found in ids.items() if not found]:
        raise InputError(f"{empty[0]} holds no text. Leave it out, or leave all out for the bundled pages")
    loaded: Any = AutoModel.from_pretrained(name, gguf_path=gguf_path, kt_rules=_RULES)
    dims = dims_of(loaded.config)
    at_once = min(_AT_ONCE, dims.context)
    tokens = sum(map(len, ids.values()))
    with _counted_choices(loaded, name) as counts, torch.no_grad(), tqdm(total=tokens, unit=" tokens") as bar:
        for found in ids.values():
            for first in range(0, len(found), at_once):
                piece = found[first : first + at_once]
                loaded(torch.tensor([piece]), use_cache=False)
                bar.update(len(piece))
    of_layers = {layer: tuple(choices.tolist()) for layer, choices in counts.items()}
    return ExpertProfile(loaded.kt_report.title, tokens, dims.top_k, of_layers)


@contextmanager
def _counted_choices(model: Any, name: str) -> Iterator[Mapping[int, torch.Tensor]]:
    """Decoder layer -> how often each of its experts is chosen inside, int64 (experts,)."""
    import torch

    from transformers_kt.modules.experts import KtExperts

    counts: dict[int, torch.Tensor] = {}
    hooks = []
    for path, module in model.named_modules():
        if not isinstance(module, KtExperts):
            continue
        layer = layer_number(path)
        assert layer is not None
        own = counts[layer] = torch.zeros(module.num_experts, dtype=torch.int64)

        def count(module: Any, args: tuple[Any, ...], own: torch.Tensor = own) -> None:
            own += torch.bincount(args[1].reshape(-1), minlength=len(own))

        hooks.append(module.register_forward_pre_hook(count))
    if not counts:
        raise InputError(
            f"{name} has no routed experts, so there is nothing to profile; a mixture-of-experts model is accepted"
        )
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def _summary(profile: ExpertProfile, output: Path) -> str:
    experts = len(next(iter(profile.counts.values())))
    sizes = sorted({max(1, experts // share) for share in _SHARES})
    columns = [f"busiest {size}" for size in sizes]
    table = new_table("layer", *columns, numbers=columns)
    table.show_footer = False
    for layer in sorted(profile.counts):
        table.add_row(str(layer), *(f"{profile.share(layer, size):.0%}" for size in sizes))
    heading = (
        f"{profile.model}: {profile.tokens:,} tokens chose {profile.top_k} of {experts} experts in each of "
        f"{len(profile.counts)} layers; of these choices went to the"
    )
    return rendered(
        heading, table, f'{output} is written; from_pretrained(..., kt_expert_profile="{output}") reads it.'
    )
