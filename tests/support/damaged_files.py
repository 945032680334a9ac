"""Files damaged in every way that a seed can think of: each loads, or is refused with an error of ours, in little time
and memory, in a process of its own.

Half of them are damaged by structure (a value, a type, a count, a shape, an offset, a scale), half by bytes. Everything
is derived from the number of the file, so that one file can be made again: --first N --files 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import struct
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gguf_handmade import _CODES as SCALAR_CODES
from gguf_handmade import ARRAY, STRING, Handmade, Tensor, scalar, string
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from transformers_kt.errors import KtError
from transformers_kt.families.from_gguf import (
    config_from_gguf,
    generation_config_from_gguf,
    notes_from_gguf,
    tokenizer_from_gguf,
)
from transformers_kt.families.tensors import check_tensors
from transformers_kt.gguf.checkpoint import open_checkpoint

MOST_SECONDS, MOST_BYTES = 10, 200 << 20  # for a file, of which the largest has a MB
MOST_SECONDS_ASLEEP = 300  # of a clock: a hang, however loaded the machine is
OUTCOMES = ("refused", "opened", "loaded")
_PIPE_BYTES = 4000  # a pipe takes more than that without a reader

_BOUNDARIES = (0, 1, 2, 3, 7, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-30, 1e30, 3e38, float("inf"), float("-inf"), float("nan"))
_TEXTS = (b"", b"\xff", b"deepseek2", b"yarn", b"linear", b"none", b"llama", b"gpt2", b"x" * 300, "\U0001f600".encode())


def parsed(raw: bytes) -> Handmade:
    """A sound file taken apart: its keys with the bytes of their values, its tensors, its data."""
    _, version, tensor_count, key_count = struct.unpack_from("<4sIQQ", raw)
    at = 24

    def take(layout: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + layout, raw, at)
        at += struct.calcsize("<" + layout)
        return value

    def text() -> bytes:
        nonlocal at
        length = take("Q")
        at += length
        return raw[at - length : at]

    def skip(kind: int) -> None:
        if kind == STRING:
            text()
        elif kind == ARRAY:
            of, count = take("I"), take("Q")
            for _ in range(count):
                skip(of)
        else:
            take(SCALAR_CODES[kind])

    keys: list[tuple[str | bytes, int, bytes]] = []
    for _ in range(key_count):
        name, kind, start = text(), take("I"), at
        skip(kind)
        keys.append((name, kind, raw[start:at]))
    tensors = []
    for _ in range(tensor_count):
        name, dims = text(), take("I")
        tensors.append(Tensor(name, [take("Q") for _ in range(dims)], take("I"), take("Q")))
    return Handmade(keys, tensors, raw[-(-at // 32) * 32 :], version=version)


def damaged(sound: bytes, number: int) -> tuple[str, bytes]:
    """What was done to file ``number``, and its bytes."""
    dice = random.Random(number)
    if dice.random() < 0.5:
        return _damaged_bytes(bytearray(sound), dice)
    file = parsed(sound)
    done = []
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        damage = dice.choice(_BY_STRUCTURE)
        damage(file, dice)
        done.append(damage.__name__.removeprefix("_"))
    return "+".join(done), file.build()


def _damaged_bytes(raw: bytearray, dice: random.Random) -> tuple[str, bytes]:
    # Mostly in the header, a hundredth of the file.
    at = dice.randrange(min(len(raw), 1 << dice.randrange(5, 21)))
    what = dice.choice(("flip", "overwrite", "insert", "remove", "truncate", "zero the rest", "append"))
    if what == "flip":
        for _ in range(dice.choice((1, 1, 4, 64))):
            raw[dice.randrange(at + 1)] ^= 1 << dice.randrange(8)
    elif what == "overwrite":
        raw[at : at + 8] = struct.pack("<Q", dice.choice(_BOUNDARIES))[: len(raw) - at]
    elif what == "insert":
        raw[at:at] = dice.randbytes(dice.randrange(1, 40))
    elif what == "remove":
        del raw[at : at + dice.randrange(1, 40)]
    elif what == "truncate":
        del raw[dice.choice((at, dice.randrange(len(raw)))) :]
    elif what == "zero the rest":
        at = dice.choice((at, dice.randrange(len(raw))))
        raw[at:] = bytes(len(raw) - at)
    else:
        raw += dice.randbytes(dice.randrange(1, 4000))
    return what, bytes(raw)


def _value(file: Handmade, dice: random.Random) -> None:
    at = dice.randrange(len(file.keys))
    name, kind, _ = file.keys[at]
    if kind == STRING:
        file.keys[at] = name, kind, string(dice.choice(_TEXTS))
    elif kind in SCALAR_CODES:
        code = SCALAR_CODES[kind]
        if code in "fd":
            value: Any = dice.choice(_FLOATS)
            value = value if abs(value) < 3.4e38 or value != value else float("inf")
        else:
            value = dice.choice(_BOUNDARIES) % (1 << 8 * struct.calcsize(code) - (code in "bhiq"))
        file.keys[at] = name, kind, scalar(kind, bool(value) if code == "?" else value)
    else:
        file.keys[at] = name, kind, file.keys[at][2][: dice.randrange(12, 200)]


def _kind(file: Handmade, dice: random.Random) -> None:
    at = dice.randrange(len(file.keys))
    name, _, raw = file.keys[at]
    kind = dice.randrange(14)
    value = raw if dice.random() < 0.3 else string(b"1") if kind == STRING else dice.randbytes(12)
    size = struct.calcsize(SCALAR_CODES[kind]) if kind in SCALAR_CODES else len(value)
    file.keys[at] = name, kind, value[:size].ljust(size, b"\0")


def _key_gone(file: Handmade, dice: random.Random) -> None:
    del file.keys[dice.randrange(len(file.keys))]


def _key_twice(file: Handmade, dice: random.Random) -> None:
    file.keys.append(dice.choice(file.keys))


def _count(file: Handmade, dice: random.Random) -> None:
    if dice.random() < 0.5:
        file.tensor_count = dice.choice((len(file.tensors) - 1, len(file.tensors) + 1, *_BOUNDARIES))
    else:
        file.key_count = dice.choice((len(file.keys) - 1, len(file.keys) + 1, *_BOUNDARIES))


def _shape(file: Handmade, dice: random.Random) -> None:
    tensor = dice.choice(file.tensors)
    dims = list(tensor.dims)
    at = dice.randrange(len(dims))
    dims[at] = dice.choice((*_BOUNDARIES, max(0, dims[at] - 1), dims[at] + 1, 2 * dims[at]))
    tensor.dims = dice.choice((dims, dims[::-1], dims[1:], [*dims, 1], [*dims, 1, 1, 1]))


def _type(file: Handmade, dice: random.Random) -> None:
    dice.choice(file.tensors).kind = dice.choice((*range(45), 97, 144, 2**31, 2**32 - 1))


def _offset(file: Handmade, dice: random.Random) -> None:
    tensor = dice.choice(file.tensors)
    tensor.offset = dice.choice((*_BOUNDARIES, tensor.offset + 32, max(0, tensor.offset - 32), tensor.offset + 1))


def _name(file: Handmade, dice: random.Random) -> None:
    tensor, other = dice.choice(file.tensors), dice.choice(file.tensors)
    tensor.name = dice.choice((other.name, b"blk.999.attn_norm.weight", b"", b"\xff", b"x" * 70000))


def _tensor_gone(file: Handmade, dice: random.Random) -> None:
    file.tensors.remove(dice.choice(file.tensors))


def _data(file: Handmade, dice: random.Random) -> None:
    data = bytearray(file.data)
    tensor = dice.choice(file.tensors)
    what = dice.choice((struct.pack("<f", float("nan")), struct.pack("<f", float("inf")), bytes(1 << 14)))
    data[tensor.offset : tensor.offset + len(what)] = what
    file.data = bytes(data[: len(file.data)])


_BY_STRUCTURE: tuple[Callable[[Handmade, random.Random], None], ...] = (
    _value, _value, _value, _kind, _key_gone, _key_twice, _count, _shape, _type, _offset, _name, _tensor_gone, _data,
)  # fmt: skip


def tried(path: Path, *, load: bool) -> str:
    """What became of the file: "refused" with an error of ours, "opened" or "loaded". Other errors pass through."""
    try:
        checkpoint = open_checkpoint(path)
        checkpoint.require_weights()
        config = config_from_gguf(checkpoint)
        notes_from_gguf(checkpoint)
        generation_config_from_gguf(checkpoint)
        check_tensors(checkpoint, config)
        if not load:
            return "opened"
        tokenizer_from_gguf(checkpoint)
        model = AutoModelForCausalLM.from_pretrained(None, gguf_path=path)
        logits = model(torch.tensor([[3, 4, 5]])).logits
    except KtError:
        return "refused"
    assert logits.shape[:2] == (1, 3)
    return "loaded"


def tried_apart(path: Path, *, load: bool) -> str:
    """The same in a process of its own, which may take `MOST_SECONDS` of a CPU and `MOST_BYTES` more than this one.

    Any other error, or the signal that ended it, is what comes back then.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS))
            resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + MOST_BYTES,) * 2)
            signal.alarm(MOST_SECONDS_ASLEEP)
            said = tried(path, load=load)
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode(errors="replace")[:_PIPE_BYTES])
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    status = os.waitpid(child, 0)[1]
    return f"ended by {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else said


def _data_bytes() -> int:
    """What RLIMIT_DATA counts, of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
    return 1024 * int(line.split()[1])


def try_files(sound: bytes, folder: Path, first: int, files: int, load_every: int) -> Counter[str]:
    """Make and try ``files`` damaged files. Raises AssertionError that names the first that is taken badly."""
    outcomes: Counter[str] = Counter()
    path = folder / "damaged.gguf"
    # What the first load of a process sets up, its children have.
    path.write_bytes(sound)
    assert tried(path, load=True) == "loaded"
    for number in range(first, first + files):
        what, raw = damaged(sound, number)
        path.write_bytes(raw)
        outcome = tried_apart(path, load=number % load_every == 0)
        assert outcome in OUTCOMES, f"file {number} ({what}): {outcome}"
        outcomes[outcome] += 1
    return outcomes


def sound_file(folder: Path) -> bytes:
    from tiny_examples import make_example

    return make_example("v3", folder).gguf.read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first file")
    parser.add_argument("--load-every", type=int, default=5, help="load each so manieth file, not only its header")
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # OpenMP does not survive a fork
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sound = sound_file(folder)
        print(json.dumps(try_files(sound, folder, args.first, args.files, args.load_every)))


if __name__ == "__main__":
    main()
