"""The conformance kit on the GPU backends, with interpreted kernels on a simulated device.

Nothing here runs on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from portalm.conformance.check import Item
from portalm.conformance.kit import all_items
from portalm.conformance.subject import Subject
from tests.gpu.fake_device import FakeGpu
from tests.gpu.interpreted import MODELS, interpreted, interpreted_backend

ITEMS = all_items(["L0", "L1", "L2"])
WHOLE_MODELS = [item for item in all_items(["L3"]) if item.case in MODELS]
ARCHS = ("sm_90", "gfx942", "gfx1100")
"""One architecture per family; families differ in their tile sizes."""

QUICK = {
    "export and import[unquantized]",
    "export and import[fp8]",
    "copy[unquantized]",
    "copy[int8]",
    "8-bit KV codes[int8 from float16]",
    "8-bit KV codes[fp8 from float32]",
    "attend[decode, gqa, float16, kv int8]",
    "attend[decode, gqa, float32, kv fp8]",
    "seal",
    "sampling alone[mixed]",
    "linear rows alone",
}
"""Cases that the default test run includes, for the first architecture only."""


def cases() -> list[object]:
    found = []
    for arch in ARCHS:
        for item in [*ITEMS, *(WHOLE_MODELS if arch != ARCHS[-1] else [])]:
            is_quick = arch == ARCHS[0] and item.name in QUICK
            marks = () if is_quick else (pytest.mark.gpu_interpreted,)
            found.append(
                pytest.param(arch, item, marks=marks, id=f"{arch} {item.level} {item.name}")
            )
    return found


@pytest.fixture(scope="module")
def subjects() -> Iterator[dict[str, tuple[FakeGpu, Subject]]]:
    yield {}


@pytest.mark.parametrize(("arch", "item"), cases())
def test_conforms(arch: str, item: Item, subjects: dict[str, tuple[FakeGpu, Subject]]) -> None:
    if arch not in subjects:
        gpu = FakeGpu(arch=arch)
        subjects[arch] = (gpu, Subject(interpreted_backend(gpu)))
    gpu, subject = subjects[arch]
    with interpreted(gpu):
        result = item.run(subject)

    if result.status == "unsupported":
        pytest.skip(f"not claimed: {result.message}")
    assert result.status == "pass", result.message
