"""The command ``transformers-kt``, outside the package: importing that raises what is wrong with the environment, which
a command says without a traceback."""

import sys


def main():
    try:
        from transformers_kt.cli import main as command
    except ImportError as error:
        if error.name is not None:  # a module is missing: no words of ours
            raise
        print(f"transformers-kt: {error}", file=sys.stderr)
        sys.exit(1)
    command()
