"""Says what is wrong with an environment before an import fails in some far-off place."""

from __future__ import annotations

import importlib.metadata

_FORK = "transformers-kt"
_OLDEST = (5, 23)


def check_environment() -> None:
    """Raises ImportError where `transformers` is not the library this package extends, or too old."""
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
    version = importlib.metadata.version("transformers")
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        raise ImportError(
            f"transformers {version} is installed; transformers_kt needs {'.'.join(map(str, _OLDEST))} or newer. "
            "Run: pip install --upgrade transformers"
        )
