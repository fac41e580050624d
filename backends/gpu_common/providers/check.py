"""Check a provider against the own kernels: the same results, and faster, or it is not used."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import AttentionSpec, StepMeta
from portalm.errors import BackendError
from portalm_backends.gpu_common import attention
from portalm_backends.gpu_common.errors import error_kind
from portalm_backends.gpu_common.providers.provider import (
    AttentionProvider,
    AttentionRun,
    LayerKind,
    missing,
)

logger = logging.getLogger(__name__)

_BOUNDS = {torch.float16: 1e-6, torch.bfloat16: 4e-5}
"""Largest squared error of a request's results relative to their squares. Two kernels that round
weights and results to 16 bits once each differ by a tenth of it."""

_TIMED_TOKENS = 4096
"""Length of the prompt that both kernels are timed with."""

_ROUNDS = 3


class PrefillProviders:
    """Chooses a provider for each kind of layer; without one, the own kernels compute it."""

    def __init__(
        self,
        providers: Sequence[AttentionProvider],
        arch: str,
        own: Callable[[LayerKind], AttentionRun],
        synchronize: Callable[[], None],
        *,
        timed_tokens: int = _TIMED_TOKENS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Use those of `providers` that are installed and support `arch`.

        Args:
            providers: candidates, the preferred ones first.
            arch: compiler name of the architecture.
            own: opens the own kernels for a kind of layer.
            synchronize: waits for the device.
            timed_tokens: length of the prompt that kernels are timed with.
            clock: seconds.
        """
        self._providers = [one for one in providers if missing(one, arch) is None]
        self._own = own
        self._synchronize = synchronize
        self._timed_tokens = timed_tokens
        self._clock = clock
        self._chosen: dict[tuple[AttentionSpec, torch.dtype, int], AttentionRun | None] = {}

    def attend(
        self,
        layer: torch.Tensor,
        query: torch.Tensor,
        meta: StepMeta,
        spec: AttentionSpec,
        *,
        to_device: Callable[[npt.NDArray[np.generic]], torch.Tensor],
        may_check: bool,
    ) -> torch.Tensor | None:
        """`AttentionRun.attend` of the provider for these layers; None if there is none.

        Args:
            layer: one layer of the cache.
            query: [T, H, D]
            meta: a step without a bucket.
            spec: attention parameters of the layer.
            to_device: copies an array to the device.
            may_check: providers may be checked now; False while requests wait.

        Raises:
            BackendError: a provider made the device unusable.
        """
        if not self._providers or layer.dtype != query.dtype:
            return None
        kind = LayerKind(
            spec=spec,
            dtype=query.dtype,
            block_size=layer.shape[3],
            device=query.device,
            to_device=to_device,
        )
        run = self._choose(kind, may_check)
        if run is None:
            return None
        try:
            return run.attend(layer, query, meta)
        except Exception as error:
            if isinstance(error, RuntimeError) and error_kind(error) in ("oom", "device_lost"):
                raise
            self._chosen[_key(kind)] = None
            logger.warning(
                "attention of long prompts failed in an optional package (%s: %s); using PortaLM's "
                "own kernels from now on",
                type(error).__name__, error,
            )  # fmt: skip
            return None

    def _choose(self, kind: LayerKind, may_check: bool) -> AttentionRun | None:
        """The first provider that passes the check; None: the own kernels."""
        key = _key(kind)
        if key not in self._chosen:
            if not may_check:
                return None
            runs = (self._checked(provider, kind) for provider in self._providers)
            self._chosen[key] = next((run for run in runs if run is not None), None)
        return self._chosen[key]

    def _checked(self, provider: AttentionProvider, kind: LayerKind) -> AttentionRun | None:
        """Open and check a provider; None, and a line in the log, if it is not to be used."""
        reason = provider.refuses(kind)
        run = None
        if reason is None:
            logger.info("checking %s for attention of long prompts", provider.package)
            try:
                run = provider.open(kind)
                reason = self._difference(run, kind) or self._slowness(run, kind)
            except Exception as error:  # whatever an optional package raises, it is not required
                if isinstance(error, RuntimeError) and error_kind(error) == "device_lost":
                    raise BackendError(
                        "device_lost",
                        f"{provider.package} made the GPU unusable when it was checked ({error}); "
                        f"uninstall it or install a version that supports this GPU",
                    ) from error
                reason = f"it raised {type(error).__name__}: {error}"
        if reason is not None:
            logger.warning(
                "not using %s for attention of long prompts: %s", provider.package, reason
            )
            return None
        logger.info("using %s for attention of long prompts", provider.package)
        return run

    def _difference(self, run: AttentionRun, kind: LayerKind) -> str | None:
        """How the results differ from those of the own kernels; None if they agree."""
        query_lens, seq_lens = check_lengths(kind.spec)
        case = random_case(kind, query_lens, seq_lens)
        expected = self._own(kind).attend(*case)
        actual = run.attend(*case)
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            return (
                f"its result is {actual.dtype} {list(actual.shape)}, not {expected.dtype} "
                f"{list(expected.shape)}"
            )
        parts = zip(torch.split(actual, query_lens), torch.split(expected, query_lens), strict=True)
        for number, (one, other) in enumerate(parts):
            error = (one.float() - other.float()).square().sum() / other.float().square().sum()
            if not float(error) <= _BOUNDS[kind.dtype]:  # NaN is not either
                return (
                    f"its results differ from those of PortaLM's kernels by {float(error):.1e} of "
                    f"their squares ({_BOUNDS[kind.dtype]:.0e} allowed) for {query_lens[number]} "
                    f"tokens after {seq_lens[number] - query_lens[number]}"
                )
        return None

    def _slowness(self, run: AttentionRun, kind: LayerKind) -> str | None:
        """By how much it is slower than the own kernels with a long prompt; None if it is not."""
        case = random_case(kind, [self._timed_tokens], [self._timed_tokens])
        own, other = (self._seconds(one, case) for one in (self._own(kind), run))
        if other < own:
            logger.info(
                "attention of %d tokens: %.3f ms, PortaLM's kernels %.3f ms",
                self._timed_tokens, 1e3 * other, 1e3 * own,
            )  # fmt: skip
            return None
        return (
            f"it takes {1e3 * other:.3f} ms for {self._timed_tokens} tokens, PortaLM's kernels "
            f"{1e3 * own:.3f} ms"
        )

    def _seconds(
        self, run: AttentionRun, case: tuple[torch.Tensor, torch.Tensor, StepMeta]
    ) -> float:
        """The least time of a few rounds, after one that is not counted."""
        run.attend(*case)
        times = []
        for _ in range(_ROUNDS):
            self._synchronize()
            start = self._clock()
            run.attend(*case)
            self._synchronize()
            times.append(self._clock() - start)
        return min(times)


