"""Converts a GGUF file's metadata to the keys and values of config.json."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from portalm.errors import UnsupportedModel
from portalm.models.loader.end_tokens import gguf_end_ids
from portalm.models.loader.gguf_families import Get, GGUFFamily
from portalm.models.loader.gguf_file import TYPES, TensorInfo

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Unquantized tensor types -> torch dtypes."""
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Tensors that hold rotary settings, not weights."""
_LINEAR = "linear"
_READ = frozenset(
    {
        # information, or sizes that the tensors have, too
        "vocab_size", "tensor_data_layout", "attention.value_length", "rope.scaling.finetuned",
        "embedding_length_out", "expert_feed_forward_length", "expert_shared_feed_forward_length",
        # read for some forms of scaling only; `_rope_scaling` refuses the others
        "rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor",
        "rope.scaling.original_context_length", "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_log_multiplier",
        "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon",
    }
)  # fmt: skip
"""Keys without the architecture that are known to change nothing where no code reads them."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_gating_func": (1,),  # softmax
    "expert_weights_scale": (1.0,),
    "logit_scale": (1.0,),
    "embedding_scale": (1.0,),
    "residual_scale": (1.0,),
    "pooling_type": (3,),  # the last token's hidden state, as here
}
"""Values that change nothing; so do 0, false and empty ones of every key."""


