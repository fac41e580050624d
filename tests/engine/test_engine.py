"""The engine on simulated devices: fast, slow, failing and lost."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from portalm.errors import BackendError, ConfigError, InvalidRequest, Unsupported
from portalm_backends.null.backend import NullBackend, next_id
from tests.tiny import VOCAB_SIZE, ask, make_engine, run, tokens


def expected_chain(prompt: list[int], num_tokens: int) -> list[int]:
    """The tokens that the null device samples after `prompt`."""
    known = list(prompt)
    for _ in range(num_tokens):
        known.append(next_id(known[-1], len(known) - 1, VOCAB_SIZE))
    return known[len(prompt) :]


def random_prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(1, 200))] for _ in range(count)
    ]


@pytest.fixture(params=[1, 2], ids=["one step in flight", "two steps in flight"])
def steps_in_flight(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def test_sampled_tokens_are_fed_back_at_their_positions(
    tmp_path: Path, steps_in_flight: int
) -> None:
    engine = make_engine(tmp_path, NullBackend(max_steps_in_flight=steps_in_flight))
    prompts = random_prompts(20)
    for i, prompt in enumerate(prompts):
        ask(engine, str(i), prompt, max_tokens=40)

    sampled = tokens(run(engine))

    assert sampled == {str(i): expected_chain(p, 40) for i, p in enumerate(prompts)}


def test_a_step_is_dispatched_while_the_previous_one_runs(tmp_path: Path) -> None:
    backend = NullBackend(latency_s=0.02, max_steps_in_flight=2)
    engine = make_engine(tmp_path, backend)
    ask(engine, "a", [5, 6, 7], max_tokens=10)
    engine.step()

    assert len(engine._in_flight) == 1


def test_the_first_output_has_the_time_of_the_requests_first_step(
    tmp_path: Path, steps_in_flight: int
) -> None:
    engine = make_engine(
        tmp_path,
        NullBackend(max_steps_in_flight=steps_in_flight),
        num_gpu_blocks_override=34,  # too few: requests preempt each other
        enable_prefix_caching=False,
    )
    started = time.monotonic()
    for i in range(6):
        ask(engine, str(i), [5] * 20, max_tokens=100)

    outputs = run(engine)

    assert engine.stats().preemptions_total > 0
    for first, *others in outputs.values():
        assert first.scheduled_time is not None
        assert started < first.scheduled_time < time.monotonic()
        assert all(other.scheduled_time is None for other in others)


def test_a_request_is_reported_as_running_before_its_first_token(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, NullBackend(max_steps_in_flight=2))
    ask(engine, "long", [5] * 150)  # takes three steps
    ask(engine, "waits", [6] * 50)

    [output] = engine.step().outputs

    assert (output.request_id, output.token_ids) == ("long", [])
    assert output.scheduled_time is not None


def test_preemption_changes_no_token(tmp_path: Path, steps_in_flight: int) -> None:
    engine = make_engine(
        tmp_path,
        NullBackend(max_steps_in_flight=steps_in_flight),
        num_gpu_blocks_override=34,
        enable_prefix_caching=False,
    )
    prompts = random_prompts(12, seed=1)
    for i, prompt in enumerate(prompts):
        ask(engine, str(i), prompt, max_tokens=100)

    sampled = tokens(run(engine))

    assert engine.stats().preemptions_total > 0
    assert sampled == {str(i): expected_chain(p, 100) for i, p in enumerate(prompts)}
    assert engine.stats().num_used_blocks == 0


def test_abort_in_flight_frees_every_block(tmp_path: Path, steps_in_flight: int) -> None:
    engine = make_engine(
        tmp_path, NullBackend(latency_s=0.001, max_steps_in_flight=steps_in_flight)
    )
    for i, prompt in enumerate(random_prompts(8, seed=2)):
        ask(engine, str(i), prompt, max_tokens=100)
    for _ in range(5):
        engine.step()

    ended = engine.abort([str(i) for i in range(0, 8, 2)] + ["unknown"])
    sampled = tokens(run(engine))

    assert [(o.request_id, o.finish_reason) for o in ended] == [
        (str(i), "abort") for i in range(0, 8, 2)
    ]
    assert all(len(sampled[str(i)]) <= 100 for i in range(1, 8, 2))
    assert engine.stats().num_used_blocks == 0
    assert engine.stats().num_running == engine.stats().num_waiting == 0


def test_a_failed_step_ends_one_request_and_no_other(tmp_path: Path, steps_in_flight: int) -> None:
    backend = NullBackend(max_steps_in_flight=steps_in_flight, fail_at_step=6, fail_kind="kernel")
    engine = make_engine(tmp_path, backend)
    prompts = random_prompts(8, seed=3)
    for i, prompt in enumerate(prompts):
        ask(engine, str(i), prompt, max_tokens=20)

    outputs = run(engine)

    failed = [k for k, many in outputs.items() if many[-1].finish_reason == "error"]
    assert len(failed) == 1
    assert "kernel" in (outputs[failed[0]][-1].error or "")
    sampled = tokens(outputs)
    for i, prompt in enumerate(prompts):
        if str(i) not in failed:
            assert sampled[str(i)] == expected_chain(prompt, 20)
    assert engine.stats().num_used_blocks == 0


def test_a_step_that_runs_out_of_memory_is_retried_and_ends_no_request(
    tmp_path: Path, steps_in_flight: int
) -> None:
    backend = NullBackend(max_steps_in_flight=steps_in_flight, fail_at_step=2, fail_kind="oom")
    engine = make_engine(tmp_path, backend)
    prompts = random_prompts(8, seed=3)
    for i, prompt in enumerate(prompts):
        ask(engine, str(i), prompt, max_tokens=20)

    sampled = tokens(run(engine))

    assert sampled == {str(i): expected_chain(prompt, 20) for i, prompt in enumerate(prompts)}
    assert engine.scheduler.config.max_batch_tokens == 32  # half of 64
    assert engine.stats().num_used_blocks == 0


def test_a_lost_device_ends_the_engine(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, NullBackend(fail_at_step=3, fail_kind="device_lost"))
    ask(engine, "a", [5], max_tokens=20)

    with pytest.raises(BackendError) as caught:
        run(engine)

    assert caught.value.kind == "device_lost"


def test_bad_token_ids_are_refused_and_other_requests_continue(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, NullBackend())
    ask(engine, "good", [5, 6])

    with pytest.raises(
        InvalidRequest, match=r"token id 512 is outside the vocabulary \(0 to 511\)"
    ):
        ask(engine, "bad", [5, 512])
    with pytest.raises(InvalidRequest, match="stop_token_ids contains token id 9999"):
        ask(engine, "bad", [5], stop_token_ids=(9999,))

    assert tokens(run(engine)) == {"good": expected_chain([5, 6], 8)}


def test_a_pool_too_small_for_one_request_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"room for 160 tokens \(10 blocks.*needs 32 blocks"):
        make_engine(tmp_path, NullBackend(), num_gpu_blocks_override=10)


def test_an_unsupported_block_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="--block-size"):
        make_engine(tmp_path, device="cpu", block_size=5)


def test_an_unsupported_kv_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"float8_e5m2.*int8.*--kv-cache-dtype"):
        make_engine(tmp_path, NullBackend(), kv_cache_dtype="float8_e5m2")


def test_max_model_len_above_the_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="512 positions"):
        make_engine(tmp_path, NullBackend(), max_model_len=1024)


def test_prompt_logprobs_are_reported_once_despite_preemption(tmp_path: Path) -> None:
    engine = make_engine(
        tmp_path, device="reference", num_gpu_blocks_override=32, enable_prefix_caching=False
    )
    prompts = {str(i): [3 + (7 * i + j) % 500 for j in range(100)] for i in range(4)}
    for request_id, prompt in prompts.items():
        ask(engine, request_id, prompt, max_tokens=60, prompt_logprobs=2)

    outputs = run(engine)

    assert engine.stats().preemptions_total > 0
    for request_id, many in outputs.items():
        entries = [e for o in many for e in o.prompt_logprobs or []]
        assert [e.token_id for e in entries] == prompts[request_id][1:]
        assert all(len(e.top) == 2 for e in entries)
