"""Groups of a compressed-tensors checkpoint: how the weights of the layers that match are stored.

Vocabulary of the compressed-tensors package: a group names its targets by a layer's name, by a
regular expression after "re:", or by the class of the layer's module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from portalm.errors import UnsupportedModel
from portalm.quant.recipe import Recipe, Rule, by_regex
from portalm.quant.scheme import setting

_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "dense",
    "mixed-precision",
)
_STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
_EMBEDDINGS = ("embed_tokens", "word_embeddings", "embed_in", "wte")
"""Last components of the names of embeddings."""

_INT4 = {"num_bits": 4, "strategy": "group", "group_size": 128}
_PRESETS: dict[str, dict[str, Any]] = {
    "W8A16": {"num_bits": 8, "strategy": "channel"},
    "W8A8": {"num_bits": 8, "strategy": "channel"},
    "INT8": {"num_bits": 8, "strategy": "channel"},
    "W4A16": _INT4,
    "W4A16_ASYM": {**_INT4, "symmetric": False},
    "W4A8": _INT4,
    "FP8": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "FP8_DYNAMIC": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "FP8_BLOCK": {
        "num_bits": 8,
        "type": "float",
        "strategy": "block",
        "block_structure": [128, 128],
    },
    "NVFP4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    "NVFP4A16": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
}
"""Settings of weights by the names that stand for a whole group."""


@dataclass(frozen=True, slots=True)
class Group:
    """How the weights of a group are stored."""

    bits: int
    kind: str
    """int or float."""
    size: int | None
    """Columns with one scale; None: a whole row, or the whole weight."""
    block: tuple[int, int] | None
    """Rows and columns with one scale; None: scales are by rows and groups."""
    needs_zeros: bool
    """Each layer must have zero points; others may have them, and then use them."""
    needs_columns: bool
    """Each layer must have weight_g_idx."""


def read_recipe(config: Mapping[str, Any]) -> Recipe[Group]:
    """Read the groups of a quantization_config.

    Raises:
        UnsupportedModel: a group has settings that are not supported.
    """
    setting(config, "format", _FORMATS, "pack-quantized")
    by_name: dict[str, Group | None] = {}
    by_pattern: list[Rule[Group]] = []
    by_class: list[Rule[Group]] = []
    for name, found in (config.get("config_groups") or {}).items():
        weights, targets = _weights_and_targets(name, found)
        if weights is None:
            continue
        group = _read_group(weights)
        for target in map(str, targets):
            if target.startswith("re:"):
                by_pattern.append(Rule(target, by_regex(target.removeprefix("re:")), group))
            elif target in _CLASSES:
                by_class.append(Rule(target, _CLASSES[target], group))
            elif by_name.setdefault(target, group) != group:
                raise UnsupportedModel(
                    f"config.json: quantization_config has several groups for {target!r}"
                )
    ignored = [str(name) for name in config.get("ignore") or ()]
    patterns = [name for name in ignored if name.startswith("re:")]
    return Recipe(
        excluded=[Rule(name, by_regex(name.removeprefix("re:")), None) for name in patterns],
        by_name=by_name | dict.fromkeys(ignored, None),
        levels=[by_pattern, by_class],
    )


def _weights_and_targets(name: str, found: Any) -> tuple[Mapping[str, Any] | None, list[Any]]:
    """Settings of a group's weights (None: they are not quantized), and its targets."""
    if not isinstance(found, Mapping):  # a preset's name, and its targets
        if name not in (*_PRESETS, "UNQUANTIZED"):
            raise UnsupportedModel(
                f"config.json: quantization_config with the preset {name!r} is not supported; "
                f"supported: {', '.join(_PRESETS)}"
            )
        return _PRESETS.get(name), list(found)
    setting(found, "format", _FORMATS, "pack-quantized")
    return found.get("weights"), list(found.get("targets", ["Linear"]))


def _read_group(weights: Mapping[str, Any]) -> Group:
    kind = setting(weights, "type", ("int", "float"), "int")
    bits = setting(weights, "num_bits", (4, 8), 8)
    size, block = weights.get("group_size"), weights.get("block_structure")
    usual = "tensor" if size is None else "channel" if int(size) == -1 else "group"
    strategy = setting(weights, "strategy", _STRATEGIES, usual)
    if (kind == "float" and bits == 4) != (strategy == "tensor_group"):
        raise UnsupportedModel(
            f"config.json: quantization_config with type {kind}, {bits} bits and strategy "
            f"{strategy} is not supported: of 4-bit floats only NVFP4 is, with tensor_group"
        )
    if strategy == "tensor_group":
        setting(weights, "group_size", (16,), 16)
    needed = {"group": "group_size", "block": "block_structure"}.get(strategy)
    if needed is not None and weights.get(needed) is None:
        raise UnsupportedModel(
            f"config.json: quantization_config has strategy {strategy} without {needed}"
        )
    if isinstance(block, str):  # "128x128" in older files
        block = block.split("x")
    actorder = weights.get("actorder")
    return Group(
        bits=bits,
        kind=kind,
        size=int(size) if strategy == "group" and size is not None else None,
        block=(int(block[0]), int(block[1])) if strategy == "block" and block else None,
        needs_zeros=not weights.get("symmetric", True),
        needs_columns=str(actorder).lower() in ("group", "true"),
    )


def _is_embedding(layer: str) -> bool:
    return layer.rpartition(".")[2] in _EMBEDDINGS


_CLASSES = {"Linear": lambda layer: not _is_embedding(layer), "Embedding": _is_embedding}
"""Layers by the class of their module."""
