"""How fast RAM is read: threads that each go through a part of more memory than caches hold."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Sequence

import numpy as np

_BYTES = 512 << 20  # well past any cache that a few cores can hold on to
# Handed out one by one, so that a thread that is held up keeps no one waiting. Python takes 10 us to hand one out.
_CHUNK_BYTES = 8 << 20
_ROUNDS = 3


class ReadableMemory:
    """512 MiB, in huge pages where the system allows it, to read from."""

    def __init__(self) -> None:
        self._mapped = mmap.mmap(-1, _BYTES)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                self._mapped.madvise(mmap.MADV_HUGEPAGE)
        self._values = np.frombuffer(self._mapped, np.int64)
        self._values[:] = 1  # pages that nothing was written to are all one page

    def bandwidth(self, cpus: Sequence[int], rounds: int = _ROUNDS) -> float:
        """Bytes per second that a thread on each of ``cpus`` read together, the best of ``rounds``.

        The best, because what others do on the machine only makes it slower.
        """
        return max(self._sample(cpus) for _ in range(rounds))

    def _sample(self, cpus: Sequence[int]) -> float:
        step = _CHUNK_BYTES // self._values.itemsize
        starts = iter(range(0, len(self._values), step))
        lock, ready, ends = threading.Lock(), threading.Barrier(len(cpus) + 1), []

        def read(cpu: int) -> None:
            if hasattr(os, "sched_setaffinity"):
                # Of this thread: two new ones may share a CPU for a whole sample.
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(0, {cpu})
            ready.wait()
            while True:
                with lock:
                    start = next(starts, None)
                if start is None:
                    break
                self._values[start : start + step].sum()
            ends.append(time.perf_counter())

        threads = [threading.Thread(target=read, args=(cpu,)) for cpu in cpus]
        for thread in threads:
            thread.start()
        ready.wait()
        begin = time.perf_counter()
        for thread in threads:
            thread.join()
        return _BYTES / (max(ends) - begin)


def ram_bandwidth(cpus: Sequence[int]) -> float:
    """Bytes per second that threads on ``cpus`` read from RAM together."""
    return ReadableMemory().bandwidth(cpus)
