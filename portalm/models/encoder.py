"""What encoders have in common: a prompt is computed whole in one step, nothing of it is kept."""

from __future__ import annotations

from typing import Any

from portalm.backend import AttentionSpec, KVSpec
from portalm.config import EncoderConfig, ModelConfig, Task
from portalm.errors import UnsupportedModel
from portalm.models.model import bytes_of


class Encoder:
    """Functions of an encoder but for its layers; see `portalm.models.model.Model`."""

    tasks: tuple[Task, ...] = ("embed",)

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """A model of this shape, computed in `dtype`.

        Raises:
            UnsupportedModel: it is a classifier, and scores more than one thing.
        """
        self.config = config
        self.dtype = dtype
        self.encoder = config.encoder or EncoderConfig()
        self.spec = AttentionSpec(
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_size=config.head_size,
            scale=config.head_size**-0.5,
        )
        if "score" in self.tasks and self.encoder.num_labels != 1:
            raise UnsupportedModel(
                f"{config.architecture} with {self.encoder.num_labels} labels is not supported: a "
                f"cross-encoder, which scores pairs of texts, has one"
            )

    @classmethod
    def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The config as it is."""
        return values

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint, with its shape."""
        raise NotImplementedError

    def weight_bytes(self) -> int:
        """Bytes of all weights in `dtype`."""
        return bytes_of(self.shapes(), self.dtype)

    def attention_specs(self) -> list[AttentionSpec]:
        """None: there is no KV cache."""
        return []

    def kv_spec(self, block_size: int, kv_dtype: str) -> KVSpec | None:
        """None: there is no KV cache."""
        return None


def added_prefix(names: set[str], wanted: str) -> str:
    """What stands before `wanted` in a checkpoint of these names; empty if nothing ends so.

    A checkpoint that has a head which is not ours has its family's prefix before all else.
    """
    if wanted in names:
        return ""
    found = [name.removesuffix(wanted) for name in names if name.endswith(f".{wanted}")]
    return found[0] if len(found) == 1 else ""
