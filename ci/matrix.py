"""Read ci/matrix.yml: `matrix.py shell JOB` for ci/run.sh, `matrix.py github` for the workflow."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

MATRIX = Path(__file__).with_name("matrix.yml")


def load() -> dict[str, Any]:
    """The parsed ci/matrix.yml."""
    matrix: dict[str, Any] = yaml.safe_load(MATRIX.read_text())
    return matrix


def shell(job: str) -> str:
    """The job's command and markers as shell assignments; exit with an error if it is unknown."""
    matrix = load()
    if job not in matrix["jobs"]:
        sys.exit(f"ci/run.sh: no job {job!r} in ci/matrix.yml; jobs: {', '.join(matrix['jobs'])}")
    fields = matrix["jobs"][job]
    return "\n".join(
        f"{name}={shlex.quote(fields.get(name, ''))}" for name in ("command", "markers")
    )


def github() -> str:
    """The jobs without special hardware, as JSON for a GitHub workflow's matrix."""
    jobs = {name: fields for name, fields in load()["jobs"].items() if "needs" not in fields}
    return json.dumps({"include": [{"job": name, **fields} for name, fields in jobs.items()]})


if __name__ == "__main__":
    if sys.argv[1:] == ["github"]:
        print(github())
    elif len(sys.argv) == 3 and sys.argv[1] == "shell":
        print(shell(sys.argv[2]))
    else:
        sys.exit("usage: matrix.py github | matrix.py shell JOB")
