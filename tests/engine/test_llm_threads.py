"""`LLM` with several callers: streams read in turn, threads, forks, and its end."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from portalm import LLM, SamplingParams
from portalm.engine.messages import StepOutputs
from portalm.errors import BackendError, EngineDead, InvalidRequest
from tests.tiny import VOCAB_SIZE, add_byte_tokenizer, make_config_folder

LIMIT_S = 60


def make_llm(folder: Path, **settings: Any) -> LLM:
    return LLM(
        str(folder), device="cpu", load_format="dummy", dtype="float32", use_tqdm=False, **settings
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_byte_tokenizer(make_config_folder(tmp_path_factory.mktemp("threads") / "tiny"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    llm = make_llm(folder)
    yield llm
    llm.close()


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def ids_of(llm: LLM, prompt: list[int], max_tokens: int) -> list[int]:
    [output] = llm.generate(prompt, greedy(max_tokens), use_tqdm=False)
    return output.outputs[0].token_ids


def wait_until(is_true: Callable[[], bool]) -> None:
    until = time.monotonic() + LIMIT_S
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.01)


def is_idle(llm: LLM) -> bool:
    stats = llm.get_metrics()
    return not (stats.num_running or stats.num_waiting or stats.num_used_blocks)


def test_two_streams_read_in_turn_give_what_each_gives_alone(llm: LLM) -> None:
    prompts = [5, 6, 7], [8, 9]
    alone = [ids_of(llm, list(prompt), 20) for prompt in prompts]

    streams = [llm.stream(list(prompt), greedy(20)) for prompt in prompts]
    found: list[list[int]] = [[], []]
    for deltas in zip(*streams, strict=True):
        for ids, delta in zip(found, deltas, strict=True):
            ids += delta.token_ids

    assert found == alone


def test_a_call_during_a_stream_takes_none_of_its_deltas(llm: LLM) -> None:
    alone = ids_of(llm, [5, 6, 7], 20)
    other = ids_of(llm, [30, 31], 40)

    stream = llm.stream([5, 6, 7], greedy(20))
    first = next(stream)
    assert ids_of(llm, [30, 31], 40) == other

    assert [*first.token_ids, *(i for delta in stream for i in delta.token_ids)] == alone


def test_calls_from_threads_get_their_own_answers(llm: LLM) -> None:
    """Property: threads that generate, stream, and abandon streams in any order lose nothing."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(1 + i % 7)] for i in range(12)]
    right = [ids_of(llm, prompt, 1 + i) for i, prompt in enumerate(prompts)]

    def work(seed: int) -> int:
        mine = random.Random(seed)
        for _ in range(12):
            i = mine.randrange(len(prompts))
            kind = mine.choice(("generate", "stream", "abandon", "many", "refused"))
            if kind == "generate":
                assert ids_of(llm, prompts[i], 1 + i) == right[i]
            elif kind == "stream":
                deltas = list(llm.stream(prompts[i], greedy(1 + i)))
                assert [t for delta in deltas for t in delta.token_ids] == right[i]
            elif kind == "abandon":
                stream = llm.stream(prompts[i], greedy(100))
                next(stream)
                stream.close()
            elif kind == "many":
                params = [greedy(1 + j) for j in range(len(prompts))]
                outputs = llm.generate(prompts, params, use_tqdm=False)
                assert [o.outputs[0].token_ids for o in outputs] == right
            else:
                with pytest.raises(InvalidRequest, match="outside the vocabulary"):
                    llm.generate([prompts[i], [VOCAB_SIZE]], use_tqdm=False)
        return seed

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(6), timeout=LIMIT_S)) == list(range(6))
    wait_until(lambda: is_idle(llm))


def test_a_stream_that_is_dropped_is_aborted(llm: LLM) -> None:
    stream = llm.stream([5, 6, 7], greedy(150))
    next(stream)

    del stream

    wait_until(lambda: is_idle(llm))
    assert llm.reset_prefix_cache()


