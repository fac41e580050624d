"""On Hopper, prompts keep the tensor cores busy while a softmax is computed.

Kernels are compiled in another process, because this one interprets them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import dataclasses
from tests.gpu.kernel_budgets import launches
from tests.gpu.tensor_core_overlap import NAMES, overlap_of

def show(name, launch):
    found = overlap_of(launch)
    print(f"{name}: {found.waits} {found.share:.3f}", flush=True)

for name in NAMES:
    show(name, launches("sm_90")[name]("sm_90"))
launch = launches("sm_90")[NAMES[0]]("sm_90")
constants = launch.constants | {"OVERLAPS": False}
show("without", dataclasses.replace(launch, constants=constants))
"""


@pytest.mark.gpu_compiled
def test_tensor_cores_are_busy_during_a_softmax() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = (line.split(": ") for line in done.stdout.splitlines())
    found = {name: line.split() for name, line in lines}

    # ptxas can serialize tensor core instructions, and then a warp waits after each of them
    assert {int(waits) for waits, _ in found.values()} == {1}
    shares = {name: float(share) for name, (_, share) in found.items()}
    assert shares["attention, prefill"] > 0.8
    assert shares["attention, prefill, head 64"] > 0.7
    assert shares["attention, prefill, head 256"] > 0.65
    assert shares["without"] < 0.7
