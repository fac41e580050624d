"""Count how often each operation's kernels are compiled over steps of different sizes.

`python -m tests.gpu.step_sizes TARGET` launches every operation on a dry GPU with each of `SIZES`
rows and prints, as JSON, the compilations of each kernel by operation. A kernel that is compiled
for a size that startup did not use stops the engine for up to a second.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from portalm.backend import (
    AttentionSpec,
    Experts,
    KVSpec,
    LogitBias,
    Penalties,
    SampleParams,
    StepMeta,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

SIZES = (1, 2, 15, 16, 17, 256)
"""Numbers of rows: those for which Triton compiles integers separately, 1 and multiples of 16."""

VOCAB = 32000
SPEC = AttentionSpec(num_heads=32, num_kv_heads=8, head_size=128, scale=0.1)


def operations(backend: Any) -> dict[str, Callable[[int], object]]:
    """Functions that launch an operation with a number of rows, by name."""
    hidden = 4096

    def rows(n: int, width: int = hidden, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(n, width, dtype=dtype)

    def heads(n: int, count: int) -> torch.Tensor:
        return rows(n, (32 + 2 * 8) * 128)[:, : count * 128].view(n, count, 128)

    def vector(dtype: torch.dtype, n: int) -> torch.Tensor:
        return torch.empty(n, dtype=dtype)

    norm, cos_sin = vector(torch.bfloat16, hidden), torch.empty(512, 128)
    kv = {
        dtype: backend.kv_alloc(
            KVSpec(num_layers=1, num_kv_heads=8, head_size=128, block_size=16, dtype=dtype), 64
        )
        for dtype in ("bfloat16", "int8")
    }
    weights = {
        name: backend.pack(rows(512, 1024), quantization=name)
        for name in (None, "int4", "int8_min", *(["fp8"] if backend._fp8 else []))
    }
    expert = Experts(
        gate_up=[backend.pack(rows(256, 128)) for _ in range(4)],
        down=[backend.pack(rows(128, 128)) for _ in range(4)],
    )

    def write(n: int, dtype: str) -> None:
        key = heads(n, 8)
        backend.kv_write(kv[dtype], 0, key, key, _decodes(backend, n))

    def rotate_write(n: int) -> None:
        backend.rope_kv_write(
            kv["bfloat16"], 0, heads(n, 32), heads(n, 8), heads(n, 8), _decodes(backend, n),
            cos_sin, is_interleaved=False,
        )  # fmt: skip

    def attend(n: int, dtype: str) -> None:
        backend.attend(kv[dtype], 0, heads(n, 32), _decodes(backend, n), SPEC)

    def experts(n: int) -> None:
        ids = torch.empty(n, 2, dtype=torch.int32)
        backend.moe(rows(n, 128), ids, torch.empty(n, 2), expert)

    return {
        "rms_norm": lambda n: backend.rms_norm(rows(n), norm, 1e-6),
        "rms_norm of heads": lambda n: backend.rms_norm(heads(n, 8), norm[:128], 1e-6),
        "add_rms_norm": lambda n: backend.add_rms_norm(rows(n), rows(n), norm, 1e-6),
        "layer_norm": lambda n: backend.layer_norm(rows(n), norm, norm, 1e-6),
        "silu_mul": lambda n: backend.silu_mul(rows(n)),
        "rope": lambda n: backend.rope(
            heads(n, 32), heads(n, 8), vector(torch.int32, n), cos_sin, is_interleaved=True
        ),
        "rope_kv_write": rotate_write,
        "kv_write": lambda n: write(n, "bfloat16"),
        "kv_write, int8": lambda n: write(n, "int8"),
        "kv_copy": lambda n: backend.kv_copy(
            kv["int8"], vector(torch.int32, n), vector(torch.int32, n)
        ),
        "attend": lambda n: attend(n, "bfloat16"),
        "attend, int8": lambda n: attend(n, "int8"),
        **{
            f"linear, {name}": lambda n, w=weight: backend.linear(rows(n, 1024), w)
            for name, weight in weights.items()
        },
        "logits, int4": lambda n: backend.logits(rows(n, 1024), weights["int4"]),
        "moe": experts,
        "sample": lambda n: backend.sample(_logits(n), _params(n)),
        "sample, logprobs": lambda n: backend.sample(
            _logits(n), _params(n, num_logprobs=min(n, 20))
        ),
        "sample, adjusted": lambda n: backend.sample(_logits(n), _adjusted(n)),
    }


def _logits(n: int) -> torch.Tensor:
    return torch.empty(n, VOCAB)


def _params(n: int, **kind: Any) -> SampleParams:
    return SampleParams(
        temperature=torch.empty(n),
        top_k=torch.empty(n, dtype=torch.int32),
        top_p=torch.empty(n),
        min_p=torch.empty(n),
        seed=torch.empty(n, dtype=torch.int64),
        position=torch.empty(n, dtype=torch.int64),
        is_greedy=False,
        has_filters=True,
        **kind,
    )


def _adjusted(n: int) -> SampleParams:
    """Penalties over as many tokens, and as many biases, as there are rows; a mask."""
    ids = torch.empty(n, n, dtype=torch.int32)
    penalties = Penalties(
        prompt_ids=ids,
        output_ids=ids,
        presence=torch.empty(n),
        frequency=torch.empty(n),
        repetition=torch.empty(n),
    )
    places = torch.empty(n, dtype=torch.int32)
    bias = LogitBias(rows=places, token_ids=places, values=torch.empty(n))
    allowed = torch.empty(n, VOCAB // 32, dtype=torch.int32)
    return _params(n, penalties=penalties, bias=bias, allowed=allowed)


def _decodes(backend: Any, n: int) -> StepMeta:
    """A step of n decodes with contexts of 300 to 5,000 tokens, some of them split."""
    contexts = np.linspace(300, 5000, n).astype(np.int32)
    starts = np.arange(n + 1, dtype=np.int32)
    table = np.zeros((n, 320 + n), np.int32)  # its width is that of the longest context
    arrays = [contexts - 1, contexts - 1, starts, contexts, table, starts[1:] - 1]
    on_device = [backend.to_device(array) for array in arrays]
    meta = StepMeta(
        positions=on_device[0],
        slot_mapping=on_device[1],
        query_start_loc=on_device[2],
        seq_lens=on_device[3],
        block_table=on_device[4],
        logits_rows=on_device[5],
        host_query_start_loc=starts,
        host_seq_lens=contexts,
        num_decodes=n,
        max_query_len=1,
        max_seq_len=5000,
    )
    return backend.prepare(meta, [SPEC])  # type: ignore[no-any-return]


def compilations(target: str) -> dict[str, dict[str, int]]:
    """Compilations by operation and kernel, over all of `SIZES`."""
    from gpu.dry import backend_for, dry_gpu  # type: ignore[import-not-found]

    found = {}
    with dry_gpu(target) as gpu:
        for name, launch in operations(backend_for(gpu)).items():
            gpu.take()
            for size in SIZES:
                launch(size)
            found[name] = dict(Counter(c.kernel.rpartition(".")[2] for c in gpu.take().compiles))
    return found


if __name__ == "__main__":
    print(json.dumps(compilations(sys.argv[1])))
