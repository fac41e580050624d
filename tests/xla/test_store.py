"""What one start traced no later one traces again; nothing else is ever taken for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from portalm.models.decoder import Decoder
from portalm_backends.xla import store
from portalm_backends.xla.backend import XlaBackend
from portalm_backends.xla.store import Source, Store
from tests.tiny import ask, make_engine, run, tokens


def source_of(traces: list[str], *, size: int = 4) -> Source:
    """A program that adds two, and writes down when it is traced."""

    def add_two(x: Any) -> Any:
        traces.append("traced")
        return x + 2

    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = jax.ShapeDtypeStruct((size,), jnp.float32, sharding=place)
    return Source(function=add_two, arguments=(shape,), results=place)


def run_traced(source: Source, traced: Any) -> list[float]:
    compiled = source.lower(traced).compile()
    return np.asarray(compiled(jnp.zeros(*source.arguments[0].shape))).tolist()


@pytest.fixture
def traces() -> list[str]:
    return []


@pytest.fixture
def kept(tmp_path: Path, traces: list[str]) -> Store:
    """A store that has the program."""
    kept = Store(tmp_path)
    kept.traced(source_of(traces), "two")
    traces.clear()
    return kept


def test_what_was_kept_is_not_traced_and_computes_the_same(kept: Store, traces: list[str]) -> None:
    source = source_of(traces)

    traced = kept.traced(source, "two")

    assert run_traced(source, traced) == [2.0] * 4
    assert traces == []


def cut(data: bytes) -> bytes:
    return data[:-7]


def flip(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


@pytest.mark.parametrize(
    "damage",
    [cut, flip, lambda _: b"", lambda data: data[64:]],
    ids=["cut", "a bit", "empty", "no head"],
)
def test_a_damaged_file_is_traced_anew_and_replaced(
    damage: Callable[[bytes], bytes], kept: Store, traces: list[str], tmp_path: Path
) -> None:
    [file] = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    source = source_of(traces)

    assert run_traced(source, kept.traced(source, "two")) == [2.0] * 4
    assert traces == ["traced"]

    kept.traced(source, "two")
    assert traces == ["traced"]


@pytest.mark.parametrize("name", ["surroundings", "code"])
def test_what_other_versions_or_other_code_traced_is_traced_anew_and_replaced(
    name: str, kept: Store, traces: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = "other" if name == "surroundings" else b"other"
    monkeypatch.setattr(store, name, lambda: other)

    Store(tmp_path).traced(source_of(traces), "two")

    assert traces == ["traced"]
    assert len(list(tmp_path.iterdir())) == 1


def test_other_sizes_and_other_names_are_other_programs(kept: Store, traces: list[str]) -> None:
    assert kept.traced(source_of(traces, size=8), "two").in_avals[0].shape == (8,)
    kept.traced(source_of(traces), "another")

    assert traces == ["traced"] * 2


def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, traces: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    source = source_of(traces)

    traced = Store(tmp_path / "file").traced(source, "two")

    assert run_traced(source, traced) == [2.0] * 4
    assert "will trace its steps again" in caplog.text


def answers(folder: Path, **settings: Any) -> dict[str, list[int]]:
    engine = make_engine(folder, XlaBackend(), **settings)
    try:
        ask(engine, "greedy", [5, 6, 7])
        ask(engine, "drawn", [9] * 40, temperature=1.0, top_p=0.9, logprobs=2)
        return tokens(run(engine))
    finally:
        engine.close()


def test_a_second_start_traces_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTALM_CACHE_DIR", str(tmp_path / "cache"))
    first = answers(tmp_path)

    def forward(*_: object) -> None:
        raise AssertionError("a step was traced")

    monkeypatch.setattr(Decoder, "forward", forward)

    assert answers(tmp_path) == first
    with pytest.raises(AssertionError, match="was traced"):  # what nobody's weights would show
        answers(tmp_path, hf_overrides={"rms_norm_eps": 0.5})
