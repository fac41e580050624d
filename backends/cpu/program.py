"""One native call per step: recorded while the step runs once, then replayed (csrc_cpu/program.h).

The recording consists of the calls into the native module. Each argument is an address or a number
that is either the same in every step (weights, cache, widths) or follows from the step: an address
in its inputs or in the result of an earlier call, or a number of rows. Between the calls, torch may
only make views: anything else it computes would be missing from the program. In that case either a
kernel reads memory that no kernel wrote, or the program, which is run once as a check, produces
different logits. Such a step is not recorded.
"""

from __future__ import annotations

import bisect
import logging
import math
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from portalm.backend import KV, SampleOutput, StepFn, StepInputs, Weights
from portalm_backends.cpu.attention import AttentionPlan

if TYPE_CHECKING:
    from portalm_backends.cpu.backend import CpuBackend

logger = logging.getLogger(__name__)

_TOKENS, _LOGITS_ROWS = 0, 1  # row counts of a step: T and R
_BLOCK_TABLE, _MAX_BLOCKS, _LOGITS, _FIRST_PLAN = 4, 5, 6, 7  # inputs; 0 to 3: _row_inputs


def _row_inputs(inputs: StepInputs) -> tuple[tuple[torch.Tensor, int], ...]:
    """The inputs with one number per row, and the row count that each of them has."""
    meta = inputs.meta
    return (
        (inputs.token_ids, _TOKENS),
        (meta.positions, _TOKENS),
        (meta.slot_mapping, _TOKENS),
        (meta.logits_rows, _LOGITS_ROWS),
    )


@dataclass(slots=True, eq=False)
class _Value:
    """Memory whose address changes from step to step: an input, or the result of a call."""

    start: int
    end: int
    count: int
    """Row count: _TOKENS or _LOGITS_ROWS."""
    row_bytes: int
    input: int | None = None
    """Index among the program's inputs; None for a result."""
    last_use: int = 0
    """Index of the last call that uses it."""
    slot: int = -1


@dataclass(slots=True, eq=False)
class _Call:
    """A recorded call; arguments are named by their index in the kernel's list."""

    kernel: str
    words: list[int]
    """The arguments in the kernel's order, as the program holds them."""
    uses: list[tuple[int, _Value, int]] = field(default_factory=list)
    """(argument, value, offset in bytes)"""
    numbers: list[tuple[int, str, int]] = field(default_factory=list)
    """(argument, "input" or "count", index)"""
    results: list[_Value] = field(default_factory=list)


class NotRecordable(Exception):
    """The step does something that a program cannot repeat."""


