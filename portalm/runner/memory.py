"""How many KV blocks fit: memory minus weights, activations, logits and sampling."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from portalm.backend import KV, Backend, KVSpec
from portalm.config import EngineConfig, ModelConfig
from portalm.errors import ConfigError
from portalm.runner.model_runner import ModelRunner

_OWN_MEMORY_SHARE = 0.9
"""Default share of a device's own memory for weights, activations and KV cache together."""

_HOST_MEMORY_SHARE = 0.5
"""Default share of free host memory, which other programs use too, for the KV cache."""

_HOST_KV_LIMIT = 4 << 30
"""Default limit of the KV cache in host memory, bytes; --kv-cache-memory-bytes overrides it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVBudget:
    """The size of the KV pool and of the memory kept free for steps."""

    num_blocks: int
    """Blocks in the pool, the null block included."""
    block_bytes: int
    activation_bytes: int
    """Activations, logits and sampling of the largest step."""


def activation_bytes(
    model: ModelConfig, *, dtype_bytes: int, max_tokens: int, max_logits_rows: int
) -> int:
    """Upper bound of the bytes that the largest step allocates, without weights and KV cache.

    A layer holds at most: residual, normed input, qkv, rotated q and k, attention's output,
    gate-up and its product. Logits are float32, and sampling keeps three more arrays of their size.
    Where prompts are pooled, every token's hidden state may be needed, also in float32.
    """
    heads = (2 * model.num_heads + 3 * model.num_kv_heads) * model.head_size
    per_token = 4 * model.hidden_size + 2 * heads + 3 * model.intermediate_size
    per_token += 3 * model.hidden_size
    states = max_tokens * model.hidden_size * 4
    return (
        max_tokens * per_token * dtype_bytes + states + max_logits_rows * model.vocab_size * 4 * 4
    )


def measured_bytes(make_runner: Callable[[KV], ModelRunner], backend: Backend, spec: KVSpec) -> int:
    """Measure the bytes that the largest step and all captures take, without weights and KV cache.

    Two captures are measured. All captures share the memory of the first and largest one; the
    second shows what each further capture adds.

    Args:
        make_runner: makes a runner with the engine's settings over the given KV cache, which has
            only the null block.
        backend: the device to measure.
        spec: shape of the KV cache.
    """
    runner = make_runner(backend.kv_alloc(spec, 1))
    with backend.peak() as used:
        runner.run_largest()
    step_bytes = used()
    num_captures = 0 if runner.graphs.buckets is None else len(runner.graphs.buckets)
    free = [backend.memory().free]
    while len(free) < 3 and runner.capture_next():
        free.append(backend.memory().free)
    taken = [max(0, before - after) for before, after in itertools.pairwise(free)]
    captured_bytes = sum(taken) + (taken[-1] * (num_captures - len(taken)) if taken else 0)
    return step_bytes + captured_bytes


def kv_budget(
    config: EngineConfig,
    model: ModelConfig,
    backend: Backend,
    spec: KVSpec,
    *,
    max_model_len: int,
    weight_bytes: Callable[[], int],
    activations: int,
) -> KVBudget:
    """Size the KV pool of an engine whose weights are already on the device.

    Raises:
        ConfigError: the pool cannot hold one request of `max_model_len` tokens.
    """
    block_bytes = backend.kv_bytes_per_block(spec)
    blocks_per_request = -(-max_model_len // spec.block_size)
    if config.num_gpu_blocks_override is not None:
        num_blocks = config.num_gpu_blocks_override
    else:
        room = _room(config, backend, weight_bytes=weight_bytes, activations=activations)
        max_useful = config.max_num_seqs * blocks_per_request
        num_blocks = min(room // block_bytes, max_useful)
    if num_blocks < blocks_per_request:
        raise ConfigError(
            f"the KV cache has room for {max(0, num_blocks) * spec.block_size} tokens "
            f"({max(0, num_blocks)} blocks of {block_bytes / 2**10:.0f} KiB), but one request of "
            f"max_model_len={max_model_len} needs {blocks_per_request} blocks "
            f"({blocks_per_request * block_bytes / 2**20:.0f} MiB): lower --max-model-len, raise "
            f"--kv-cache-memory-bytes or --gpu-memory-utilization, or lower "
            f"--max-num-batched-tokens ({activations / 2**20:.0f} MiB are kept for activations)"
        )
    return KVBudget(
        num_blocks=num_blocks + 1, block_bytes=block_bytes, activation_bytes=activations
    )


def _room(
    config: EngineConfig, backend: Backend, *, weight_bytes: Callable[[], int], activations: int
) -> int:
    """Bytes available to the KV pool."""
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    memory = backend.memory()
    share = config.gpu_memory_utilization
    if memory.host_shared:
        # the weights are loaded already, so free memory does not include them
        if share is None:
            return min(int((memory.free - activations) * _HOST_MEMORY_SHARE), _HOST_KV_LIMIT)
        return min(
            int(memory.total * share) - weight_bytes() - activations, memory.free - activations
        )
    return (
        min(
            int(memory.total * (share or _OWN_MEMORY_SHARE)) - (memory.total - memory.free),
            memory.free,
        )
        - activations
    )
