"""Check the GPU backends on a GPU in one run: first correctness, then speed.

    python benchmarks/gpu_run.py --stages calib,numerics,kernels,engine,serve,profile \
        --limit 540 --out DIR

It runs from the source tree without installation or network access, and needs torch, Triton and
the dependencies of transformers. If a stage needs other packages, it names them (`pip download`
them elsewhere, then use --packages). Each stage runs in separate processes with a share of --limit.
Results are saved immediately in DIR/gpu-run.json, after the predictions, which are written first.
Several calls with the same DIR add to one file.

    python benchmarks/gpu_run.py --device reference --tiny --out DIR    tests the script itself
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu.common import MARK

ROOT = Path(__file__).resolve().parents[1]

STAGES: dict[str, list[list[str]]] = {
    "calib": [["gpu.calib"]],
    "numerics": [["gpu.numerics"]],
    "kernels": [["gpu.kernels"]],
    "engine": [["gpu.engine", "8b"], ["gpu.engine", "1b"], ["gpu.engine", "transformers"]],
    "serve": [["gpu.serve"]],
    "profile": [["gpu.profile", "8b"], ["gpu.profile", "1b"]],
}
"""Commands of each stage, run one after another."""

SHARES = {"calib": 0.5, "numerics": 3, "kernels": 2, "engine": 4, "serve": 2, "profile": 1.5}
"""Relative share of the time for each stage."""

NEEDS = {
    "calib": ["torch", "triton"],
    "numerics": ["torch", "triton", "msgspec", "tqdm"],
    "kernels": ["torch", "triton"],
    "engine": ["torch", "triton", "msgspec", "tqdm", "transformers"],
    "serve": [
        "torch",
        "msgspec",
        "zmq",
        "fastapi",
        "uvicorn",
        "prometheus_client",
        "tokenizers",
        "jinja2",
    ],
    "profile": ["torch", "triton", "msgspec", "tqdm"],
}
"""Modules that each stage imports."""

PREDICTED: dict[str, tuple[float, float, str]] = {
    "8b: decode, 1 x 512": (286, 256, "tok/s"),
    "8b: decode, 64 x 1024": (11_660, 10_200, "tok/s"),
    "8b: decode, 256 x 1024": (19_915, 17_500, "tok/s"),
    "8b: prefill, 2048": (54_000, 43_000, "tok/s"),
    "8b: TTFT, 1024": (18.5, 24, "ms"),
    "8b: offline, 1000 requests": (20_700, 16_000, "tok/s"),
    "8b: exec to first token": (0, 8, "s"),
    "decode attention, 64 x 1024": (4.3, 0.88 * 4.3, "TB/s"),
    "decode attention, 64 x 8192": (4.3, 0.92 * 4.3, "TB/s"),
    "experts, 64 tokens": (4.3, 0.75 * 4.3, "TB/s"),
    "experts, 8192 tokens": (790, 0.5 * 790, "TFLOP/s"),
    "8b: idle at 256 streams": (0, 1, "%"),
    "1b: idle at 64 streams": (0, 5, "%"),
}
"""(limit, goal, unit) on an H200, from 4.3 TB/s and 790 TFLOP/s measured in a calibration."""


class Record:
    """The file DIR/gpu-run.json, which is complete after every change."""

    def __init__(self, folder: Path, device: str) -> None:
        """Read the existing file, or create one with the predictions."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "gpu-run.json"
        self.content: dict[str, Any] = {
            "device": device,
            "machine": platform.platform(),
            "predictions": {
                k: dict(zip(("limit", "goal", "unit"), v, strict=True))
                for k, v in PREDICTED.items()
            },
            "results": [],
        }
        if self.path.exists():
            self.content = json.loads(self.path.read_text())
        self._write()

    def add(self, result: dict[str, Any]) -> None:
        """Add a result and save the file."""
        self.content["results"].append(result)
        self._write()

    def _write(self) -> None:
        whole = self.path.with_suffix(".part")
        whole.write_text(json.dumps(self.content, indent=1) + "\n")
        whole.replace(self.path)

    def table(self) -> str:
        """Format the results, one per line, with goal and limit if there is a prediction."""
        lines = [f"{'':<52}{'measured':>12} {'':<8}{'goal':>10}{'limit':>10}"]
        for result in self.content["results"]:
            value = result["value"]
            if not isinstance(value, int | float):
                if "message" in result:
                    lines.append(f"{result['name']}: {result['message'][:160]}")
                continue
            predicted = self.content["predictions"].get(result["name"])
            more = ""
            if predicted:
                more = f"{predicted['goal']:>10,.6g}{predicted['limit']:>10,.6g}"
            lines.append(f"{result['name']:<52}{value:>12,.5g} {result['unit']:<8}{more}")
        return "\n".join(lines)


