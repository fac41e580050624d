"""The engine on a simulated GPU: graphs, two steps in flight, faults; the tokens never change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from portalm.backend import StepMeta
from portalm.engine.engine import Engine
from portalm.errors import BackendError
from portalm.runner.memory import kv_budget
from portalm_backends.gpu_common.kernels.unpack import unpack_plainly
from portalm_backends.reference.backend import ReferenceBackend
from tests.gpu.fake_device import FakeGpu
from tests.gpu.interpreted import complete
from tests.gpu.plain import PlainGpu
from tests.tiny import ask, make_engine, run, tokens

PROMPTS = [[5, 6, 7], [9] * 30, [11, 12], [17] * 90, [3], [21, 22, 23, 24]]

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0},
    "filters": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.5, "frequency_penalty": 0.5},
    "bias": {"logit_bias": {7: 3.0}, "temperature": 1.0},
    "mask": {"allowed_token_ids": [5, 9, 100, 200], "temperature": 1.0},
    "logprobs": {"logprobs": 3},
    "prompt logprobs": {"prompt_logprobs": 2},
}


def answers(engine: Engine, kind: str, **more: Any) -> dict[str, list[int]]:
    prompts = PROMPTS if kind in ("greedy", "seeded") else PROMPTS[:3]
    for i, prompt in enumerate(prompts):
        ask(engine, f"{kind}-{i}", prompt, seed=i, **{"max_tokens": 9, **SAMPLING[kind], **more})
    return tokens(run(engine))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[int]]]:
    """Tokens of the reference backend by kind of sampling."""
    engine = make_engine(tmp_path_factory.mktemp("reference"), ReferenceBackend())
    return {kind: answers(engine, kind) for kind in SAMPLING}


def captured_engine(gpu: FakeGpu, folder: Path, **settings: Any) -> Engine:
    """An engine on `gpu` that has captured all of its steps."""
    engine = make_engine(folder, PlainGpu(gpu), num_gpu_blocks_override=256, **settings)
    while engine.capture_next():
        pass
    return engine


@pytest.mark.parametrize("seed", range(1))
def test_every_kind_of_sampling_gives_the_reference_tokens(
    tmp_path: Path, expected: dict[str, dict[str, list[int]]], seed: int
) -> None:
    gpu = FakeGpu(seed=seed)
    with gpu.running():
        engine = captured_engine(gpu, tmp_path)
        num_captures = gpu.num_captures

        assert {kind: answers(engine, kind) for kind in SAMPLING} == expected
    # decodes of 1, 2, 4 and 8 requests, mixed steps of 32 and 64 tokens
    assert gpu.num_captures == num_captures == 2 * (4 + 2)
    assert gpu.num_replays > 100


class Poisoned(PlainGpu):
    """Everything that a step must not depend on is out of range or NaN."""

    eager_tokens = 0
    """Tokens of steps that fit no bucket."""

    def _unpack(  # type: ignore[override]
        self,
        packed: torch.Tensor,
        arrays: torch.Tensor,
        table: torch.Tensor,
        num_words: int,
        ids_at: int,
        starts: Any,
    ) -> None:
        arrays.fill_(-123_456_789)
        table.fill_(NUM_BLOCKS - 1)  # the last block is never used, and holds NaN
        unpack_plainly(packed, arrays, table, num_words, ids_at, starts)

    def prepare(self, meta: StepMeta, specs: Any) -> StepMeta:  # type: ignore[override]
        self.eager_tokens += 0 if meta.bucket else len(meta.positions)
        return meta

    def attend(self, *args: Any) -> torch.Tensor:
        meta, out = args[3], super().attend(*args)
        is_token = torch.arange(len(out), dtype=torch.int32) < meta.query_start_loc[-1:]
        return torch.where(is_token[:, None, None], out, float("nan"))


NUM_BLOCKS = 256


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=complete) for i in range(1, 4))])
def test_captured_mixed_steps_depend_on_nothing_but_their_inputs(
    tmp_path: Path, expected: dict[str, dict[str, list[int]]], seed: int
) -> None:
    gpu = FakeGpu(seed=seed)
    with gpu.running():
        backend = Poisoned(gpu)
        engine = make_engine(tmp_path, backend, num_gpu_blocks_override=NUM_BLOCKS - 1)
        while engine.capture_next():
            pass
        backend.eager_tokens = 0
        sampled: dict[str, list[int]] = {}
        for i, prompt in enumerate(PROMPTS):  # while the others decode
            kind = ("greedy", "seeded")[i % 2]
            ask(engine, f"{kind}-{i}", prompt, seed=i, max_tokens=9, **SAMPLING[kind])
            sampled = merged(sampled, run_steps(engine, 2))
        sampled = merged(sampled, tokens(run(engine)))

    for name, answer in sampled.items():
        assert answer == expected[name.partition("-")[0]][name], name
    assert len(sampled) == len(PROMPTS)
    assert backend.eager_tokens == 0


def test_a_step_that_fits_no_bucket_runs_eagerly_between_captured_ones(
    tmp_path: Path, expected: dict[str, dict[str, list[int]]]
) -> None:
    """Prompt logprobs need more rows of logits than a bucket has."""
    gpu = FakeGpu()
    with gpu.running():
        backend = Poisoned(gpu)
        engine = make_engine(tmp_path, backend, num_gpu_blocks_override=NUM_BLOCKS - 1)
        while engine.capture_next():
            pass
        ask(engine, "greedy-0", PROMPTS[0], max_tokens=9)
        early = run_steps(engine, 3)
        ask(engine, "long", PROMPTS[3], max_tokens=9, prompt_logprobs=2)
        sampled = merged(early, tokens(run(engine)))

    assert backend.eager_tokens > 0
    assert sampled["greedy-0"] == expected["greedy"]["greedy-0"]
    assert sampled["long"] == expected["greedy"]["greedy-3"]


@pytest.mark.gpu_interpreted
def test_kinds_of_sampling_may_be_mixed(
    tmp_path: Path, expected: dict[str, dict[str, list[int]]]
) -> None:
    gpu = FakeGpu(seed=1)
    kinds = ["mask", "penalties", "filters", "greedy", "seeded"]
    with gpu.running():
        engine = captured_engine(gpu, tmp_path)
        for i, (kind, prompt) in enumerate(zip(kinds, PROMPTS, strict=False)):
            ask(engine, str(i), prompt, seed=i, **{"max_tokens": 9, **SAMPLING[kind]})
        sampled = tokens(run(engine))

    for i, kind in enumerate(kinds):
        assert sampled[str(i)] == expected[kind][f"{kind}-{i}"], kind


def test_requests_are_served_while_steps_are_captured(
    tmp_path: Path, expected: dict[str, dict[str, list[int]]]
) -> None:
    gpu = FakeGpu()
    with gpu.running():
        engine = make_engine(tmp_path, PlainGpu(gpu), num_gpu_blocks_override=256)
        assert engine.has_captures_left

        assert answers(engine, "greedy") == expected["greedy"]
    assert not engine.has_captures_left


def test_a_decode_step_does_not_wait_for_the_device(tmp_path: Path) -> None:
    gpu = FakeGpu()
    with gpu.running():
        engine = captured_engine(gpu, tmp_path)
        for i in range(4):
            ask(engine, str(i), PROMPTS[0], max_tokens=50, temperature=1.0)
        for _ in range(5):
            engine.step()
        gpu.num_waits = gpu.num_launches = gpu.num_replays = 0
        for _ in range(10):
            engine.step()

    assert gpu.num_waits == 0
    assert gpu.num_replays == 20  # forward pass and sampling, 10 steps
    assert len(engine._in_flight) == 1


def test_preemption_does_not_change_tokens(
    tmp_path: Path, expected: dict[str, dict[str, list[int]]]
) -> None:
    prompts = [[3 + (7 * i + j) % 500 for j in range(60)] for i in range(3)]

    def sampled(engine: Engine) -> dict[str, list[int]]:
        for i, prompt in enumerate(prompts):
            ask(engine, str(i), prompt, seed=i, max_tokens=20, temperature=1.0)
        return tokens(run(engine))

    few = {"num_gpu_blocks_override": 14, "max_model_len": 96, "enable_prefix_caching": False}
    gpu = FakeGpu(seed=2)
    with gpu.running():
        engine = make_engine(tmp_path / "gpu", PlainGpu(gpu), **few)
        on_gpu = sampled(engine)

    assert engine.stats().preemptions_total > 0
    assert on_gpu == sampled(make_engine(tmp_path / "reference", ReferenceBackend()))
    assert engine.stats().num_used_blocks == 0


@pytest.mark.gpu_interpreted
def test_an_abort_in_flight_does_not_change_other_answers(
    tmp_path: Path, expected: dict[str, dict[str, list[int]]]
) -> None:
    gpu = FakeGpu(seed=3)
    with gpu.running():
        engine = captured_engine(gpu, tmp_path)
        for i, prompt in enumerate(PROMPTS):
            ask(engine, f"greedy-{i}", prompt, max_tokens=9)
        early = run_steps(engine, 6)
        engine.abort(["greedy-0", "greedy-3"])
        sampled = merged(early, tokens(run(engine)))

    for i in (1, 2, 4, 5):
        assert sampled[f"greedy-{i}"] == expected["greedy"][f"greedy-{i}"]
    assert engine.stats().num_used_blocks == 0


@pytest.mark.gpu_interpreted
def test_a_stop_token_ends_an_answer_whose_next_token_is_in_flight(
    tmp_path: Path, expected: dict[str, dict[str, list[int]]]
) -> None:
    [answer] = [expected["seeded"]["seeded-1"]]
    stop = answer[5]
    gpu = FakeGpu(seed=4)
    with gpu.running():
        engine = captured_engine(gpu, tmp_path)
        sampled = answers(engine, "seeded", stop_token_ids=(stop,))

    assert sampled["seeded-1"] == answer[: answer.index(stop) + 1]
    assert engine.stats().num_used_blocks == 0


# -- faults -----------------------------------------------------------------------------------


def fail_once(gpu: FakeGpu, make: Callable[[], Exception]) -> Callable[[int], Exception | None]:
    """Make the next launch fail, and no other."""
    at = gpu.num_launches

    def fail(number: int) -> Exception | None:
        return make() if number == at else None

    return fail


def test_one_out_of_memory_error_fails_no_request(
    tmp_path: Path, expected: dict[str, dict[str, list[int]]]
) -> None:
    gpu = FakeGpu()
    with gpu.running():
        engine = captured_engine(gpu, tmp_path)
        for i, prompt in enumerate(PROMPTS):
            ask(engine, f"greedy-{i}", prompt, max_tokens=9)
        early = run_steps(engine, 4)
        gpu.fail_launch = fail_once(gpu, lambda: torch.OutOfMemoryError("no memory"))
        sampled = merged(early, tokens(run(engine)))

    assert sampled == expected["greedy"]
    assert gpu.num_empty_caches > 0


@pytest.mark.gpu_interpreted
def test_a_step_that_does_not_fit_is_split(
    tmp_path: Path, expected: dict[str, dict[str, list[int]]]
) -> None:
    """The device has memory for the hidden states of 20 tokens per step."""

    class Small(PlainGpu):
        def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
            if len(gate_up) > 20:
                raise torch.OutOfMemoryError(f"no memory for {len(gate_up)} tokens")
            return super().silu_mul(gate_up)

    gpu = FakeGpu()
    with gpu.running():
        engine = make_engine(tmp_path, Small(gpu), num_gpu_blocks_override=256)

        assert answers(engine, "greedy") == expected["greedy"]
    assert engine.scheduler.config.max_batch_tokens <= 20


@pytest.mark.gpu_interpreted
def test_a_request_that_never_fits_in_memory_fails_alone(tmp_path: Path) -> None:
    class Broken(PlainGpu):
        def embed(self, token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            if len(token_ids) == 1 and self.is_broken:
                raise torch.OutOfMemoryError("no memory for one token")
            return super().embed(token_ids, table)

        is_broken = False

    gpu = FakeGpu()
    with gpu.running():
        backend = Broken(gpu)
        engine = make_engine(tmp_path, backend, num_gpu_blocks_override=256, enforce_eager=True)
        backend.is_broken = True
        ask(engine, "alone", [5])
        outputs = run(engine)
        backend.is_broken = False
        ask(engine, "after", [5])
        after = run(engine)

    assert outputs["alone"][-1].finish_reason == "error"
    assert len(tokens(after)["after"]) == 8


def test_a_late_device_error_is_raised_as_device_lost(tmp_path: Path) -> None:
    gpu = FakeGpu()
    with gpu.running():
        engine = captured_engine(gpu, tmp_path)
        ask(engine, "a", PROMPTS[0], max_tokens=20)
        engine.step()
        text = "CUDA error: an illegal memory access was encountered"
        gpu.fail_run = fail_once(gpu, lambda: torch.AcceleratorError(text))

        with pytest.raises(BackendError) as caught:
            run(engine)

    assert caught.value.kind == "device_lost"


@pytest.mark.gpu_interpreted
def test_a_capture_that_runs_out_of_memory_is_skipped(
    tmp_path: Path, expected: dict[str, dict[str, list[int]]]
) -> None:
    gpu = FakeGpu()
    with gpu.running():
        engine = make_engine(tmp_path, PlainGpu(gpu), num_gpu_blocks_override=256)
        num_captures = gpu.num_captures

        def fail(number: int) -> Exception | None:
            return torch.OutOfMemoryError("no memory for a graph") if gpu.is_capturing else None

        gpu.fail_launch = fail
        while engine.capture_next():
            pass
        gpu.fail_launch = lambda number: None
        assert gpu.recording is None

        assert answers(engine, "greedy") == expected["greedy"]
    assert gpu.num_captures == num_captures + 1  # the one that failed
    assert gpu.num_replays > 0


def run_steps(engine: Engine, count: int) -> dict[str, list[int]]:
    sampled: dict[str, list[int]] = {}
    for _ in range(count):
        for output in engine.step().outputs:
            sampled.setdefault(output.request_id, []).extend(output.token_ids)
    return sampled


def merged(first: dict[str, list[int]], then: dict[str, list[int]]) -> dict[str, list[int]]:
    return {k: first.get(k, []) + then.get(k, []) for k in {**first, **then}}


# -- memory -----------------------------------------------------------------------------------


@pytest.mark.gpu_interpreted
def test_the_pool_leaves_room_for_the_largest_step_and_the_captures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []

    def budget(*args: Any, activations: int, **kwargs: Any) -> Any:
        kept.append(activations)
        return kv_budget(*args, activations=activations, **kwargs)

    monkeypatch.setattr("portalm.engine.setup.kv_budget", budget)
    made = []
    for settings in ({}, {"enforce_eager": True}):
        gpu = FakeGpu(total=1 << 30)
        with gpu.running():
            engine = make_engine(tmp_path, PlainGpu(gpu), **settings)
            while engine.capture_next():
                pass
        made.append(sum(graph.num_bytes for graph in gpu.graphs))
    plain, eager = kept

    assert eager > 64 * 64 * 4  # at least the hidden states of the largest step
    assert plain - eager >= made[0] > 0  # the memory of the captures
    assert made[1] == 0
