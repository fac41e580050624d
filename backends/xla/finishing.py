"""Small programs that run after a step: penalties, biases, masks, targets and logprobs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import SampleOutput, SampleParams
from portalm_backends.portable import sampling as portable
from portalm_backends.xla import packing, sampling
from portalm_backends.xla.bridge import Bridge, DeviceTensor, host_tensor
from portalm_backends.xla.store import Source, Traced

Array: TypeAlias = Any

_NUM_ENTRIES = 4096
"""Penalty and bias entries transferred to the device at a time."""
_PROMPT, _OUTPUT, _BIAS, _PADDING = 0, 1, 2, 3
"""Kinds of entries; the first three index `FinishArrays.entries`."""


def is_needed(params: SampleParams) -> bool:
    """True if `params` needs more than the temperatures and filters that steps apply."""
    return (
        params.penalties is not None
        or params.bias is not None
        or params.allowed is not None
        or params.targets is not None
        or params.num_logprobs is not None
    )


class Finisher:
    """The programs for R rows of V logits, compiled by other threads."""

    def __init__(
        self,
        bridge: Bridge,
        num_rows: int,
        vocab_size: int,
        *,
        max_rows: int,
        compile: Callable[[Source, str], tuple[Traced, Future[Any]]],
    ) -> None:
        """Trace the programs and start compiling them.

        Args:
            bridge: the devices.
            num_rows: R, rows of logits.
            vocab_size: V
            max_rows: most rows of any step; sampled ids are padded to it.
            compile: `Programs.compile`
        """
        self._bridge = bridge
        self._num_rows, self._vocab_size = num_rows, vocab_size
        column = (num_rows,)
        self._layout = packing.Layout(
            {
                **packing.sampling_shapes(num_rows),
                "presence": column,
                "frequency": column,
                "repetition": column,
                "targets": column,
                "is_adjusted": (),
                "wants_logprobs": (),
            }
        )
        self._entries_shape = (3, num_rows, vocab_size)
        entries = bridge.shape(self._entries_shape, jnp.float32)
        some = bridge.shape((4, _NUM_ENTRIES), jnp.int32)
        logits = bridge.shape((num_rows, vocab_size), jnp.float32)
        packed = bridge.shape((self._layout.size,), jnp.int32)
        allowed = bridge.shape((num_rows, -(-vocab_size // 32)), jnp.int32)

        sizes = (num_rows, vocab_size, max_rows)

        def start(
            name: str, function: Callable[..., Any], *arguments: Any, donated: tuple[int, ...] = ()
        ) -> Future[Any]:
            source = Source(
                function=function, arguments=arguments, results=bridge.replicated, donated=donated
            )
            return compile(source, f"{name} {sizes}")[1]

        self._first = start("first entries", functools.partial(self._add, None), some)
        self._more = start("more entries", self._add, entries, some, donated=(0,))
        finish = functools.partial(self._finish, max_rows)
        self._compiled = start("finish", finish, logits, entries, packed, allowed)

    def wait(self) -> None:
        """Wait until all programs are compiled."""
        for program in (self._first, self._more, self._compiled):
            program.result()

    def __call__(self, logits: Array, params: SampleParams) -> tuple[SampleOutput, Array]:
        """Sample from `logits` [R, V]; return the output and its ids padded to `max_rows`."""
        is_adjusted = params.penalties is not None or params.bias is not None
        packed = self._layout.pack(
            {
                **packing.sampling_values(params),
                **self._penalties(params),
                "targets": _column(params.targets, self._num_rows, np.int32, -1),
                "is_adjusted": is_adjusted,
                "wants_logprobs": params.num_logprobs is not None,
            }
        )
        if params.allowed is None:
            allowed = np.full((self._num_rows, -(-self._vocab_size // 32)), -1, np.int32)
        else:
            allowed = np.array(params.allowed.numpy())
        entries = self._entries(params)
        ids, padded_ids, logprobs, ranks, top_ids, top_logprobs = self._compiled.result()(
            logits, entries, packed, allowed
        )
        wrap = self._bridge.tensor
        out = SampleOutput(token_ids=wrap(ids))
        wanted = params.num_logprobs
        if wanted is not None and wanted <= sampling.NUM_TOP:
            out.logprobs, out.ranks = wrap(logprobs), wrap(ranks)
            out.top_ids, out.top_logprobs = wrap(top_ids), wrap(top_logprobs)
        elif wanted is not None:  # more than the program returns: rare, so computed on the host
            found = SampleOutput(token_ids=host_tensor(ids))
            portable.add_logprobs(found, host_tensor(logits), wanted)
            out.logprobs, out.ranks = found.logprobs, found.ranks
            out.top_ids, out.top_logprobs = found.top_ids, found.top_logprobs
        return out, padded_ids

    def _penalties(self, params: SampleParams) -> dict[str, npt.NDArray[Any] | int]:
        given = params.penalties
        num_rows = self._num_rows
        return {
            "presence": _column(given and given.presence, num_rows, np.float32, 0),
            "frequency": _column(given and given.frequency, num_rows, np.float32, 0),
            "repetition": _column(given and given.repetition, num_rows, np.float32, 1),
        }

    def _entries(self, params: SampleParams) -> Array:
        """Build `FinishArrays.entries`, float32 [3, R, V], `_NUM_ENTRIES` entries at a time."""
        listed = _entries_of(params)
        entries = self._first.result()(listed[:, :_NUM_ENTRIES])
        for start in range(_NUM_ENTRIES, listed.shape[1], _NUM_ENTRIES):
            entries = self._more.result()(entries, listed[:, start : start + _NUM_ENTRIES])
        return entries

    def _add(self, entries: Array | None, some: Array) -> Array:
        rows, token_ids, kinds, values = some
        return sampling.add_entries(
            entries, rows, token_ids, kinds, packing.as_float(values), shape=self._entries_shape
        )

    def _finish(
        self, max_rows: int, logits: Array, entries: Array, packed: Array, allowed: Array
    ) -> tuple[Array, ...]:
        parts = self._layout.unpack(packed)
        arrays = sampling.FinishArrays(
            entries=entries,
            presence=packing.as_float(parts["presence"]),
            frequency=packing.as_float(parts["frequency"]),
            repetition=packing.as_float(parts["repetition"]),
            allowed=allowed,
            targets=parts["targets"],
            is_adjusted=parts["is_adjusted"] != 0,
            wants_logprobs=parts["wants_logprobs"] != 0,
        )
        ids, *reported = sampling.finish(logits, packing.sampling_arrays(parts), arrays)
        return (ids, jnp.pad(ids, (0, max(0, max_rows - len(ids)))), *reported)


def on_host(out: SampleOutput, num_top: int | None) -> SampleOutput:
    """Copy sampler output to the host, with the `num_top` most likely tokens (None: all)."""

    def get(x: torch.Tensor | None) -> torch.Tensor | None:
        if x is None:
            return None
        host = host_tensor(x.jax()) if isinstance(x, DeviceTensor) else x
        return host if host.ndim == 1 else host[:, :num_top]

    token_ids = get(out.token_ids)
    assert token_ids is not None
    return SampleOutput(
        token_ids=token_ids,
        logprobs=get(out.logprobs),
        ranks=get(out.ranks),
        top_ids=get(out.top_ids),
        top_logprobs=get(out.top_logprobs),
    )


def _column(
    given: Any, num_rows: int, dtype: type[np.generic], fill: float
) -> npt.NDArray[np.generic]:
    return np.full(num_rows, fill, dtype) if given is None else given.numpy()


def _entries_of(params: SampleParams) -> npt.NDArray[np.int32]:
    """int32 [4, N]: row, token, kind and float32 bits of each entry.

    N is a multiple of `_NUM_ENTRIES`, at least one; the rest is padding.
    """
    rows, token_ids, kinds, values = [], [], [], []

    def add(at: npt.NDArray[Any], ids: npt.NDArray[Any], kind: int, value: Any) -> None:
        rows.append(at.astype(np.int32))
        token_ids.append(ids.astype(np.int32))
        kinds.append(np.full(len(at), kind, np.int32))
        values.append(np.broadcast_to(np.asarray(value, np.float32), at.shape).view(np.int32))

    if params.penalties is not None:
        for ids, kind in (
            (params.penalties.prompt_ids.numpy(), _PROMPT),
            (params.penalties.output_ids.numpy(), _OUTPUT),
        ):
            at, columns = np.nonzero(ids >= 0)
            add(at, ids[at, columns], kind, 1.0)
    if params.bias is not None:
        bias = params.bias
        add(bias.rows.numpy(), bias.token_ids.numpy(), _BIAS, bias.values.numpy())
    num_given = sum(map(len, rows))
    padding = max(_NUM_ENTRIES, -(-num_given // _NUM_ENTRIES) * _NUM_ENTRIES) - num_given
    add(np.zeros(padding), np.zeros(padding), _PADDING, 0.0)
    return np.stack([np.concatenate(one) for one in (rows, token_ids, kinds, values)])
