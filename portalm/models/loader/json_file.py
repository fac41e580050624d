"""Reads JSON files of a checkpoint; errors name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from portalm.errors import CheckpointError


def read_json(path: Path) -> Any:
    """Parse a JSON file; raise `CheckpointError` if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(path, error.strerror or str(error)) from error
    except ValueError as error:
        raise CheckpointError(path, f"it is not valid JSON ({error})") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object; raise `CheckpointError` for anything else."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise CheckpointError(path, f"it must hold a JSON object, not a {type(values).__name__}")
    return values
