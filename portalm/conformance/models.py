"""L3: whole models on the backend, compared with a float64 forward pass.

Llama's forward pass is written out here a second time, in plain loops. Other families run their own
model code over float64 operations (oracle.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from portalm.conformance import oracle, reference
from portalm.conformance.base import CheckFailed, Named
from portalm.conformance.check import Check
from portalm.conformance.numerics import require_close
from portalm.conformance.subject import Subject
from portalm.conformance.tiny import (
    ENCODERS,
    VARIANTS,
    ask,
    finish,
    pool,
    prompts,
    tiny_engine,
)
from portalm.engine.engine import Engine
from portalm.engine.scores import numbers
from portalm.models.loader import open_checkpoint

Array = npt.NDArray[np.float64]

_LOGPROB_NMSE = {"float32": 1e-9, "float16": 1e-5, "bfloat16": 1e-3}
"""NMSE bound of a whole model: some twenty operations in sequence, each within its own bound."""

_NUM_GREEDY = 64


def forward(engine: Engine, token_ids: list[int]) -> Array:
    """Return logits of all positions in float64, [N, V], from the checkpoint's weights."""
    config = engine.model_config
    if config.architecture != "LlamaForCausalLM":
        return oracle.forward(engine, token_ids)
    checkpoint = open_checkpoint(engine.model_path, engine.config, engine.backend.device())

    def w(name: str) -> Array:
        return np.asarray(checkpoint.tensor(name).cpu().double().numpy(), np.float64)

    def linear(x: Array, name: str, has_bias: bool) -> Array:
        return reference.linear(x, w(f"{name}.weight"), w(f"{name}.bias") if has_bias else None)

    table = _rope_table(engine)
    positions = np.arange(len(token_ids), dtype=np.int32)
    spec = engine.attention_specs[0]
    x = w("model.embed_tokens.weight")[token_ids]
    for layer in range(config.num_layers):
        name = f"model.layers.{layer}"
        normed = reference.rms_norm(x, w(f"{name}.input_layernorm.weight"), config.norm_eps)
        q, k, v = (
            linear(normed, f"{name}.self_attn.{p}_proj", config.attention_bias).reshape(
                len(token_ids), -1, config.head_size
            )
            for p in "qkv"
        )
        q, k = (reference.rope(a, positions, table, False) for a in (q, k))
        attended = reference.attention(q, k, v, spec).reshape(len(token_ids), -1)
        x = x + linear(attended, f"{name}.self_attn.o_proj", config.attention_bias)
        normed = reference.rms_norm(
            x, w(f"{name}.post_attention_layernorm.weight"), config.norm_eps
        )
        gate, up = (linear(normed, f"{name}.mlp.{p}_proj", config.mlp_bias) for p in ("gate", "up"))
        gated = reference.silu_mul(np.concatenate([gate, up], axis=1))
        x = x + linear(gated, f"{name}.mlp.down_proj", config.mlp_bias)
    x = reference.rms_norm(x, w("model.norm.weight"), config.norm_eps)
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return reference.linear(x, w(f"{head}.weight"))


def _rope_table(engine: Engine) -> Array:
    """Compute the table of angles in float64; llama3 scaling frequency by frequency."""
    config = engine.model_config
    table = np.empty((config.max_position, config.head_size))
    scaling: dict[str, Any] = dict(config.rope.scaling)
    for i in range(config.head_size // 2):
        frequency = config.rope.theta ** (-2 * i / config.head_size)
        if scaling.get("rope_type") == "llama3":
            turns = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            share = min(max((turns - low) / (high - low), 0.0), 1.0)
            frequency *= share + (1 - share) / scaling["factor"]
        angles = np.arange(config.max_position) * frequency
        table[:, i] = np.cos(angles)
        table[:, config.head_size // 2 + i] = np.sin(angles)
    return table


def check_logprobs(subject: Subject, case: Named) -> float:
    """Compare prompt logprobs of a mixed batch of chunked prompts."""
    with tiny_engine(subject, case.name, enable_prefix_caching=False) as engine:
        asked = prompts()
        for request_id, prompt in asked.items():
            ask(engine, request_id, prompt, prompt_logprobs=0)
        outputs = finish(engine)
        actual, expected = [], []
        for request_id, prompt in asked.items():
            entries = [e for o in outputs[request_id] for e in o.prompt_logprobs or []]
            actual += [e.logprob for e in entries]
            logits = forward(engine, prompt)
            shifted = logits - logits.max(axis=1, keepdims=True)
            logprobs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
            expected += [logprobs[i, token] for i, token in enumerate(prompt[1:])]
    difference = np.array(actual) - np.array(expected)
    error = float(np.square(difference).sum() / np.square(expected).sum())
    bound = _LOGPROB_NMSE[subject.dtype]
    if not error <= bound:
        raise CheckFailed(
            f"logprobs: NMSE {error:.2e} exceeds {bound:.0e}", nmse=error, bound=bound
        )
    return error


def check_greedy(subject: Subject, case: Named) -> None:
    """Compare 64 greedy tokens with the float64 model's choices, except at near-ties."""
    near = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1.5e-1}[subject.dtype]
    with tiny_engine(subject, case.name) as engine:
        prompt = prompts()["3"]
        ask(engine, "a", prompt, max_tokens=_NUM_GREEDY)
        [found] = [[t for o in many for t in o.token_ids] for many in finish(engine).values()]
        logits = forward(engine, prompt + found)
    num_clear = 0
    for i, token_id in enumerate(found):
        row = logits[len(prompt) - 1 + i]
        second, best = np.sort(row)[-2:]
        if best - second < near:
            continue  # both are acceptable; later tokens are compared after the one found
        num_clear += 1
        if token_id != int(row.argmax()):
            raise CheckFailed(
                f"token {i} is {token_id}, the reference has {int(row.argmax())} "
                f"with a margin of {best - second:.3g}"
            )
    if num_clear < _NUM_GREEDY // 4:
        raise CheckFailed(
            f"only {num_clear} of {_NUM_GREEDY} tokens have a clear margin: too few to compare"
        )


def check_encoder(subject: Subject, case: Named) -> float:
    """Compare mean-pooled vectors of an encoder over a batch of prompts."""
    with tiny_engine(subject, case.name) as engine:
        asked = prompts()
        for request_id, prompt in asked.items():
            pool(engine, request_id, prompt)
        outputs = finish(engine)
        found = [numbers(outputs[request_id][-1].pooled or b"") for request_id in asked]
        expected = [oracle.encode(engine, prompt).mean(axis=0) for prompt in asked.values()]
    bound = _LOGPROB_NMSE[subject.dtype]
    return require_close("vectors", np.array(found), np.array(expected), bound)


_VARIANTS = tuple(Named(name) for name in VARIANTS)

CHECKS = (
    Check("L3", "model logprobs", check_logprobs, _VARIANTS),
    Check("L3", "greedy tokens", check_greedy, _VARIANTS),
    Check("L3", "encoder vectors", check_encoder, tuple(Named(name) for name in ENCODERS)),
)
