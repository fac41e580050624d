"""Measure the engine's own work per step in microseconds, on a device that takes no time.

    python benchmarks/engine/host_work.py [--requests 64] [--rounds 5] [--result-json FILE]

Covers a step's whole path in the engine process: scheduler, input batch, sampling parameters,
copies to and from the device, the update of every request, msgpack.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from portalm.backend import (
    KV,
    AttentionSpec,
    Bucket,
    SampleOutput,
    StepFn,
    StepInputs,
    StepMeta,
    Weights,
)
from portalm.config import EngineConfig
from portalm.engine.engine import Engine
from portalm.engine.messages import AddRequest, ToEngine
from portalm.sampling_params import SamplingParams
from portalm_backends.null.backend import NullBackend

NUM_PROMPT = 100
NUM_STEPS = 400
TOKEN = 7

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ToEngine)


class Instant(NullBackend):
    """A device that takes no time: it ignores its inputs and always samples the same token."""

    def prepare(self, meta: StepMeta, specs: Sequence[AttentionSpec]) -> StepMeta:
        return meta

    def compile(self, fn: StepFn, bucket: Bucket | None, example: StepInputs | None) -> StepFn:
        def step(weights: Weights, kv: KV, inputs: StepInputs) -> tuple[KV, SampleOutput]:
            count = len(inputs.meta.logits_rows)
            return kv, SampleOutput(token_ids=torch.full((count,), TOKEN, dtype=torch.int32))

        return step


def make_engine(folder: Path, num_requests: int) -> Engine:
    """Build the scheduler and runner of a small Llama; its weights are never read."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152,
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return Engine(
        EngineConfig(
            model=str(folder),
            device="null",
            load_format="dummy",
            max_num_seqs=num_requests,
            num_gpu_blocks_override=num_requests * 64,
        ),
        backend=Instant(),
    )


def add(engine: Engine, number: int, num_out: int, params: SamplingParams | None = None) -> None:
    """Build one request as the server sends it."""
    prompt = [(number * 7 + j) % 30_000 for j in range(NUM_PROMPT)]
    params = params or SamplingParams(max_tokens=num_out, ignore_eos=True, temperature=0.8)
    message = AddRequest(
        request_id=f"cmpl-{number:032x}", prompt_token_ids=prompt, params=params, seed=number
    )
    engine.add(_decoder.decode(_encoder.encode(message)))


def step(engine: Engine) -> bytes:
    """Run one step and encode its message."""
    return _encoder.encode(engine.step())


def decode_steps(engine: Engine, num_requests: int) -> dict[str, float]:
    """Return median microseconds of steps in which every request samples one token."""
    for i in range(num_requests):
        add(engine, i, NUM_STEPS + 20)
    while len(engine.scheduler.running) < num_requests or any(
        r.num_output_tokens == 0 for r in engine.scheduler.running
    ):
        step(engine)
    seconds = []
    for _ in range(NUM_STEPS):
        started = time.perf_counter()
        step(engine)
        seconds.append(time.perf_counter() - started)
    while engine.has_work():
        step(engine)
    engine.reset_prefix_cache()
    return {"host_us_a_step": statistics.median(seconds) * 1e6}


def whole_requests(engine: Engine, num_requests: int) -> dict[str, float]:
    """Return requests and tokens per second of host work alone, with prefill and admission."""
    num_all, num_out = 16 * num_requests, 64
    started = time.perf_counter()
    for i in range(num_all):
        add(engine, i, num_out)
    while engine.has_work():
        step(engine)
    seconds = time.perf_counter() - started
    engine.reset_prefix_cache()
    return {
        "requests_a_second": num_all / seconds,
        "tokens_a_second": num_all * num_out / seconds,
    }


def main() -> None:
    """Print medians of several rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--result-json", default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine = make_engine(Path(folder), arguments.requests)
        rounds = [
            decode_steps(engine, arguments.requests) | whole_requests(engine, arguments.requests)
            for _ in range(arguments.rounds)
        ]
    figures = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    print(f"{arguments.requests} running requests, medians of {arguments.rounds} rounds (spread)")
    for name, value in figures.items():
        values = [one[name] for one in rounds]
        print(f"  {name:20s} {value:12.0f}   ({min(values):.0f} to {max(values):.0f})")
    if arguments.result_json:
        result = {"requests": arguments.requests, **figures, "rounds": rounds}
        Path(arguments.result_json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
