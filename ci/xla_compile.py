"""Compile the XLA backend's programs for TPUs on a machine without a TPU, and record their sizes.

    python ci/xla_compile.py                 kernels and all steps of the default model's shape
    python ci/xla_compile.py --kernels v5e   kernels only, for one target
    python ci/xla_compile.py --write         also rewrite docs/xla-compiled.md

Exits with status 1 if a program breaks a budget: all of the KV cache must be aliased (a step
updates it in place), temporaries stay under 200 MB, and the program contains kernels. The compiler
is part of libtpu; without it nothing is compiled, and a message says so. Nothing here measures the
speed of a TPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TARGETS = {  # name: topology, TPU_ACCELERATOR_TYPE
    "v5e": ("v5e:2x2", "v5litepod-4"),
    "v6e": ("v6e:2x2", "v6e-4"),
}
PEAKS = {"v5e": (819e9, 197e12), "v6e": (1640e9, 918e12)}
"""Bytes and bfloat16 operations per second, from the datasheets."""
MAX_TEMPORARIES = 200_000_000
TABLE = Path(__file__).parent.parent / "docs" / "xla-compiled.md"

SMOLLM2 = {  # SmolLM2-135M
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}

KERNELS: dict[str, dict[str, Any]] = {  # one layer's write and attention: its shape and the step's
    "9 heads, 3 KV, 64, float32, decode": {
        "heads": (9, 3, 64),
        "dtype": "float32",
        "step": (8, 8, 1),
    },
    "9 heads, 3 KV, 64, decode": {"heads": (9, 3, 64), "step": (8, 8, 1)},
    "9 heads, 3 KV, 64, mixed": {"heads": (9, 3, 64), "step": (128, 8, 128)},
    "32 heads, 8 KV, 128, decode": {"heads": (32, 8, 128), "step": (32, 32, 1)},
    "32 heads, 8 KV, 128, mixed": {"heads": (32, 8, 128), "step": (512, 32, 512)},
    "16 heads, 16 KV, 80, mixed": {"heads": (16, 16, 80), "step": (128, 8, 128)},
    "8 heads, 1 KV, 256, window, cap": {
        "heads": (8, 1, 256),
        "step": (128, 8, 128),
        "spec": {"sliding_window": 512, "soft_cap": 50.0},
    },
    "8 heads, 2 KV, 64, ALiBi, sinks": {
        "heads": (8, 2, 64),
        "step": (128, 8, 128),
        "spec": {"alibi_slopes": tuple(2.0**-i for i in range(8)), "has_sinks": True},
    },
}


def figures(name: str, source: Any, kv_bytes: int, target: str) -> dict[str, Any]:
    """Compile a program as the server does; return the compiler's analysis, sizes in bytes."""
    lowered = source.lower(source.trace("tpu"))
    started = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    bytes_per_s, operations_per_s = PEAKS[target]
    least_s = max(
        cost.get("bytes accessed", 0) / bytes_per_s, cost.get("flops", 0) / operations_per_s
    )
    return {
        "program": name,
        "seconds": round(seconds, 1),
        "least_ms": 1e3 * least_s,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "output": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "kv_cache": kv_bytes,
        "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
    }


def broken_budgets(row: dict[str, Any]) -> list[str]:
    """Describe each budget that the program breaks."""
    found = []
    if row["aliased"] < row["kv_cache"]:
        found.append(f"{row['kv_cache'] - row['aliased']} bytes of the KV cache are copied")
    if row["temporaries"] > MAX_TEMPORARIES:
        found.append(f"temporaries of {row['temporaries']} bytes, above {MAX_TEMPORARIES}")
    if not row["kernels"]:
        found.append("it contains no kernel (tpu_custom_call)")
    return [f"{row['program']}: {what}" for what in found]


# -- in a separate process, because libtpu takes its target from the environment ----------------


def kernel_rows(target: str, sharding: Any) -> Iterator[dict[str, Any]]:
    """Compile one layer's write and attention for each shape in `KERNELS`."""
    import jax
    import jax.numpy as jnp

    from portalm.backend import AttentionSpec, KVSpec
    from portalm_backends.xla import cache, kernels
    from portalm_backends.xla.store import Source

    for name, case in KERNELS.items():
        num_heads, num_kv_heads, head_size = case["heads"]
        num_tokens, num_requests, max_query_len = case["step"]
        dtype = jnp.dtype(case.get("dtype", "bfloat16"))
        spec = AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            scale=head_size**-0.5,
            **case.get("spec", {}),
        )
        kv = KVSpec(
            num_layers=1,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            block_size=16,
            dtype=dtype.name,
        )
        shape = cache.layer_shape(kv, 1024, is_tpu=True)

        def one(shape: tuple[int, ...], dtype: Any = dtype) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        def layer_step(
            layer: Any,
            query: Any,
            key: Any,
            value: Any,
            step: tuple[Any, ...],
            sinks: Any,
            spec: AttentionSpec = spec,
            longest: int = max_query_len,
        ) -> tuple[Any, Any]:
            layer = kernels.write_in_place(layer, key, value, *step)
            out = kernels.attend(query, layer, *step, spec, max_query_len=longest, sinks=sinks)
            return layer, out

        new = one((num_tokens, num_kv_heads, head_size))
        step = tuple(
            one(s, jnp.int32) for s in ((num_requests + 1,), (num_requests,), (num_requests, 128))
        )
        sinks = one((num_heads,), jnp.float32) if spec.has_sinks else None
        arguments = (one(shape), one((num_tokens, num_heads, head_size)), new, new, step, sinks)
        source = Source(function=layer_step, arguments=arguments, results=sharding, donated=(0,))
        yield figures(name, source, 1024 * cache.bytes_per_block(kv, is_tpu=True), target)


