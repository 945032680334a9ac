"""llama.cpp's logits of many files, in an interpreter that has llama-cpp-python and numpy, and nothing else of ours.

    PYTHON tools/llama_logits.py OUT.npz 5,17,9 FILE.gguf ...

The archive has float32 (tokens, vocab) for each file, by its name: llama.cpp's with its defaults.
"""

from __future__ import annotations

import sys
from pathlib import Path

import llama_cpp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "golden"))
from make_golden import THREADS, Prompt, logits_of


def main() -> None:
    out, ids, *files = sys.argv[1:]
    tokens = [int(token) for token in ids.split(",")]
    found = {}
    for file in files:
        model = llama_cpp.Llama(
            file, n_ctx=2 * len(tokens), n_threads=THREADS, n_threads_batch=THREADS, logits_all=True, verbose=False
        )
        found[Path(file).name] = logits_of(model, Prompt("", tokens, len(tokens), 0))
        model.close()
    np.savez(out, **found)


if __name__ == "__main__":
    main()
