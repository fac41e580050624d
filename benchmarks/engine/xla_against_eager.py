"""Compare the XLA backend's CPU client with torch eager on the same model, requests and machine.

Both sides alternate in one process over several rounds, in float32; figures are medians, ratios
those of the medians. Torch eager is the reference backend with attention over all requests at
once, as eager code would compute it.

all: from the first prompt; decodes: from the moment when every request has a token, which
excludes the prompts, whose time is matrix products on both sides. Processor seconds are reported
in addition to wall time, since they are more reliable on a busy machine.

    python benchmarks/engine/xla_against_eager.py [--rounds 3] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import torch
import torch.nn.functional as F

from portalm.backend import KV, AttentionSpec, Backend, StepMeta
from portalm.config import DEFAULT_MODEL, EngineConfig
from portalm.engine.engine import Engine
from portalm.engine.messages import AddRequest
from portalm.sampling_params import SamplingParams
from portalm_backends.reference.backend import ReferenceBackend
from portalm_backends.xla.backend import XlaBackend

NUM_IN, NUM_OUT = 128, 64
AT_A_TIME = (8, 32)


class EagerBackend(ReferenceBackend):
    """Torch eager: all decodes are one call of torch's attention."""

    name = "eager"

    def attend(
        self,
        kv: KV,
        layer: int,
        query: torch.Tensor,
        meta: StepMeta,
        spec: AttentionSpec,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute decodes padded to the longest context, everything else as the reference does."""
        if meta.max_query_len > 1:
            return super().attend(kv, layer, query, meta, spec, sinks)
        key, value = (
            kv[layer, i][meta.block_table].flatten(1, 2).transpose(1, 2) for i in (0, 1)
        )  # [S, H_kv, N, D]
        is_seen = torch.arange(key.shape[2]) < meta.seq_lens[:, None]
        # slots without a token may hold NaN
        key, value = (x.masked_fill(~is_seen[:, None, :, None], 0.0) for x in (key, value))
        out = F.scaled_dot_product_attention(
            query[:, :, None], key, value, is_seen[:, None, None], scale=spec.scale, enable_gqa=True
        )
        return out[:, :, 0]


def make_engine(backend: Backend, at_a_time: int) -> Engine:
    """Load the default model in float32."""
    config = EngineConfig(
        model=DEFAULT_MODEL,
        dtype="float32",
        quantization="none",
        max_model_len=1024,
        max_num_seqs=at_a_time,
        enable_prefix_caching=False,
    )
    return Engine(config, backend=backend)


def rates(engine: Engine, at_a_time: int, seed: int) -> dict[str, float]:
    """Measure output tokens per second of wall time and of processor time, greedy requests."""
    rng = random.Random(seed)
    for i in range(at_a_time):
        engine.add(
            AddRequest(
                request_id=f"{seed}-{i}",
                prompt_token_ids=[rng.randrange(100, 49_000) for _ in range(NUM_IN)],
                params=SamplingParams(temperature=0.0, max_tokens=NUM_OUT, ignore_eos=True),
                seed=0,
            )
        )
    begun: set[str] = set()
    num_tokens, marks = 0, [(0, time.perf_counter(), time.process_time())]
    while engine.has_work():
        outputs = engine.step().outputs
        num_tokens += sum(len(output.token_ids) for output in outputs)
        if len(begun) < at_a_time:
            begun |= {output.request_id for output in outputs if output.token_ids}
            if len(begun) == at_a_time:
                marks.append((num_tokens, time.perf_counter(), time.process_time()))
    assert num_tokens == at_a_time * NUM_OUT, num_tokens
    found = {}
    for name, (before, clock, processors) in zip(("all", "decodes"), marks, strict=True):
        found[name] = (num_tokens - before) / (time.perf_counter() - clock)
        found[f"{name}, processors"] = (num_tokens - before) / (time.process_time() - processors)
    return found


def measure(rounds: int) -> dict[str, Any]:
    """Run all rounds of both sides for each number of requests; return medians and ratios."""
    rows: dict[str, Any] = {}
    for at_a_time in AT_A_TIME:
        backends: tuple[Backend, ...] = (XlaBackend(), EagerBackend())
        engines = {backend.name: make_engine(backend, at_a_time) for backend in backends}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
        for engine in engines.values():
            rates(engine, at_a_time, seed=1)
        for round_ in range(rounds):
            for name, engine in engines.items():
                found[name].append(rates(engine, at_a_time, seed=10 + round_))
                print(f"{at_a_time} at a time, {name}: {found[name][-1]}", file=sys.stderr)
        rows[str(at_a_time)] = {"rounds": found, "medians": {}}
        for kind in found["tpu"][0]:
            xla, eager = (statistics.median(x[kind] for x in found[n]) for n in ("tpu", "eager"))
            rows[str(at_a_time)]["medians"][kind] = [xla, eager, xla / eager]
    return rows


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    arguments = parser.parse_args()

    result = {
        "what": f"requests of {NUM_IN} in, {NUM_OUT} out, greedy, ignore_eos, all at a time",
        "model": DEFAULT_MODEL,
        "dtype": "float32",
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "at_a_time": measure(arguments.rounds),
    }
    print(f"output tokens/s, medians {'XLA':>17} {'eager':>8} {'ratio':>6}")
    for at_a_time, row in result["at_a_time"].items():
        for kind, (xla, eager, ratio) in row["medians"].items():
            print(f"{at_a_time:>3} at a time, {kind:<22} {xla:8.1f} {eager:8.1f} {ratio:6.2f}")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
