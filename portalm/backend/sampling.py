"""Sampling: the parameters of each row and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(slots=True, kw_only=True)
class Penalties:
    """Penalties on tokens that occurred before; applied before the temperature."""

    prompt_ids: torch.Tensor
    """int32 [R, Lp]: prompt tokens, padded with -1."""
    output_ids: torch.Tensor
    """int32 [R, Lo]: generated tokens, padded with -1."""
    presence: torch.Tensor
    """float32 [R]"""
    frequency: torch.Tensor
    """float32 [R]"""
    repetition: torch.Tensor
    """float32 [R]"""


@dataclass(slots=True, kw_only=True)
class LogitBias:
    """Sparse additions to the logits; -inf forbids a token."""

    rows: torch.Tensor
    """int32 [N]"""
    token_ids: torch.Tensor
    """int32 [N]"""
    values: torch.Tensor
    """float32 [N]"""


@dataclass(slots=True, kw_only=True)
class SampleParams:
    """How to sample a token from each row of logits, vectorized over the batch.

    The order is: penalties, bias, allowed mask, then (unless greedy) temperature, min_p, top_k,
    top_p, and the largest of logit + Gumbel noise. A threshold keeps its ties; an argmax takes
    the lowest id. Row r's noise for token v is -log(-log(u)), u = ((x >> 9) + 0.5) * 2^-23 in
    float32, x = word v % 4 of Philox4x32-10 with key = seed[r] (low word first) and counter =
    (v // 4, 0, position[r] low word, position[r] high word).
    """

    temperature: torch.Tensor
    """float32 [R]: 0 is greedy."""
    top_k: torch.Tensor
    """int32 [R]: 0 is off."""
    top_p: torch.Tensor
    """float32 [R]: 1 is off."""
    min_p: torch.Tensor
    """float32 [R]: 0 is off."""
    seed: torch.Tensor
    """int64 [R]"""
    position: torch.Tensor
    """int64 [R]: position of the sampled token in its request."""
    is_greedy: bool
    """Every temperature is 0 (known on the host: it may change the captured step)."""
    has_filters: bool
    """Some row has top_k, top_p or min_p."""
    penalties: Penalties | None = None
    bias: LogitBias | None = None
    allowed: torch.Tensor | None = None
    """int32 [R, ceil(V / 32)]: bit v % 32 of word v // 32 is 1 where token v may be sampled."""
    targets: torch.Tensor | None = None
    """int32 [R]: where >= 0, the row samples nothing and reports this token (prompt logprobs)."""
    num_logprobs: int | None = None
    """None: no logprobs. k: logprobs of the k most likely tokens and of the sampled one."""


@dataclass(slots=True, kw_only=True)
class SampleOutput:
    """The result of each row. Logprobs are of the raw logits, before penalties and temperature."""

    token_ids: torch.Tensor
    """int32 [R]; -1 where the row's logits, after penalties, bias and mask, contain a NaN or only
    -inf: no token can be sampled. Other rows are not affected."""
    logprobs: torch.Tensor | None = None
    """float32 [R], if requested."""
    ranks: torch.Tensor | None = None
    """int32 [R]: 1 is the most likely token."""
    top_ids: torch.Tensor | None = None
    """int32 [R, k], most likely first, ties to the lowest id; a captured step may return more."""
    top_logprobs: torch.Tensor | None = None
    """float32 [R, k]"""
    states: torch.Tensor | None = None
    """float32 [P, C]: hidden states, if requested; or [P, N]: a classifier's output for them."""
