"""Says what is wrong with an environment before an import fails in some far-off place; lists the environment variables.

TRANSFORMERS_KT=1             every Python that starts imports this package when it imports transformers (startup/)
TRANSFORMERS_KT_RULES=...     kt_rules of calls that name none: auto, a YAML file or the name of bundled rules
TRANSFORMERS_KT_THREADS=N     as set_thread_count(N) right after the import
TRANSFORMERS_KT_API_KEY=...   --api-key of transformers-kt serve, unseen by other users of the machine
TRANSFORMERS_KT_ISA=...       kernels of this instruction set in place of the best (csrc/kernels/dispatch.cpp)
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

_FORK = "transformers-kt"
_OLDEST = (5, 22)
ACTIVATE = "TRANSFORMERS_KT"
RULES = "TRANSFORMERS_KT_RULES"
THREADS = "TRANSFORMERS_KT_THREADS"


def default_rules() -> str | None:
    """What the environment says for calls without ``kt_rules=``."""
    return os.environ.get(RULES) or None


def default_threads() -> int | None:
    """The thread count that the environment asks for. Raises ImportError for one that is none."""
    text = os.environ.get(THREADS)
    if not text:
        return None
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise ImportError(f"{THREADS}={text} is no thread count: a whole number from 1 is accepted")
    return int(text)


def check_environment() -> None:
    """Raises ImportError where `transformers` is not the library this package extends, or too old, or where the
    package's compiled extension is missing."""
    _check_transformers()
    _check_extension()


def _check_extension() -> None:
    if importlib.util.find_spec("transformers_kt._C") is not None:
        return
    folder = Path(__file__).parent
    built_for = sorted(path.name.split(".")[1] for path in folder.glob("_C.*.so"))
    if built_for:
        raise ImportError(
            f"the extension in {folder} is built for {', '.join(built_for)}; this is {sys.implementation.cache_tag}. "
            "Run with this Python: pip install --force-reinstall --no-deps transformers-kt-experts"
        )
    found = f"{folder} is source code without the compiled extension"
    build = f"pip install --editable {folder.parent}"
    hidden = [path for path in sys.path if any(Path(path).glob("transformers_kt/_C.*.so"))]
    if hidden:
        raise ImportError(
            f"{found}, and hides the package installed in {hidden[0]}. Run Python in another folder, or build the "
            f"extension for this source code: {build}"
        )
    raise ImportError(f"{found}. Run: {build}")


def _check_transformers() -> None:
    try:
        fork = importlib.metadata.version(_FORK)
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        raise ImportError(
            f"the distribution {_FORK} {fork} is installed: it is a fork of transformers that overwrites the real one, "
            "and no part of this package. Run: pip uninstall transformers-kt transformers; "
            "pip install transformers-kt-experts"
        )
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError("transformers is not installed. Run: pip install transformers") from None
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        raise ImportError(
            f"transformers {version} is installed; transformers_kt needs {'.'.join(map(str, _OLDEST))} or newer. "
            "Run: pip install --upgrade transformers"
        )
