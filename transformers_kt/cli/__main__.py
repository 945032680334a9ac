"""``python -m transformers_kt.cli``: the command where its script is not on the path."""

from __future__ import annotations

from transformers_kt.cli import main

main()
