"""llama.cpp, measured as `bench` measures ours: a process that prints one line of JSON.

    python peer.py '{"path": "model.gguf", "repacked": true, "threads": [2], "prompts": [512], "depths": [0],
                     "new_tokens": 32}'

It imports nothing but the standard library and llama_cpp: the interpreter that has llama-cpp-python may have nothing
else.

llama.cpp has two ways to multiply quantized weights on a CPU, and is faster in one or the other: with weights
repacked when the model is loaded (its default), or with tiles of the file's own blocks.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BATCH = 512  # tokens of a prompt at a time, its default
_FIRST_TOKEN = 3  # what comes before are special tokens


def timer(llama_cpp: Any, llama: Any) -> Callable[[list[int]], float]:
    """A function that gives the seconds of computing tokens after those before, without choosing any."""

    def timed(tokens: list[int]) -> float:
        begin = time.perf_counter()
        llama.eval(tokens)
        llama_cpp.llama_synchronize(llama._ctx.ctx)
        return time.perf_counter() - begin

    return timed


def opened(
    llama_cpp: Any, path: str, positions: int, threads: int, *, repacked: bool = True, flash_attention: bool = False
) -> Any:
    """``Llama`` has no option for the way to multiply: it takes the parameters that this module's function gives."""
    bindings: Any = llama_cpp.llama_cpp
    default_params = bindings.llama_model_default_params
    if not hasattr(default_params(), "use_extra_bufts"):
        raise SystemExit(
            f"llama-cpp-python {llama_cpp.__version__} does not say whether it repacks weights; 0.3.36 does: "
            "pip install -U llama-cpp-python"
        )

    def chosen_params() -> Any:
        params = default_params()
        params.use_extra_bufts = repacked
        return params

    bindings.llama_model_default_params = chosen_params
    try:
        return llama_cpp.Llama(
            path,
            n_ctx=positions,
            n_batch=_BATCH,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=flash_attention,
            verbose=False,
        )
    finally:
        bindings.llama_model_default_params = default_params


def _measured(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """A figure of each setting, one sequence at a time: seconds of a prompt, and of each token at a depth."""
    import llama_cpp

    positions = max([*settings["prompts"], *settings["depths"]]) + settings["new_tokens"] + 32
    found = []
    for threads in settings["threads"]:
        llama = opened(llama_cpp, settings["path"], positions, threads, repacked=settings["repacked"])
        timed = timer(llama_cpp, llama)
        timed(_tokens(8))  # the first call allocates
        for prompt in settings["prompts"]:
            llama.reset()
            found.append({"threads": threads, "prompt": prompt, "seconds": [timed(_tokens(prompt))]})
        for depth in settings["depths"]:
            llama.reset()
            timed(_tokens(max(1, depth)))
            seconds = [timed([_FIRST_TOKEN + step]) for step in range(settings["new_tokens"])]
            found.append({"threads": threads, "depth": depth, "seconds": seconds})
        llama.close()  # two copies of a model rarely fit
    return found


def _tokens(count: int) -> list[int]:
    return [_FIRST_TOKEN + number % 200 for number in range(count)]


if __name__ == "__main__":
    # Python looks for modules in a script's folder first, and this one has an inspect.py.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    print(json.dumps(_measured(json.loads(sys.argv[1]))))
