"""Refuses checkpoints with tensors that nothing read: without them, answers could be wrong."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

import torch

from portalm.errors import CheckpointError
from portalm.models.loader.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

_HARMLESS = (
    r"(^|[._])(inv_freq|cos_cached|sin_cached)$",  # rotary tables: computed from the config
    r"(^|\.)mtp(_[a-z_]+)?\.",  # layers that predict further tokens: answers do not need them
)
_KV_SCALE = re.compile(
    r"\.([qkv]|kv|prob)_(scale|zero_point)$|\.[qkv]_proj\.output_(scale|zero_point)$"
)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_MAX_NAMED = 3
"""Names in the error's text; it counts the others."""


def check_all_read(checkpoint: Checkpoint, *, unused: Iterable[str] = ()) -> None:
    """Check that every tensor of the checkpoint was read, except those known to be harmless.

    Harmless are rotary tables, layers that predict further tokens, biases of zeros, and scales of
    an 8-bit KV cache: this package computes its own, and a warning says so.

    Args:
        checkpoint: a model has read its tensors.
        unused: regular expressions, searched in names, of further tensors that do not change what
            the model computes.

    Raises:
        CheckpointError: names tensors that were not read.
    """
    names = set(checkpoint.names())
    patterns = [re.compile(pattern) for pattern in (*_HARMLESS, *unused)]
    left = [n for n in checkpoint.unread() if not any(p.search(n) for p in patterns)]
    scales = [name for name in left if _KV_SCALE.search(name)]
    left = [
        name
        for name in left
        if not _KV_SCALE.search(name)
        and not _is_prediction_layer(checkpoint, name)
        and not (name in names and _is_bias_of_zeros(checkpoint, name))
    ]
    if left:
        named = ", ".join(repr(name) for name in sorted(left)[:_MAX_NAMED])
        others = f" and {len(left) - _MAX_NAMED} others" if len(left) > _MAX_NAMED else ""
        raise CheckpointError(
            checkpoint.path,
            f"it has tensors that the model does not use: {named}{others}. Ignoring them could "
            f"make its answers wrong: {checkpoint.config.architecture} with this config.json, and "
            f"this quantization if it has one, has no such weights",
        )
    if scales:
        logger.warning(
            "%d scales of an 8-bit KV cache in this checkpoint (%s, ...) are not used: keys and "
            "values are stored as --kv-cache-dtype says, with scales computed from them",
            len(scales),
            min(scales),
        )


def check_tied(checkpoint: Checkpoint, name: str, used: str) -> None:
    """Check that tensor `name`, if the checkpoint has it, equals `used`, which is used for it.

    Raises:
        CheckpointError: the tensors differ.
    """
    if name not in checkpoint.names():
        return
    tensor, other = checkpoint.tensor(name), checkpoint.tensor(used)
    if tensor.dtype != other.dtype:
        tensor, other = tensor.float(), other.float()
    if not torch.equal(tensor, other):
        raise CheckpointError(
            checkpoint.path,
            f"tensor {name!r} is not equal to {used!r}, but config.json has tie_word_embeddings "
            f"true, which says that they are one",
        )


def _is_prediction_layer(checkpoint: Checkpoint, name: str) -> bool:
    """True for a layer after the last one that predicts further tokens (DeepSeek-V3)."""
    count = int(checkpoint.config.values.get("num_nextn_predict_layers") or 0)
    found, first = _LAYER.search(name), checkpoint.config.num_layers
    return found is not None and first <= int(found[1]) < first + count


def _is_bias_of_zeros(checkpoint: Checkpoint, name: str) -> bool:
    """True for a bias that adds nothing; some GPTQ writers add one to every layer."""
    return name.endswith(".bias") and not bool(checkpoint.tensor(name).any())
