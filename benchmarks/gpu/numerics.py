"""The conformance kit on the device, in sections, each until its time is up.

Level 1 needs over 200 kernel variants, minutes of compilation in one process. The section `compile`
compiles them first, in many processes, on a substitute of the GPU (dry.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from gpu.common import Clock, OutOfTime, Settings, fail, report, run_sections, settings
from portalm.backend import load_backend
from portalm.conformance import laws, layers, operations
from portalm.conformance.check import Check, Item, Result
from portalm.conformance.report import counts
from portalm.conformance.subject import Subject

OPERATIONS: tuple[Check, ...] = (*operations.CHECKS, *layers.CHECKS, *laws.CHECKS)
"""Checks of L0, L1 and L2, which need no engine."""


def items(level: str, wanted: Callable[[Item], bool] = lambda item: True) -> list[Item]:
    """Cases of a level; only L3 and L4 import the engine."""
    checks = OPERATIONS
    if level in ("L3", "L4"):
        from portalm.conformance import models, serving

        checks = (*models.CHECKS, *serving.CHECKS)
    found = [item for check in checks if check.level == level for item in check.items()]
    return [item for item in found if wanted(item)]


class Numerics:
    """The sections."""

    def __init__(self, run: Settings) -> None:
        """Start nothing yet: the section `compile` does not need the device."""
        self.run = run
        self._subject: Subject | None = None

    def subject(self) -> Subject:
        """The device, started when it is first used."""
        if self._subject is None:
            self._subject = Subject(load_backend(self.run.device))
        return self._subject

    def compile(self, clock: Clock) -> None:
        """Compile the kernels of L1 and L2 in parallel processes."""
        backend = self.subject().backend
        arch = getattr(backend, "arch", None)
        if arch is None or self.run.is_dry:
            message = "not needed: this device compiles nothing, or nothing else"
            report("kernels compiled in parallel", None, message=message)
            return
        count = max(1, min((os.cpu_count() or 2) - 1, 32))
        begin = time.perf_counter()
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "gpu.precompile", arch.name, f"{i}/{count}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i in range(count)
        ]
        try:
            outputs = [process.communicate()[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process, output in zip(processes, outputs, strict=True):
            print(output, flush=True)
            if process.returncode:
                raise RuntimeError(f"status {process.returncode}: {output[-2000:]}")
        report("kernels compiled in parallel", time.perf_counter() - begin, "s", processes=count)

    def check(self, name: str, cases: list[Item], clock: Clock) -> None:
        """Run cases until the time is up; report every failure as a result."""
        if self.run.is_tiny:
            cases = cases[:: max(1, len(cases) // 12)]
        if self.run.is_dry:
            self._launch(name, cases)
            return
        results: list[Result] = []
        begin, done = time.perf_counter(), 0
        try:
            for item in cases:
                if clock.left() < 1:
                    break
                results.append(item.run(self.subject()))
                done += 1
                if results[-1].status == "fail":
                    fail(f"{item.level} {item.name}", results[-1].message)
        except OutOfTime:
            fail(f"{name}: {cases[done].name}", "stopped at the section's time limit")
        for level, count in counts(results).items():
            taken = time.perf_counter() - begin
            report(f"conformance {name}", count["pass"], "passed", seconds=taken, **count)
            slowest = sorted((r for r in results if r.level == level), key=lambda r: -r.seconds)[:3]
            report(f"slowest cases of {name}", None, cases=[asdict(r) for r in slowest])
        if done < len(cases):
            report(f"conformance {name}, skipped for lack of time", len(cases) - done, "cases")

    def _launch(self, name: str, cases: list[Item]) -> None:
        """Run cases on a dry GPU, where only errors before the device computes count."""
        from gpu.dry_backend import launch_cases

        for error in launch_cases(self.subject(), cases):
            fail(name, error)
        report(f"conformance {name}, launched only", len(cases), "cases")


def main() -> None:
    """Run the selected sections."""
    run = settings()
    part = Numerics(run)

    def is_captured(item: Item) -> bool:
        return item.check == "captured step"

    def is_llama(item: Item) -> bool:
        return item.case == "llama"

    cases: dict[str, Callable[[], list[Item]]] = {
        "L2 captured": lambda: items("L2", is_captured),
        "L3 llama": lambda: items("L3", is_llama),
        "L0": lambda: items("L0"),
        "L1": lambda: items("L1"),
        "L2": lambda: items("L2", lambda item: not is_captured(item)),
        "L3": lambda: items("L3", lambda item: not is_llama(item)),
        "L4": lambda: items("L4"),
    }

    def section(name: str, clock: Clock) -> None:
        part.check(name, cases[name](), clock)

    sections = {name: partial(section, name) for name in cases}
    run_sections(run, {"compile": part.compile, **sections})


if __name__ == "__main__":
    main()
