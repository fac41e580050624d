"""Predictions for every goal on an H200, from the model's shapes and what the code launches.

    python benchmarks/gpu/predict.py        prints them, with the time of each part of a step

A step is a list of kernels. Each takes the larger of three times: bytes over bandwidth, operations
over the matrix peak, and instructions over the issue rate. Between two kernels of a graph the
device drains and starts again, which costs more where the second does not start early
(docs/adr/0031). The facts of the device are measured by the stage `calib`; those that no run has
measured are assumptions, and say so. gpu_run.py writes the predictions before its first result.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.common import LLAMA_1B, LLAMA_8B
from gpu.lengths import FP8_ROWS, lengths_like_sharegpt

# -- the device -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """An H200."""

    bytes_per_s: float = 4.3e12
    """Copy bandwidth, measured by torch in an earlier calibration."""
    flops: float = 790e12
    """bfloat16 matrix product of 8192 x 8192, measured by torch in an earlier calibration."""
    num_cores: int = 132
    clock: float = 1.755e9
    """Assumption: between the base clock (1.5) and the boost clock (1.98) under load."""
    issue_share: float = 0.7
    """Assumption: of 4 warp instructions per clock and multiprocessor."""
    gap_s: float = 1.1e-6
    """Assumption: from the last instruction of a kernel to the first of the next in a graph."""
    early_gap_s: float = 0.6e-6
    """Assumption: the same if the next kernel started early and waits for its inputs."""
    floor_s: float = 1.6e-6
    """Assumption: the least duration of a kernel: two dependent loads, a reduction, a store."""
    read_share: float = 0.94
    """Assumption: bandwidth of a product with few rows, as a share of `bytes_per_s`."""
    product_share: float = 0.93
    """Assumption: of `flops`, for a product whose tiles fill the device."""
    fp8_factor: float = 1.85
    """Assumption: float8 products over bfloat16 products, at equal tiles."""

    @property
    def issues_per_s(self) -> float:
        """Warp instructions of all multiprocessors."""
        return 4 * self.issue_share * self.clock * self.num_cores


FLOPS_PER_CYCLE = 4096
"""Of a multiprocessor's tensor cores in bfloat16, by data sheet."""


# -- the code ---------------------------------------------------------------------------------


MIXED_SIZES = (
    *(32, 64, 128, 192, 224, 256, 288, 320, 352, 384, 448),
    *(512, 576, 640, 704, 768, 896, 1024),
)
"""Tokens of the mixed steps that are captured (backends/gpu_common/buckets.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """What the engine launches, as counted on the dry GPU, and the loops of its SASS for sm_90."""

    decode_cycles: dict[str, int] = field(
        default_factory=lambda: {"bfloat16": 2240, "int8": 2152, "fp8": 2022}
    )
    """Issue cycles of the decode attention for 64 tokens of a KV head of 128, over all warps
    (python -m tests.gpu.loop_instructions), by KV dtype."""
    prefill_cycles: int = 3592
    """The same for a prompt: 128 rows by 64 tokens."""
    exposed_share: float = 0.5
    """Assumption: of the shorter of issue and matrix time in that loop, which overlap."""
    num_other: int = 16
    """Launches of a decode step outside its layers, sampling and the upload included."""
    num_quantizing: int = 1
    """Launches of a layer with float8 weights that only quantize; norms and silu do the rest."""
    eager_layer_s: float = 0.19e-3
    """Host time of a layer in a step that is not captured."""
    host_s: float = 0.5e-3
    """Assumption: host time of a captured step."""
    captures_mixed: bool = True
    """Steps with prompts are captured up to the last of `MIXED_SIZES`."""


@dataclass(frozen=True, slots=True)
class Model:
    """Shapes of a Llama."""

    config: dict[str, Any]
    weight_bytes: float = 2
    """Of a number in the layers' weights; the output head stays in bfloat16."""
    kv_dtype: str = "bfloat16"

    @property
    def products(self) -> list[tuple[int, int]]:
        """(N, K) of the four products of a layer."""
        c = self.config
        heads, kv_heads, size = (
            c["num_attention_heads"],
            c["num_key_value_heads"],
            c["head_dim"],
        )
        hidden, inner = c["hidden_size"], c["intermediate_size"]
        return [
            ((heads + 2 * kv_heads) * size, hidden),
            (hidden, heads * size),
            (2 * inner, hidden),
            (hidden, inner),
        ]

    @property
    def kv_bytes(self) -> float:
        """Of a token in one layer; 8-bit codes have a 16-bit scale per head."""
        heads, size = self.config["num_key_value_heads"], self.config["head_dim"]
        return 2 * heads * (2 * size if self.kv_dtype == "bfloat16" else size + 2)


