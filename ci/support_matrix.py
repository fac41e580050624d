"""docs/support-matrix.md, from what the conformance kit found on each device.

python ci/support_matrix.py record DEVICE [LEVEL ...]   runs the kit (these levels of it), writes
                                                        docs/support/DEVICE.json
python ci/support_matrix.py write                       writes docs/support-matrix.md from those

cuda and rocm are interpreted here, on a device that stands for a GPU; of the models (L3) one of
each kind is. On a machine with a GPU `portalm conformance --device cuda --json
docs/support/cuda.json` says "run".
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs/support"
PAGE = ROOT / "docs/support-matrix.md"
ARCHS = {"cuda": "sm_90", "rocm": "gfx942"}
STAND_INS = {"tpu": "CPU client"}
"""By device: what its summary says where something stands for it."""

_HEAD = """# Support matrix

What the conformance kit found on each device: cases that passed, of those that were tried. Written
by `python ci/support_matrix.py write` from docs/support. How: `run` is on the device itself;
`interpreted` is the device's kernels in Triton's interpreter, streams and graphs on a device that
stands for one; `emulated` is the whole backend on something that stands for its device.

"""


def page() -> str:
    """The page, from the files that are there."""
    from portalm.conformance.report import as_markdown

    records = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    return _HEAD + as_markdown(records)


def record(device: str, levels: list[str]) -> None:
    """Run these levels of the kit (none: all that there are) on `device` and keep the counts."""
    if device in ARCHS:
        sys.path.insert(0, str(ROOT))
        import tests.gpu.conftest  # noqa: F401 - kernels are to be interpreted
        from tests.gpu.fake_device import FakeGpu
        from tests.gpu.interpreted import MODELS, interpreted, interpreted_backend

        gpu = FakeGpu(arch=ARCHS[device])
        run_levels(
            device,
            interpreted_backend(gpu),
            levels or ["L0", "L1", "L2", "L3"],
            interpreted(gpu),
            models=MODELS,
            checked="interpreted",
            summary=f"kernels for {ARCHS[device]} in Triton's interpreter; no GPU has run it",
        )
    else:
        from portalm.backend import load_backend
        from portalm.conformance.base import LEVELS

        backend = load_backend(device)
        is_there = device not in STAND_INS or STAND_INS[device] not in backend.find().summary
        run_levels(
            device,
            backend,
            levels or list(LEVELS),
            contextlib.nullcontext(),
            checked="run" if is_there else "emulated",
        )


def run_levels(
    device: str,
    backend: Any,
    levels: list[str],
    running: Any,
    *,
    checked: str,
    summary: str = "",
    models: frozenset[str] = frozenset(),
) -> None:
    """Write the file behind every level: one that is not run, or not yet, stays as it is there.

    Of L3 only `models` are tried; none: all.
    """
    from portalm.conformance.kit import all_items
    from portalm.conformance.report import as_json, as_table
    from portalm.conformance.subject import Subject

    path, subject = FOLDER / f"{device}.json", Subject(backend)
    with running:
        for level in levels:
            items = all_items([level])
            if level == "L3" and models:
                items = [item for item in items if item.case in models]
            results = [item.run(subject) for item in items]
            kept = json.loads(as_json(backend, results, checked=checked))
            before = (
                json.loads(path.read_text()) if path.exists() else {"counts": {}, "results": []}
            )
            rest = [r for r in before["results"] if r["level"] != level]
            # which models passed is told one by one
            now = [r for r in kept["results"] if r["status"] == "fail" or level == "L3"]
            kept["results"] = rest + [{**r, "seconds": round(r["seconds"], 1)} for r in now]
            kept["counts"] = dict(sorted((before["counts"] | kept["counts"]).items()))
            kept["summary"] = summary or kept["summary"]
            path.write_text(json.dumps(kept, indent=1) + "\n")
            print(as_table(device, results), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        PAGE.write_text(page())
    elif len(sys.argv) > 2 and sys.argv[1] == "record":
        record(sys.argv[2], sys.argv[3:])
    else:
        sys.exit("usage: support_matrix.py write | support_matrix.py record DEVICE [LEVEL ...]")
