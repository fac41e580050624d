"""From an EngineConfig to a loaded model, a sized KV pool and a runner.

Everything here runs once, before the engine takes its first request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from portalm.backend import Backend, KVSpec, Weights, load_backend
from portalm.config import MAX_PROMPT_LOGPROB_ROWS, EngineConfig, ModelConfig
from portalm.core.scheduler import Scheduler
from portalm.errors import BackendError, ConfigError, Unsupported
from portalm.models.hub import resolve_model
from portalm.models.loader import open_checkpoint
from portalm.models.loader.generation_config import read_sampling_defaults
from portalm.models.model import AS_CAST, Quantization
from portalm.models.registry import model_class
from portalm.runner.memory import activation_bytes, kv_budget, measured_bytes
from portalm.runner.model_runner import ModelRunner

if TYPE_CHECKING:
    from portalm.models.model import Model

logger = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
"""Called with a phase (load, capture, warm_up) and the share of it that is done, 0 to 1."""

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

_ROUNDED = {
    "int8": Quantization(keep=True, layers="int8", head="int8"),
    # the head chooses between tokens: 4 bits there cost more accuracy than they save memory
    "int4": Quantization(keep=True, layers="int4_min", head="int8"),
    "fp8": Quantization(layers="fp8"),
}
"""By `EngineConfig.quantization`: the formats that weights are rounded to at load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetup:
    """A loaded model on a started backend, with its scheduler and runner."""

    backend: Backend
    model: Model
    model_path: Path
    """Folder or .gguf file of the checkpoint."""
    tokenizer_path: Path
    sampling_defaults: dict[str, int | float]
    """Values of `SamplingParams` that requests have unless they set them, by name."""
    scheduler: Scheduler
    runner: ModelRunner
    startup_s: dict[str, float]
    """Seconds by phase: load, budget."""


def set_up(config: EngineConfig, backend: Backend | None, report: Progress) -> EngineSetup:
    """Load the model, size the KV pool and make the runner.

    Args:
        config: the model to run and the settings to run it with.
        backend: a started backend; None: start the one that `config.device` names.
        report: called as the weights are loaded.

    Raises:
        PortaLMError: the model, the device or the settings do not work; the text says why.
    """
    started = time.perf_counter()
    backend = backend if backend is not None else load_backend(config.device)
    if config.cpu_threads is not None:
        backend.use_threads(config.cpu_threads)
    model_path = resolve_model(config.model, revision=config.revision)
    tokenizer_path = model_path if config.tokenizer is None else resolve_model(config.tokenizer)
    sampling_defaults = read_sampling_defaults(model_path, config.generation_config)
    if sampling_defaults:
        logger.info(
            "requests that do not set them have %s, from %s (--generation-config vllm turns this "
            "off)",
            ", ".join(f"{name}={value}" for name, value in sampling_defaults.items()),
            "the model" if config.generation_config == "auto" else config.generation_config,
        )
    model, weights = _load_model(config, model_path, backend, report)
    loaded = time.perf_counter()

    max_model_len = _choose_max_model_len(config, model.config)
    spec = model.kv_spec(config.block_size, _kv_dtype(config, model.dtype))
    num_blocks = None
    if spec is not None:
        num_blocks = _num_blocks(config, model, weights, spec, backend, max_model_len)
    scheduler = Scheduler(
        config.scheduler_config(max_model_len=max_model_len, num_blocks=num_blocks)
    )
    runner = ModelRunner(
        model,
        weights,
        None if spec is None else backend.kv_alloc(spec, scheduler.config.num_blocks),
        backend,
        scheduler.config,
        enforce_eager=config.enforce_eager,
    )
    if backend.capabilities.measures_memory and spec is not None and _is_pool_given(config):
        _try_largest(runner)
    return EngineSetup(
        backend=backend,
        model=model,
        model_path=model_path,
        tokenizer_path=tokenizer_path,
        sampling_defaults=sampling_defaults if "generate" in model.tasks else {},
        scheduler=scheduler,
        runner=runner,
        startup_s={"load": loaded - started, "budget": time.perf_counter() - loaded},
    )


def _load_model(
    config: EngineConfig, model_path: Path, backend: Backend, report: Progress
) -> tuple[Model, Weights]:
    """Open the checkpoint, check that the backend can run the model, and load its weights."""
    checkpoint = open_checkpoint(model_path, config, backend.device())
    try:
        model_config = checkpoint.config.serving(_choose_max_model_len(config, checkpoint.config))
        dtype = _choose_dtype(config, model_config, backend)
        model = model_class(model_config.architecture)(model_config, dtype)
        _check_claims(config, model, backend)
        weights = model.load(
            checkpoint,
            backend,
            quantization=_choose_quantization(config, backend, dtype),
            progress=lambda share: report("load", share),
        )
    finally:
        checkpoint.close()
    return model, weights


