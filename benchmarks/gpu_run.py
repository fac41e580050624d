"""Check the GPU backends on a GPU: first correctness, then speed.

    python benchmarks/gpu_run.py --out DIR --pack PACK --stages smoke,calib,numerics --limit 240

It runs from the source tree without installation or network access. benchmarks/gpu/README.md lists
the stages and what each needs; benchmarks/gpu/pack.py collects what a machine lacks. A part that
lacks something is skipped, with the reason. Results are saved one by one in DIR/gpu-run.json, after
the predictions, which are written first; the whole output of every part is in DIR/logs. Calls with
the same DIR add to one file, and --resume skips what is done.

    python benchmarks/gpu_run.py --device reference --tiny --out DIR    tests the script itself
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpu.common import DONE, MARK
from gpu.environment import ROOT, Environment, not_installed, preflight, prepare
from gpu.predict import predictions
from gpu.processes import run_part
from gpu.record import Record
from gpu.stages import STAGES, Part, selected


class Run:
    """One call of this script."""

    def __init__(self, arguments: argparse.Namespace, record: Record, needs: Environment) -> None:
        """Run with the given arguments; results go to `record`."""
        self.arguments = arguments
        self.record = record
        self.environment = needs
        self.only: list[str] = [text for text in arguments.only.split(",") if text]
        self.until = time.monotonic() + arguments.limit
        self.broken: dict[str, str] = {}
        """Errors of modules that cannot be imported."""

    def sections(self, stage: str, part: Part) -> dict[str, float]:
        """Sections of a part that this run has to run."""
        found = selected(part, stage, self.only)
        if self.arguments.resume:
            done = {s for s in found if self.record.is_done(f"{stage} {part.name} {s}")}
            left = {s: share for s, share in found.items() if s not in done}
            if left and "start" in found:
                left = {"start": found["start"], **left}
            found = left
        return found

    def check_imports(self, stages: list[str]) -> None:
        """Import what the selected parts need; record what is missing."""
        parts = [(stage, part) for stage in stages for part in STAGES[stage].parts]
        modules = [
            name for stage, part in parts if self.sections(stage, part) for name in part.imports
        ]
        self.broken, versions = preflight(modules, self.environment)
        lacking = not_installed(self.environment)
        self.record.describe(
            versions=versions,
            not_installed=lacking,
            cannot_import=self.broken,
            notes=self.environment.notes,
        )
        for note in self.environment.notes:
            print(f"note: {note}", flush=True)
        if lacking:
            print(f"not installed: {', '.join(lacking)}", flush=True)
        for name, error in self.broken.items():
            print(f"cannot import {name}: {error}", flush=True)

    def run_stage(self, stage: str, limit_s: float) -> bool:
        """Run the parts of a stage within `limit_s`; return True unless one that ran failed."""
        until, num_skipped = time.monotonic() + limit_s, 0
        todo = [(part, self.sections(stage, part)) for part in STAGES[stage].parts]
        todo = [(part, sections) for part, sections in todo if sections]
        before = len(self.record.failures())
        for i, (part, sections) in enumerate(todo):
            lacking = [name for name in part.imports if name in self.broken]
            if lacking:
                reasons = "; ".join(f"{name}: {self.broken[name]}" for name in lacking)
                self.record.fail(stage, f"{stage} {part.name}", f"skipped: cannot import {reasons}")
                num_skipped += 1
                continue
            share = part.share / sum(other.share for other, _ in todo[i:])
            self._run_part(stage, part, sections, share * max(until - time.monotonic(), 1.0))
        return len(self.record.failures()) == before + num_skipped

    def _run_part(self, stage: str, part: Part, sections: dict[str, float], limit_s: float) -> None:
        arguments = self.arguments
        settings = {
            "device": arguments.device,
            "part": part.name,
            "sections": sections,
            "limit_s": limit_s,
            "is_tiny": arguments.tiny,
        }
        name = f"{stage} {part.name}"
        logs = arguments.out / "logs"
        logs.mkdir(exist_ok=True)
        log = logs / f"{self.record.number}-{name.replace(' ', '-')}.log"
        print(f"--- {name}: {', '.join(sections)} ({limit_s:.0f} s)", flush=True)

        def take(line: str) -> None:
            if line.startswith(MARK):
                self.record.add({"stage": stage, **json.loads(line.removeprefix(MARK))})
            elif line.startswith(DONE):
                self.record.finish(f"{name} {line.removeprefix(DONE)}")
            print(line, flush=True)

        command = [sys.executable, "-m", part.module, json.dumps(settings)]
        status, tail = run_part(command, limit_s, self.environment.variables, log, take)
        if status is None:
            text = f"stopped at its time limit of {limit_s:.0f} s; last output:\n{tail}"
            self.record.fail(stage, name, text)
        elif status != 0:
            self.record.fail(stage, name, f"ended with status {status}; last output:\n{tail}")


def revision() -> str:
    """Return the commit of this source tree, or a remark that there is none."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return "unknown: not a git checkout"
    command = [git, "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stages", default=",".join(STAGES), help="stages to run, in order (default: all)"
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT[,TEXT]",
        help="run only sections whose name, 'STAGE PART SECTION', contains one of these texts "
        "(default: all, except the part 'transformers')",
    )
    parser.add_argument(
        "--limit", type=float, default=540, help="seconds for all stages together (default: 540)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument(
        "--resume", action="store_true", help="skip sections that DIR has results of"
    )
    parser.add_argument(
        "--go-on", action="store_true", help="run later stages even if the smoke test fails"
    )
    parser.add_argument("--device", default="cuda", help="backend to measure (default: cuda)")
    parser.add_argument(
        "--pack", type=Path, help="folder that benchmarks/gpu/pack.py made (default: none)"
    )
    parser.add_argument(
        "--packages", default="", help="folder with more packages (pip install --target)"
    )
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to test the script itself")
    arguments = parser.parse_args()
    arguments.stages = arguments.stages.split(",")
    if unknown := [stage for stage in arguments.stages if stage not in STAGES]:
        parser.error(f"unknown stage {', '.join(unknown)}; stages: {', '.join(STAGES)}")
    if arguments.pack is not None and not (arguments.pack / "pack.json").exists():
        parser.error(
            f"{arguments.pack} is not a pack: it has no pack.json (benchmarks/gpu/pack.py)"
        )
    return arguments


def main() -> int:
    """Run the selected stages; return 1 if anything failed."""
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the running part, too
    record = Record(arguments.out, arguments.device, predictions(), resume=arguments.resume)
    record.describe(revision=revision(), arguments=sys.argv[1:])
    run = Run(arguments, record, prepare(arguments.out, arguments.pack, arguments.packages))
    run.check_imports(arguments.stages)
    for i, stage in enumerate(arguments.stages):
        weight = STAGES[stage].seconds / sum(STAGES[s].seconds for s in arguments.stages[i:])
        is_good = run.run_stage(stage, weight * max(run.until - time.monotonic(), 1.0))
        if not is_good and STAGES[stage].stops_run and not arguments.go_on:
            for later in arguments.stages[i + 1 :]:
                record.fail(later, later, f"not run: the stage {stage} failed")
            print("\n".join(result["message"] for result in record.failures()), flush=True)
            break
    print(record.table())
    return 1 if record.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
