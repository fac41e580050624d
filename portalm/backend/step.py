"""One step: the tokens, requests and KV blocks that it is about, and its function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from portalm.backend.kv_cache import KV
from portalm.backend.sampling import SampleOutput, SampleParams
from portalm.backend.weights import Weights

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """The kind of attention a layer computes: `attend` is causal, `attend_encoder` is not."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    """Multiplies the scores before the softmax."""
    sliding_window: int | None = None
    """Window size W including the token itself: it attends to the previous W - 1 tokens (in an
    encoder also to the next W - 1). None: the whole context."""
    soft_cap: float | None = None
    """Scores become cap * tanh(score / cap); None: unchanged."""
    alibi_slopes: tuple[float, ...] | None = None
    """One slope per query head: slope * (key position - query position) is added to a score, after
    the cap. Press et al., "Train short, test long", 2022."""
    has_sinks: bool = False
    """`attend` is called with `sinks`: one more score per head in the softmax, without a value."""
    value_size: int | None = None
    """None: values are separate vectors with the size of keys. Else a token's value is the first
    `value_size` numbers of its key, the cache `shares_values`, and `attend` returns
    [T, H, value_size]. DeepSeek-AI, "DeepSeek-V2", 2024 (multi-head latent attention)."""

    @property
    def out_size(self) -> int:
        """Size of a value and of attention's output per head."""
        return self.head_size if self.value_size is None else self.value_size


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A padded step size that a backend captures once."""

    num_tokens: int
    num_requests: int
    num_blocks: int
    max_query_len: int
    """Maximum number of new tokens per request: 1 in a bucket for decodes only."""


@dataclass(slots=True, kw_only=True)
class StepMeta:
    """The tokens, requests and KV blocks of one step; built once, shared by all layers.

    Requests with one query token come first. Padding is data: pad tokens have a slot in block 0
    (the null block, never allocated), pad requests repeat the last query_start_loc and have
    seq_len 0. The host fields let a backend plan without reading from the device.
    """

    positions: torch.Tensor
    """int32 [T]: position of each token in its request, from 0."""
    slot_mapping: torch.Tensor
    """int32 [T]: slot of each token's key and value, block * B + offset."""
    query_start_loc: torch.Tensor
    """int32 [S + 1]: request i has tokens query_start_loc[i] to query_start_loc[i + 1]."""
    seq_lens: torch.Tensor
    """int32 [S]: context length of each request, this step's tokens included."""
    block_table: torch.Tensor
    """int32 [S, MB]: physical block of each logical block; entries past seq_len are 0, unless
    `Backend.block_table` leaves them unspecified."""
    logits_rows: torch.Tensor
    """int32 [R]: tokens whose logits, or hidden states, are needed."""
    host_query_start_loc: np.ndarray
    """query_start_loc on the host."""
    host_seq_lens: np.ndarray
    """seq_lens on the host."""
    num_decodes: int
    """Requests [0, num_decodes) have exactly one query token."""
    max_query_len: int
    max_seq_len: int
    token_types: torch.Tensor | None = None
    """int32 [T]: 1 for tokens of the second text of a pair, for encoders; None for decoders."""
    bucket: Bucket | None = None
    """The padded size; None where steps are not padded."""
    plan: dict[Any, Any] = field(default_factory=dict)
    """Private to the backend, filled by `Backend.prepare`: split of the work, launch geometry."""


@dataclass(slots=True, kw_only=True)
class StepInputs:
    """Everything a step reads except weights and KV cache."""

    token_ids: torch.Tensor
    """int32 [T]; ignored where `previous_rows` is >= 0."""
    meta: StepMeta
    sample: SampleParams
    previous_ids: torch.Tensor | None = None
    """int32 [R']: token ids sampled by the previous step, still on the device; None where no token
    of this step depends on them."""
    previous_rows: torch.Tensor | None = None
    """int32 [T]: row of `previous_ids` that holds this token, or -1."""
    num_states: int = 0
    """P: the last P of meta.logits_rows return hidden states and sample nothing."""


StepFn: TypeAlias = Callable[[Weights, KV, StepInputs], tuple[KV, SampleOutput]]
"""One step from token ids to sampled ids: what `compile` captures. No output shape and no branch
in it depends on a value on the device."""


class HostFuture(Protocol):
    """A device-to-host copy in progress."""

    def done(self) -> bool:
        """Return True once `result` would not wait."""
        ...

    def result(self) -> np.ndarray:
        """Wait for the copy and return the values. Raise `BackendError` if the step failed."""
        ...
