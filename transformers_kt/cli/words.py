"""Messages of the Python interface in the words of a command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

_ELSEWHERE = r"(?<![\w/.\-])"  # not inside a path or a longer name


def in_options(message: str, options: Mapping[str, str]) -> str:
    """``message`` with options where it names arguments; ``options`` is argument -> option.

    ``kt_cpu_layers=99`` becomes ``--kt-cpu-layers 99``, ``gpus[1]`` becomes ``--gpu, entry 2``, and an option that the
    message adds in brackets is not said twice.
    """
    for argument, option in options.items():
        entry = re.compile(rf"{_ELSEWHERE}{argument}\[(\d+)\]")
        message = entry.sub(partial(_entry_of, option), message)
        message = re.sub(rf"{_ELSEWHERE}{argument}= \({option}\)", option, message)
        stated = rf"""{_ELSEWHERE}{argument}=(?:(["'])(?P<quoted>.*?)\1|(?P<bare>[^\s"',;:()]+))"""
        message = re.sub(stated, partial(_value_of, option), message)
        message = re.sub(rf"{_ELSEWHERE}{argument}=(?!\w)", option, message)
        # A plain word, such as ram, is an argument only where the message begins with it.
        where = _ELSEWHERE if "_" in argument else r"\A"
        message = re.sub(rf"{where}{argument}(?= )", option, message)
    return message


def _entry_of(option: str, found: re.Match[str]) -> str:
    return f"{option}, entry {int(found[1]) + 1},"


def _value_of(option: str, found: re.Match[str]) -> str:
    return f"{option} {found['quoted'] or found['bare']}"
