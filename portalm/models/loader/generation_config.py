"""Default sampling parameters that a checkpoint's makers recommend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from portalm.errors import CheckpointError, ConfigError
from portalm.models.loader.gguf_file import read_metadata
from portalm.models.loader.json_file import read_json_object
from portalm.sampling_params import SamplingParams

FILE = "generation_config.json"

_NAMES = {
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}
"""Keys of generation_config.json that are defaults in vLLM too, and our names."""

_GGUF_NAMES = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
"""Keys of GGUF metadata, as llama.cpp reads them."""


def read_sampling_defaults(model_path: Path, choice: str) -> dict[str, int | float]:
    """Read the sampling parameters of requests that do not set them.

    Args:
        model_path: folder or .gguf file of the model.
        choice: `EngineConfig.generation_config`: auto, vllm, or the path of another file.

    Returns:
        Values by their names in `SamplingParams`; only those that the source sets.

    Raises:
        ConfigError: `choice` is a path where no such file is.
        CheckpointError: the file is broken, or a value is invalid.
    """
    if choice == "vllm":
        return {}
    path = model_path / FILE if model_path.is_dir() else model_path
    if choice != "auto":
        path = Path(choice).expanduser()
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            raise ConfigError(
                f"generation_config is {choice!r}, but there is no file {str(path)!r}: pass auto, "
                f"vllm, or the path of a {FILE} or of its folder"
            )
    if path.suffix == ".gguf":
        return _checked(path, read_metadata(path), _GGUF_NAMES)
    return _checked(path, read_json_object(path), _NAMES) if path.exists() else {}


def _checked(
    path: Path, values: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, int | float]:
    """Return the values that are set and differ from the API's defaults, under our names."""
    found = {ours: values[name] for name, ours in names.items() if values.get(name) is not None}
    # GGUF has float32: 0.6 must not become 0.6000000238
    found = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in found.items()}
    try:
        SamplingParams(**found)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            path,
            f"its default sampling parameters are invalid ({error}): correct the file, or pass "
            f"--generation-config vllm to ignore them",
        ) from error
    usual = SamplingParams()
    return {name: value for name, value in found.items() if value != getattr(usual, name)}
