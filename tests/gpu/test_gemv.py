"""Products of at most 4 rows on AMD GPUs, interpreted and compared with float64."""

from __future__ import annotations

import pytest
import torch

from portalm_backends.gpu_common.kernels import gemv
from portalm_backends.rocm.backend import RocmBackend
from tests.gpu.fake_device import FakeGpu
from tests.gpu.interpreted import complete, interpreted, some
from tests.gpu.test_linear import DTYPES, NMSE, nmse, normal

SIZES = {  # name: (N, K); K of one program is 1,024 in float32 and 2,048 in float16
    "one block": (9, 1024),
    "rest of K and N": (37, 2064),
    "narrow": (5, 16),
    "split": (3, 8208),
}
CORES = 4


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return gemv.gemv(x, weight, bias, dtype or x.dtype, num_cores=CORES, warp_size=64)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", some(DTYPES, lambda dtype: dtype == "float16"))
def test_product_is_exact_to_its_rounding(size: str, dtype: str) -> None:
    n, k = SIZES[size]
    weight, bias = normal(n, k, dtype=dtype), normal(n, dtype=dtype, seed=1)
    for rows in range(1, gemv.MAX_ROWS + 1):
        x = normal(rows, k, dtype=dtype, seed=rows)
        exact = x.double() @ weight.double().T

        assert nmse(multiply(x, weight, bias), exact + bias.double()) < NMSE[dtype]
        assert nmse(multiply(x, weight, None, torch.float32), exact) < 1e-11


def test_the_split_size_is_split() -> None:
    n, k = SIZES["split"]

    *_, num_parts = gemv.shape_of(1, n, k, itemsize=2, num_cores=CORES, warp_size=64)

    assert num_parts > 2


@pytest.mark.parametrize("num_cores", [4, 110, 304])
@pytest.mark.parametrize("warp_size", [32, 64])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_parts_cover_k_and_depend_on_no_other_row(
    itemsize: int, warp_size: int, num_cores: int
) -> None:
    for n in (1, 7, 896, 4096, 128_256):
        for k in (16, 896, 4096, 14_336, 53_248):
            splits = set()
            for m in range(1, gemv.MAX_ROWS + 1):
                rows, block_n, block_k, per_part, num_parts = gemv.shape_of(
                    m, n, k, itemsize=itemsize, num_cores=num_cores, warp_size=warp_size
                )
                assert m <= rows
                assert rows * block_n <= 32
                assert (num_parts - 1) * per_part * block_k < k <= num_parts * per_part * block_k
                splits.add((block_k, per_part, num_parts))
            assert len(splits) == 1


def test_rows_of_x_need_not_be_contiguous_and_nan_stays_in_its_row() -> None:
    weight, wide = normal(20, 96), torch.full((4, 208), float("nan"))
    wide[:, 16:112] = normal(4, 96, seed=1)
    wide[2, 30] = float("nan")
    x = wide[:3, 16:112]

    actual = multiply(x, weight)

    assert nmse(actual[:2], x[:2].double() @ weight.double().T) < 1e-11
    assert actual[2].isnan().all()


@complete
def test_values_beyond_n_and_k_are_not_used() -> None:
    """The weight, x and the result are inside larger tensors of NaN."""
    n, k = 37, 1040
    padded, padded_x = torch.full((n + 8, k), float("nan")), torch.full((3, 2048), float("nan"))
    padded[:n], padded_x[:, :k] = normal(n, k), normal(3, k, seed=1)

    actual = multiply(padded_x[:, :k], padded[:n])

    assert nmse(actual, padded_x[:, :k].double() @ padded[:n].double().T) < 1e-11


def test_what_fits() -> None:
    weight = normal(32, 64)

    assert gemv.fits(weight, normal(1, 64))
    assert gemv.fits(weight, normal(4, 64))
    assert not gemv.fits(weight, normal(5, 64))
    assert not gemv.fits(weight, normal(0, 64))
    assert not gemv.fits(weight, normal(2, 64, dtype="float16"))
    assert not gemv.fits(normal(32, 72), normal(2, 72))  # rows are not aligned
    assert not gemv.fits(weight, normal(2, 128)[:, 1:65])  # no pointer to a vector
    assert not gemv.fits(weight, normal(64, 2).T)  # columns are not contiguous


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_the_backend_uses_it_for_few_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    launch = gemv.gemv

    def count(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append(len(x))
        return launch(x, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(gemv, "gemv", count)
    gpu = FakeGpu(arch="gfx942")
    with interpreted(gpu):
        backend = RocmBackend(gpu)
        weight, bias = normal(24, 64), normal(24, seed=1)
        packed, x = backend.pack(weight), normal(rows, 64, seed=2)

        linear, logits = backend.linear(x, packed, bias), backend.logits(x, packed)

        gpu.drain()
    assert calls == ([rows, rows] if rows <= gemv.MAX_ROWS else [])
    assert nmse(linear, x.double() @ weight.double().T + bias.double()) < 1e-11
    assert nmse(logits, x.double() @ weight.double().T) < 1e-11


@complete
@pytest.mark.parametrize("fault", ["weight", "bias", "part"])
def test_the_comparison_detects_planted_faults(fault: str) -> None:
    n, k = SIZES["split"]
    weight, bias, x = normal(n, k), normal(n, seed=1), normal(2, k, seed=2)
    expected = x.double() @ weight.double().T + bias.double()
    if fault == "weight":
        weight = weight.roll(8, dims=1)
    elif fault == "bias":
        bias = bias.flip(0)
    else:
        x = x.clone()
        x[:, -16:] = 0.0  # as if the last part ended too early

    assert nmse(multiply(x, weight, bias), expected) > 1e-5
