"""How the host waits for a device: spinning or asleep, how late it goes on, and what experts then take on its cores."""

from __future__ import annotations

import time

from random_experts import V3, RandomCalls, Widths, random_experts

from .setting import Setting, median_of, waited

_BUSY_S = 300e-6  # what a layer of the largest models keeps a GPU busy
_ROUNDS = 200


def measure(setting: Setting) -> None:
    experts = setting.size((V3, 32, "Q4_K", "Q6_K"), (Widths(64, 32, 2), 4, "Q8_0", "Q8_0"))
    compute = RandomCalls(random_experts(*experts), tokens=1)
    rounds = setting.size(_ROUNDS, 2)
    alone = median_of(lambda: _taken(compute), rounds)
    setting.report.add("Waiting for an event", {"the host": "does not wait", "experts after it, us": alone * 1e6})
    for how, event in (("spins", setting.device.event()), ("sleeps", setting.device.event(is_blocking=True))):
        late, taken = [], []
        stream, work = setting.device.stream(), setting.sleep(_BUSY_S)
        for _ in range(rounds):
            stream.launch(work)
            stream.record(event)
            late.append(waited(event) - _BUSY_S)
            taken.append(_taken(compute))
        row = {"the host": how, "wait - 300 us, us": sorted(late)[rounds // 2] * 1e6}
        setting.report.add("Waiting for an event", {**row, "experts after it, us": sorted(taken)[rounds // 2] * 1e6})


def _taken(compute: RandomCalls) -> float:
    begin = time.perf_counter()
    compute()
    return time.perf_counter() - begin
