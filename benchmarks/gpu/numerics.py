"""The conformance kit on the device, level by level, until the time is up."""

from __future__ import annotations

import time
from dataclasses import asdict

from gpu.common import report, settings
from portalm.backend import load_backend
from portalm.conformance.kit import all_items
from portalm.conformance.report import counts
from portalm.conformance.subject import Subject


def main() -> None:
    """Run the kit; report every failure as a result."""
    run = settings()
    until = time.monotonic() + 0.9 * run.limit_s
    subject = Subject(load_backend(run.device))
    results, num_left = [], 0
    for item in all_items(["L0", "L1", "L2"] if run.is_tiny else []):
        if time.monotonic() > until:
            num_left += 1
            continue
        results.append(item.run(subject))
        if results[-1].status == "fail":
            report(f"FAILED {item.level} {item.name}", None, message=results[-1].message)
    for level, count in counts(results).items():
        report(f"conformance {level}", count["pass"], "passed", **count)
    report("cases skipped for lack of time", num_left, "cases")
    slowest = sorted(results, key=lambda r: -r.seconds)[:3]
    report("slowest cases", None, cases=[asdict(r) for r in slowest])


if __name__ == "__main__":
    main()
