"""Compare PortaLM with transformers' generate: same model, token ids and machine, in one run.

Both sides alternate in one process over several rounds; the results are medians, and the ratios are
those of the medians. CPU seconds over wall seconds show whether all cores were busy.

    python benchmarks/engine/against_transformers.py [--rounds 3] [--dtype bfloat16]
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from portalm import LLM, SamplingParams
from portalm.config import DEFAULT_MODEL
from portalm.models.hub import resolve_model

NUM_REQUESTS, NUM_IN, NUM_OUT = 32, 128, 64
STATIC_BATCH = 8
SINGLE_IN, SINGLE_OUT = 512, 128
RESULTS = Path(__file__).parents[1] / "results"


def make_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Return prompts with different beginnings, so that the prefix cache has no effect."""
    rng = random.Random(seed)
    return [[rng.randrange(100, vocab_size) for _ in range(length)] for _ in range(count)]


class Transformers:
    """Hugging Face transformers with static batches."""

    def __init__(self, dtype: str) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        from portalm.config import EngineConfig
        from portalm.models.loader import open_checkpoint

        # the same dequantized weights on both sides
        checkpoint = open_checkpoint(resolve_model(DEFAULT_MODEL), EngineConfig())
        config = checkpoint.config
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                max_position_embeddings=config.max_position,
                rms_norm_eps=config.norm_eps,
                rope_theta=config.rope.theta,
                tie_word_embeddings=config.tie_word_embeddings,
            )
        )
        state = {name: checkpoint.tensor(name) for name in checkpoint.names()}
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        self.model.to(getattr(torch, dtype))
        self.model.eval()

    def generate(self, prompts: list[list[int]], num_out: int) -> None:
        for start in range(0, len(prompts), STATIC_BATCH):
            ids = torch.tensor(prompts[start : start + STATIC_BATCH])
            with torch.inference_mode():
                out = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=num_out,
                    min_new_tokens=num_out,
                    do_sample=False,
                    pad_token_id=0,
                )
            assert out.shape[1] == ids.shape[1] + num_out

    def decode_rate(self, prompt: list[int], num_out: int) -> float:
        """Measure the tokens per second after the first token."""
        first = timed(lambda: self.generate([prompt], 1))["wall"]
        whole = timed(lambda: self.generate([prompt], num_out))["wall"]
        return (num_out - 1) / (whole - first)


class PortaLM:
    """PortaLM through its offline API."""

    def __init__(self, dtype: str) -> None:
        self.llm = LLM(
            dtype=dtype,
            quantization="none",
            use_tqdm=False,
            enable_prefix_caching=False,
            max_num_seqs=NUM_REQUESTS,
        )

    def generate(self, prompts: list[list[int]], num_out: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=num_out, ignore_eos=True)
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        assert all(len(o.outputs[0].token_ids) == num_out for o in outputs)

    def decode_rate(self, prompt: list[int], num_out: int) -> float:
        """Measure the tokens per second after the first token."""
        params = SamplingParams(temperature=0.0, max_tokens=num_out, ignore_eos=True)
        times = [time.perf_counter() for _ in self.llm.stream(prompt, params)]
        return (num_out - 1) / (times[-1] - times[0])


def timed(run: Callable[[], None]) -> dict[str, float]:
    """Return the wall and CPU seconds of `run`."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def measure(dtype: str, rounds: int) -> dict[str, Any]:
    """Run all rounds of both engines; return the values and their medians."""
    engines = {"portalm": PortaLM(dtype), "transformers": Transformers(dtype)}
    vocab_size = engines["portalm"].llm.engine.ready.vocab_size  # type: ignore[union-attr]
    for engine in engines.values():
        engine.generate(make_prompts(2, 16, vocab_size, seed=1), 4)

    rows: dict[str, dict[str, list[float]]] = {
        name: {"throughput": [], "single_decode": [], "cpu_over_wall": []} for name in engines
    }
    for round_ in range(rounds):
        prompts = make_prompts(NUM_REQUESTS, NUM_IN, vocab_size, seed=10 + round_)
        [single] = make_prompts(1, SINGLE_IN, vocab_size, seed=100 + round_)
        for name, engine in engines.items():
            spent = timed(lambda e=engine, p=prompts: e.generate(p, NUM_OUT))  # type: ignore[misc]
            rows[name]["throughput"].append(NUM_REQUESTS * NUM_OUT / spent["wall"])
            rows[name]["cpu_over_wall"].append(spent["cpu"] / spent["wall"])
            rows[name]["single_decode"].append(engine.decode_rate(single, SINGLE_OUT))
            print(f"round {round_} {name}: {rows[name]}", file=sys.stderr)
    medians = {
        name: {key: statistics.median(values) for key, values in row.items()}
        for name, row in rows.items()
    }
    ratios = {
        key: medians["portalm"][key] / medians["transformers"][key]
        for key in ("throughput", "single_decode")
    }
    return {"rounds": rows, "medians": medians, "ratios": ratios}


def describe_machine() -> dict[str, Any]:
    """Describe the machine and the run."""
    import transformers

    from portalm.backend import report_backends

    return {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "cpu": report_backends()["cpu"].summary,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    arguments = parser.parse_args()

    result = {
        "what": f"{NUM_REQUESTS} requests of {NUM_IN} in, {NUM_OUT} out, greedy, ignore_eos; "
        f"transformers in static batches of {STATIC_BATCH}; single stream {SINGLE_IN} in, "
        f"{SINGLE_OUT} out",
        "model": DEFAULT_MODEL,
        "dtype": arguments.dtype,
        **describe_machine(),
        **measure(arguments.dtype, arguments.rounds),
    }
    print(f"{'':>14} {'throughput':>12} {'1 stream':>10} {'cpu/wall':>9}   (tokens/s, medians)")
    for name, row in result["medians"].items():
        print(
            f"{name:>14} {row['throughput']:12.1f} {row['single_decode']:10.1f} "
            f"{row['cpu_over_wall']:9.2f}"
        )
    ratios = result["ratios"]
    print(f"{'ratio':>14} {ratios['throughput']:12.2f} {ratios['single_decode']:10.2f}")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
