"""The simulated device exposes the faults that the tests of the backend rely on."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.fake_device import FakeGpu, SynchronizesInCapture


def test_nothing_is_computed_before_the_host_waits() -> None:
    gpu = FakeGpu()
    x = torch.ones(3)
    with gpu.running():
        y = x + 1

    assert y.isnan().all()
    gpu.drain()
    assert y.tolist() == [2, 2, 2]


def test_overwriting_a_buffer_before_its_copy_is_done_changes_the_copy() -> None:
    gpu = FakeGpu()
    host, device = torch.ones(3), torch.zeros(3)
    with gpu.running():
        device.copy_(host)
    host.fill_(5)

    gpu.drain()

    assert device.tolist() == [5, 5, 5]


def test_only_events_order_streams() -> None:
    def last(seed: int, *, waits: bool) -> float:
        gpu = FakeGpu(seed=seed)
        side, x = gpu.new_stream(), torch.zeros(1)
        with gpu.running():
            x.fill_(1)
            if waits:
                side.wait_event(gpu.current_stream().record_event())
            with gpu.on(side):
                x.fill_(2)
        gpu.drain()
        return float(x)

    assert {last(seed, waits=False) for seed in range(20)} == {1, 2}
    assert {last(seed, waits=True) for seed in range(20)} == {2}


def test_a_replay_uses_the_memory_of_the_capture() -> None:
    gpu = FakeGpu()
    x = torch.tensor([1.0])
    graph = gpu.new_graph()
    with gpu.running():
        with gpu.on(gpu.new_stream()):
            graph.capture_begin(gpu.new_pool(), "thread_local")
            y = x * 2
            graph.capture_end()
        captured = y.clone()
        gpu.drain()
        x.fill_(7)
        graph.replay()
    gpu.drain()

    assert captured.isnan().all()  # a capture computes nothing
    assert y.tolist() == [14]


def test_reading_a_value_on_the_host_breaks_a_capture() -> None:
    gpu = FakeGpu()
    x = torch.tensor([1.0])
    with gpu.running(), gpu.on(gpu.new_stream()):
        gpu.new_graph().capture_begin(gpu.new_pool(), "thread_local")
        with pytest.raises(SynchronizesInCapture):
            x.item()


def test_tensors_on_the_host_are_computed_immediately() -> None:
    gpu = FakeGpu()
    x = torch.ones(2)
    with gpu.running():
        host = (x + 1).cpu()

        assert (host[:1] * 3).numpy().tolist() == [6]
    assert gpu.num_waits == 1
