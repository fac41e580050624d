"""Sample tokens from logits, vectorized over rows; the reference for `Backend.sample`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from portalm.backend import LogitBias, Penalties, SampleOutput, SampleParams
from portalm_backends.portable.philox import gumbel

BROKEN = -1
"""Token id of a row whose scores contain a NaN, or no token that may be sampled."""


def sample(logits: torch.Tensor, params: SampleParams) -> SampleOutput:
    """Sample one token from each row.

    Args:
        logits: float32 [R, V], not changed.
        params: `SampleParams` defines the order of operations.

    Returns:
        int32 [R] ids, -1 where a row is broken; logprobs of the raw logits if requested.
    """
    scores = adjust(logits, params)
    token_ids = first_argmax(scores) if params.is_greedy else sample_scores(scores, params)
    is_broken = scores.isnan().any(dim=-1) | (scores.amax(dim=-1) == float("-inf"))
    return finish(torch.where(is_broken, BROKEN, token_ids).to(torch.int32), logits, params)


def adjust(logits: torch.Tensor, params: SampleParams) -> torch.Tensor:
    """Apply penalties, bias and mask to logits [R, V]; unchanged if there are none."""
    if params.penalties is not None:
        logits = apply_penalties(logits, params.penalties)
    if params.bias is not None:
        logits = apply_bias(logits, params.bias)
    if params.allowed is not None:
        logits = apply_mask(logits, params.allowed)
    return logits


def finish(token_ids: torch.Tensor, logits: torch.Tensor, params: SampleParams) -> SampleOutput:
    """Build the output of sampled ids, int32 [R]: apply targets, add logprobs if requested."""
    if params.targets is not None:
        token_ids = torch.where(params.targets >= 0, params.targets, token_ids)
    output = SampleOutput(token_ids=token_ids)
    if params.num_logprobs is not None:
        add_logprobs(output, logits, params.num_logprobs)
    return output


def apply_penalties(logits: torch.Tensor, penalties: Penalties) -> torch.Tensor:
    """Subtract the penalties of tokens that occurred before from logits [R, V].

    Repetition: Keskar et al., "CTRL", 2019; presence and frequency as in OpenAI's API.
    """
    in_prompt = _count(penalties.prompt_ids, logits)
    in_output = _count(penalties.output_ids, logits)
    repetition = penalties.repetition[:, None]
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where((in_prompt + in_output) > 0, repeated, logits)
    logits = logits - penalties.frequency[:, None] * in_output
    return logits - penalties.presence[:, None] * (in_output > 0)


def _count(token_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Count each token in `token_ids` [R, L], where -1 is padding: float32 [R, V]."""
    num_rows, vocab_size = logits.shape
    counts = torch.zeros(num_rows, vocab_size + 1, device=logits.device)
    ids = token_ids.long()
    ids = torch.where(ids < 0, vocab_size, ids)  # padding goes to an extra column
    counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=counts.dtype))
    return counts[:, :vocab_size]


def apply_bias(logits: torch.Tensor, bias: LogitBias) -> torch.Tensor:
    """Add sparse biases to logits [R, V]."""
    return logits.index_put((bias.rows.long(), bias.token_ids.long()), bias.values, accumulate=True)


def apply_mask(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Set logits [R, V] to -inf where the bit mask, int32 [R, ceil(V / 32)], has a 0."""
    bit = torch.arange(32, dtype=torch.int32, device=logits.device)
    is_allowed = ((allowed[:, :, None] >> bit) & 1).flatten(1)[:, : logits.shape[1]].bool()
    return logits.masked_fill(~is_allowed, float("-inf"))


def first_argmax(scores: torch.Tensor) -> torch.Tensor:
    """int64 [R]: the lowest id among the largest of each row of [R, V]."""
    vocab_size = scores.shape[1]
    ids = torch.arange(vocab_size, device=scores.device)
    is_best = scores == scores.amax(dim=-1, keepdim=True)
    # a row with a NaN has no best id; any will do, because the row is marked as broken
    return torch.where(is_best, ids, vocab_size).amin(dim=-1).clamp(max=vocab_size - 1)


def sample_scores(scores: torch.Tensor, params: SampleParams) -> torch.Tensor:
    """int64 [R]: sampled by temperature, min_p, top_k and top_p; greedy rows take the best."""
    is_greedy = params.temperature == 0
    temperature = torch.where(is_greedy, 1.0, params.temperature)
    scaled = scores / temperature[:, None]
    if params.has_filters:
        scaled = apply_filters(scaled, params)
    noisy = scaled + gumbel(params.seed, params.position, scores.shape[1])
    return torch.where(is_greedy, first_argmax(scores), first_argmax(noisy))


def apply_filters(scaled: torch.Tensor, params: SampleParams) -> torch.Tensor:
    """Set scores [R, V] to -inf where min_p, top_k or top_p drop a token.

    Each filter becomes a threshold on the score, so that tokens tied with the last one kept are
    kept too, in whatever order they are sorted.
    """
    none = float("-inf")
    ordered = scaled.sort(dim=-1, descending=True).values  # [R, V]
    vocab_size = scaled.shape[1]

    min_p = params.min_p[:, None]
    threshold = torch.where(min_p > 0, ordered[:, :1] + torch.log(min_p), none)  # [R, 1]
    k = torch.where(params.top_k > 0, params.top_k, vocab_size).clamp(max=vocab_size)
    threshold = torch.maximum(threshold, ordered.gather(1, (k.long() - 1)[:, None]))
    kept = torch.where(ordered >= threshold, ordered, none)

    top_p = params.top_p[:, None]
    reached = kept.softmax(dim=-1).cumsum(dim=-1)
    ahead = F.pad(reached[:, :-1], (1, 0))  # probability of the more likely tokens
    is_needed = ((ahead < top_p) | (top_p >= 1.0)) & (kept > none)
    threshold = torch.where(is_needed, kept, float("inf")).amin(dim=-1, keepdim=True)
    return torch.where(scaled >= threshold, scaled, none)


def add_logprobs(output: SampleOutput, raw: torch.Tensor, num_top: int) -> None:
    """Add the logprob and rank of each row's token, and the `num_top` most likely tokens."""
    logprobs = raw.log_softmax(dim=-1)
    ids = output.token_ids.long().clamp(min=0)[:, None]  # any id for a broken row
    output.logprobs = logprobs.gather(1, ids)[:, 0]
    output.ranks = ((raw > raw.gather(1, ids)).sum(dim=-1) + 1).to(torch.int32)
    top_ids = most_likely(raw, num_top)
    output.top_ids = top_ids.to(torch.int32)
    output.top_logprobs = logprobs.gather(1, top_ids)


def most_likely(raw: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [R, count]: ids of the largest values of float32 [R, V], ties to the lowest id.

    A score and its id are combined into one integer without ties: the score's bits, mapped to
    integers of the same order, above V - 1 - id.
    """
    vocab_size = raw.shape[1]
    bits = (raw + 0.0).view(torch.int32).long()  # -0.0 becomes 0.0
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    from_end = torch.arange(vocab_size - 1, -1, -1, device=raw.device)
    best = ((ascending << 32) + from_end).topk(min(count, vocab_size), dim=-1).values
    return vocab_size - 1 - (best & 0xFFFFFFFF)