def print_steps(target: str, sharding: Any) -> None:
    """Print a row for the step of each bucket that an engine of the default model captures."""
    from portalm.config import EngineConfig
    from portalm.engine.engine import Engine
    from portalm_backends.xla.backend import XlaBackend

    class StepsCompiled(Exception):
        """Stops the engine after its steps are compiled, as they cannot run here."""

    class Compiler(XlaBackend):
        """Compiles the engine's steps for a TPU."""

        def __init__(self) -> None:
            super().__init__()
            self._is_tpu = True
            self._names: dict[Any, str] = {}

        def compile(self, fn: Any, bucket: Any, example: Any) -> Any:
            step = super().compile(fn, bucket, example)
            kind = "decodes" if bucket.max_query_len == 1 else f"{bucket.num_requests} requests"
            more = ", hidden states" if example.num_states else ""
            self._names[step] = f"{bucket.num_tokens} tokens, {kind}{more}"
            return step

        def build(self, steps: Any, weights: Any, kv: Any, *_: Any, **__: Any) -> None:
            for step in steps:
                kv_bytes = kv.num_blocks * self.kv_bytes_per_block(kv.spec)
                source = step.source(weights, kv, sharding)
                row = figures(self._names[step], source, kv_bytes, target)
                print(json.dumps(row), flush=True)
            raise StepsCompiled

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SMOLLM2))
        config = EngineConfig.from_dict(
            {
                "model": folder,
                "load_format": "dummy",
                "dtype": "bfloat16",
                "num_gpu_blocks_override": 1024,
            }
        )
        with contextlib.suppress(StepsCompiled):
            Engine(config, backend=Compiler())


def compile_here(target: str, *, only_kernels: bool) -> None:
    """Compile for `target` in this process; print a JSON row for each program."""
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # else seconds would be of reading
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TARGETS[target][0])
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    for row in kernel_rows(target, sharding):
        print(json.dumps(row), flush=True)
    if not only_kernels:
        print_steps(target, sharding)


# -- the command ------------------------------------------------------------------------------


def compile_for(target: str, *, only_kernels: bool) -> list[dict[str, Any]]:
    """Compile for `target` in another process; return a row for each program."""
    import libtpu

    environment = os.environ | {
        "TPU_LIBRARY_PATH": str(Path(libtpu.__file__).parent / "libtpu.so"),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": TARGETS[target][1],
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    command = [sys.executable, __file__, "--here", target, *["--kernels"] * only_kernels]
    rows = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                rows.append(json.loads(line))
                print(f"{target}  {as_line(rows[-1])}", flush=True)
    if process.returncode:
        sys.exit(f"compiling for {target} failed")
    return rows


HEADER = (
    "program", "seconds", "ms", "arguments", "temporaries", "aliased", "other output", "kernels",
)  # fmt: skip


def as_line(row: dict[str, Any]) -> str:
    """Format a row of the table; sizes in MB."""
    sizes = [f"{row[name] / 1e6:.3g}" for name in ("arguments", "temporaries", "aliased", "output")]
    times = (f"{row['seconds']:.1f}", f"{row['least_ms']:.2g}")
    return " | ".join([row["program"], *times, *sizes, str(row["kernels"])])


def table(target: str, rows: list[dict[str, Any]]) -> str:
    """Format the rows of one target as Markdown."""
    lines = [f"## TPU {target}", "", f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
    return "\n".join([*lines, *(f"| {as_line(row)} |" for row in rows)])


def main() -> None:
    """Compile for every target, print the rows, check the budgets."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = ", ".join(TARGETS)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{names} (default: all)")
    parser.add_argument("--kernels", action="store_true", help="compile the kernels only")
    parser.add_argument("--write", action="store_true", help=f"rewrite {TABLE.name}")
    parser.add_argument("--here", choices=TARGETS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        compile_here(arguments.here, only_kernels=arguments.kernels)
        return
    if importlib.util.find_spec("libtpu") is None:
        print(
            "libtpu is not installed, so nothing is compiled for TPUs: "
            "pip install 'portalm[tpu]' to compile"
        )
        return
    targets = arguments.targets or TARGETS
    rows = {t: compile_for(t, only_kernels=arguments.kernels) for t in targets}
    if arguments.write:
        introduction = TABLE.read_text().split("## ")[0]
        TABLE.write_text(introduction + "\n\n".join(table(t, r) for t, r in rows.items()) + "\n")
    broken = [f"{t}: {what}" for t, r in rows.items() for row in r for what in broken_budgets(row)]
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
