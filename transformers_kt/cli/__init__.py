"""The command ``transformers-kt``. A command is a function in a file of its own, added in `build_app`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from transformers_kt.errors import KtError

if TYPE_CHECKING:
    import typer

_FAILED = 1  # 2 is a command line that is not understood


def build_app() -> typer.Typer:
    """The application with all its commands."""
    from importlib.metadata import version as version_of

    import typer

    from transformers_kt.cli.ask import ask_command
    from transformers_kt.cli.bench import bench_command
    from transformers_kt.cli.chat import chat_command
    from transformers_kt.cli.cost import cost_command
    from transformers_kt.cli.doctor import doctor_command
    from transformers_kt.cli.inspect import inspect_command
    from transformers_kt.cli.options import our_spelling
    from transformers_kt.cli.plan import plan_command
    from transformers_kt.cli.profile import profile_command
    from transformers_kt.cli.quality import quality_command
    from transformers_kt.cli.run import run_command
    from transformers_kt.cli.serve import serve_command

    def print_version(wanted: bool) -> None:
        if wanted:
            print(f"transformers-kt {version_of('transformers-kt-experts')}")
            raise typer.Exit

    def common(
        version: bool = typer.Option(
            False, "--version", callback=print_version, is_eager=True, help="Print the version and leave."
        ),
    ) -> None:
        pass

    app = typer.Typer(
        name="transformers-kt",
        help="Run large language models on this machine from GGUF files: a model in one file, with its numbers stored "
        "in few bits (quantized).",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",  # lines of a paragraph are one
        pretty_exceptions_enable=False,
    )
    app.callback()(common)
    app.command("chat", context_settings={"token_normalize_func": our_spelling})(chat_command)
    app.command("ask", no_args_is_help=True)(ask_command)
    app.command("inspect", no_args_is_help=True)(inspect_command)
    app.command("bench", no_args_is_help=True)(bench_command)
    app.command("cost", no_args_is_help=True)(cost_command)
    app.command("quality", no_args_is_help=True)(quality_command)
    app.command("doctor")(doctor_command)
    app.command("plan", no_args_is_help=True)(plan_command)
    app.command("profile", no_args_is_help=True)(profile_command)
    # What follows the program's name, its options too, is its own.
    its_own = {"ignore_unknown_options": True, "allow_interspersed_args": False}
    app.command("run", no_args_is_help=True, context_settings=its_own)(run_command)
    # So are these, for transformers, whose server's options are known once it is imported.
    passed_on = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    app.command("serve", context_settings=passed_on)(serve_command)
    return app


def main() -> None:
    """Run the command line. Refusals, also those of transformers about files and the hub, end as one message."""
    try:
        build_app()()
    except (KtError, OSError) as error:
        from transformers_kt.cli import options, plan, quality
        from transformers_kt.cli.words import in_options

        said = in_options(str(error), {**plan.OPTIONS, **options.OPTIONS, **quality.OPTIONS})
        print(f"transformers-kt: {said}", file=sys.stderr)
        sys.exit(_FAILED)
