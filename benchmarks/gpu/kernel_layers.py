"""Linear layers, experts, norms and sampling at the shapes of the 8B model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from gpu.common import Clock, Settings, report, run_sections, settings
from gpu.timing import copies, seconds, tensor_bytes
from portalm.backend import Experts, SampleParams, load_backend


class Layers:
    """The sections of this part."""

    def __init__(self, run: Settings) -> None:
        """Start the backend."""
        self.run = run
        self.backend: Any = load_backend(run.device)
        self.device = self.backend.device()
        self.dtype = torch.float32 if run.is_tiny else torch.bfloat16
        self.model = run.model("8b")

    def normal(self, *shape: int) -> torch.Tensor:
        """Normal values on the device."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def products(self, clock: Clock) -> None:
        """Measure the linear layers by format and number of rows."""
        hidden, inner = self.model["hidden_size"], self.model["intermediate_size"]
        heads = self.model["num_attention_heads"] + 2 * self.model["num_key_value_heads"]
        shapes = {
            "gate_up": (2 * inner, hidden),
            "qkv": (heads * self.model["head_dim"], hidden),
            "down": (hidden, inner),
            "out": (hidden, self.model["num_attention_heads"] * self.model["head_dim"]),
        }
        for quantization in (None, "fp8", "int8", "int4_min"):
            if quantization is not None and (
                quantization not in self.backend.capabilities.quantizations
            ):
                report(f"products, {quantization}", None, message="not supported here")
                continue
            for name, (n, k) in shapes.items():
                self._product(name, n, k, quantization)

    def _product(self, name: str, n: int, k: int, quantization: str | None) -> None:
        first = self.backend.pack(self.normal(n, k), quantization=quantization)
        num_bytes = tensor_bytes(first)
        count = copies(num_bytes, is_tiny=self.run.is_tiny)
        weights = [
            first,
            *(
                self.backend.pack(self.normal(n, k), quantization=quantization)
                for _ in range(count - 1)
            ),
        ]
        for rows in (1, 16, 64, 256, 2048, 8192) if not self.run.is_tiny else (2,):
            x = self.normal(rows, k)
            taken = seconds(self.backend, [partial(self.backend.linear, x, w) for w in weights])
            moved = num_bytes + rows * (n + k) * x.element_size()
            report(
                f"{name}, {quantization or str(self.dtype).removeprefix('torch.')}, {rows} rows",
                taken * 1e6,
                "us",
                tflops=2 * rows * n * k / taken / 1e12,
                tbytes=moved / taken / 1e12,
            )

    def experts(self, clock: Clock) -> None:
        """Measure the experts of a Qwen3-30B-A3B layer: bytes of chosen experts, or operations."""
        run, device = self.run, self.device
        count, top_k = run.scaled(128, 4), run.scaled(8, 2)
        hidden, inner = run.scaled(2048, 64), run.scaled(768, 32)

        def packed(rows: int, columns: int) -> tuple[Any, ...]:
            many = (self.normal(rows, columns) * columns**-0.5 for _ in range(count))
            return tuple(self.backend.pack(weight) for weight in many)

        layer = Experts(gate_up=packed(2 * inner, hidden), down=packed(hidden, inner))
        numbers = 3 * inner * hidden
        for tokens in (1, 16, 64, 256, 2048, 8192) if not run.is_tiny else (2, 9):
            works, num_chosen = [], 0
            for _ in range(4):  # other tokens choose other experts
                x = self.normal(tokens, hidden)
                shares, ids = torch.rand(tokens, count, device=device).topk(top_k, dim=-1)
                num_chosen += len(ids.unique())
                works.append(partial(self.backend.moe, x, ids.int(), shares, layer))
            taken = seconds(self.backend, works)
            moved = num_chosen / 4 * numbers * self.dtype.itemsize
            moved += 2 * tokens * hidden * self.dtype.itemsize
            tbytes = moved / taken / 1e12
            tflops = 2 * tokens * top_k * numbers / taken / 1e12
            name = f"experts, {tokens} tokens"
            if tokens <= 256:
                report(name, tbytes, "TB/s", us=taken * 1e6, tflops=tflops)
            else:
                report(name, tflops, "TFLOP/s", us=taken * 1e6, tbytes=tbytes)

    def small_operations(self, clock: Clock) -> None:
        """Measure the norm, the activation and the logits; activations stay in L2, as in a step."""
        model, backend = self.model, self.backend
        rows, hidden = self.run.scaled(256, 4), model["hidden_size"]
        x, residual = self.normal(rows, hidden), self.normal(rows, hidden)
        weight = torch.ones(hidden, device=self.device, dtype=self.dtype)
        taken = seconds(backend, [lambda: backend.add_rms_norm(x, residual, weight, 1e-5)])
        report(f"add_rms_norm, {rows} rows", taken * 1e6, "us")
        gate_up = self.normal(rows, 2 * model["intermediate_size"])
        taken = seconds(backend, [lambda: backend.silu_mul(gate_up)])
        report(f"silu_mul, {rows} rows", taken * 1e6, "us")
        head = backend.pack(self.normal(model["vocab_size"], hidden), for_logits=True)
        for count in (1, rows):
            taken = seconds(backend, [partial(backend.logits, x[:count], head)])
            moved = tensor_bytes(head) + count * model["vocab_size"] * 4
            report(f"logits, {count} rows", taken * 1e6, "us", tbytes=moved / taken / 1e12)

    def sampling(self, clock: Clock) -> None:
        """Measure sampling; bytes are those of the logits, once."""
        vocab = self.model["vocab_size"]
        for rows in (1, 64, 256) if not self.run.is_tiny else (2,):
            count = copies(rows * vocab * 4, is_tiny=self.run.is_tiny)
            many = [torch.randn(rows, vocab, device=self.device) for _ in range(min(count, 64))]
            for label, temperature, top_k, top_p in (
                ("greedy", 0.0, 0, 1.0),
                ("temperature", 1.0, 0, 1.0),
                ("top_k and top_p", 1.0, 50, 0.9),
                ("top_p", 1.0, 0, 0.9),
            ):
                params = self._params(rows, temperature, top_k, top_p)
                works = [partial(self.backend.sample, logits, params) for logits in many]
                taken = seconds(self.backend, works)
                tbytes = rows * vocab * 4 / taken / 1e12
                report(f"sample, {label}, {rows} rows", taken * 1e6, "us", tbytes=tbytes)

    def _params(self, rows: int, temperature: float, top_k: int, top_p: float) -> SampleParams:
        """The parameters as a captured step passes them."""

        def column(value: float, kind: torch.dtype) -> torch.Tensor:
            return torch.full((rows,), value, dtype=kind, device=self.device)

        return SampleParams(
            temperature=column(temperature, torch.float32),
            top_k=column(top_k, torch.int32),
            top_p=column(top_p, torch.float32),
            min_p=column(0.0, torch.float32),
            seed=column(1, torch.int64),
            position=column(7, torch.int64),
            is_greedy=False,
            has_filters=True,
        )


def main() -> None:
    """Measure the selected sections."""
    run = settings()
    part = Layers(run)
    run_sections(
        run,
        {
            "products": part.products,
            "experts": part.experts,
            "small operations": part.small_operations,
            "sampling": part.sampling,
        },
    )


if __name__ == "__main__":
    main()