@dataclass(frozen=True, slots=True)
class Step:
    """What a step computes."""

    decodes: int = 0
    context: float = 0
    """Mean context of the decodes."""
    prompts: tuple[tuple[int, int], ...] = ()
    """(first token, number of tokens) of each piece of a prompt in this step."""
    num_rows: int | None = None
    """Rows of logits; None: one for each decode and prompt."""

    @property
    def num_tokens(self) -> int:
        """New tokens."""
        return self.decodes + sum(count for _, count in self.prompts)

    @property
    def rows(self) -> int:
        """Rows of logits."""
        return self.decodes + len(self.prompts) if self.num_rows is None else self.num_rows


@dataclass(frozen=True, slots=True)
class Predictor:
    """Durations of steps."""

    model: Model
    device: Device = field(default_factory=Device)
    code: Code = field(default_factory=Code)

    def product(self, rows: int, n: int, k: int, weight_bytes: float) -> float:
        """Seconds of a product of x [rows, k] with a weight [n, k]."""
        d = self.device
        moved = weight_bytes * n * k + 2 * rows * (n + k)
        peak = d.flops * d.product_share * (d.fp8_factor if weight_bytes < 2 else 1)
        # the fullest of the usual tile sizes: a partly filled wave takes as long as a full one
        best = max(
            _fill(rows, n, tile_rows, tile_columns, d.num_cores)
            for tile_rows, tile_columns in ((64, 128), (64, 256), (128, 128), (128, 256))
        )
        return max(moved / (d.bytes_per_s * d.read_share), 2 * rows * n * k / (peak * best))

    def decode_attention(self, decodes: int, context: float) -> float:
        """Seconds of one layer's decodes."""
        d, c, config = self.device, self.code, self.model.config
        moved = decodes * context * self.model.kv_bytes
        tiles = decodes * config["num_key_value_heads"] * math.ceil(context / 64)
        issued = tiles * c.decode_cycles[self.model.kv_dtype] / d.issues_per_s
        # a tile has 64 tokens of a head of 128: smaller heads need proportionally fewer
        issued *= config["head_dim"] / 128
        return max(moved / (d.bytes_per_s * d.read_share), issued)

    def prefill_attention(self, prompts: Sequence[tuple[int, int]]) -> float:
        """Seconds of one layer's prompts."""
        config = self.model.config
        size = config["num_attention_heads"] * config["head_dim"]
        flops = sum(4 * size * count * (first + (count + 1) / 2) for first, count in prompts)
        tile_flops = 4 * 128 * 64 * 128
        matrix = tile_flops / (FLOPS_PER_CYCLE * self.device.num_cores * self.device.clock)
        issue = self.code.prefill_cycles / self.device.issues_per_s
        shorter, longer = sorted((matrix, issue))
        return flops / tile_flops * (longer + self.code.exposed_share * shorter)

    def padded(self, step: Step) -> tuple[int, int]:
        """(tokens, rows of logits) that a step computes, padding included."""
        if not step.prompts:
            size = next((n for n in (1, 2, 4) if n >= step.decodes), -(-step.decodes // 8) * 8)
            return size, size
        if not self.is_captured(step):
            return step.num_tokens, step.rows
        few = 32 if step.rows <= 32 and step.num_tokens <= 512 else 256
        tokens = min(size for size in MIXED_SIZES if size >= step.num_tokens)
        return tokens, min(tokens, few)

    def is_captured(self, step: Step) -> bool:
        """True if a step is replayed."""
        if not step.prompts:
            return True
        return self.code.captures_mixed and step.num_tokens <= MIXED_SIZES[-1]

    def parts(self, step: Step) -> dict[str, float]:
        """Seconds of a step on the device, by kind of work."""
        d, config = self.device, self.model.config
        tokens, rows = self.padded(step)
        layers, is_fp8 = config["num_hidden_layers"], self.model.weight_bytes < 2
        products = [
            self.product(tokens, n, k, self.model.weight_bytes) for n, k in self.model.products
        ]
        head = self.product(rows, config["vocab_size"], config["hidden_size"], 2)
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        norm = self._small(tokens * hidden * 2 * 4)
        silu = self._small(tokens * inner * 2 * 3)
        rotate = self._small(tokens * hidden * 2 * 3)
        # a step with decodes launches narrow tiles, one with prompts wide tiles; contexts are split
        # (and merged by another kernel) where whole ones leave half of the device idle
        kinds = (step.decodes > 0) + bool(step.prompts)
        splits = step.decodes * config["num_key_value_heads"] < 2 * d.num_cores
        num_merges = kinds if splits and not step.prompts else 0
        attention = self.decode_attention(step.decodes, step.context) if step.decodes else 0.0
        attention += self.prefill_attention(step.prompts)
        small = 2 * norm + silu + rotate + num_merges * d.floor_s
        num_early = 4 + kinds + num_merges
        if is_fp8:
            small += self.code.num_quantizing * self._small(tokens * hidden * 3)
            num_early += self.code.num_quantizing
        # products of the vendor do not start early; everything else does
        gaps = 4 * d.gap_s + num_early * d.early_gap_s
        sampling = 2 * self._small(rows * config["vocab_size"] * 4)
        return {
            "products": layers * sum(products),
            "attention": layers * attention,
            "other kernels": layers * small,
            "gaps": layers * gaps + self.code.num_other * d.gap_s,
            "head": head,
            "sampling": sampling + (self.code.num_other - 3) * d.floor_s,
        }

    def _small(self, num_bytes: float) -> float:
        """Seconds of a kernel that is not a product; up to 30 MB stay in L2, at twice the rate."""
        rate = self.device.bytes_per_s * (2 if num_bytes < 30e6 else 0.85)
        return max(self.device.floor_s, num_bytes / rate)

    def seconds(self, step: Step) -> float:
        """Seconds of a step, with the host's time where it is longer than the device's."""
        host = self.code.host_s
        if not self.is_captured(step):
            host += self.code.eager_layer_s * self.model.config["num_hidden_layers"]
        return max(sum(self.parts(step).values()), host)

    # -- goals ----------------------------------------------------------------------------------

    def decode(self, streams: int, context: float) -> float:
        """Tokens per second of all streams."""
        return streams / self.seconds(Step(streams, context))

    def prefill(self, length: int, count: int = 1) -> float:
        """Seconds of `count` prompts in steps of at most 8,192 tokens."""
        taken, left = 0.0, [(0, length)] * count
        while left:
            pieces, room = [], 8192
            while left and room:
                first, rest = left.pop(0)
                now = min(rest, room)
                pieces.append((first, now))
                room -= now
                if rest > now:
                    left.insert(0, (first + now, rest - now))
            taken += self.seconds(Step(prompts=tuple(pieces)))
        return taken

    def offline(self, pairs: Sequence[tuple[int, int]], most: int = 256) -> float:
        """Generated tokens per second of requests submitted at once, in order.

        Every step decodes what runs, and fills up to 8,192 tokens with waiting prompts.
        """
        taken, waiting = 0.0, list(pairs)
        running: list[list[int]] = []  # [context, tokens left]
        started: list[int] = []  # position and length of the prompt that was cut by the last step
        while waiting or running:
            decodes, room = len(running), 8192 - len(running)
            context = sum(c for c, _ in running) / decodes if decodes else 0
            pieces, new = [], []
            while waiting and room and len(running) + len(new) < most:
                length, num_out = waiting[0]
                first = started[0] if started else 0
                now = min(length - first, room)
                pieces.append((first, now))
                room -= now
                if first + now < length:
                    started = [first + now]
                    break
                started = []
                waiting.pop(0)
                new.append([length + 1, num_out - 1])
            taken += self.seconds(Step(decodes, context, tuple(pieces), decodes + len(new)))
            running = [[c + 1, n - 1] for c, n in running] + new
            running = [r for r in running if r[1] > 0]
        return sum(num_out for _, num_out in pairs) / taken


def _fill(rows: int, columns: int, tile_rows: int, tile_columns: int, cores: int) -> float:
    """Share of the peak that tiles of this size reach; K may be split to fill the last wave."""
    tiles = math.ceil(rows / tile_rows) * math.ceil(columns / tile_columns)
    used = rows * columns / (tile_rows * tile_columns * tiles)
    waves = max(tiles * k / (math.ceil(tiles * k / cores) * cores) for k in (1, 2, 4))
    # smaller tiles read their operands more often than the tensor cores multiply them
    reuse = 0.75 + 0.25 * (tile_rows * tile_columns) / (128 * 256)
    return reuse * used * waves


# -- goals ------------------------------------------------------------------------------------

GOALS: dict[str, tuple[float | None, float, str]] = {
    "8b: decode, 1 x 512": (286, 256, "tok/s"),
    "8b: decode, 64 x 1024": (11_660, 10_200, "tok/s"),
    "8b: decode, 256 x 1024": (19_915, 17_500, "tok/s"),
    "8b: prefill, 2048": (54_070, 43_000, "tok/s"),
    "8b: TTFT, 1024": (18.5, 24, "ms"),
    "8b: offline, 1000 requests": (20_700, 16_000, "tok/s"),
    "8b: exec to first token": (None, 8, "s"),
    "8b: idle at 256 streams": (0, 1, "%"),
    "1b: idle at 64 streams": (0, 5, "%"),
    "decode attention, 64 x 1024": (4.3, 0.88 * 4.3, "TB/s"),
    "decode attention, 64 x 8192": (4.3, 0.92 * 4.3, "TB/s"),
    "experts, 64 tokens": (4.3, 0.75 * 4.3, "TB/s"),
    "experts, 8192 tokens": (790, 0.5 * 790, "TFLOP/s"),
    "fp8: 128 in, 128 out": (43_550, 28_447, "tok/s"),
    "fp8: 1000 in, 1000 out": (23_125, 17_591, "tok/s"),
    "fp8: 2048 in, 128 out": (4_767, 3_531, "tok/s"),
    "fp8: 2048 in, 2048 out": (14_790, 12_022, "tok/s"),
}
"""(limit, goal, unit) of each figure. A limit counts bytes and operations alone."""

_8B = Predictor(Model(LLAMA_8B))
_1B = Predictor(Model(LLAMA_1B))
_FP8 = Predictor(Model(LLAMA_8B, weight_bytes=1, kv_dtype="fp8"))


def predicted() -> dict[str, float]:
    """The prediction of each figure that this file has a model of."""
    found = {
        f"8b: decode, {streams} x {context}": _8B.decode(streams, context)
        for streams, context in ((1, 512), (64, 1024), (256, 1024))
    }
    for length in (2048, 3584):
        count = 8192 // length * 4
        found[f"8b: prefill, {length}"] = count * length / _8B.prefill(length, count)
    for length in (1024, 2048, 8192):
        found[f"8b: TTFT, {length}"] = 1e3 * _8B.prefill(length)
    found["8b: offline, 1000 requests"] = _8B.offline(lengths_like_sharegpt(1000))
    decodes_only = replace(_8B, code=replace(_8B.code, captures_mixed=False))
    found["8b: offline, 1000 requests, decodes captured only"] = decodes_only.offline(
        lengths_like_sharegpt(1000)
    )
    for model, predictor, streams in (("8b", _8B, 256), ("1b", _1B, 64)):
        parts = predictor.parts(Step(streams, 600))
        found[f"{model}: idle at {streams} streams"] = 100 * parts["gaps"] / sum(parts.values())
    for streams, context in ((64, 1024), (64, 8192)):
        taken = _8B.decode_attention(streams, context)
        moved = streams * context * _8B.model.kv_bytes
        found[f"decode attention, {streams} x {context}"] = moved / taken / 1e12
    for num_in, num_out, count in FP8_ROWS:
        pairs = [(num_in, num_out)] * count
        found[f"fp8: {num_in} in, {num_out} out"] = _FP8.offline(pairs, 512)
    found["fp8: decode, 256 x 1024"] = _FP8.decode(256, 1024)
    return found


def predictions() -> dict[str, dict[str, Any]]:
    """Limit, goal and prediction of each figure that has a goal or a prediction."""
    numbers = predicted()
    found: dict[str, dict[str, Any]] = {}
    for name in (*GOALS, *(name for name in numbers if name not in GOALS)):
        limit, goal, unit = GOALS.get(name, (None, None, ""))
        found[name] = {"limit": limit, "goal": goal, "predicted": numbers.get(name), "unit": unit}
    return found


def main() -> None:
    """Print the predictions, and where the time of typical steps goes."""
    print(f"{'':<52}{'predicted':>12}{'goal':>10}{'limit':>10}")
    for name, found in predictions().items():
        columns = (found["predicted"], found["goal"], found["limit"])
        texts = ["" if x is None else f"{x:,.4g}" for x in columns]
        print(f"{name:<52}{texts[0]:>12}{texts[1]:>10}{texts[2]:>10}  {found['unit']}")
    steps: list[tuple[str, Predictor, Step]] = [
        ("8b, 1 x 512", _8B, Step(1, 512)),
        ("8b, 64 x 1024", _8B, Step(64, 1024)),
        ("8b, 256 x 1024", _8B, Step(256, 1024)),
        ("8b, 256 x 400 + prompt of 256", _8B, Step(256, 400, ((0, 256),))),
        ("8b, prompt of 2048", _8B, Step(prompts=((0, 2048),))),
        ("1b, 64 x 600", _1B, Step(64, 600)),
        ("fp8, 256 x 1024", _FP8, Step(256, 1024)),
    ]
    print("\nmilliseconds of a step")
    for name, predictor, step in steps:
        parts = predictor.parts(step)
        shares = ", ".join(f"{part} {1e3 * taken:.2f}" for part, taken in parts.items())
        print(f"{name:<32}{1e3 * predictor.seconds(step):>8.2f}  {shares}")


if __name__ == "__main__":
    main()
