"""The machine's limits, and the speed limit of a model that follows from them."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peers.base import cpu_flags
from peers.cases import Case
from peers.checkpoints import Shape

BYTES_PER_WEIGHT = {"bf16": 2.0, "int8": 1.0, "int4": 18 / 32}
"""Bytes per weight: int4 in groups of 32 with 16-bit scales; int8 scales are negligible."""

_INSTRUCTIONS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16",
    "amx_int8", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
_SOURCE = Path(__file__).with_suffix(".c")
_PASSES = 8


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Limits measured at one model's size in one format, with all processors busy."""

    read_bytes_s: float
    flops_s: float
    """Operations per second of the fastest multiply-add or dot product for the format."""

    def limit(self, case: Case, shape: Shape, fmt: str) -> float:
        """Compute the limit of `case`, in the case's unit.

        Assumes that reading the weights and computing overlap perfectly and that keys and values
        are read at the same bandwidth; nothing else is counted.
        """
        step_s = self._decode_s(1, case.num_in + case.num_out // 2, shape, fmt)
        if case.figure == "decode":
            return 1 / step_s
        if case.figure == "ttft":
            return self._prefill_s(case.num_in, 1, shape, fmt)
        rows = case.concurrency
        num_new = case.shared_prefix + case.num_requests * (case.num_in - case.shared_prefix)
        prefill_s = self._prefill_s(num_new, case.num_requests, shape, fmt)
        decode_s = self._decode_s(rows, case.num_in + case.num_out // 2, shape, fmt)
        num_steps = case.num_out * case.num_requests / rows
        return case.num_requests * case.num_out / (prefill_s + num_steps * decode_s)

    def _decode_s(self, rows: int, context: int, shape: Shape, fmt: str) -> float:
        weights_s = shape.num_weights * BYTES_PER_WEIGHT[fmt] / self.read_bytes_s
        compute_s = 2 * shape.num_weights * rows / self.flops_s
        return max(weights_s, compute_s) + rows * context * shape.kv_bytes / self.read_bytes_s

    def _prefill_s(self, num_tokens: int, num_requests: int, shape: Shape, fmt: str) -> float:
        """Seconds for `num_tokens` new tokens of `num_requests`, the head for last tokens only."""
        layers = 2 * (shape.num_weights - shape.num_head_weights) * num_tokens
        head = 2 * shape.num_head_weights * num_requests
        mean = num_tokens / num_requests
        attention = (
            2 * shape.num_layers * shape.hidden_size * mean * num_tokens
        )  # half of the scores is masked
        read_s = shape.num_weights * BYTES_PER_WEIGHT[fmt] / self.read_bytes_s
        return max(read_s, (layers + head + attention) / self.flops_s)


def build(cache: Path) -> Path:
    """Compiles and runs the measuring program."""
    program = cache / "ceilings"
    if not program.exists() or program.stat().st_mtime < _SOURCE.stat().st_mtime:
        cache.mkdir(parents=True, exist_ok=True)
        command = ["cc", "-O3", "-march=native", "-ffp-contract=fast", "-pthread"]
        subprocess.run([*command, str(_SOURCE), "-o", str(program)], check=True)
    return program


def measure(program: Path, shape: Shape, fmt: str) -> Ceiling:
    """Measure the current limits for a model of this shape."""
    return measure_bytes(program, int(shape.num_weights * BYTES_PER_WEIGHT[fmt]), fmt)


def measure_bytes(program: Path, size: int, fmt: str) -> Ceiling:
    """Measure the current limits for repeated reads of `size` bytes."""
    reads = _run(program, "read", str(size), str(_PASSES))
    fp32, bf16, int8 = _run(program, "flops")
    usable = {"bf16": [fp32, bf16], "int8": [fp32, bf16, int8], "int4": [fp32, bf16, int8]}[fmt]
    return Ceiling(read_bytes_s=statistics.median(reads) * 1e9, flops_s=max(usable) * 1e9)


def _run(program: Path, *arguments: str) -> list[float]:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def limits(
    ceilings: Mapping[str, Sequence[Mapping[str, float]]],
    cases: Sequence[Case],
    shapes: Mapping[str, Shape],
) -> dict[str, dict[str, float]]:
    """Compute the limit of each case by "model format", from the medians of the rounds."""
    found = {}
    for key, rounds in ceilings.items():
        model, fmt = key.split()
        ceiling = Ceiling(
            **{name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        )
        found[key] = {case.name: ceiling.limit(case, shapes[model], fmt) for case in cases}
    return found


def instructions() -> list[str]:
    """List the processor's instruction sets that affect matrix products."""
    flags = cpu_flags()
    return [name for name in _INSTRUCTIONS if name in flags]
