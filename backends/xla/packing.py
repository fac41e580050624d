"""Pack a step's inputs, except weights and cache, into one int32 array: one transfer per step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from portalm.backend import SampleParams, StepInputs
from portalm_backends.xla.sampling import SamplingArrays

Array: TypeAlias = Any
HostArray: TypeAlias = npt.NDArray[Any]


class Layout:
    """Offsets of named 32-bit arrays in one packed array."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Place the arrays one after another in this order; shape () is a flag or a number."""
        self._parts: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        self.size = 0
        for name, shape in shapes.items():
            end = self.size + math.prod(shape)
            self._parts[name] = (self.size, end, shape)
            self.size = end

    def pack(self, values: Mapping[str, HostArray | int]) -> npt.NDArray[np.int32]:
        """Pack into a new int32 [size]: XLA may still be reading the previous array."""
        packed = np.empty(self.size, np.int32)
        for name, (start, end, shape) in self._parts.items():
            value = values[name]
            if isinstance(value, np.ndarray):
                words = np.ascontiguousarray(value).reshape(-1).view(np.int32)
                assert len(words) == end - start, (name, value.shape, shape)
                packed[start:end] = words
            else:
                packed[start] = value
        return packed

    def unpack(self, packed: Array) -> dict[str, Array]:
        """Split int32 [size] into the named int32 arrays; called inside a program."""
        return {
            name: packed[start:end].reshape(shape)
            for name, (start, end, shape) in self._parts.items()
        }


# -- sampling ---------------------------------------------------------------------------------


def sampling_shapes(num_rows: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays that a program needs to sample `num_rows` tokens."""
    return {
        "temperature": (num_rows,),
        "top_k": (num_rows,),
        "top_p": (num_rows,),
        "min_p": (num_rows,),
        "seed": (num_rows, 2),
        "position": (num_rows, 2),
        "is_greedy": (),
        "has_filters": (),
    }


def sampling_values(params: SampleParams) -> dict[str, HostArray | int]:
    """Values for `sampling_shapes`, from `params` on the host."""
    arrays: dict[str, HostArray | int] = {
        name: getattr(params, name).numpy()
        for name in ("temperature", "top_k", "top_p", "min_p", "seed", "position")
    }
    return {**arrays, "is_greedy": params.is_greedy, "has_filters": params.has_filters}


def sampling_arrays(parts: Mapping[str, Array]) -> SamplingArrays:
    """Build `SamplingArrays` from the result of `Layout.unpack`."""
    return SamplingArrays(
        temperature=as_float(parts["temperature"]),
        top_k=parts["top_k"],
        top_p=as_float(parts["top_p"]),
        min_p=as_float(parts["min_p"]),
        seed=lax.bitcast_convert_type(parts["seed"], jnp.uint32),
        position=lax.bitcast_convert_type(parts["position"], jnp.uint32),
        is_greedy=parts["is_greedy"] != 0,
        has_filters=parts["has_filters"] != 0,
    )


def as_float(part: Array) -> Array:
    """Reinterpret int32 bits as float32."""
    return lax.bitcast_convert_type(part, jnp.float32)


# -- a step -----------------------------------------------------------------------------------


def step_shapes(inputs: StepInputs) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays that a step with inputs like `inputs` needs."""
    meta, num_tokens = inputs.meta, len(inputs.token_ids)
    shapes: dict[str, tuple[int, ...]] = {
        "token_ids": (num_tokens,),
        "previous_rows": (num_tokens,),
        "positions": (num_tokens,),
        "slot_mapping": (num_tokens,),
        "query_start_loc": tuple(meta.query_start_loc.shape),
        "seq_lens": tuple(meta.seq_lens.shape),
        "block_table": tuple(meta.block_table.shape),
        "logits_rows": tuple(meta.logits_rows.shape),
        "num_decodes": (),
    }
    if meta.token_types is not None:
        shapes["token_types"] = (num_tokens,)
    return {**shapes, **sampling_shapes(len(inputs.sample.temperature))}


def step_values(inputs: StepInputs) -> dict[str, HostArray | int]:
    """Values for `step_shapes`, from `inputs` on the host."""
    meta = inputs.meta
    values: dict[str, HostArray | int] = {
        name: getattr(meta, name).numpy()
        for name in (
            "positions", "slot_mapping", "query_start_loc", "seq_lens", "block_table",
            "logits_rows",
        )
    }  # fmt: skip
    values["token_ids"] = inputs.token_ids.numpy()
    if inputs.previous_rows is None:
        values["previous_rows"] = np.full(len(inputs.token_ids), -1, np.int32)
    else:
        values["previous_rows"] = inputs.previous_rows.numpy()
    values["num_decodes"] = meta.num_decodes
    if meta.token_types is not None:
        values["token_types"] = meta.token_types.numpy()
    return {**values, **sampling_values(inputs.sample)}
