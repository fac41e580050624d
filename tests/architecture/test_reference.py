"""docs/reference says what the code says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_reference_pages_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "ci/reference.py"), "check"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, f"run `python ci/reference.py write`:\n{done.stdout}{done.stderr}"
