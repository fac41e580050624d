"""One native call a step: recorded while the step runs once, then replayed (csrc_cpu/program.h).

What is recorded are the calls into the native module. Each argument is an address or a size that is
the same in every step (weights, cache, widths), or follows the step: an address in its inputs or in
the result of an earlier call, or a number of rows. In between torch may only make views: what else
it computes would be missing from the program. Then a kernel reads what no kernel wrote, or the
program, which is run once for proof, comes to other logits; such a step is not recorded.
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

# What an argument of a kernel is.
_FIXED = "fixed"  # the same in every step
_IN = "in"  # an address in the step's inputs or in an earlier result, or 0
_TABLE = "table"  # the same, or (then fixed) an address in the weights
_OUT = "out"  # address of a result
_ROWS = "rows"  # as many as the last address before it has
_SOURCE_ROWS = "source_rows"  # as many as the first address has
_PLAN = ("items_ptr", "num_items", "partials_ptr", "counters_ptr")  # fields of AttentionPlan

_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "linear": (_IN, _FIXED, _ROWS, *[_FIXED] * 6, _OUT, _FIXED, _FIXED),
    "rms_norm": (_IN, _IN, _FIXED, _OUT, _OUT, _FIXED, _ROWS, *[_FIXED] * 4),
    "silu_mul": (_IN, _OUT, _FIXED, _ROWS, _FIXED, _FIXED),
    "take_rows": (_TABLE, _IN, _OUT, _ROWS, _SOURCE_ROWS, _FIXED, _FIXED),
    "rope": (_IN, _IN, _OUT, _OUT, _IN, _FIXED, _FIXED, _ROWS, *[_FIXED] * 7),
    "kv_write": (*[_FIXED] * 7, _IN, _IN, _FIXED, _ROWS, _FIXED, _FIXED, _IN),
    "attention": (_IN, _OUT, *[_FIXED] * 11, _IN, "max_blocks", *_PLAN, *[_FIXED] * 5),
}
"""In the order of csrc_cpu/bindings.cpp."""

_INPUT, _SLOT, _COUNT = 0, 1, 2  # PatchKind in csrc_cpu/program.h
_TOKENS, _LOGITS_ROWS = 0, 1  # counts of rows: T and R
_BLOCK_TABLE, _MAX_BLOCKS, _LOGITS, _FIRST_PLAN = 4, 5, 6, 7  # inputs; 0 to 3 are of _row_inputs


def _row_inputs(inputs: StepInputs) -> tuple[tuple[torch.Tensor, int], ...]:
    """The inputs that have a number a row, and which count of rows that is."""
    meta = inputs.meta
    return (
        (inputs.token_ids, _TOKENS),
        (meta.positions, _TOKENS),
        (meta.slot_mapping, _TOKENS),
        (meta.logits_rows, _LOGITS_ROWS),
    )


@dataclass(slots=True, eq=False)
class _Value:
    """Memory whose address follows the step: an input, or the result of a call."""

    start: int
    end: int
    count: int
    row_bytes: int
    input: int | None = None
    last_use: int = 0
    slot: int = -1


@dataclass(slots=True, eq=False)
class _Call:
    kernel: str
    arguments: list[Any]
    uses: list[tuple[int, _Value, int]] = field(default_factory=list)
    """(argument, value, offset in bytes)"""
    numbers: list[tuple[int, int, int]] = field(default_factory=list)
    """(argument, _INPUT or _COUNT, index)"""
    results: list[_Value] = field(default_factory=list)


class NotRecordable(Exception):
    """The step does something that a program cannot repeat."""


class Recorder:
    """Stands in for the native module while a step runs once, and writes down its calls."""

    def __init__(self, native: Any, inputs: StepInputs) -> None:
        """Record the calls into `native` of the step over `inputs`."""
        self.logits: _Value | None = None
        self.vocab_size = 0
        self._expected = torch.empty(0)
        self._native = native
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
        """Memory for a kernel's result: its address must not be given out twice."""
        self._alive[result.data_ptr()] = result

    def __getattr__(self, name: str) -> Any:
        """The native function of this name, recorded if it is a kernel of the step."""
        function = getattr(self._native, name)
        if name not in _ARGUMENTS:
            return function

        def call(*arguments: Any) -> None:
            function(*arguments)
            if self.logits is None:
                self._record(name, arguments)

        return call

    def end(self, logits: torch.Tensor) -> None:
        """The step has come to its logits [R, V]: what follows is not recorded."""
        value = self._find(logits.data_ptr())
        if value is None or value.input is not None or value.start != logits.data_ptr():
            raise NotRecordable("its logits are not what a kernel wrote")
        self.logits = value
        self.vocab_size = logits.shape[1]
        self._expected = logits.clone()
        value.input = _LOGITS

    def is_proven_by(self, logits: torch.Tensor) -> bool:
        """Whether these, [R, V] of the program, are the logits that the step came to."""
        return logits.numpy().tobytes() == self._expected.numpy().tobytes()

    # -- writing down -------------------------------------------------------------------------

    def _record(self, kernel: str, arguments: tuple[Any, ...]) -> None:
        roles = _ARGUMENTS[kernel]
        call = _Call(kernel, list(arguments))
        now = len(self._calls)
        last: _Value | None = None  # that an address before lies in
        for i, (role, argument) in enumerate(zip(roles, arguments, strict=True)):
            if role in (_IN, _TABLE) and argument:
                value = self._find(argument)
                if value is not None:
                    self._use(call, i, value, argument - value.start, now)
                    last = last if value is self._table else value
                elif role == _IN:
                    raise NotRecordable(
                        f"{kernel} reads what no kernel of the step wrote: an operation before "
                        f"it has none"
                    )
            elif role == _ROWS:
                call.numbers.append((i, _COUNT, self._count(kernel, last)))
            elif role == _SOURCE_ROWS:
                source = self._find(arguments[0])
                if source is not None:
                    call.numbers.append((i, _COUNT, source.count))
            elif role == "max_blocks":
                call.numbers.append((i, _INPUT, _MAX_BLOCKS))
            elif role in _PLAN:
                first = _FIRST_PLAN + self._plan(arguments[roles.index(_PLAN[0])]) * len(_PLAN)
                call.numbers.append((i, _INPUT, first + _PLAN.index(role)))
        for i, role in enumerate(roles):
            if role == _OUT and arguments[i]:
                self._add_result(call, i, self._count(kernel, last), now)
        self._calls.append(call)

    def _use(self, call: _Call, argument: int, value: _Value, offset: int, now: int) -> None:
        if offset >= value.row_bytes:
            raise NotRecordable(f"{call.kernel} begins at a row that is not the first")
        value.last_use = now
        call.uses.append((argument, value, offset))

    def _add_result(self, call: _Call, argument: int, count: int, now: int) -> None:
        tensor = self._alive.get(call.arguments[argument])
        if tensor is None:
            raise NotRecordable(f"{call.kernel} writes to what was not allocated in the step")
        value = self._add_value(tensor, count, math.prod(tensor.shape[1:]) * tensor.element_size())
        value.last_use = now
        call.results.append(value)
        call.uses.append((argument, value, 0))

    @staticmethod
    def _count(kernel: str, value: _Value | None) -> int:
        if value is None:
            raise NotRecordable(f"{kernel} computes nothing that follows from the step")
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

    def _plan(self, items: int) -> int:
        for i, plan in enumerate(self._plans):
            if plan.items_ptr == items:
                return i
        raise NotRecordable("attention over items that prepare did not make")

    # -- the program --------------------------------------------------------------------------

    def program(self) -> Any:
        """What was recorded, as a native program."""
        if self.logits is None:
            raise NotRecordable("it draws nothing")
        program = self._native.Program()
        for row_bytes, count in self._give_out_slots():
            program.add_slot(row_bytes, count)
        for call in self._calls:
            patches = [(i, kind, index, 0) for i, kind, index in call.numbers]
            for i, value, offset in call.uses:
                if value.input is None:
                    patches.append((i, _SLOT, value.slot, offset))
                else:
                    patches.append((i, _INPUT, value.input, offset))
            program.add_call(call.kernel, [_bits(x) for x in call.arguments], patches)
        return program

    def _give_out_slots(self) -> list[tuple[int, int]]:
        """A slot for each result, used again when nobody needs it: (bytes a row, count) each."""
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


