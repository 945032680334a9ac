"""Streams and events of the fake device behave as those of a GPU, and show what would go wrong on one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from transformers_kt.backends.gpu.device import CudaDevice, Device
from transformers_kt.backends.gpu.fake import FakeDevice

LONGEST_DELAY_S = 0.003
ORDINARY = torch.ones(4)


def devices() -> list[Device]:
    fakes: list[Device] = [FakeDevice(0, 1 << 30, longest_delay_s=LONGEST_DELAY_S, seed=seed) for seed in range(3)]
    return fakes + [CudaDevice(number) for number in range(torch.cuda.device_count())]


@pytest.fixture(params=devices(), ids=lambda device: f"{type(device).__name__}-{device.name}")
def device(request: pytest.FixtureRequest) -> Device:
    found: Device = request.param
    return found


def round_trip(device: Device, steps: int) -> torch.Tensor:
    """A chain of steps that alternates between two streams and the host, as layers on GPU and CPU do."""
    compute, copies = device.stream(), device.stream()
    values = device.empty((8,), torch.float32)
    staged, result = device.pinned((8,), torch.float32), device.pinned((8,), torch.float32)
    ready, back = device.event(), device.event()
    compute.launch(lambda: values.fill_(1.0))
    for _ in range(steps):
        compute.launch(lambda: values.add_(1.0))
        compute.record(ready)
        copies.wait(ready)
        copies.copy(staged, values)
        copies.record(back)
        back.synchronize()
        result.copy_(2.0 * staged)  # what the CPU computes
        compute.copy(values, result)
    compute.record(ready)
    ready.synchronize()
    return values.cpu()


def test_work_of_streams_and_host_keeps_its_order_whatever_the_delays(device: Device) -> None:
    expected = 1.0
    for _ in range(5):
        expected = 2.0 * (expected + 1.0)
    assert round_trip(device, 5).tolist() == [expected] * 8


def test_a_stream_that_waits_for_no_event_reads_what_is_not_there_yet() -> None:
    device = FakeDevice(0, 1 << 30, longest_delay_s=LONGEST_DELAY_S, seed=1)
    slow, fast = device.stream(), device.stream()
    values, staged = device.empty((4,), torch.float32), device.pinned((4,), torch.float32)
    for _ in range(20):
        slow.launch(lambda: None)
    slow.launch(lambda: values.fill_(1.0))
    fast.copy(staged, values)  # no wait
    done = device.event()
    fast.record(done)
    done.synchronize()
    assert staged.isnan().all()


def test_a_wait_holds_for_the_recording_that_came_before_it(device: Device) -> None:
    first, second = device.stream(), device.stream()
    values, event, done = device.empty((4,), torch.float32), device.event(), device.event()
    first.launch(lambda: values.fill_(3.0))
    first.record(event)
    second.wait(event)
    first.launch(lambda: None)
    first.record(event)
    second.launch(lambda: values.mul_(2.0))
    second.record(done)
    done.synchronize()
    assert values.cpu().tolist() == [6.0] * 4


def test_captured_work_runs_again_on_the_same_tensors(device: Device) -> None:
    values, stream, done = device.empty((4,), torch.float32), device.stream(), device.event()
    graph = device.capture(lambda: values.add_(1.0))
    stream.launch(lambda: values.zero_())
    for _ in range(3):
        graph.launch(stream)
    stream.record(done)
    done.synchronize()
    assert values.cpu().tolist() == [3.0] * 4


def test_replaying_computes_with_what_is_there_now_and_runs_no_python(device: Device) -> None:
    values, out = device.empty((4,), torch.float32), device.empty((4,), torch.float32)
    values.fill_(1.0)
    runs = []

    def work() -> None:
        runs.append(1)
        between = (values * 2.0).view(2, 2).t().reshape(-1)  # memory of the graph, views of it, copies
        between += 1.0
        out.copy_(between)

    graph, stream, done = device.capture(work), device.stream(), device.event()
    captured = len(runs)
    stream.launch(lambda: values.copy_(torch.arange(4.0)))
    graph.launch(stream)
    stream.record(done)
    done.synchronize()
    assert out.cpu().tolist() == [1.0, 5.0, 3.0, 7.0]
    assert len(runs) == captured


@pytest.mark.parametrize(
    "what",
    [
        lambda device, values: values.fill_(values[0].item()),
        lambda device, values: values.fill_(1.0 if values[0] > 0 else 2.0),
        lambda device, values: values.cpu(),
        lambda device, values: values.tolist(),
        lambda device, values: values[values > 0],
        lambda device, values: values.add_(ORDINARY),
        lambda device, values: values.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0], device=values.device)),
    ],
    ids=["item", "if", "cpu", "tolist", "indices", "ordinary-memory", "constant"],
)
def test_a_capture_refuses_what_needs_the_host(device: Device, what: Callable[[Device, torch.Tensor], object]) -> None:
    values = device.empty((4,), torch.float32)
    values.fill_(1.0)
    with pytest.raises(RuntimeError):
        device.capture(lambda: what(device, values))
    # And goes on.
    device.capture(lambda: values.add_(1.0))


@pytest.mark.parametrize("asked", ["memory", "pinned memory", "a stream", "an event"])
def test_a_capture_on_a_fake_refuses_what_outlives_it(asked: str) -> None:
    device = FakeDevice(0, 1 << 20)
    other, stream, event = FakeDevice(1, 1 << 20).empty((4,), torch.float32), device.stream(), device.event()
    work: dict[str, Callable[[], object]] = {
        "memory": lambda: device.empty((4,), torch.float32),
        "pinned memory": lambda: device.pinned((4,), torch.float32),
        "a stream": lambda: stream.launch(lambda: None),
        "an event": event.synchronize,
    }
    with pytest.raises(RuntimeError, match="which no captured work may"):
        device.capture(work[asked])
    with pytest.raises(RuntimeError, match="no memory of the device"):
        device.capture(lambda: other.zero_())
    values, kept = device.empty((4,), torch.float32), list[torch.Tensor]()
    device.capture(lambda: kept.append(values.zero_() + 1.0))
    assert kept[0].isnan().all()


def test_an_error_in_a_stream_is_raised_by_who_waits_and_leaves_the_device_usable() -> None:
    device = FakeDevice(0, 1 << 30)
    stream, event = device.stream(), device.event()
    values = device.empty((2,), torch.float32)

    def fail() -> None:
        raise ValueError("an expert failed")

    stream.launch(fail)
    stream.record(event)
    with pytest.raises(ValueError, match="an expert failed"):
        event.synchronize()
    stream.launch(lambda: values.fill_(1.0))
    stream.record(event)
    event.synchronize()
    assert values.tolist() == [1.0, 1.0]


def test_memory_that_nobody_has_written_holds_nan() -> None:
    device = FakeDevice(0, 1 << 30)
    assert device.empty((3,), torch.bfloat16).isnan().all()
    assert device.pinned((3,), torch.float32).isnan().all()
    assert (device.empty((3,), torch.int32) < 0).all()