class Metadata:
    """The metadata of one architecture: keys are without its name, and reading is recorded."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        """Wrap all of a file's metadata."""
        self._path = path
        self._prefix = f"{values['general.architecture']}."
        self._values = values
        self._read: set[str] = set()

    def find(self, key: str) -> Any:
        """Value of `key`; None: the file has none.

        Raises:
            UnsupportedModel: the value differs by layer.
        """
        self._read.add(key)
        value = self._values.get(self._prefix + key)
        if not isinstance(value, list):
            return value
        if not value or any(each != value[0] for each in value):
            raise UnsupportedModel(
                f"{self._path}: {self._prefix}{key} differs by layer ({_shortened(value)}), which "
                f"is not supported"
            )
        return value[0]

    def find_list(self, key: str) -> list[Any] | None:
        """Values of `key` by layer; None: the file has none, or one for all layers."""
        value = self._values.get(self._prefix + key)
        if not isinstance(value, list):
            return None
        self._read.add(key)
        return value

    def get(self, key: str) -> Any:
        """Value of `key`; raise `KeyError` if the file has none."""
        value = self.find(key)
        if value is None:
            raise KeyError(self._prefix + key)
        return value

    def check_all_read(self, architecture: str) -> None:
        """Raise `UnsupportedModel` for a value that may change answers and that nothing read."""
        for name, value in self._values.items():
            key = name.removeprefix(self._prefix)
            if key == name or key in self._read | _READ or value in _NEUTRAL.get(key, ()):
                continue
            if value and not (isinstance(value, list) and not any(value)):
                raise UnsupportedModel(
                    f"{self._path}: {name} is {_shortened(value)}, which is not supported for "
                    f"{architecture}: ignoring it could make its answers wrong"
                )


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def hf_values(
    path: Path,
    family: GGUFFamily,
    metadata: Mapping[str, Any],
    infos: Mapping[str, TensorInfo],
    factors: Mapping[str, tuple[float, ...]],
) -> dict[str, Any]:
    """Build the values of config.json.

    Args:
        path: the file, for error messages.
        family: the file's family.
        metadata: the file's metadata.
        infos: the file's tensors, by their names in the file.
        factors: contents of the tensors in `ROPE_FACTORS` that the file has.

    Raises:
        KeyError: a required key is missing.
        UnsupportedModel: the metadata has a setting that the family does not support.
    """
    own = Metadata(path, metadata)
    find, get = own.find, own.get
    if "token_embd.weight" not in infos:
        raise KeyError("token_embd.weight")
    num_heads, head_size = get("attention.head_count"), find("attention.key_length")
    share = _rotary_share(path, family, find, head_size or get("embedding_length") // num_heads)
    values = {
        "architectures": [family.architecture],
        "vocab_size": infos["token_embd.weight"].shape[0],
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": find("attention.head_count_kv") or num_heads,
        "head_dim": head_size,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": find("attention.layer_norm_epsilon")
        or get("attention.layer_norm_rms_epsilon"),
        "rope_theta": find("rope.freq_base"),
        "rope_scaling": _rope_scaling(path, family, find, factors),
        "partial_rotary_factor": share,
        "tie_word_embeddings": "output.weight" not in infos,
        "attention_bias": "blk.0.attn_output.bias" in infos,
        "mlp_bias": "blk.0.ffn_gate.bias" in infos,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": gguf_end_ids(metadata),
        "torch_dtype": _dtype(infos),
        **family.hf_values(find, infos),
    }
    has_window = own.find_list("attention.sliding_window_pattern")
    if has_window is not None:
        kinds = ("full_attention", "sliding_attention")
        values["layer_types"] = [kinds[bool(each)] for each in has_window]
    own.check_all_read(family.architecture)
    return values


def _rotary_share(path: Path, family: GGUFFamily, find: Get, head_size: int) -> float | None:
    """Share of a head with rotary embedding; None: the whole head, or the family reads the key."""
    key = "rope.dimension_count"
    rotary = find(key)
    if not rotary or rotary == head_size or key in family.values.values():
        return None
    if not family.rotates_part:
        raise UnsupportedModel(
            f"{path}: {key} is {rotary}, but {family.architecture} supports only the head size, "
            f"{head_size}"
        )
    return float(rotary / head_size)


def _rope_scaling(
    path: Path, family: GGUFFamily, find: Get, factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any] | None:
    """The rope_scaling of config.json; None: no scaling.

    As in llama.cpp, the type is linear where a file has a factor and no type, and `rope_freqs`
    divide the frequencies in addition.
    """
    kind = find("rope.scaling.type") or _LINEAR
    factor = 1.0
    if kind != "none":
        factor = float(find("rope.scaling.factor") or find("rope.scale_linear") or 1.0)
    attention = float(find("rope.scaling.attn_factor") or 1.0)
    original = find("rope.scaling.original_context_length")
    every, short, long = (factors.get(name) for name in ROPE_FACTORS)
    if len(factors) > (1 if short is None or long is None else 2) or (short is None) != (
        long is None
    ):
        raise UnsupportedModel(f"{path}: {' with '.join(factors)} is not supported")
    if short is not None and long is not None:
        _require(path, factor == 1.0, f"rope.scaling.factor {factor} with rope_factors_long")
        return {
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "attention_factor": find("rope.scaling.attn_factor"),
            **({"original_max_position_embeddings": original} if original else {}),
        }
    _require(path, kind != "longrope", "rope.scaling.type longrope without its rope_factors")
    if kind == "yarn":
        _require(path, every is None, "rope.scaling.type yarn with rope_freqs.weight")
        return {
            "rope_type": kind,
            "factor": factor,
            "original_max_position_embeddings": original or find("context_length"),
            **_yarn(path, find, factor, attention),
            **family.scaling,
        }
    _require(path, attention == 1.0, f"rope.scaling.attn_factor {attention} with {kind} scaling")
    if every is not None:
        return {"rope_type": "factors", "factors": tuple(factor * each for each in every)}
    if kind in (_LINEAR, "none"):
        return None if factor == 1.0 else {"rope_type": _LINEAR, "factor": factor}
    return {"rope_type": kind, "factor": factor}


def _require(path: Path, is_supported: bool, what: str) -> None:
    if not is_supported:
        raise UnsupportedModel(f"{path}: {what} is not supported")


def _yarn(path: Path, find: Get, factor: float, attention: float) -> dict[str, Any]:
    """YaRN's parameters; llama.cpp multiplies its attention factor with those of the file."""
    mix = find("rope.scaling.yarn_ext_factor")
    _require(path, mix in (None, 1.0), f"rope.scaling.yarn_ext_factor {mix}")
    scaling = {name: find(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
    attention *= float(find("rope.scaling.yarn_attn_factor") or 1.0)
    multiplier = find("rope.scaling.yarn_log_multiplier")
    if multiplier:
        _require(
            path,
            attention == 1.0,
            "rope.scaling.attn_factor with rope.scaling.yarn_log_multiplier",
        )
        # DeepSeek's mscale_all_dim / 10; published models have mscale == mscale_all_dim
        scaling |= dict.fromkeys(("mscale", "mscale_all_dim"), 10 * float(multiplier))
    elif attention != 1.0:
        scaling["attention_factor"] = attention * (1 + 0.1 * math.log(max(factor, 1.0)))
    return {name: value for name, value in scaling.items() if value is not None}


def _dtype(infos: Mapping[str, TensorInfo]) -> str:
    """The dtype of most weights; bfloat16 if those are quantized."""
    sizes: Counter[int] = Counter()
    for info in infos.values():
        sizes[info.kind] += math.prod(info.shape)
    [(kind, _)] = sizes.most_common(1)
    return DTYPES.get(TYPES[kind][0], "bfloat16")
