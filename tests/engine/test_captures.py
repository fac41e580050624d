"""When steps are captured: all before service, or one by one between steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from portalm.backend import Bucket, StepFn, StepInputs
from portalm.errors import BackendError
from portalm_backends.reference.backend import ReferenceBackend
from tests.tiny import ask, make_engine, run, tokens

PROMPTS = [[5, 6, 7], [9] * 30, [11, 12]]


class Capturing(ReferenceBackend):
    """The reference backend with padded decodes, of 2 or 8 requests."""

    def __init__(self, *, must_pad: bool, fails_at: int | None = None) -> None:
        super().__init__()
        self.capabilities = replace(type(self).capabilities, static_shapes=must_pad)
        self.captured: list[Bucket] = []
        self.padded_steps = 0
        self.eager_steps = 0
        self._fails_at = fails_at

    def buckets(self, max_tokens: int, max_requests: int, max_blocks: int) -> Sequence[Bucket]:
        decodes = [Bucket(n, n, max_blocks, 1) for n in (2, 8)]
        if not self.capabilities.static_shapes:
            return decodes
        return [*decodes, Bucket(max_tokens, max_requests, max_blocks, max_tokens)]

    def compile(self, fn: StepFn, bucket: Bucket | None, example: StepInputs | None) -> StepFn:
        assert bucket is not None and example is not None
        if len(self.captured) == self._fails_at:
            raise BackendError("oom", "no memory for another capture")
        super().compile(fn, bucket, example)
        self.captured.append(bucket)

        def step(weights, kv, inputs):  # type: ignore[no-untyped-def]
            assert len(inputs.token_ids) == bucket.num_tokens
            self.padded_steps += 1
            return fn(weights, kv, inputs)

        return step

    def prepare(self, meta, specs):  # type: ignore[no-untyped-def]
        self.eager_steps += meta.bucket is None
        return super().prepare(meta, specs)


def answers(tmp_path: Path, backend: ReferenceBackend) -> dict[str, list[int]]:
    engine = make_engine(tmp_path, backend)
    for i, prompt in enumerate(PROMPTS):
        ask(engine, str(i), prompt, max_tokens=12)
    return tokens(run(engine))


def test_a_device_with_static_shapes_captures_everything_before_service(tmp_path: Path) -> None:
    backend = Capturing(must_pad=True)
    engine = make_engine(tmp_path, backend)
    captured = list(backend.captured)
    ask(engine, "a", PROMPTS[0], max_tokens=12)
    run(engine)

    assert len(set(captured)) == 3
    assert captured.count(captured[0]) == 2  # prompts: the usual shape, and the one with every row
    assert captured == sorted(captured, reverse=True)
    assert backend.captured == captured  # none during service
    assert backend.eager_steps == 0
    wide = engine.runner._padding(captured[0], engine.runner.graphs.shapes(captured[0])[-1])
    inputs = engine.runner.executor.inputs(wide)
    with pytest.raises(BackendError, match="sealed"):
        backend.compile(lambda *args: args, captured[0], inputs)


def test_other_devices_serve_while_they_capture(tmp_path: Path) -> None:
    backend = Capturing(must_pad=False)
    engine = make_engine(tmp_path, backend)
    before = len(backend.captured)
    ask(engine, "a", PROMPTS[0], max_tokens=12)
    first = engine.step()
    run(engine)

    assert before < 2  # the engine was ready before they were captured
    assert first.outputs
    assert [b.num_tokens for b in backend.captured] == [8, 2]
    assert backend.padded_steps > 0
    assert not engine.has_captures_left


@pytest.mark.parametrize("must_pad", [True, False])
def test_captured_steps_give_the_same_answers(tmp_path: Path, must_pad: bool) -> None:
    expected = answers(tmp_path, ReferenceBackend())
    backend = Capturing(must_pad=must_pad)

    assert answers(tmp_path, backend) == expected
    assert backend.padded_steps > 10


def test_a_capture_that_runs_out_of_memory_is_skipped(tmp_path: Path) -> None:
    backend = Capturing(must_pad=False, fails_at=1)

    assert answers(tmp_path, backend) == answers(tmp_path, ReferenceBackend())
    assert [b.num_tokens for b in backend.captured] == [8]


def test_a_device_with_static_shapes_does_not_start_without_its_captures(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no memory"):
        make_engine(tmp_path, Capturing(must_pad=True, fails_at=1))
