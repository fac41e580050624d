"""Records and metrics of a finished request, for each way that it can end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from prometheus_client import generate_latest

from portalm.config import EngineConfig
from portalm.engine.client import EngineClient
from portalm.engine.input_processor import ProcessedInput
from portalm.engine.messages import AddRequest, EngineStats, TokenOutput
from portalm.engine.output_processor import OutputProcessor
from portalm.errors import EngineDead
from portalm.sampling_params import SamplingParams
from portalm.server.observability.metrics import Metrics
from portalm.server.observability.watch import RequestObserver, RequestRecord, RequestWatch


@dataclass
class Witness(RequestObserver):
    records: list[RequestRecord] = field(default_factory=list)

    def ended(self, record: RequestRecord) -> None:
        self.records.append(record)


class Watched:
    """One request with its metrics and an observer of its record."""

    def __init__(self, client: EngineClient, **params: int) -> None:
        self.params = SamplingParams(**params)
        self.processed = ProcessedInput(
            request_id="r",
            prompt=None,
            prompt_token_ids=[1, 2, 3],
            requests=[
                AddRequest(
                    request_id=f"r-{i}", prompt_token_ids=[1, 2, 3], params=self.params, seed=0,
                    tenant="somebody",
                )
                for i in range(self.params.n)
            ],
        )  # fmt: skip
        self.outputs = OutputProcessor(None)
        self.outputs.add(self.processed, self.params, arrival_time=5.0)
        self.metrics = Metrics(client, "m")
        self.witness = Witness()
        self.watch = RequestWatch(self.metrics, [self.witness], self.processed, self.params)

    def send(self, id: str = "r-0", tokens: tuple[int, ...] = (), **fields: object) -> None:
        output = TokenOutput(request_id=id, token_ids=list(tokens), **fields)
        for delta in self.outputs.process([output]).deltas:
            self.watch.saw(delta)

    def record(self) -> RequestRecord:
        self.watch.ended()
        [record] = self.witness.records
        return record

    def metric(self, name: str) -> float:
        lines = generate_latest(self.metrics.registry).decode().splitlines()
        [value] = [line.split(" ")[1] for line in lines if line.startswith(f"portalm:{name}")]
        return float(value)


@pytest.fixture
def client() -> Iterator[EngineClient]:
    never_started = EngineClient(EngineConfig())
    yield never_started
    asyncio.run(never_started.shutdown())


def test_record_has_all_finish_reasons_and_total_token_count(client: EngineClient) -> None:
    watched = Watched(client, n=2)
    watched.send("r-0", (7, 8), scheduled_time=1e9, num_cached_tokens=2)
    watched.send("r-1", (7,), finish_reason="stop")
    watched.send("r-0", (9,), finish_reason="length")

    record = watched.record()

    assert record.finish_reasons == ["length", "stop"]
    assert (record.num_generated_tokens, record.num_cached_tokens) == (4, 2)
    assert (record.error, record.tenant) == (None, "somebody")
    assert record.final is not None
    assert watched.metric('request_success_total{finished_reason="stop"') == 1


def test_request_abandoned_in_the_queue_is_recorded_as_aborted(client: EngineClient) -> None:
    record = Watched(client).record()

    assert record.finish_reasons == ["abort"]
    assert (record.num_cached_tokens, record.error) == (None, None)
    assert record.times.queue_s is record.times.decode_s is None
    assert 0 <= record.times.e2e_s < 60


def test_unfinished_answers_of_a_dead_engine_are_recorded_as_failed(client: EngineClient) -> None:
    watched = Watched(client, n=2)
    watched.send("r-0", (7,), finish_reason="stop")
    watched.watch.failed(EngineDead("it is gone"))

    record = watched.record()

    assert record.finish_reasons == ["stop", "error"]
    assert record.error == "it is gone"
    assert watched.metric('request_success_total{finished_reason="error"') == 1


def test_earliest_scheduled_answer_sets_the_requests_times(client: EngineClient) -> None:
    watched = Watched(client, n=2)
    watched.send("r-0", (7,), scheduled_time=200.0)
    watched.send("r-1", (7,), scheduled_time=150.0)
    later = watched.outputs.snapshot("r").metrics
    watched.send("r-0", (7,), scheduled_time=300.0)  # from the restarted engine

    again = watched.outputs.snapshot("r").metrics

    assert later.first_scheduled_time == again.first_scheduled_time
    assert later.prefill_s + later.queue_s == later.time_to_first_token_s


def test_counters_and_histograms_continue_after_engine_restart(client: EngineClient) -> None:
    metrics = Metrics(client, "m")
    for stats in (
        EngineStats(steps_total=1, last_step_tokens=30),
        EngineStats(steps_total=2, last_step_tokens=1),
        EngineStats(steps_total=2, last_step_tokens=1),  # an abort, not a step
    ):
        client._supervisor._add_stats(stats)
    client._supervisor._totals = {"steps_total": 2}
    client._supervisor._add_stats(EngineStats(steps_total=1, last_step_tokens=30))

    text = generate_latest(metrics.registry).decode()

    for line in (
        'portalm:engine_steps_total{model_name="m"} 3.0',
        'vllm:iteration_tokens_total_bucket{le="1.0",model_name="m"} 1.0',
        'vllm:iteration_tokens_total_bucket{le="16.0",model_name="m"} 1.0',
        'vllm:iteration_tokens_total_bucket{le="32.0",model_name="m"} 3.0',
        'vllm:iteration_tokens_total_bucket{le="+Inf",model_name="m"} 3.0',
        'vllm:iteration_tokens_total_count{model_name="m"} 3.0',
        'vllm:iteration_tokens_total_sum{model_name="m"} 61.0',
    ):
        assert line in text.splitlines(), line
    assert "_created" not in text
