"""Nothing is compiled while serving, whatever parameters requests have."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.monitoring

from portalm.engine.engine import Engine
from portalm.engine.messages import AddRequest
from portalm.pooling_params import PoolingParams
from portalm.sampling_params import SamplingParams
from portalm_backends.xla.backend import XlaBackend
from tests.tiny import VOCAB_SIZE, ask, make_engine, run

NUM_STEPS = 1000
_COMPILED = "/jax/core/compile/backend_compile_duration"
_TRACED = "/jax/core/compile/jaxpr_trace_duration"


@contextmanager
def counting() -> Iterator[list[str]]:
    """Collect the traces and compilations that JAX does inside this context."""
    events: list[str] = []
    is_over = False

    def listen(event: str, seconds: float, **_: Any) -> None:
        if not is_over and event in (_COMPILED, _TRACED):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        is_over = True


def random_params(rng: random.Random) -> dict[str, Any]:
    """Random choice of sampling parameters; together they use every kind."""
    ids = [rng.randrange(VOCAB_SIZE) for _ in range(6)]
    return rng.choice(
        [
            {},
            {"temperature": 1.0},
            {"temperature": 0.7, "top_p": 0.8, "top_k": 40, "min_p": 0.01},
            {"repetition_penalty": 1.3, "presence_penalty": 0.5, "temperature": 1.0},
            {"logit_bias": {ids[0]: 5.0, ids[1]: -100.0}},
            {"allowed_token_ids": ids},
            {"logprobs": rng.choice([0, 3, 20])},
            {"prompt_logprobs": 2},
            {"min_tokens": 3, "stop_token_ids": ids[:2]},
            {"frequency_penalty": 1.0, "logprobs": 1, "top_k": 5, "temperature": 1.0},
        ]
    )


def add_random(engine: Engine, rng: random.Random, number: int) -> None:
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 2, 15, 16, 17, 60, 150]))]
    if rng.random() < 0.1:
        engine.add(
            AddRequest(
                request_id=str(number),
                prompt_token_ids=prompt,
                params=SamplingParams(),
                seed=0,
                pooling=PoolingParams(task="embed"),
            )
        )
        return
    options = random_params(rng)
    ask(engine, str(number), prompt, seed=number, **{"max_tokens": rng.randint(1, 40), **options})


def test_1000_random_steps_compile_nothing(tmp_path: Path, backend: XlaBackend) -> None:
    engine = make_engine(tmp_path, backend, num_gpu_blocks_override=40)
    rng = random.Random(5)
    failures = []
    with counting() as events:
        number = 0
        while engine.stats().steps_total < NUM_STEPS:
            while engine.stats().num_running + engine.stats().num_waiting < 12:
                add_random(engine, rng, number)
                number += 1
            failures += [o.error for o in engine.step().outputs if o.error]
        run(engine)
    engine.close()

    assert failures == []
    assert events == []
    assert engine.stats().preemptions_total > 0
    assert number > 100


def test_the_counter_detects_a_compilation() -> None:
    with counting() as events:
        jax.jit(lambda x: x + 3)(jax.numpy.ones(7))

    assert _COMPILED in events
