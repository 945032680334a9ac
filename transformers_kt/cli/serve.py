"""``transformers-kt serve``: transformers' server for models from GGUF files."""

from __future__ import annotations

import inspect
import sys
from typing import Annotated, Any

import typer

from transformers_kt.cli.run import RulesOption, ThreadsOption, set_environment

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _ours(
    rules: RulesOption = None,
    threads: ThreadsOption = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests that are answered at once, as one batch.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait while so many are answered.")] = 64,
    cache_gb: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Memory for keys: of requests being answered, and of earlier ones, which are used again where a "
            "prompt begins alike. Default: a quarter of what is free once the model is loaded.",
        ),
    ] = None,
    shutdown_seconds: Annotated[
        int, typer.Option(min=0, help="Time that answers are given to end when the server is stopped.")
    ] = 10,
    api_key: Annotated[
        str | None, typer.Option(envvar="TRANSFORMERS_KT_API_KEY", help="What clients have to send as their API key.")
    ] = None,
) -> None:
    """The options that `transformers serve` has not."""


def serve_command(context: typer.Context) -> None:
    """Answer requests over HTTP, as OpenAI's API has them, with a model from a GGUF file.

    This is `transformers serve`, and takes its options.
    """
    from transformers_kt.integration.batching import Limits
    from transformers_kt.integration.serving import KtServe, require_server

    require_server()
    stock = inspect.signature(KtServe.__mro__[1], eval_str=True).parameters
    ours = inspect.signature(_ours, eval_str=True).parameters

    def serve(**options: Any) -> None:
        """Answer requests over HTTP, as OpenAI's API has them. MODEL is a GGUF file, a folder or hub repository with
        one, "folder:file.gguf" or "org/repo:file.gguf".

        This is `transformers serve`, with some options more: those down to --api-key. Requests that come at once are
        computed together, and each is answered as if it came alone.
        """
        set_environment(options.pop("rules"), options.pop("threads"))
        if options["host"] not in _LOOPBACK and options["api_key"] is None:
            print(f"transformers-kt: whoever reaches {options['host']} can use this: no --api-key", file=sys.stderr)
        gigabytes = options.pop("cache_gb")
        cache_bytes = None if gigabytes is None else int(gigabytes * 1e9)
        KtServe(limits=Limits(options.pop("max_batch"), options.pop("max_waiting"), cache_bytes), **options)

    model, *others = stock.values()
    merged = {option.name: option for option in (model, *ours.values(), *others)}
    merged["host"] = merged["host"].replace(default="127.0.0.1")
    del merged["non_blocking"]
    serve.__signature__ = inspect.Signature(list(merged.values()))  # type: ignore[attr-defined]
    serve.__annotations__ = {}
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    app.command(no_args_is_help=True)(serve)
    app(context.args, prog_name=context.command_path)
