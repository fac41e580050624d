"""Decoders without a family file: transformers' code, with attention replaced by the backend's.

Slower than a family of this package (no merged, packed or quantized weights), but available as soon
as transformers has the model. A dry run without data records the attention of each layer, and a
small model of the same config is compared with transformers' own attention (`transformers_check`).
A model is refused if its attention needs what `Backend` does not support, or if its result depends
on more than each token and its position.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from portalm.backend import KV, AttentionSpec, Backend, KVSpec, StepMeta, Weights
from portalm.config import ModelConfig, Task
from portalm.errors import CheckpointError, Unsupported, UnsupportedModel
from portalm.models.loader.checkpoint import (
    Checkpoint,
    LoadProgress,
    TensorReader,
    check_dtype,
)
from portalm.models.loader.unread import check_all_read, check_tied
from portalm.models.model import AS_CAST, Quantization, bytes_of
from portalm.models.transformers_attention import (
    ATTENTION,
    STEP,
    BackendStep,
    RecordingStep,
    register,
)
from portalm.models.transformers_check import check_model

logger = logging.getLogger(__name__)


class _Tensors:
    """Reads a checkpoint's tensors for transformers, which does so in several threads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._lock = threading.Lock()
        self.error: CheckpointError | None = None
        """The first error, which transformers may not raise."""

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor."""
        with self._lock:
            try:
                tensor = self._checkpoint.tensor(name)
                dtype = str(tensor.dtype).removeprefix("torch.")
                check_dtype(self._checkpoint.path, name, dtype)
            except CheckpointError as error:
                self.error = self.error or error
                raise
            return tensor


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor that is read when transformers indexes it, as it does with safetensors' slices."""

    tensors: _Tensors
    name: str

    def __getitem__(self, index: object) -> torch.Tensor:
        """Read the tensor whole."""
        return self.tensors.read(self.name)


