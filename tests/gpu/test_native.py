"""The device code of the native kernels, on the emulator, against float64 loops: no GPU needed."""

from __future__ import annotations

import sys
import types
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from portalm.backend import AttentionSpec
from portalm.conformance.check import Item
from portalm.conformance.kit import all_items
from portalm.conformance.subject import Subject
from portalm_backends.cuda.backend import CudaBackend
from portalm_backends.gpu_common import native
from portalm_backends.gpu_common.native import NativeKernels, plan_decodes
from tests.gpu.emulator import COMPILER, WAVES, Emulator, KernelFault
from tests.gpu.fake_device import FakeGpu

pytestmark = pytest.mark.skipif(not COMPILER, reason="the emulator needs g++")

all_cases = pytest.mark.gpu_compiled
"""For cases that add seconds: only the job that compiles all kernels runs them."""

NAN = float("nan")
BLOCK_SIZE = 16


@pytest.fixture(scope="module", params=WAVES, ids="wave{}".format)
def emulator(request: pytest.FixtureRequest) -> Iterator[Emulator]:
    is_whole = any(item.get_closest_marker("gpu_compiled") for item in request.session.items)
    emulator = Emulator(request.param, is_whole=is_whole)
    yield emulator
    emulator.close()


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# -- the modules ----------------------------------------------------------------------------------


def test_missing_module_is_reported_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "portalm_backends._cuda", None)
    monkeypatch.setitem(sys.modules, "portalm_backends._rocm", None)

    assert "nvcc was not found" in str(native.missing("cuda", "sm_90"))
    assert "a clang with amdgcn" in str(native.missing("rocm", "gfx942"))


def test_architecture_without_a_code_object_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = types.ModuleType("_rocm")
    module.__file__ = str(tmp_path / "_rocm.so")
    (tmp_path / "_rocm_kernels").mkdir()
    (tmp_path / "_rocm_kernels/gfx942.hsaco").touch()
    monkeypatch.setitem(sys.modules, "portalm_backends._rocm", module)

    assert native.missing("rocm", "gfx942:sramecc+:xnack-") is None
    assert native.missing("rocm", "gfx906") == "they were not built for gfx906"


@pytest.mark.parametrize("vendor", ["cuda", "rocm"])
def test_module_needs_its_device_only_for_a_launch(vendor: str) -> None:
    module = pytest.importorskip(f"portalm_backends._{vendor}", reason="the module was not built")
    if torch.cuda.is_available():
        pytest.skip("this machine has a device")

    with pytest.raises(RuntimeError, match=r"portalm_decode_.*: .*driver|no code object is loaded"):
        module.decode_attention(*[0] * 15, 1, 0, 0, 1, 1, 64, 1.0, 0.0, 0, 0, 0)
    if vendor == "rocm":
        with pytest.raises(RuntimeError, match="no HIP runtime"):
            module.load("gfx942.hsaco")


# -- the emulator itself --------------------------------------------------------------------------


def test_divergent_barrier_is_an_error(emulator: Emulator) -> None:
    with pytest.raises(KernelFault, match="divergent barrier in block 0, 0, 0"):
        emulator.launch("divergent_barrier")


def test_shuffle_without_all_lanes_is_an_error(emulator: Emulator) -> None:
    with pytest.raises(KernelFault, match="threads in a collective at line"):
        emulator.launch("half_a_shuffle")


def test_access_past_shared_memory_is_an_error(emulator: Emulator) -> None:
    with pytest.raises(KernelFault, match="heap-buffer-overflow"):
        emulator.launch("past_shared_memory")


def test_missing_barrier_is_detected_by_the_order_of_threads(emulator: Emulator) -> None:
    with pytest.raises(KernelFault, match="depends on the order of threads"):
        emulator.launch("missing_barrier", torch.zeros(64, dtype=torch.int32), 64)


# -- the cache ------------------------------------------------------------------------------------


