"""Optional attention packages are used if they are right and fast, and never required."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from portalm.backend import AttentionSpec, Bucket
from portalm.errors import BackendError
from portalm_backends.gpu_common.archs import CUDA, ROCM
from portalm_backends.gpu_common.providers import ATTENTION
from portalm_backends.gpu_common.providers.check import (
    OwnAttention,
    PrefillProviders,
    check_lengths,
    random_case,
)
from portalm_backends.gpu_common.providers.flash_attention import FlashAttention3Run
from portalm_backends.gpu_common.providers.provider import LayerKind, missing, summary
from tests.gpu.fake_packages import FAULTS, FakeFlashAttention, FakeFlashInfer, install
from tests.gpu.interpreted import InterpretedBackend, complete

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, scale=0.125)
EDGES = dataclasses.replace(SPEC, sliding_window=100, soft_cap=20.0)
PACKAGES: dict[str, Callable[[str], Any]] = {
    "flash_attn_interface": FakeFlashAttention,
    "flashinfer": FakeFlashInfer,
}


class Clock:
    """Seconds, advanced by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def kind_of(spec: AttentionSpec, dtype: torch.dtype = torch.float16, block: int = 16) -> LayerKind:
    return LayerKind(
        spec=spec,
        dtype=dtype,
        block_size=block,
        device=torch.device("cpu"),
        to_device=torch.from_numpy,
    )