def _key(kind: LayerKind) -> tuple[AttentionSpec, torch.dtype, int]:
    return kind.spec, kind.dtype, kind.block_size


class OwnAttention:
    """The own kernels, called as a provider is."""

    def __init__(self, kind: LayerKind, *, family: str, num_programs: int) -> None:
        """Compute layers of `kind`; the other arguments are those of attention.py."""
        self._kind = kind
        self._family = family
        self._num_programs = num_programs

    def attend(self, layer: torch.Tensor, query: torch.Tensor, meta: StepMeta) -> torch.Tensor:
        """Causal attention of query [T, H, D]: [T, H, D]."""
        spec = self._kind.spec
        if spec not in meta.plan:
            meta.plan[spec] = attention.plan_attention(
                meta, spec, self._kind.to_device, num_programs=self._num_programs
            )
        plan = meta.plan[spec]
        return attention.attend(layer, query, meta, spec, plan, family=self._family)


def check_lengths(spec: AttentionSpec) -> tuple[list[int], list[int]]:
    """Query and context lengths to check: a decode, a prompt, a chunk that the window cuts."""
    before = 83 if spec.sliding_window is None else spec.sliding_window + 83
    return [1, 37, 150], [70, 37, before + 150]


def random_case(
    kind: LayerKind, query_lens: list[int], seq_lens: list[int]
) -> tuple[torch.Tensor, torch.Tensor, StepMeta]:
    """Arguments for `AttentionRun.attend` in which every mistake shows.

    Blocks are in random order, and slots without a token, the null block included, are NaN. Rows of
    the query are apart, as those of a fused projection are. Scores are large enough for a soft cap
    to matter, and old values are large, so that a token too many at the window's edge shows.
    """
    spec, block = kind.spec, kind.block_size
    generator = torch.Generator().manual_seed(0)
    blocks = [-(-length // block) for length in seq_lens]
    ids = torch.split(1 + torch.randperm(sum(blocks), generator=generator), blocks)
    table = torch.zeros((len(seq_lens), max(blocks)), dtype=torch.int32)
    shape = (1 + sum(blocks), spec.num_kv_heads, 2, block, spec.head_size)
    cache = torch.full(shape, float("nan"), dtype=kind.dtype)
    for i, (length, own) in enumerate(zip(seq_lens, ids, strict=True)):
        table[i, : len(own)] = own
        padded = (2, len(own) * block, spec.num_kv_heads, spec.head_size)
        slots = torch.full(padded, float("nan"))
        slots[:, :length] = torch.randn((2, length, *padded[2:]), generator=generator)
        slots[1, : max(length - (spec.sliding_window or length), 0)] *= 16
        cache[own] = (
            slots.view(2, len(own), block, *padded[2:]).permute(1, 3, 0, 2, 4).to(kind.dtype)
        )
    num_tokens, width = sum(query_lens), spec.num_heads + 2 * spec.num_kv_heads
    rows = torch.randn((num_tokens, width, spec.head_size), generator=generator)
    deviation = max(3.0, (spec.soft_cap or 0.0) / 2)  # of the scores
    rows *= deviation / (spec.scale * spec.head_size**0.5)
    query = rows.to(kind.dtype).to(kind.device)[:, : spec.num_heads]
    loc = np.cumsum([0, *query_lens]).astype(np.int32)
    lengths = np.array(seq_lens, np.int32)
    meta = StepMeta(
        positions=torch.empty(0),
        slot_mapping=torch.empty(0),
        query_start_loc=kind.to_device(loc),
        seq_lens=kind.to_device(lengths),
        block_table=table.to(kind.device),
        logits_rows=torch.empty(0),
        host_query_start_loc=loc,
        host_seq_lens=lengths,
        num_decodes=query_lens.count(1),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
    )
    return cache.to(kind.device), query, meta
