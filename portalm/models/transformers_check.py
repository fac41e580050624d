"""Checks that a model of transformers computes the same here as with its own eager attention.

The check runs when the model is created, on a small model of the same config with random weights
in float64 (`small_config`). One prompt is computed whole, in chunks, and in batches with another in
two layouts; each must give the logits of transformers' eager forward. The masks that transformers
would use are compared too: see `transformers_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from logging import ERROR
from typing import Any

import torch

from portalm.backend import AttentionSpec
from portalm.errors import UnsupportedModel
from portalm.models.small_config import PROMPT_LENGTH, VOCAB_SIZE, randomize, shrink
from portalm.models.transformers_attention import ATTENTION, CHECKED_ATTENTION, STEP

_MAX_ERROR = 1e-8
"""Largest relative squared error of a token's logits. Models of transformers 5.23 that pass have at
most 3e-11; temperatures of other positions in Llama 4 give 1e-4."""

_FIRST, _SECOND = range(2)
Chunk = tuple[int, int, int]
"""A prompt (`_FIRST` or `_SECOND`), and the tokens of it to compute: start, end."""
_WHOLE: list[list[Chunk]] = [[(_FIRST, 0, PROMPT_LENGTH)]]
_LAYOUTS: dict[str, list[list[Chunk]]] = {
    "in chunks": [[(_FIRST, 0, 17)], [(_FIRST, 17, 18)], [(_FIRST, 18, PROMPT_LENGTH)]],
    "in a batch": [
        [(_FIRST, 0, PROMPT_LENGTH), (_SECOND, 0, 21)],
        [(_SECOND, 21, PROMPT_LENGTH)],
    ],
    "in a batch of chunks": [
        [(_SECOND, 0, PROMPT_LENGTH - 1), (_FIRST, 0, 30)],
        [(_FIRST, 30, PROMPT_LENGTH), (_SECOND, PROMPT_LENGTH - 1, PROMPT_LENGTH)],
    ],
}
"""Steps, each a list of chunks."""


@dataclass(slots=True)
class _PlainStep:
    """Attention in plain PyTorch, with a KV cache per request."""

    chunks: Sequence[Chunk] = ()
    cache: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """(Prompt, layer) -> keys and values, [S, H_kv, D] each."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Append keys and values, and attend: [T, H, D] -> [T, H, D]."""
        lengths = [end - start for _, start, end in self.chunks]
        outputs = []
        parts = (torch.split(x, lengths) for x in (query, key, value))
        for (prompt, _, _), q, k, v in zip(self.chunks, *parts, strict=True):
            if (prompt, layer) in self.cache:
                past = self.cache[prompt, layer]
                k, v = torch.cat((past[0], k)), torch.cat((past[1], v))
            self.cache[prompt, layer] = k, v
            outputs.append(_attended(q, k, v, spec, sinks))
        return torch.cat(outputs)


def _attended(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of one request's last tokens: [N, H, D], 2 x [S, H_kv, D] -> [N, H, D]."""
    group = spec.num_heads // spec.num_kv_heads
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
    hidden = distance < 0
    if spec.sliding_window is not None:
        hidden |= distance >= spec.sliding_window
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        extra = sinks.to(scores.dtype)[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat((scores, extra), dim=-1)
    probs = scores.softmax(dim=-1)[..., : len(k)]
    return torch.einsum("hqk,khd->qhd", probs, v).to(q.dtype)


def check_model(model_class: Any, config: Any) -> None:
    """Check a model that transformers' `model_class` creates from its `config`.

    Raises:
        UnsupportedModel: its masks are not causal, or its logits differ from eager attention's.
    """
    from transformers.utils import logging

    num_threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)  # threads cost more than they save on matrices this small
    logging.set_verbosity(ERROR)  # warnings would name values of the small config
    try:
        _check(model_class, config)
    finally:
        torch.set_num_threads(num_threads)
        logging.set_verbosity(verbosity)


def _check(model_class: Any, config: Any) -> None:
    try:
        small = type(config).from_dict(shrink(config.to_dict()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = model_class._from_config(
                small,
                dtype=torch.float64,
                attn_implementation="eager",
                experts_implementation="eager",  # others lack float64
            ).eval()
            randomize(model)
            prompts = torch.randint(3, VOCAB_SIZE, (2, PROMPT_LENGTH))
        with torch.inference_mode():
            expected = [_eager(model, prompt) for prompt in prompts]
    except Exception as error:  # the model's code can raise anything
        raise UnsupportedModel(
            f"a small model of its config, for a check of its answers, could not run: "
            f"{type(error).__name__}: {error}"
        ) from error
    with torch.inference_mode():
        _use(model, CHECKED_ATTENTION)
        _compare(model, prompts, expected, _WHOLE, "whole")
        _use(model, ATTENTION)
        for name, steps in _LAYOUTS.items():
            _compare(model, prompts, expected, steps, name)


def _use(model: torch.nn.Module, attention: str) -> None:
    """Make the modules call the attention function with this name."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = attention


def _eager(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    """Logits [N, V] of a prompt, as transformers computes them."""
    logits: torch.Tensor = model(input_ids=prompt[None], use_cache=False).logits[0]
    if not torch.isfinite(logits).all():
        raise ValueError("its logits are not finite")
    return logits


def _compare(
    model: Any,
    prompts: torch.Tensor,
    expected: Sequence[torch.Tensor],
    steps: Sequence[Sequence[Chunk]],
    how: str,
) -> None:
    """Compute the prompts in these steps, and compare the logits of every token."""
    step = _PlainStep()
    for step.chunks in steps:
        ids = torch.cat([prompts[prompt, start:end] for prompt, start, end in step.chunks])
        positions = torch.cat([torch.arange(start, end) for _, start, end in step.chunks])
        logits = model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=torch.arange(len(ids)),
            **{STEP: step},
        ).logits[0]
        right = torch.cat([expected[prompt][start:end] for prompt, start, end in step.chunks])
        error = ((logits - right).square().sum(-1) / right.square().sum(-1)).max()
        if not error <= _MAX_ERROR:
            raise UnsupportedModel(
                f"its answers differ from those of its own attention for a prompt computed {how} "
                f"(relative squared error of logits {float(error):.1e})"
            )