class Recorder:
    """Stands in for the native module while a step runs once, and records its calls."""

    def __init__(self, native: Any, inputs: StepInputs) -> None:
        """Record the calls into `native` of the step over `inputs`."""
        self.logits: _Value | None = None
        self.vocab_size = 0
        self._expected = torch.empty(0)
        self._native = native
        self._kernels = {
            kernel: arguments
            for kernel, arguments in native.ARGUMENTS.items()
            if arguments[0][1] != "none"
        }
        """Name, role and kind of each argument (csrc_cpu/arguments.h) of the recorded kernels."""
        self._calls: list[_Call] = []
        self._alive: dict[int, torch.Tensor] = {}
        """Results by address."""
        self._values: list[_Value] = []
        self._plans: list[AttentionPlan] = list(inputs.meta.plan.values())
        for i, (tensor, count) in enumerate(_row_inputs(inputs)):
            self._add_value(tensor, count, tensor.element_size()).input = i
        self._table = self._add_value(inputs.meta.block_table, _TOKENS, 4)
        self._table.input = _BLOCK_TABLE

    # -- watching -----------------------------------------------------------------------------

    def keep(self, result: torch.Tensor) -> None:
        """Keep a kernel's result alive, so that its address is not allocated again."""
        self._alive[result.data_ptr()] = result

    def __getattr__(self, name: str) -> Any:
        """The native attribute of this name; calls are recorded if it is a kernel of a step."""
        function = getattr(self._native, name)
        if name not in self._kernels:
            return function

        def call(**arguments: Any) -> None:
            function(**arguments)
            if self.logits is None:
                self._record(name, arguments)

        return call

    def end(self, logits: torch.Tensor) -> None:
        """End the recording at the step's logits [R, V]."""
        value = self._find(logits.data_ptr())
        if value is None or value.input is not None or value.start != logits.data_ptr():
            raise NotRecordable("its logits are not the result of a kernel")
        self.logits = value
        self.vocab_size = logits.shape[1]
        self._expected = logits.clone()
        value.input = _LOGITS

    def is_proven_by(self, logits: torch.Tensor) -> bool:
        """Whether the program's logits [R, V] equal the step's, bit for bit."""
        return logits.numpy().tobytes() == self._expected.numpy().tobytes()

    # -- recording ----------------------------------------------------------------------------

    def _record(self, kernel: str, arguments: dict[str, Any]) -> None:
        signature = self._kernels[kernel]
        words = [_word(arguments[name], kind) for name, _, kind in signature]
        call = _Call(kernel, words)
        now = len(self._calls)
        last: _Value | None = None  # the last value that an address before this argument lies in
        for i, (name, role, _) in enumerate(signature):
            address = words[i]
            if role in ("input", "table") and address:
                value = self._find(address)
                if value is not None:
                    self._use(call, i, value, address - value.start, now)
                    last = last if value is self._table else value
                elif role == "input":
                    raise NotRecordable(
                        f"{kernel} reads {name}, which no kernel of the step wrote: an earlier "
                        f"operation has no kernel"
                    )
            elif role == "rows":
                call.numbers.append((i, "count", self._count(kernel, last)))
            elif role == "source_rows":
                source = self._find(words[0])
                if source is not None:
                    call.numbers.append((i, "count", source.count))
            elif role == "max_blocks":
                call.numbers.append((i, "input", _MAX_BLOCKS))
            elif role == "plan":
                call.numbers.append((i, "input", self._plan_input(arguments["items"], name)))
        for i, (_, role, _) in enumerate(signature):
            if role == "output" and words[i]:
                self._add_result(call, i, self._count(kernel, last), now)
        self._calls.append(call)

    def _use(self, call: _Call, argument: int, value: _Value, offset: int, now: int) -> None:
        if offset >= value.row_bytes:
            raise NotRecordable(f"{call.kernel} starts at a row other than the first")
        value.last_use = now
        call.uses.append((argument, value, offset))

    def _add_result(self, call: _Call, argument: int, count: int, now: int) -> None:
        tensor = self._alive.get(call.words[argument])
        if tensor is None:
            raise NotRecordable(f"{call.kernel} writes to memory not allocated in the step")
        value = self._add_value(tensor, count, math.prod(tensor.shape[1:]) * tensor.element_size())
        value.last_use = now
        call.results.append(value)
        call.uses.append((argument, value, 0))

    @staticmethod
    def _count(kernel: str, value: _Value | None) -> int:
        if value is None:
            raise NotRecordable(f"{kernel} reads nothing that follows from the step")
        return value.count

    def _add_value(self, tensor: torch.Tensor, count: int, row_bytes: int) -> _Value:
        start = tensor.data_ptr()
        end = start + max(1, tensor.numel()) * tensor.element_size()
        value = _Value(start, end, count, row_bytes)
        bisect.insort(self._values, value, key=lambda v: v.start)
        return value

    def _find(self, address: int) -> _Value | None:
        """The value that `address` lies in."""
        i = bisect.bisect_right(self._values, address, key=lambda v: v.start) - 1
        value = self._values[i] if i >= 0 else None
        return value if value is not None and address < value.end else None

    def _plan_input(self, items: int, name: str) -> int:
        """Index of the input that holds `name` of the plan with these items."""
        for i, plan in enumerate(self._plans):
            if plan.arguments["items"] == items:
                names = list(plan.arguments)
                return _FIRST_PLAN + i * len(names) + names.index(name)
        raise NotRecordable("attention uses a plan that prepare did not make")

    # -- the program --------------------------------------------------------------------------

    def program(self) -> Any:
        """The recorded calls as a native program."""
        if self.logits is None:
            raise NotRecordable("it samples no token")
        kinds = self._native.PATCH_KINDS
        program = self._native.Program()
        for row_bytes, count in self._assign_slots():
            program.add_slot(row_bytes, count)
        for call in self._calls:
            patches = [(i, kinds[kind], index, 0) for i, kind, index in call.numbers]
            for i, value, offset in call.uses:
                if value.input is None:
                    patches.append((i, kinds["slot"], value.slot, offset))
                else:
                    patches.append((i, kinds["input"], value.input, offset))
            program.add_call(call.kernel, call.words, patches)
        return program

    def _assign_slots(self) -> list[tuple[int, int]]:
        """Give each result a slot, reused once nothing needs it: (bytes per row, count) each."""
        slots: list[tuple[int, int]] = []
        free: list[int] = []
        in_use: list[_Value] = []
        for now, call in enumerate(self._calls):
            for value in call.results:
                if value is self.logits:
                    continue
                fitting = [i for i in free if slots[i][1] == value.count]
                if fitting:
                    # the smallest that is large enough, else the largest, which grows
                    value.slot = min(
                        fitting,
                        key=lambda i: (
                            slots[i][0] < value.row_bytes,
                            abs(slots[i][0] - value.row_bytes),
                        ),
                    )
                    free.remove(value.slot)
                    row_bytes, count = slots[value.slot]
                    slots[value.slot] = (max(row_bytes, value.row_bytes), count)
                else:
                    value.slot = len(slots)
                    slots.append((value.row_bytes, value.count))
                in_use.append(value)
            free += [value.slot for value in in_use if value.last_use <= now]
            in_use = [value for value in in_use if value.last_use > now]
        return slots