def _num_blocks(
    config: EngineConfig,
    model: Model,
    weights: Weights,
    spec: KVSpec,
    backend: Backend,
    max_model_len: int,
) -> int:
    """Choose the size of the KV pool, in blocks; includes the null block."""
    if backend.capabilities.measures_memory and not _is_pool_given(config):
        limits = config.scheduler_config(max_model_len=max_model_len, num_blocks=2)
        activations = measured_bytes(
            lambda kv: ModelRunner(
                model, weights, kv, backend, limits, enforce_eager=config.enforce_eager
            ),
            backend,
            spec,
        )
    else:
        activations = activation_bytes(
            model.config,
            dtype_bytes=_DTYPE_BYTES[model.dtype],
            max_tokens=config.max_num_batched_tokens,
            max_logits_rows=config.max_num_seqs + MAX_PROMPT_LOGPROB_ROWS,
        )
    budget = kv_budget(
        config,
        model.config,
        backend,
        spec,
        max_model_len=max_model_len,
        weight_bytes=model.weight_bytes,
        activations=activations,
    )
    return budget.num_blocks


def _is_pool_given(config: EngineConfig) -> bool:
    """True if the KV pool's size is a setting, so that no step has to be measured for it."""
    return bool(config.num_gpu_blocks_override or config.kv_cache_memory_bytes)


def _try_largest(runner: ModelRunner) -> None:
    """Run the largest step once, so that the device compiles and loads what it needs for it."""
    try:
        runner.run_largest()
    except BackendError as error:
        if error.kind != "oom":
            raise
        logger.warning(
            "a step of max_num_batched_tokens does not fit in memory, so steps will be smaller: "
            "lower max_num_batched_tokens or the size of the KV cache (%s)",
            error,
        )


# -- what to run with -------------------------------------------------------------------------


def _choose_max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """`config.max_model_len`, or the longest text that the model supports."""
    if config.max_model_len is None:
        trained = model.pooling.max_tokens if model.encoder is not None else None
        return min(model.max_position, trained or model.max_position)
    if config.max_model_len > model.max_position:
        raise ConfigError(
            f"max_model_len ({config.max_model_len}) is above the model's limit of "
            f"{model.max_position} positions: lower it, or change max_position_embeddings and "
            f"rope_scaling with --hf-overrides"
        )
    return config.max_model_len


def _choose_dtype(config: EngineConfig, model: ModelConfig, backend: Backend) -> str:
    """The dtype of weights and activations; auto falls back to float32 with a warning."""
    claimed = backend.capabilities.dtypes
    usual = backend.capabilities.auto_dtype or model.dtype
    wanted = usual if config.dtype == "auto" else config.dtype
    if wanted in claimed:
        return wanted
    if config.dtype == "auto" and "float32" in claimed:
        logger.warning(
            "backend %s does not support %s, the model's dtype: using float32",
            backend.name,
            wanted,
        )
        return "float32"
    raise Unsupported(
        f"{_describe(backend)} does not support dtype {wanted}; supported: "
        f"{', '.join(sorted(claimed))} (choose one with --dtype)"
    )


def _kv_dtype(config: EngineConfig, dtype: str) -> str:
    return dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype


def _choose_quantization(config: EngineConfig, backend: Backend, dtype: str) -> Quantization:
    """How `config.quantization` loads weights on this backend.

    Raises:
        Unsupported: the backend does not support the format.
    """
    if config.quantization == "none":
        return AS_CAST
    if config.quantization not in _ROUNDED:
        # float32 is the precision that all else is compared with: weights are dequantized for it
        return Quantization(keep=bool(backend.capabilities.quantizations) and dtype != "float32")
    quantization = _ROUNDED[config.quantization]
    claimed = backend.capabilities.quantizations
    for name in (quantization.layers, quantization.head):
        if name is not None and name not in claimed:
            others = [n for n, q in _ROUNDED.items() if {q.layers, q.head} <= {None, *claimed}]
            raise Unsupported(
                f"{_describe(backend)} does not support {config.quantization} weights; "
                f"choose one of these with --quantization: {', '.join(others) or 'none'}"
            )
    return quantization


def _check_claims(config: EngineConfig, model: Model, backend: Backend) -> None:
    """Raise `Unsupported` for attention or a KV cache that the backend lacks."""
    claims = backend.capabilities
    for spec in model.attention_specs():
        for feature, is_wanted in (
            ("sliding_window", spec.sliding_window is not None),
            ("soft_cap", spec.soft_cap is not None),
            ("alibi", spec.alibi_slopes is not None),
            ("sinks", spec.has_sinks),
            ("shared_values", spec.value_size is not None),
        ):
            if is_wanted and feature not in claims.features:
                raise Unsupported(
                    f"the model needs {feature}, which {_describe(backend)} does not support"
                )
    kv = model.kv_spec(config.block_size, _kv_dtype(config, model.dtype))
    if kv is not None and (problem := claims.kv_problem(kv)):
        raise Unsupported(f"{_describe(backend)}: {problem}")


def _describe(backend: Backend) -> str:
    """The backend's name for a message, with its device if its devices differ."""
    device = backend.capabilities.device
    return f"backend {backend.name!r}" + (f" on {device}" if device else "")