def source_tree() -> Path:
    """Create a folder from which this source tree can be imported as if it were installed."""
    folder = Path(tempfile.mkdtemp(prefix="portalm-source-"))
    (folder / "portalm_backends").symlink_to(ROOT / "backends")
    (folder / "portalm").symlink_to(ROOT / "portalm")
    entry_points = (ROOT / "pyproject.toml").read_text().partition('"portalm.backends"]\n')[2]
    entry_points = entry_points.partition("\n\n")[0].replace('"', "")
    info = folder / "portalm-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: portalm\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[portalm.backends]\n{entry_points}\n")
    return folder


def missing(stage: str) -> list[str]:
    """Modules that the stage needs and this Python does not have."""
    return [name for name in NEEDS[stage] if importlib.util.find_spec(name) is None]


def run_stage(
    stage: str, arguments: argparse.Namespace, limit_s: float, record: Record, path: str
) -> None:
    """Run the commands of a stage within `limit_s`; record its results and failures."""
    until = time.monotonic() + limit_s
    parts = STAGES[stage]
    for i, (module, *rest) in enumerate(parts):
        left = (until - time.monotonic()) / (len(parts) - i)
        settings = {"device": arguments.device, "limit_s": left, "is_tiny": arguments.tiny}
        command = [sys.executable, "-m", module, json.dumps(settings), *rest]
        name = " ".join([stage, *rest])
        status, tail = run_part(
            command, left, path, lambda result: record.add({"stage": stage, **result})
        )
        if status != 0:
            text = f"stopped at its time limit of {left:.0f} s" if status is None else tail
            record.add(
                {
                    "stage": stage,
                    "name": f"FAILED {name}",
                    "value": None,
                    "unit": "",
                    "message": text,
                }
            )
            print(f"{name} FAILED: {text}", flush=True)


def run_part(command: list[str], limit_s: float, path: str, take: Any) -> tuple[int | None, str]:
    """Run a command and pass its results to `take`.

    Returns its exit status (None: stopped at the time limit) and the end of its output.
    """
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    until, lines = time.monotonic() + limit_s, []
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process, killed_at_exit(process):
        for line in lines_until(process.stdout.fileno(), until):
            lines.append(line)
            print(line, flush=True)
            if line.startswith(MARK):
                take(json.loads(line[len(MARK) :]))
        if time.monotonic() >= until:
            return None, ""
        return process.wait(), "\n".join(lines[-12:])


@contextlib.contextmanager
def killed_at_exit(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill the process group of `process` when the context ends."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def lines_until(descriptor: int, until: float) -> Iterator[str]:
    """Yield lines as they arrive, until the end of the file or the time `until`."""
    rest = b""
    while (left := until - time.monotonic()) > 0:
        if not select.select([descriptor], [], [], left)[0]:
            return
        piece = os.read(descriptor, 1 << 16)
        if not piece:
            return
        *lines, rest = (rest + piece).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)


def main() -> int:
    """Run the selected stages; return 1 if anything failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stages", default=",".join(STAGES), help="stages to run, in order (default: all)"
    )
    parser.add_argument(
        "--limit", type=float, default=540, help="seconds for all stages together (default: 540)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu-run.json")
    parser.add_argument("--device", default="cuda", help="backend to measure (default: cuda)")
    parser.add_argument(
        "--packages", default="", help="folder with more packages (pip install --target)"
    )
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to test the script itself")
    arguments = parser.parse_args()
    stages = arguments.stages.split(",")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        parser.error(f"unknown stage {', '.join(unknown)}; stages: {', '.join(STAGES)}")
    record = Record(arguments.out, arguments.device)
    path = os.pathsep.join(
        filter(None, [str(source_tree()), str(ROOT / "benchmarks"), arguments.packages])
    )
    sys.path[:0] = filter(None, [arguments.packages])
    until = time.monotonic() + arguments.limit
    for i, stage in enumerate(stages):
        share = SHARES[stage] / sum(SHARES[s] for s in stages[i:])
        if lacking := missing(stage):
            text = (
                f"missing packages: {', '.join(lacking)}; install them into a folder "
                f"(pip install --target) and pass it as --packages"
            )
            record.add(
                {
                    "stage": stage,
                    "name": f"FAILED {stage}",
                    "value": None,
                    "unit": "",
                    "message": text,
                }
            )
            continue
        run_stage(stage, arguments, share * (until - time.monotonic()), record, path)
    print(record.table())
    return 1 if any(r["name"].startswith("FAILED") for r in record.content["results"]) else 0


if __name__ == "__main__":
    sys.exit(main())
