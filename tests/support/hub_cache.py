"""The cache of a hub that cannot be asked: repositories as huggingface_hub leaves them after a download."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

_COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """``options`` let from_pretrained and huggingface_hub look there alone."""

    def __init__(self, folder: Path) -> None:
        self.options: dict[str, Any] = {"cache_dir": str(folder), "local_files_only": True}
        self._folder = folder

    def put(self, repository: str, path: Path, name: str) -> None:
        kept = self._folder / f"models--{repository.replace('/', '--')}"
        target = kept / "snapshots" / _COMMIT / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        (kept / "refs").mkdir(exist_ok=True)
        (kept / "refs" / "main").write_text(_COMMIT)
