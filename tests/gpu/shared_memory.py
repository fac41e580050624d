"""Shared memory that the variants of the attention kernels need on each target.

`python -m tests.gpu.shared_memory` prints the need of each variant and fails if one is above the
target's limit. Variants are compiled only as far as Triton allocates shared memory, about a second
each.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton._C.libtriton import ir
from triton.compiler.compiler import make_backend

from portalm_backends.gpu_common import attention
from portalm_backends.gpu_common.kernels import kv_codes
from portalm_backends.gpu_common.kernels.kv_codes import FP8, INT8
from tests.gpu import kernel_budgets
from tests.gpu.kernel_budgets import LATENT, Launch
from tests.gpu.triton_targets import SHARED_LIMIT, TARGETS, source_of

MOST_HEADS = -1
"""Placeholder for the most query heads per KV head that one program computes."""


def variants(target: str) -> Iterator[tuple[str, Launch]]:
    """Launches that need the most shared memory, with their names.

    Sizes depend on whether a head has up to 128, up to 256 or more elements, so the largest head
    of each kind stands for the smaller ones; 8-bit caches of all dtypes are included because each
    decodes in its own way. Groups of as many query heads as one program computes enlarge tiles.
    """
    kinds, sizes = ("narrow", "wide"), (128, 256)
    for kind, head_size, dtype, codes, group in itertools.product(
        kinds, sizes, ("bf16", "fp16", "fp32"), (0, INT8, FP8), (4, MOST_HEADS)
    ):
        is_large = group == MOST_HEADS
        if (dtype == "fp16" and not codes) or (is_large and (dtype == "fp16" or codes == INT8)):
            continue  # the same sizes as in bfloat16, and as with fp8
        group = attention._MOST_QUERY // head_size if is_large else group
        name = f"{kind}, head {head_size}, group {group}, {dtype}, codes {codes}"
        yield (
            name,
            kernel_budgets.attention(
                target, kind, head_size=head_size, dtype=dtype, codes=codes, group=group
            ),
        )
    for kind, dtype in itertools.product(kinds, ("bf16", "fp32")):
        yield (
            f"{kind}, latent, {dtype}",
            kernel_budgets.attention(target, kind, dtype=dtype, **LATENT),
        )
    for head_size, dtype in itertools.product(sizes, ("bf16", "fp32")):
        yield (
            f"encoder, head {head_size}, {dtype}",
            kernel_budgets.encoder(target, head_size=head_size, dtype=dtype),
        )


def shared_bytes(launch: Launch, target: str) -> int:
    """Bytes of shared memory per program of `launch` on `target`."""
    gpu = TARGETS[target]
    constants = launch.constants
    if "DECODER" in launch.kernel.arg_names:
        constants = constants | kv_codes.options_for(gpu)
    if "WAITS" in launch.kernel.arg_names:
        constants = constants | {"WAITS": False}  # waiting takes no shared memory
    source = source_of(launch.kernel, launch.signature, constants, TARGETS[target])
    backend: Any = make_backend(gpu)
    options = backend.parse_options(
        {
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            "enable_fp_fusion": True,
            **launch.options,
        }
    )
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options), backend.get_module_map()
    module: Any = source.make_ir(gpu, options, *functions, context)
    for stage in ("ttir", "ttgir"):
        module = stages[stage](module, {})
    with _only_allocation(sys.modules[type(backend).__module__]):
        try:
            stages["llir"](module, {})
        except _Allocated:
            return int(module.get_int_attr("ttg.shared"))
    raise AssertionError("Triton's lowering to LLVM did not reach LLVM")


class _Allocated(Exception):
    """Ends the lowering after the allocation of shared memory."""


class _Passes:
    """Triton's passes, without those that follow the allocation of shared memory."""

    def __init__(self, real: Any, state: dict[str, bool]) -> None:
        self._real, self._state = real, state

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        if not name.startswith("add_"):
            return _Passes(found, self._state) if type(found).__name__ == "module" else found
        if self._state["allocated"]:
            return lambda *args, **kwargs: None
        self._state["allocated"] = name.startswith("add_allocate_shared_memory")
        return found


class _Llvm:
    """Replaces Triton's LLVM module: nothing is translated to LLVM."""

    def __getattr__(self, name: str) -> Any:
        raise _Allocated


@contextmanager
def _only_allocation(compiler: Any) -> Iterator[None]:
    """Context in which Triton's compiler module skips what follows the allocation."""
    names = [name for name in ("passes", "nvidia", "amd", "llvm") if hasattr(compiler, name)]
    real, state = {name: getattr(compiler, name) for name in names}, {"allocated": False}
    for name in names:
        setattr(compiler, name, _Llvm() if name == "llvm" else _Passes(real[name], state))
    try:
        yield
    finally:
        for name in names:
            setattr(compiler, name, real[name])


def above_limit(target: str) -> list[str]:
    """Print the need of each variant; describe those above the limit of `target`."""
    failures = []
    for name, launch in variants(target):
        need = shared_bytes(launch, target)
        print(f"{target:8} {name:44} {need:7}", flush=True)
        if need > SHARED_LIMIT[target]:
            failures.append(
                f"{name} on {target}: {need} bytes of shared memory, limit {SHARED_LIMIT[target]}"
            )
    return failures


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    failures = [line for target in parser.parse_args().targets for line in above_limit(target)]
    print("\n".join(failures))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
