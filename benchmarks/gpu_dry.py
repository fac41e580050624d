"""Run the GPU backend on a dry GPU: everything but the kernels, for a GPU that is not present.

    python benchmarks/gpu_dry.py --target sm_90       the engine, and the kit's shapes
    python benchmarks/gpu_dry.py --target gfx942 --parts engine --model 1b --layers 2

The engine starts a model with random weights, captures its steps, and serves decodes, mixed steps
and prompts. Reported for each: launches outside graphs, replays, compiles, bytes uploaded and host
time per step. The kit's cases run for their launches; their numbers mean nothing here. Any other
error fails. Kernels are compiled by Triton itself, so TRITON_CACHE_DIR is then a warm cache for
this target and this Triton. See benchmarks/gpu/dry.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from gpu.common import LLAMA_1B, LLAMA_8B, TINY, model_folder
from gpu.dry import TARGETS, Counts, DryGpu, backend_for, dry_gpu

MODELS = {"8b": LLAMA_8B, "1b": LLAMA_1B, "tiny": {**TINY, "torch_dtype": "bfloat16"}}

NUM_STEPS = 20
"""Steps of each kind of traffic, after as many to warm up."""


@dataclasses.dataclass(kw_only=True)
class Report:
    """What a part of the run did."""

    name: str
    num_steps: int
    host_ms: float
    """Median host time of a step in milliseconds, with the cost of counting in it."""
    counts: Counts

    def __post_init__(self) -> None:
        """Print one line of the table; counts are per step."""
        n, c = max(1, self.num_steps), self.counts
        if not self.name:
            return
        print(
            f"{self.name:<34}{self.num_steps:>6}{sum(c.launches.values()) / n:>10,.1f}"
            f"{c.replays / n:>9,.1f}{c.uploads / n:>9,.1f}{c.uploaded_bytes / n:>13,.0f}"
            f"{len(c.compiles):>9}{sum(c.waits.values()):>7}{self.host_ms:>9,.2f}",
            flush=True,
        )

    def as_json(self) -> dict[str, Any]:
        """All counts, without the signatures of kernels."""
        found: dict[str, Any] = {
            field.name: getattr(self.counts, field.name)
            for field in dataclasses.fields(self.counts)
        }
        found["compiles"] = [[c.kernel, round(c.seconds, 2)] for c in self.counts.compiles]
        return {"name": self.name, "steps": self.num_steps, "host_ms": self.host_ms, **found}


HEAD = (
    f"{'':<34}{'steps':>6}{'outside':>10}{'replays':>9}{'uploads':>9}{'bytes':>13}"
    f"{'compiles':>9}{'waits':>7}{'ms':>9}"
)


class Traffic:
    """Requests for an engine on a dry GPU."""

    def __init__(self, gpu: DryGpu, engine: Any) -> None:
        """Serve on `engine`."""
        self._gpu = gpu
        self._engine = engine
        self._rng = random.Random(0)
        self._num_asked = 0
        self.late_compiles: Counter[str] = Counter()
        """Kernels compiled since the first request, by name."""

    def ask(self, num_prompt: int, num_out: int, **params: Any) -> None:
        """Add a request with a random prompt; greedy unless `params` say otherwise."""
        from portalm.engine.messages import AddRequest
        from portalm.sampling_params import SamplingParams

        vocab = self._engine.model_config.vocab_size
        self._num_asked += 1
        self._engine.add(
            AddRequest(
                request_id=str(self._num_asked),
                prompt_token_ids=[self._rng.randrange(3, vocab) for _ in range(num_prompt)],
                params=SamplingParams(
                    **{"temperature": 0.0, "max_tokens": num_out, "ignore_eos": True, **params}
                ),
                seed=self._num_asked,
            )
        )

    def until(self, num_running: int) -> None:
        """Step until this many requests run and none waits with a prompt."""
        for _ in range(10_000):
            scheduler = self._engine.scheduler
            if len(scheduler.running) >= num_running and not any(
                r.num_pending_tokens > 1 for r in scheduler.running
            ):
                return
            self._engine.step()
        raise RuntimeError(f"no {num_running} requests run after 10,000 steps")

    def drain(self) -> None:
        """Step until no work is left."""
        while self._engine.has_work():
            self._engine.step()
        self._note(self._gpu.take())

    def measure(self, name: str, num_steps: int, before_each: Any = None) -> Report:
        """Count what `num_steps` steps do; `before_each` may add requests."""
        self._note(self._gpu.take())
        seconds = []
        for _ in range(num_steps):
            if before_each is not None:
                before_each()
            begin = time.perf_counter()
            self._engine.step()
            seconds.append(time.perf_counter() - begin)
        host_ms = sorted(seconds)[len(seconds) // 2] * 1e3
        counts = self._note(self._gpu.take())
        return Report(name=name, num_steps=num_steps, host_ms=host_ms, counts=counts)

    def _note(self, counts: Counts) -> Counts:
        self.late_compiles.update(c.kernel for c in counts.compiles)
        return counts


def run_engine(gpu: DryGpu, arguments: argparse.Namespace) -> tuple[list[Report], Counter[str]]:
    """Start, capture and serve; the reports of each part, and the kernels compiled in service."""
    from portalm.config import EngineConfig
    from portalm.engine.engine import Engine

    model = {**MODELS[arguments.model], "max_position_embeddings": 1 << 17}
    if arguments.layers:
        model["num_hidden_layers"] = arguments.layers
    begin = time.perf_counter()
    engine = Engine(
        EngineConfig.from_dict(
            {
                "model": model_folder(model),
                "load_format": "dummy",
                "max_num_seqs": arguments.requests,
                "max_num_batched_tokens": 8192,
                "max_model_len": arguments.max_model_len,
                "enable_prefix_caching": False,
                **json.loads(arguments.settings),
            }
        ),
        backend=backend_for(gpu),
    )
    started = time.perf_counter()
    reports = [
        Report(name="start", num_steps=1, host_ms=(started - begin) * 1e3, counts=gpu.take())
    ]
    num_captures = 0
    while engine.capture_next():
        num_captures += 1
    captured = (time.perf_counter() - started) * 1e3
    counts = gpu.take()
    name = f"{num_captures} buckets, {counts.captures} graphs"
    reports.append(Report(name=name, num_steps=1, host_ms=captured, counts=counts))
    traffic, most = Traffic(gpu, engine), arguments.requests
    for count in sorted({1, max(1, most // 4), most}):
        for _ in range(count):
            traffic.ask(arguments.context, 3 * NUM_STEPS)
        traffic.until(count)
        traffic.measure("", NUM_STEPS)
        name = f"decode, {count} x {arguments.context}"
        reports.append(traffic.measure(name, NUM_STEPS))
        traffic.drain()
    reports += _mixed(traffic, most)
    for name, length in (
        ("prompt, 1024", 1024),
        ("prompt, 3000", 3000),
        ("prompt, 20000 in chunks", 20_000),
    ):
        if length < arguments.max_model_len:
            traffic.ask(length, 1)
            reports.append(traffic.measure(name, -(-length // 8192)))
            traffic.drain()
    return reports, traffic.late_compiles


def _mixed(traffic: Traffic, most: int) -> list[Report]:
    """A server under load: in every step requests decode and others start with a prompt."""
    reports = []
    for num_prompt in (30, 120, 500):
        running = max(1, most - 8)
        for i in range(running):
            traffic.ask(16, 4 * NUM_STEPS + i % 7, temperature=float(i % 2), top_p=0.9)
        traffic.until(running)

        def add(num_prompt: int = num_prompt) -> None:
            traffic.ask(num_prompt, 3)

        traffic.measure("", NUM_STEPS, add)
        name = f"mixed, {running} decodes + {num_prompt}"
        reports.append(traffic.measure(name, NUM_STEPS, add))
        traffic.drain()
    return reports


def run_kit(gpu: DryGpu, arguments: argparse.Namespace) -> tuple[list[Report], list[str]]:
    """Launch the kit's cases; the reports, and every error that is not a wrong number."""
    from gpu.dry_backend import launch_cases

    from portalm.conformance.kit import all_items
    from portalm.conformance.subject import Subject

    subject = Subject(backend_for(gpu))
    reports, errors = [], []
    for level in arguments.levels.split(","):
        items = all_items([level], arguments.only)
        begin = time.perf_counter()
        for error in launch_cases(subject, items):
            errors.append(error)
            print(error, flush=True)
        taken = (time.perf_counter() - begin) * 1e3
        name = f"kit {level}, {len(items)} cases"
        reports.append(Report(name=name, num_steps=1, host_ms=taken, counts=gpu.take()))
    return reports, errors


