"""JSON files of a checkpoint; a broken one is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from portalm.errors import CheckpointError


def read_json(path: Path) -> Any:
    """What the file holds; `CheckpointError` if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(path, error.strerror or str(error)) from error
    except ValueError as error:
        raise CheckpointError(path, f"it is not valid JSON ({error})") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that the file holds."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise CheckpointError(path, f"it holds a {type(values).__name__}, not an object")
    return values