class Own:
    """Replaces the own kernels: right, and one second per call."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._right = FakeFlashAttention()

    def open(self, kind: LayerKind) -> Any:
        run = FlashAttention3Run(self._right, kind)

        def attend(*case: Any) -> torch.Tensor:
            self._clock.now += 1
            return run.attend(*case)

        return type("Run", (), {"attend": staticmethod(attend)})()


def providers(clock: Clock | None = None) -> PrefillProviders:
    clock = clock or Clock()
    return PrefillProviders(
        ATTENTION, "sm_90", Own(clock).open, lambda: None, timed_tokens=64, clock=clock
    )


def attend(chosen: PrefillProviders, kind: LayerKind, *, may_check: bool = True) -> Any:
    layer, query, meta = random_case(kind, [3, 20], [40, 20])
    return layer, chosen.attend(
        layer, query, meta, kind.spec, to_device=kind.to_device, may_check=may_check
    )


@pytest.mark.parametrize("spec", [SPEC, EDGES], ids=["plain", "window and cap"])
@pytest.mark.parametrize("name", PACKAGES)
def test_a_right_package_reads_the_cache_without_a_copy(
    monkeypatch: pytest.MonkeyPatch, name: str, spec: AttentionSpec
) -> None:
    package = PACKAGES[name]("")
    install(monkeypatch, name, package)
    kind = kind_of(spec)

    layer, out = attend(providers(), kind)

    own = Own(Clock()).open(kind).attend(*random_case(kind, [3, 20], [40, 20]))
    assert torch.equal(out, own)
    last, storage = package.calls[-1], layer.untyped_storage().data_ptr()
    assert all(last[plane].untyped_storage().data_ptr() == storage for plane in ("key", "value"))
    assert not last["key"].is_contiguous()


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_package_is_refused_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str, name: str
) -> None:
    install(monkeypatch, name, PACKAGES[name](FAULTS[fault]))

    _, out = attend(providers(), kind_of(EDGES))

    assert out is None
    assert f"not using {name} for attention of long prompts" in caplog.text


@complete
def test_the_interpreted_kernels_agree_with_a_right_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, "flashinfer", FakeFlashInfer())
    kind = kind_of(EDGES)
    own = OwnAttention(kind, family="nvidia", num_programs=264)
    case = random_case(kind, *check_lengths(EDGES))
    run = next(one for one in ATTENTION if one.package == "flashinfer").open(kind)

    expected, actual = own.attend(*case).float(), run.attend(*case).float()

    error = (actual - expected).square().sum() / expected.square().sum()
    assert error < 1e-6


def test_a_second_choice_is_used_if_the_first_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attn_interface", FakeFlashAttention("order"))
    second = FakeFlashInfer()
    install(monkeypatch, "flashinfer", second)

    _, out = attend(providers(), kind_of(SPEC))

    assert out is not None
    assert second.calls


def test_a_slow_package_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, package = Clock(), FakeFlashAttention()
    compute = package.flash_attn_with_kvcache

    def slow(*args: Any, **kwargs: Any) -> torch.Tensor:
        clock.now += 1.5
        return compute(*args, **kwargs)

    monkeypatch.setattr(package, "flash_attn_with_kvcache", slow)
    install(monkeypatch, "flash_attn_interface", package)

    assert attend(providers(clock), kind_of(SPEC))[1] is None
    assert "it takes 1500.000 ms for 64 tokens, PortaLM's kernels 1000.000 ms" in caplog.text


def test_nothing_is_checked_while_requests_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    package = FakeFlashAttention()
    install(monkeypatch, "flash_attn_interface", package)
    chosen = providers()

    assert attend(chosen, kind_of(SPEC), may_check=False)[1] is None
    assert not package.calls
    assert attend(chosen, kind_of(SPEC))[1] is not None
    assert attend(chosen, kind_of(SPEC), may_check=False)[1] is not None


def test_a_package_that_loses_the_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attn_interface", FakeFlashAttention("lost"))

    with pytest.raises(BackendError, match="flash_attn_interface made the GPU unusable") as caught:
        attend(providers(), kind_of(SPEC))
    assert caught.value.kind == "device_lost"


def test_a_package_that_fails_in_service_is_not_used_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    package = FakeFlashAttention()
    install(monkeypatch, "flash_attn_interface", package)
    chosen, kind = providers(), kind_of(SPEC)
    assert attend(chosen, kind)[1] is not None

    package.fault = "raises"
    assert attend(chosen, kind)[1] is None

    assert "using PortaLM's own kernels from now on" in caplog.text
    package.fault = ""
    assert attend(chosen, kind)[1] is None


@pytest.mark.parametrize("fault", ["memory", "lost"])
def test_errors_of_the_device_in_service_are_raised(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    package = FakeFlashAttention()
    install(monkeypatch, "flash_attn_interface", package)
    chosen, kind = providers(), kind_of(SPEC)
    assert attend(chosen, kind)[1] is not None

    package.fault = fault

    with pytest.raises(RuntimeError, match="memory"):
        attend(chosen, kind)


def test_flashinfer_plans_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    package = FakeFlashInfer()
    install(monkeypatch, "flashinfer", package)
    kind, chosen = kind_of(SPEC), providers()
    case = random_case(kind, [20], [20])
    options = {"to_device": kind.to_device, "may_check": True}
    first = chosen.attend(*case, kind.spec, **options)  # checks and plans
    before = package.plans

    second = chosen.attend(*case, kind.spec, **options)

    assert package.plans == before
    assert first is not None and second is not None and torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"has_sinks": True}, "sinks"),
        ({"alibi_slopes": (0.5, 0.25, 0.125, 0.0625)}, "ALiBi"),
        ({"head_size": 260}, "head size 260"),
        ({"value_size": 32}, "values that are part of their keys"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_that_packages_cannot_compute(change: dict[str, Any], reason: str) -> None:
    kind = kind_of(dataclasses.replace(SPEC, **change))

    assert all(reason in (provider.refuses(kind) or "") for provider in ATTENTION)


def test_why_packages_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ATTENTION

    assert missing(first, "sm_80") == "flash_attn_interface does not support sm_80"
    assert missing(second, "sm_80") == "flashinfer is not installed"
    assert summary(ATTENTION, CUDA) == (
        "PortaLM's own kernels; flash_attn_interface or flashinfer would be checked if installed"
    )
    assert summary(ATTENTION, ROCM) == "PortaLM's own kernels"
    install(monkeypatch, "flashinfer", FakeFlashInfer())
    assert summary(ATTENTION, CUDA) == (
        "flashinfer (version unknown), if it passes a check at startup; else PortaLM's own kernels"
    )


@pytest.mark.parametrize("bucket", [None, Bucket(32, 4, 16, 32)], ids=["eager", "captured"])
def test_the_backend_uses_providers_for_steps_that_are_not_captured(
    monkeypatch: pytest.MonkeyPatch, bucket: Bucket | None
) -> None:
    package = FakeFlashAttention()
    install(monkeypatch, "flash_attn_interface", package)
    backend = InterpretedBackend()
    monkeypatch.setattr(backend, "_prefill", providers())
    kind = kind_of(SPEC)
    layer, query, meta = random_case(kind, [24], [24])
    meta.bucket = bucket
    if bucket is not None:
        query = torch.cat([query, query[:8]])
        for name in ("query_start_loc", "host_query_start_loc"):
            loc = getattr(meta, name)
            setattr(meta, name, _padded(loc, loc[-1], 5))
        meta.seq_lens = _padded(meta.seq_lens, 0, 4)
        meta.host_seq_lens = _padded(meta.host_seq_lens, 0, 4)
        meta.block_table = torch.cat([meta.block_table, torch.zeros(3, 2, dtype=torch.int32)])
    backend.prepare(meta, [SPEC])

    backend.attend(layer[None], 0, query, meta, SPEC)

    assert bool(package.calls) == (bucket is None)


def _padded(values: Any, value: int, count: int) -> Any:
    if isinstance(values, torch.Tensor):
        return torch.cat([values, values.new_full((count - len(values),), int(value))])
    return _padded(torch.from_numpy(values), value, count).numpy()