def _word(value: float | int, kind: str) -> int:
    """An argument as the program holds it: a number, or the bits of a float32."""
    if kind == "real":
        return int.from_bytes(struct.pack("<f", value), "little")
    return int(value)


class RecordedStep:
    """A step that runs natively from its second call on."""

    def __init__(self, backend: CpuBackend, step: StepFn) -> None:
        """Record `step` on its first call."""
        self._backend = backend
        self._step = step
        self._program: Any = None
        self._is_recordable = True
        self._weights: Weights | None = None
        self._kv: KV = None
        self._logits = torch.empty(0)

    def __call__(self, weights: Weights, kv: KV, inputs: StepInputs) -> tuple[KV, SampleOutput]:
        """Run the step; the result equals that of the recorded function bit for bit."""
        if not self._is_recordable or inputs.previous_ids is not None or inputs.num_states:
            return self._step(weights, kv, inputs)
        if self._program is None or weights is not self._weights or kv is not self._kv:
            return self._record(weights, kv, inputs)
        logits = self._replay(inputs)
        return kv, self._backend.sample(logits, inputs.sample)

    def profile(self, is_on: bool) -> None:
        """Turn measuring of native time on or off."""
        self._program.profile = is_on

    def take_seconds(self) -> dict[str, float]:
        """Seconds per kernel since the last call; of these, "waiting" for threads."""
        return dict(self._program.take_seconds())

    def _record(self, weights: Weights, kv: KV, inputs: StepInputs) -> tuple[KV, SampleOutput]:
        if len(inputs.token_ids) < 2 or len(inputs.meta.logits_rows) == 0:
            # torch does not report the row stride of a single row
            return self._step(weights, kv, inputs)
        try:
            with self._backend.recording(inputs) as recorder:
                kv, out = self._step(weights, kv, inputs)
            self._program = recorder.program()
            self._logits = torch.empty((0, recorder.vocab_size))
            if not recorder.is_proven_by(self._replay(inputs)):
                raise NotRecordable("something in it changes the results of kernels")
        except NotRecordable as reason:
            logger.warning("the step runs call by call, not as one native program: %s", reason)
            self._program = None
            self._is_recordable = False
            return self._step(weights, kv, inputs)
        self._weights, self._kv = weights, kv
        return kv, out

    def _replay(self, inputs: StepInputs) -> torch.Tensor:
        """Run the program: float32 [R, V], valid until the next step."""
        meta = inputs.meta
        num_rows = len(meta.logits_rows)
        if num_rows > len(self._logits):
            self._logits = torch.empty((num_rows, self._logits.shape[1]))
        words = [tensor.data_ptr() for tensor, _ in _row_inputs(inputs)]
        words += (
            meta.block_table.data_ptr(),
            meta.block_table.shape[1],
            self._logits.data_ptr(),
        )
        for plan in meta.plan.values():
            words += plan.arguments.values()
        self._program.run(words, [len(inputs.token_ids), num_rows])
        return self._logits[:num_rows]