def main() -> int:
    """Run the parts; return 1 if anything failed, or a kernel was compiled after startup."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True, choices=TARGETS, help="GPU to compile for")
    parser.add_argument("--parts", default="engine,kit", help="engine, kit (default: both)")
    parser.add_argument("--model", default="8b", choices=MODELS, help="shape (default: 8b)")
    parser.add_argument("--layers", type=int, help="number of layers (default: the model's)")
    parser.add_argument("--requests", type=int, default=256, help="max_num_seqs (default: 256)")
    parser.add_argument("--context", type=int, default=512, help="of decodes (default: 512)")
    parser.add_argument("--max-model-len", type=int, default=4096, help="(default: 4096)")
    parser.add_argument("--settings", default="{}", help="more engine settings, as JSON")
    parser.add_argument("--levels", default="L0,L1,L2,L3", help="of the kit (default: L0 to L3)")
    parser.add_argument("--only", default="", help="cases of the kit whose name contains this")
    parser.add_argument("--json", type=Path, help="file for all counts")
    arguments = parser.parse_args()
    reports: list[Report] = []
    errors: list[str] = []
    with dry_gpu(arguments.target) as gpu:
        print(
            f"{gpu.summary}, torch {torch.__version__}; cache {os.environ.get('TRITON_CACHE_DIR')}"
        )
        print(HEAD, flush=True)
        if "engine" in arguments.parts:
            found, late = run_engine(gpu, arguments)
            reports += found
            if late:
                errors.append(f"compiled after startup: {dict(late)}")
        if "kit" in arguments.parts:
            more, failed = run_kit(gpu, arguments)
            reports, errors = reports + more, errors + failed
    print(f"{len(errors)} errors", *errors, sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps([r.as_json() for r in reports], indent=1) + "\n")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
