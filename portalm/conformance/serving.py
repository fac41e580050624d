"""L4: serving. Scheduling never changes an answer, and one failure ends one request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from portalm.backend import (
    KV,
    SCALED_KV_DTYPES,
    SampleOutput,
    StepFn,
    StepInputs,
    Weights,
)
from portalm.conformance.base import CheckFailed, Named
from portalm.conformance.check import Check
from portalm.conformance.subject import Subject
from portalm.conformance.tiny import ask, finish, prompts, tiny_engine, tokens
from portalm.engine.engine import Engine
from portalm.errors import BackendError, BackendErrorKind

_SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "top_p": 0.9, "seed": 7},
    "penalties": {"repetition_penalty": 1.5, "frequency_penalty": 0.5},
}
_KINDS = tuple(Named(name) for name in _SAMPLING)


def _answers(
    subject: Subject, kind: str, max_tokens: int = 12, **settings: Any
) -> tuple[dict[str, list[int]], Engine]:
    with tiny_engine(subject, **settings) as engine:
        for request_id, prompt in prompts().items():
            ask(engine, request_id, prompt, max_tokens=max_tokens, **_SAMPLING[kind])
        return tokens(finish(engine)), engine


def _require_same(
    subject: Subject, what: str, actual: dict[str, list[int]], expected: dict[str, list[int]]
) -> None:
    """Require equal answers if batch_invariant is claimed; otherwise allow few to differ."""
    different = [k for k in expected if actual.get(k) != expected[k]]
    allowed = 0 if subject.has("batch_invariant") else len(expected) // 3
    if len(different) > allowed:
        one = different[0]
        raise CheckFailed(
            f"{what}: {len(different)} of {len(expected)} answers differ; {one}: "
            f"{actual.get(one)}, expected {expected[one]}"
        )


def check_preemption(subject: Subject, case: Named) -> None:
    """Requests that are preempted and resumed give the same tokens."""
    kind = case.name
    settings: dict[str, Any] = {"enable_prefix_caching": False}
    if case.name in SCALED_KV_DTYPES:
        subject.needs_kv_dtype(case.name)
        kind, settings = "greedy", {**settings, "kv_cache_dtype": case.name}
    expected, _ = _answers(subject, kind, 60, **settings)
    blocks = 256 // subject.block_size + 2
    actual, engine = _answers(subject, kind, 60, num_gpu_blocks_override=blocks, **settings)
    if engine.stats().preemptions_total == 0:
        raise CheckFailed("no request was preempted: the KV pool is too large for this check")
    _require_same(subject, "after preemption", actual, expected)


def check_prefix_hit(subject: Subject, case: Named) -> None:
    """A prefix hit gives the same tokens."""
    with tiny_engine(subject) as engine:
        answers = []
        for round_ in range(2):
            for request_id, prompt in prompts().items():
                ask(engine, f"{round_}-{request_id}", prompt, **_SAMPLING[case.name])
            found = tokens(finish(engine))
            answers.append({k.partition("-")[2]: v for k, v in found.items()})
        if engine.stats().prefix_hits_total == 0:
            raise CheckFailed("the prefix cache had no hits")
    _require_same(subject, "with a prefix hit", answers[1], answers[0])


def check_alone(subject: Subject, case: Named) -> None:
    """A request alone gives the same tokens as in a batch."""
    together, _ = _answers(subject, case.name)
    alone: dict[str, list[int]] = {}
    with tiny_engine(subject, enable_prefix_caching=False) as engine:
        for request_id, prompt in prompts().items():
            ask(engine, request_id, prompt, **_SAMPLING[case.name])
            alone |= tokens(finish(engine))
    _require_same(subject, "alone", alone, together)


def check_abort(subject: Subject, case: None) -> None:
    """Aborting running requests frees all blocks."""
    with tiny_engine(subject) as engine:
        for request_id, prompt in prompts().items():
            ask(engine, request_id, prompt, max_tokens=50)
        for _ in range(5):
            engine.step()
        engine.abort(list(prompts()))
        finish(engine)
        stats = engine.stats()
    if stats.num_used_blocks or stats.num_running or stats.num_waiting:
        raise CheckFailed(f"after the abort {stats.num_used_blocks} blocks are still held")


def check_sealed(subject: Subject, case: None) -> None:
    """After warm-up, requests of sizes that occurred before need no new capture."""
    with tiny_engine(subject, enable_prefix_caching=False) as engine:
        for sealed in (False, True):
            for request_id, prompt in prompts().items():
                ask(engine, request_id, prompt)
            if sealed:
                engine.runner.graphs.seal()
            outputs = finish(engine)
            failed = [o.error for many in outputs.values() for o in many if o.error]
            if failed:
                engine.runner.graphs.unseal()
                raise CheckFailed(f"sealed={sealed}: {failed[0]}")
        engine.runner.graphs.unseal()


def _with_fault(engine: Engine, fault: Callable[[int], None]) -> None:
    """Call `fault` with each step's number before the step runs."""
    graphs, number = engine.runner.graphs, 0
    step_for = graphs.step_for

    def faulty_step_for(inputs: StepInputs) -> StepFn:
        step = step_for(inputs)

        def run(weights: Weights, kv: KV, inputs: StepInputs) -> tuple[KV, SampleOutput]:
            nonlocal number
            number += 1
            fault(number)
            return step(weights, kv, inputs)

        return run

    graphs.step_for = faulty_step_for  # type: ignore[method-assign]


def check_failure(subject: Subject, case: Named) -> None:
    """A failed step ends one request, or none if memory ran out; other answers are unchanged."""
    expected, _ = _answers(subject, "greedy")
    kind: BackendErrorKind = "oom" if case.name == "out of memory" else "kernel"

    def fault(number: int) -> None:
        if number == 4:
            raise BackendError(kind, f"planted: {case.name}")

    with tiny_engine(subject) as engine:
        _with_fault(engine, fault)
        for request_id, prompt in prompts().items():
            ask(engine, request_id, prompt)
        outputs = finish(engine)
        held = engine.stats().num_used_blocks
    failed = [k for k, many in outputs.items() if many[-1].finish_reason == "error"]
    if len(failed) != (kind != "oom") or held:
        raise CheckFailed(
            f"{len(failed)} requests ended after one failure, {held} blocks are still held"
        )
    actual = {k: v for k, v in tokens(outputs).items() if k not in failed}
    _require_same(subject, "after a failure", actual, {k: expected[k] for k in actual})


CHECKS = (
    Check(
        "L4",
        "preempt and resume",
        check_preemption,
        (*_KINDS, Named("int8")),
    ),
    Check("L4", "prefix hit", check_prefix_hit, _KINDS),
    Check("L4", "alone or in a batch", check_alone, _KINDS),
    Check("L4", "abort frees blocks", check_abort),
    Check("L4", "no capture after warm-up", check_sealed),
    Check(
        "L4",
        "failed step",
        check_failure,
        (Named("out of memory"), Named("kernel error")),
    ),
)