class TransformersModel:
    """Any decoder that transformers has; see `portalm.models.model.Model`."""

    tasks: tuple[Task, ...] = ("generate",)

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """Create the model for `config`, with weights and activations in `dtype`.

        Raises:
            UnsupportedModel: transformers does not have the model, or its code cannot run here.
        """
        self.config = config
        self.dtype = dtype
        self._class = _find_class(config.architecture)
        self._hf_config = _hf_config(config.source)
        try:
            with torch.device("meta"):
                model = self._build(
                    "bfloat16"
                )  # some operations on meta tensors support only this dtype
                self._specs = _dry_run(model)
            check_model(self._class, self._hf_config)
        except UnsupportedModel as reason:
            raise _refusal(config.architecture, str(reason)) from None
        except Exception as error:  # the model's code can raise anything
            raise _refusal(config.architecture, f"{type(error).__name__}: {error}") from error
        self._shapes = {name: tuple(tensor.shape) for name, tensor in _stored(model).items()}
        logger.warning(
            "%s is not a model family of PortaLM and runs through transformers' code: slower, and "
            "without quantized weights",
            config.architecture,
        )

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Add the defaults of transformers' config class, under the common names of values."""
        _find_class(str((values.get("architectures") or [""])[0]))
        config = _hf_config(values).get_text_config()
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
                 "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
                 "tie_word_embeddings")  # fmt: skip
        known = {name: getattr(config, name, None) for name in names}
        known["intermediate_size"] = known["intermediate_size"] or 4 * config.hidden_size
        known = {name: value for name, value in known.items() if value is not None}
        rope = {"rope_parameters": getattr(config, "rope_parameters", None), "rope_scaling": None}
        return {**values, **rope, **known}

    def _build(self, dtype: str) -> Any:
        self._hf_config._attn_implementation = ATTENTION
        return self._class._from_config(
            self._hf_config, dtype=getattr(torch, dtype), attn_implementation=ATTENTION
        ).eval()

    # -- shapes -------------------------------------------------------------------------------

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all parameters and persistent buffers of transformers' module."""
        return dict(self._shapes)

    def weight_bytes(self) -> int:
        """Bytes of all weights in `dtype`."""
        return bytes_of(self._shapes, self.dtype)

    def attention_specs(self) -> list[AttentionSpec]:
        """Attention of each layer, as recorded in the dry run."""
        return self._specs

    def kv_spec(self, block_size: int, kv_dtype: str) -> KVSpec:
        """The KV cache that the model needs."""
        first = self._specs[0]
        return KVSpec(
            num_layers=len(self._specs),
            num_kv_heads=first.num_kv_heads,
            head_size=first.head_size,
            block_size=block_size,
            dtype=kv_dtype,
        )

    # -- loading ------------------------------------------------------------------------------

    def load(
        self,
        checkpoint: Checkpoint,
        backend: Backend,
        *,
        quantization: Quantization = AS_CAST,
        progress: LoadProgress | None = None,
    ) -> Weights:
        """Load transformers' module, as "module".

        Raises:
            Unsupported: the device cannot run torch modules, or `quantization` has a format.
            CheckpointError: a tensor is missing or has another shape.
        """
        if backend.capabilities.static_shapes:
            raise Unsupported(
                f"{self.config.architecture} runs through transformers' code, which backend "
                f"{backend.name!r} does not support: use another device"
            )
        if quantization.layers is not None:
            raise Unsupported(
                f"{self.config.architecture} runs through transformers' code, which does not "
                f"support quantized weights: omit --quantization"
            )
        has_all = self._shapes.keys() <= set(checkpoint.names())
        module = self._filled(checkpoint, progress) if has_all else self._converted(checkpoint)
        for name, used in _tied(module):
            check_tied(checkpoint, name, used)
        check_all_read(checkpoint, unused=module._keys_to_ignore_on_load_unexpected or ())
        module.requires_grad_(False)
        return {"module": module.to(backend.device())}

    def _filled(self, checkpoint: Checkpoint, progress: LoadProgress | None) -> Any:
        """Fill the module from a checkpoint whose tensors have the module's names."""
        module = self._build(self.dtype)
        read = TensorReader(checkpoint, len(self._shapes), progress=progress)
        kept = tuple(module._get_dtype_plan(getattr(torch, self.dtype)))
        for name, stored in _stored(module).items():
            is_kept = any(part in name for part in kept)
            dtype = torch.float32 if is_kept else stored.dtype
            stored.data = read.tensor(name, tuple(stored.shape)).to(dtype, copy=True)
        return module

    def _converted(self, checkpoint: Checkpoint) -> Any:
        """Load through transformers, which maps the checkpoint's names to its own.

        Quantized weights are dequantized by `checkpoint`: transformers sees plain ones.
        """
        tensors = _Tensors(checkpoint)
        try:
            module, found = self._class.from_pretrained(
                None,
                config=self._hf_config,
                state_dict={name: _Tensor(tensors, name) for name in checkpoint.names()},
                dtype=getattr(torch, self.dtype),
                attn_implementation=ATTENTION,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:  # a tensor's error, which transformers wraps, or its own
            raise tensors.error or CheckpointError(
                checkpoint.path,
                f"transformers' code for {self.config.architecture} cannot load it "
                f"({type(error).__name__}: {error})",
            ) from error
        if tensors.error is not None:
            raise tensors.error
        missing = sorted(found["missing_keys"]) + [str(k) for k in found["mismatched_keys"]]
        if missing:
            raise CheckpointError(
                checkpoint.path, f"tensor {missing[0]!r} is missing or has another shape"
            )
        return module.eval()

    # -- running ------------------------------------------------------------------------------

    def forward(
        self,
        backend: Backend,
        weights: Weights,
        kv: KV,
        token_ids: torch.Tensor,
        meta: StepMeta,
    ) -> tuple[KV, torch.Tensor]:
        """Run the module on int32 [T] ids: logits [R, V] of meta.logits_rows."""
        step = BackendStep(backend, kv, meta)
        out = weights["module"](
            input_ids=token_ids.long()[None],
            position_ids=meta.positions.long()[None],
            use_cache=False,
            logits_to_keep=meta.logits_rows.long(),
            **{STEP: step},
        )
        return step.kv, out.logits[0]

    def logits(self, backend: Backend, weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
        """Convert the logits that `forward` returned to float32."""
        return hidden.float()


def _stored(module: Any) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers, the tensors that checkpoints have; tied ones once."""
    tensors = dict(module.named_parameters())
    buffers = dict(module.named_buffers())
    return tensors | {name: buffers[name] for name in module.state_dict() if name in buffers}


def _tied(module: Any) -> list[tuple[str, str]]:
    """Names of the parameters that are another one, with that one's name."""
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        (name, first[id(parameter)])
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if first[id(parameter)] != name
    ]


def _find_class(architecture: str) -> Any:
    """Find transformers' class; refuse one whose attention cannot be replaced."""
    import transformers

    found = getattr(transformers, architecture, None)
    if found is None or not architecture.endswith("ForCausalLM"):
        from portalm.models.registry import ARCHITECTURES

        raise UnsupportedModel(
            f"architecture {architecture!r} is not supported, and transformers has no decoder with "
            f"that name; supported: {', '.join(ARCHITECTURES)}"
        )
    if not found._supports_attention_backend or getattr(found, "_is_stateful", False):
        raise _refusal(architecture, "its attention cannot be replaced, or it has other state")
    register()
    return found


_NOT_PASSED = ("model_type", "quantization_config", "compression_config")
"""Keys of config.json that transformers does not get: checkpoints are dequantized for it."""


def _hf_config(values: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    kind = values.get("model_type", "")
    if kind not in CONFIG_MAPPING:
        raise UnsupportedModel(
            f"config.json: {values['architectures'][0]} is not a model family of PortaLM, and "
            f"transformers, whose code would run it, has no model_type {kind!r}"
        )
    return CONFIG_MAPPING[kind](**{k: v for k, v in values.items() if k not in _NOT_PASSED})


def _dry_run(model: Any) -> list[AttentionSpec]:
    """Run a step of two tokens without data, and return the attention of every layer."""
    text = model.config.get_text_config()
    if getattr(text, "index_topk", None):
        raise UnsupportedModel("its attention reads only the tokens that an index chooses")
    rope = getattr(text, "rope_parameters", None) or {}
    if {"dynamic", "longrope"} & {str(v) for v in _leaves(rope)}:
        raise UnsupportedModel("its rotary embedding depends on the length of the text")
    run, ids = RecordingStep(), torch.zeros((1, 2), dtype=torch.long, device="meta")
    with torch.inference_mode():
        model(input_ids=ids, position_ids=ids, use_cache=False, logits_to_keep=1, **{STEP: run})
    specs = [spec for _, spec in sorted(run.specs.items())]
    if sorted(run.specs) != list(range(text.num_hidden_layers)):
        raise UnsupportedModel("not every layer calls attention once")
    if len({(spec.num_kv_heads, spec.head_size) for spec in specs}) != 1:
        raise UnsupportedModel("its layers have different numbers or sizes of KV heads")
    return specs


def _leaves(values: Mapping[str, Any]) -> list[Any]:
    """All values of a mapping and of the mappings within it."""
    return [
        leaf
        for value in values.values()
        for leaf in (_leaves(value) if isinstance(value, Mapping) else [value])
    ]


def _refusal(architecture: str, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"architecture {architecture!r} is not supported: it is not a model family of PortaLM, and "
        f"transformers' code for it cannot run here because {reason}"
    )