def poisoned_cache(
    num_blocks: int, kv_heads: int, head_size: int, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """One layer of a cache, [NB, H_kv, 2, B, D], filled with NaN."""
    cache = torch.full((num_blocks, kv_heads, 2, BLOCK_SIZE, head_size), NAN)
    return cache.to(dtype)


# -- attention ------------------------------------------------------------------------------------


def attend(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, spec: AttentionSpec, sinks: Any = None
) -> np.ndarray:
    """Attention of a request's last token in float64: query [H, D], key and value [N, H_kv, D]."""
    out = np.zeros_like(query)
    last = len(key) - 1
    for h in range(spec.num_heads):
        kv_head = h * spec.num_kv_heads // spec.num_heads
        scores, rows = [], []
        for t in range(len(key)):
            if spec.sliding_window and t <= last - spec.sliding_window:
                continue
            score = query[h] @ key[t, kv_head] * spec.scale
            if spec.soft_cap:
                score = spec.soft_cap * np.tanh(score / spec.soft_cap)
            if spec.alibi_slopes:
                score += spec.alibi_slopes[h] * (t - last)
            scores.append(score)
            rows.append(value[t, kv_head])
        if sinks is not None:
            scores.append(float(sinks[h]))
            rows.append(np.zeros_like(rows[0]))
        weights = np.exp(np.array(scores) - max(scores))
        out[h] = weights / weights.sum() @ np.array(rows)
    return out


def spec_of(group: int = 4, head_size: int = 128, kv_heads: int = 2, **kind: Any) -> AttentionSpec:
    return AttentionSpec(
        num_heads=group * kv_heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        scale=kind.pop("scale", head_size**-0.5),
        **kind,
    )


def check_decode(
    emulator: Emulator,
    spec: AttentionSpec,
    seq_lens: list[int],
    *,
    max_items: int = 12,
    dtype: torch.dtype = torch.bfloat16,
    sinks: torch.Tensor | None = None,
) -> None:
    """Decode requests of `seq_lens` tokens (0: padding) with a cache whose unused slots are NaN."""
    torch.manual_seed(0)
    max_blocks = -(-max(seq_lens) // BLOCK_SIZE)
    num_blocks = 1 + len(seq_lens) * max_blocks
    free = (torch.randperm(num_blocks - 1) + 1).tolist()
    cache = poisoned_cache(num_blocks, spec.num_kv_heads, spec.head_size, dtype)
    table = torch.zeros(len(seq_lens), max_blocks, dtype=torch.int32)
    wide = torch.randn(len(seq_lens), spec.num_heads + 3, spec.head_size).to(dtype)
    query = wide[:, : spec.num_heads]  # rows of a merged projection
    contexts = []
    for i, length in enumerate(seq_lens):
        keys, values = torch.randn(2, length, spec.num_kv_heads, spec.head_size).to(dtype)
        contexts.append((keys.double().numpy(), values.double().numpy()))
        for t in range(length):
            if t % BLOCK_SIZE == 0:
                table[i, t // BLOCK_SIZE] = free.pop()
            block = int(table[i, t // BLOCK_SIZE])
            cache[block, :, 0, t % BLOCK_SIZE] = keys[t]
            cache[block, :, 1, t % BLOCK_SIZE] = values[t]
    items = plan_decodes(
        np.array(seq_lens), max_items=max_items, window=spec.sliding_window, min_tokens=32
    )
    partials, counters = NativeKernels.decode_workspace(
        spec, max_items, len(seq_lens), torch.device("cpu")
    )
    partials.fill_(NAN)
    slopes = torch.tensor(spec.alibi_slopes) if spec.alibi_slopes else None

    out = emulator.native(
        "decode_attention", cache, query, table, int32(seq_lens), torch.from_numpy(items),
        (partials, counters), spec, slopes, sinks,
    )  # fmt: skip

    assert counters.count_nonzero() == 0
    for i, (keys, values) in enumerate(contexts):
        if seq_lens[i]:
            expected = attend(query[i].double().numpy(), keys, values, spec, sinks)
            np.testing.assert_allclose(out[i].double().numpy(), expected, atol=0.006, rtol=0.006)


def some_of(cases: dict[str, Any], *names: str) -> list[Any]:
    """All cases, of which only those in `names` run outside the gpu_compiled job."""
    return [name if name in names else pytest.param(name, marks=all_cases) for name in cases]


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "group of three": {"group": 3},
    "window": {"sliding_window": 37},
    "window of one": {"sliding_window": 1},
    "cap": {"soft_cap": 2.0, "scale": 0.3},
    "alibi": {"alibi_slopes": tuple(2.0**-i for i in range(1, 9))},
    "large scores": {"scale": 6.0},
}


@pytest.mark.parametrize("kind", some_of(KINDS, "window", "alibi"))
def test_decode_attention_equals_plain_loops(emulator: Emulator, kind: str) -> None:
    check_decode(emulator, spec_of(**KINDS[kind]), [70, 0, 1, 16, 161])


def test_sinks_count_once_however_the_context_is_split(emulator: Emulator) -> None:
    sinks = torch.linspace(-2, 6, 8)

    check_decode(emulator, spec_of(has_sinks=True), [161, 5], sinks=sinks)
    check_decode(emulator, spec_of(has_sinks=True), [161, 5], sinks=sinks, max_items=2)


def test_decode_attention_with_one_query_head_per_kv_head(emulator: Emulator) -> None:
    check_decode(emulator, spec_of(group=1, head_size=64), [9, 130])


@all_cases
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_decode_kernel_equals_plain_loops(
    emulator: Emulator, dtype: torch.dtype, head_size: int, group: int
) -> None:
    spec = spec_of(group=group, head_size=head_size, soft_cap=30.0, sliding_window=100)

    check_decode(emulator, spec, [1000, 90, 0], dtype=dtype)


@pytest.mark.parametrize("window", [None, 100])
def test_plan_covers_every_visible_token_once_within_max_items(window: int | None) -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        seq_lens = random.integers(0, 5000, random.integers(1, 40))
        max_items = len(seq_lens) + random.integers(0, 100)

        items = plan_decodes(seq_lens, max_items=max_items, window=window)

        assert items.shape == (max_items, 5)
        for request, length in enumerate(seq_lens):
            own = np.flatnonzero((items[:, 0] == request) & (items[:, 4] > 0))
            assert bool(len(own)) == (length > 0)
            if length:
                starts, ends = items[own, 1], items[own, 2]
                assert (starts % 16 == 0).all()
                assert starts[0] <= max(length - (window or length), 0)
                assert ends[-1] == length
                assert (starts[1:] == ends[:-1]).all()
                assert (items[own, 3] == own[0]).all()
                assert (items[own, 4] == len(own)).all()


# -- the backend ----------------------------------------------------------------------------------


class Emulated(NativeKernels):
    """Native kernels whose launches are emulated, and counted."""

    def __init__(self, emulator: Emulator) -> None:
        super().__init__(emulator, lambda: 0)
        self.calls: Counter[str] = Counter()
        self.decode_attention = partial(self._count, emulator, "decode_attention")

    def _count(self, emulator: Emulator, name: str, *args: Any, **kwargs: Any) -> Any:
        self.calls[name] += 1
        return emulator.native(name, *args, **kwargs)


def with_native(emulator: Emulator) -> tuple[CudaBackend, Emulated]:
    """A CUDA backend with native kernels, which are emulated."""
    backend = CudaBackend(FakeGpu())
    backend._native = kernels = Emulated(emulator)
    return backend, kernels


def kit_item(check: str, case: str) -> Item:
    [item] = [i for i in all_items(["L1"], check) if i.check == check and i.case == case]
    return item


@pytest.mark.parametrize(
    "case",
    [
        "decode, gqa, bfloat16",
        pytest.param("one token, gqa, bfloat16", marks=all_cases),
    ],
)
def test_decodes_use_native_kernels_and_pass_conformance(emulator: Emulator, case: str) -> None:
    backend, kernels = with_native(emulator)

    result = kit_item("attend", case).run(Subject(backend))

    assert result.status == "pass", result.message
    assert kernels.calls["decode_attention"] == 1


def test_unsupported_shapes_are_left_to_triton() -> None:
    kv = torch.empty(1, 2, 1, 2, 16, 64, dtype=torch.bfloat16)
    key = torch.empty(3, 1, 64, dtype=torch.bfloat16)

    assert NativeKernels.decodes(kv, key)
    assert not NativeKernels.decodes(kv.half(), key)
    assert not NativeKernels.decodes(kv[:, :, :, :, :8], key)  # block size 8
    assert native.has_decodes(spec_of(group=4, head_size=64))
    assert not native.has_decodes(spec_of(group=8, head_size=64))
    assert not native.has_decodes(spec_of(group=4, head_size=96))