def _bits(x: float | int) -> int:
    """An argument as the program holds it: a float32 by its bits."""
    if isinstance(x, float):
        return int.from_bytes(struct.pack("<f", x), "little")
    return int(x)


class RecordedStep:
    """A step that runs natively from its second time on."""

    def __init__(self, backend: CpuBackend, step: StepFn) -> None:
        """Record `step` when it is first called."""
        self._backend = backend
        self._step = step
        self._program: Any = None
        self._is_recordable = True
        self._weights: Weights | None = None
        self._kv: KV = None
        self._logits = torch.empty(0)

    def __call__(self, weights: Weights, kv: KV, inputs: StepInputs) -> tuple[KV, SampleOutput]:
        """As the step itself, with the same result bit for bit."""
        if not self._is_recordable or inputs.previous_ids is not None or inputs.num_states:
            return self._step(weights, kv, inputs)
        if self._program is None or weights is not self._weights or kv is not self._kv:
            return self._record(weights, kv, inputs)
        logits = self._replay(inputs)
        return kv, self._backend.sample(logits, inputs.sample)

    def profile(self, is_on: bool) -> None:
        """Measure from now on where native time goes."""
        self._program.profile = is_on

    def take_seconds(self) -> dict[str, float]:
        """Seconds by kernel since the last call, and of waiting among them."""
        return dict(self._program.take_seconds())

    def _record(self, weights: Weights, kv: KV, inputs: StepInputs) -> tuple[KV, SampleOutput]:
        if len(inputs.token_ids) < 2 or len(inputs.meta.logits_rows) == 0:
            # of a single row torch does not tell how far apart rows lie
            return self._step(weights, kv, inputs)
        try:
            with self._backend.recording(inputs) as recorder:
                kv, out = self._step(weights, kv, inputs)
            self._program = recorder.program()
            self._logits = torch.empty((0, recorder.vocab_size))
            if not recorder.is_proven_by(self._replay(inputs)):
                raise NotRecordable("something in it changes what kernels wrote")
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
        addresses = [tensor.data_ptr() for tensor, _ in _row_inputs(inputs)]
        addresses += (
            meta.block_table.data_ptr(),
            meta.block_table.shape[1],
            self._logits.data_ptr(),
        )
        for plan in meta.plan.values():
            addresses += (getattr(plan, name) for name in _PLAN)
        self._program.run(addresses, [len(inputs.token_ids), num_rows])
        return self._logits[:num_rows]
