"""The list of kernel arguments (csrc_cpu/arguments.h) as Python and recorded programs see it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import portalm_backends
from portalm.backend import AttentionSpec, KVSpec, StepMeta
from portalm_backends.cpu import cache
from portalm_backends.cpu.attention import plan_attention
from portalm_backends.cpu.backend import CpuBackend
from portalm_backends.cpu.program import _word
from portalm_backends.cpu.weights import EXACT_FORMATS, ROUNDED_FORMATS
from tests.unit import cpu_isas

native = cpu_isas.installed()

SILU_MUL = {"dtype": native.DTYPES["float32"], "rows": 1, "columns": 2, "stride": 4}


def silu_mul(**changes: Any) -> torch.Tensor:
    gate_up, out = torch.ones(1, 4), torch.zeros(1, 2)
    addresses = {"gate_up": gate_up.data_ptr(), "out": out.data_ptr()}
    native.silu_mul(**(addresses | SILU_MUL | changes))
    return out


def test_kernel_takes_its_arguments_by_name():
    torch.testing.assert_close(silu_mul(), torch.full((1, 2), 0.7310586))


def test_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="silu_mul"):
        silu_mul(width=2)


def test_missing_argument_is_refused():
    given = {"gate_up": 0, "out": 0} | SILU_MUL
    for name in given:
        with pytest.raises(TypeError, match="silu_mul"):
            native.silu_mul(**{key: value for key, value in given.items() if key != name})


def test_arguments_by_position_are_refused():
    with pytest.raises(TypeError, match="silu_mul"):
        native.silu_mul(0, 0, *SILU_MUL.values())


def test_list_names_each_argument_once_with_a_known_role_and_kind():
    roles = {"fixed", "input", "table", "output", "rows", "source_rows", "max_blocks", "plan"}
    for kernel, arguments in native.ARGUMENTS.items():
        names = [name for name, _, _ in arguments]
        assert len(set(names)) == len(names), kernel
        used = {role for _, role, _ in arguments}
        assert used == {"none"} or used <= roles, kernel
        assert {kind for _, _, kind in arguments} <= {"address", "number", "real", "flag"}, kernel


@pytest.mark.parametrize("extra", [-1, 1], ids=["too few", "too many"])
def test_program_refuses_a_call_with_the_wrong_number_of_arguments(extra):
    count = len(native.ARGUMENTS["silu_mul"])

    with pytest.raises(ValueError, match=f"silu_mul takes {count} arguments; got {count + extra}"):
        native.Program().add_call("silu_mul", [0] * (count + extra), [])


@pytest.mark.parametrize("kernel", ["moe", "nothing"])
def test_program_refuses_a_kernel_that_is_not_recorded(kernel):
    with pytest.raises(ValueError, match=f"a program cannot call a kernel {kernel}"):
        native.Program().add_call(kernel, [], [])


def test_real_argument_is_recorded_as_float32_bits_even_if_it_is_an_int():
    assert _word(1, "real") == _word(1.0, "real") == 0x3F800000


def test_every_format_and_dtype_is_one_of_the_native_module():
    assert {*EXACT_FORMATS.values(), *ROUNDED_FORMATS.values()} <= set(native.FORMATS)
    assert {*cache.DTYPES, "blocks"} <= set(native.FORMATS)
    assert set(native.DTYPES) == cache.KV_DTYPES


class StandIn:
    """The native module with other numbers; it records the arguments of calls."""

    DTYPES = {name: 100 + number for name, number in native.DTYPES.items()}  # noqa: RUF012
    FORMATS = {name: 200 + number for name, number in native.FORMATS.items()}  # noqa: RUF012

    def __init__(self) -> None:
        self.calls: list[SimpleNamespace] = []

    def packed_bytes(self, format: int, n: int, k: int) -> int:
        return native.packed_bytes(format - 200, n, k)

    def __getattr__(self, name: str) -> Any:
        if name not in native.ARGUMENTS:
            return getattr(native, name)
        return lambda **arguments: self.calls.append(SimpleNamespace(name=name, **arguments))


def test_numbers_of_dtypes_and_formats_come_from_the_native_module():
    with mock.patch.object(portalm_backends, "_cpu", StandIn()) as stand_in:
        backend = CpuBackend()
    weight = torch.zeros(4, 32, dtype=torch.bfloat16)

    backend.linear(torch.zeros(1, 32), backend.pack(weight))
    backend.pack(weight, for_logits=True)
    backend.pack(weight, quantization="int8")
    kv = backend.kv_alloc(
        KVSpec(num_layers=1, num_kv_heads=1, head_size=16, block_size=16, dtype="int8"), 2
    )

    packs = [call for call in stand_in.calls if call.name == "pack"]
    [linear] = [call for call in stand_in.calls if call.name == "linear"]
    assert [call.format - 200 for call in packs] == [
        native.FORMATS[name] for name in ("blocks", "bfloat16", "q8")
    ]
    assert {call.dtype - 100 for call in packs} == {native.DTYPES["bfloat16"]}
    assert (linear.x_dtype, linear.out_dtype, linear.format) == (100, 100, packs[0].format)
    assert kv.shape["cache_dtype"] - 100 == native.DTYPES["int8"]


def test_columns_and_splits_of_attention_items_come_from_the_native_module():
    loc, lens = np.array([0, 1], np.int32), np.array([300], np.int32)
    meta = StepMeta(
        positions=torch.tensor([299]),
        slot_mapping=torch.zeros(1),
        query_start_loc=torch.from_numpy(loc),
        seq_lens=torch.from_numpy(lens),
        block_table=torch.zeros(1, 19),
        logits_rows=torch.zeros(1),
        host_query_start_loc=loc,
        host_seq_lens=lens,
        num_decodes=1,
        max_query_len=1,
        max_seq_len=300,
    )
    columns = dict(zip(native.ITEM_COLUMNS, reversed(range(len(native.ITEM_COLUMNS))), strict=True))
    stand_in = SimpleNamespace(
        ITEM_COLUMNS=columns,
        SPLIT_TOKENS=128,
        num_threads=lambda: 4,
        partial_floats=native.partial_floats,
    )

    spec = AttentionSpec(num_heads=2, num_kv_heads=1, head_size=16, scale=1.0)

    plan = plan_attention(meta, spec, stand_in)

    spans = plan.items[:, [columns["begin"], columns["end"]]]
    assert sorted(map(tuple, spans.tolist())) == [(0, 128), (128, 256), (256, 300)]
    assert set(plan.items[:, columns["partial"]]) == {0, 1, 2}
