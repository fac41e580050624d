"""Instruction sets of the installed native module and of the one for tests."""

from __future__ import annotations

import pytest

from tests.unit import cpu_isas


def test_emulated_instruction_sets_are_in_the_module_for_tests_only():
    assert not set(cpu_isas.installed().isas()) & set(cpu_isas.EMULATED_ISAS)
    if "avx2" in cpu_isas.installed().isas():
        assert set(cpu_isas.emulated().isas()) == set(cpu_isas.EMULATED_ISAS)


def test_unknown_instruction_set_is_refused_with_those_that_can_run():
    native = cpu_isas.installed()

    with pytest.raises(ValueError, match=rf"cannot run .* 'none'; it can run: {native.isas()[0]}"):
        native.set_isa("none")