def test_a_call_interrupted_while_it_is_added_leaves_no_request(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = llm._worker.call

    def interrupted(work: Callable[[Any], Any]) -> None:
        call(work)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm._worker, "call", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([5, 6], greedy(450), use_tqdm=False)

    assert llm.get_metrics().num_running == 0


def test_a_stream_may_be_closed_by_a_garbage_collection_within_another_call(llm: LLM) -> None:
    worker = llm._worker._worker

    def nested() -> None:
        with worker._lock:
            worker.drop(["unknown"])

    thread = threading.Thread(target=nested, daemon=True)
    thread.start()
    thread.join(LIMIT_S)

    assert not thread.is_alive()


def test_closing_ends_the_calls_that_wait(folder: Path) -> None:
    llm = make_llm(folder, max_model_len=256)
    entered = threading.Event()
    step = llm.engine.step

    def slow() -> StepOutputs:
        entered.set()
        time.sleep(0.02)
        return step()

    llm.engine.step = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ids_of, llm, [5, 6], 200) for _ in range(2)]
        assert entered.wait(LIMIT_S)
        llm.close()
        for call in waiting:
            with pytest.raises(EngineDead, match="closed"):
                call.result(LIMIT_S)
    with pytest.raises(EngineDead, match="create a new LLM"):
        llm.generate([5], use_tqdm=False)
    llm.close()


def test_a_lost_device_ends_every_call_with_its_error(folder: Path) -> None:
    llm = make_llm(folder)

    def lost() -> StepOutputs:
        raise BackendError("device_lost", "planted")

    llm.engine.step = lost  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="planted"):
        ids_of(llm, [5], 4)
    with pytest.raises(EngineDead, match="planted"):
        llm.get_metrics()


def test_dropping_the_last_reference_ends_the_thread_and_frees_the_engine(folder: Path) -> None:
    llm = make_llm(folder)
    ids_of(llm, [5], 4)
    [thread] = [t for t in threading.enumerate() if t is llm._worker._worker._thread]
    engine = weakref.ref(llm.engine)

    del llm
    gc.collect()

    thread.join(LIMIT_S)
    assert not thread.is_alive()
    gc.collect()
    assert engine() is None


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; return its exit status, -1 for a timeout."""
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT_S)
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_can_use_a_new_llm_and_not_its_parents(llm: LLM, folder: Path) -> None:
    right = ids_of(llm, [5, 6, 7], 12)

    def work() -> None:
        with pytest.raises(EngineDead, match="create a new LLM in process"):
            llm.generate([5], use_tqdm=False)
        assert ids_of(make_llm(folder), [5, 6, 7], 12) == right

    assert in_child(work) == 0
    assert ids_of(llm, [5, 6, 7], 12) == right


# -- forms of a prompt ------------------------------------------------------------------------


def test_a_prompt_may_be_a_dictionary_as_in_vllm(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("abc")
    right = ids_of(llm, ids, 6)

    for prompts, text in (
        ({"prompt": "abc"}, "abc"),
        ([{"prompt": "abc"}], "abc"),
        ({"prompt_token_ids": ids}, None),
        ([{"prompt_token_ids": ids, "prompt": "abc"}], "abc"),
        ({"prompt": "abc", "prompt_token_ids": None, "cache_salt": "x"}, "abc"),
    ):
        [output] = llm.generate(prompts, greedy(6), use_tqdm=False)

        assert (output.outputs[0].token_ids, output.prompt) == (right, text), prompts
        assert output.prompt_token_ids == ids
    mixed = llm.generate(["abc", ids, {"prompt": "abc"}], greedy(6), use_tqdm=False)
    assert [o.outputs[0].token_ids for o in mixed] == [right] * 3
    assert [t for d in llm.stream({"prompt": "abc"}, greedy(6)) for t in d.token_ids] == right


def test_a_salt_in_a_dictionary_separates_cached_blocks(llm: LLM) -> None:
    ids = list(range(3, 67))
    salted = {"prompt_token_ids": ids, "cache_salt": "mine"}
    ids_of(llm, ids, 2)

    cached = [
        llm.generate(prompt, greedy(2), use_tqdm=False)[0].num_cached_tokens
        for prompt in (salted, salted, ids)
    ]

    assert cached[0] == 0 and cached[1] > 0 and cached[2] > 0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"text": "abc"}, "'text', which is not supported; supported keys: prompt"),
        ({"prompt": "abc", "multi_modal_data": {"image": 1}}, "'multi_modal_data'"),
        ({}, 'needs the key "prompt" or "prompt_token_ids"'),
        ({"prompt": [1, 2]}, "'prompt' must be a string, not list"),
        ({"prompt_token_ids": "abc"}, "is a string"),
        ({"prompt_token_ids": 5}, "list of token ids, not int"),
        ({"prompt": "abc", "cache_salt": 3}, "'cache_salt' must be a string"),
        (b"abc", "not bytes"),
        (7, "not int"),
        ([None], "not NoneType"),
    ],
    ids=str,
)
def test_other_prompts_are_refused_by_name(llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        llm.generate(prompt, greedy(2), use_tqdm=False)
