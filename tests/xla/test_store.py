"""Traced programs are read from disk by later starts, and only if everything matches."""

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
    """A program that adds two and records each time it is traced."""

    def add_two(x: Any) -> Any:
        traces.append("traced")
        return x + 2

    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = jax.ShapeDtypeStruct((size,), jnp.float32, sharding=sharding)
    return Source(function=add_two, arguments=(shape,), results=sharding)


def run_traced(source: Source, traced: Any) -> list[float]:
    compiled = source.lower(traced).compile()
    return np.asarray(compiled(jnp.zeros(*source.arguments[0].shape))).tolist()


@pytest.fixture
def traces() -> list[str]:
    return []


@pytest.fixture
def stored(tmp_path: Path, traces: list[str]) -> Store:
    """A store that contains the program."""
    store = Store(tmp_path)
    store.traced(source_of(traces), "two")
    traces.clear()
    return store


def test_a_stored_program_is_not_traced_again_and_computes_the_same(
    stored: Store, traces: list[str]
) -> None:
    source = source_of(traces)

    traced = stored.traced(source, "two")

    assert run_traced(source, traced) == [2.0] * 4
    assert traces == []


def truncate(data: bytes) -> bytes:
    return data[:-7]


def flip_a_bit(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


@pytest.mark.parametrize(
    "damage",
    [truncate, flip_a_bit, lambda _: b"", lambda data: data[64:]],
    ids=["truncated", "one bit", "empty", "no header"],
)
def test_a_damaged_file_is_traced_again_and_replaced(
    damage: Callable[[bytes], bytes], stored: Store, traces: list[str], tmp_path: Path
) -> None:
    [file] = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    source = source_of(traces)

    assert run_traced(source, stored.traced(source, "two")) == [2.0] * 4
    assert traces == ["traced"]

    stored.traced(source, "two")
    assert traces == ["traced"]


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("name", ["environment", "code"])
def test_a_program_of_another_version_is_traced_again_and_replaced(
    name: str, traces: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = "other" if name == "environment" else b"other"
    monkeypatch.setattr(store, name, lambda: other)

    Store(tmp_path).traced(source_of(traces), "two")

    assert traces == ["traced"]
    assert len(list(tmp_path.iterdir())) == 1


def test_other_sizes_and_other_names_are_other_programs(stored: Store, traces: list[str]) -> None:
    assert stored.traced(source_of(traces, size=8), "two").in_avals[0].shape == (8,)
    stored.traced(source_of(traces), "another")

    assert traces == ["traced"] * 2


def test_an_unwritable_folder_only_causes_a_warning(
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
        ask(engine, "sampled", [9] * 40, temperature=1.0, top_p=0.9, logprobs=2)
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
    # a setting that is not visible in the weights is part of the key
    with pytest.raises(AssertionError, match="was traced"):
        answers(tmp_path, hf_overrides={"rms_norm_eps": 0.5})


def test_the_key_covers_the_code_of_models_and_backend() -> None:
    files = {"/".join(path.parts[-3:]) for path in store._files()}

    assert {
        "portalm/models/decoder.py",
        "portalm/backend/protocol.py",
        "backends/xla/graph.py",
    } <= {file.replace("portalm_backends", "backends") for file in files}
