"""A change to a GGUF file is refused or has an effect; it is never ignored in silence.

Transformers is no oracle here, because it reads GGUF differently. So each changed file is compared
with the unchanged one: what the model computes (settings, rotary tables, weights) must differ, or
loading must fail; neutral changes must leave all of it equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from portalm.errors import ModelError
from portalm.models.loader import gguf_config
from portalm.models.loader.gguf import GGUFCheckpoint
from portalm.models.registry import model_class
from portalm_backends.reference.backend import ReferenceBackend
from tests.models.test_gguf_families import (
    FILES,
    KNOWN,
    File,
    convert,
    rotations_of,
    shape_of,
    tensors_in,
)

SETTINGS: dict[str, Any] = {
    "attention.clamp_kqv": 0.5,
    "attention.key_length_swa": 8,
    "attention.max_alibi_bias": 8.0,
    "attention.scale": 0.37,
    "attention.sliding_window": 7,
    "attention.temperature_length": 8,
    "attn_logit_softcapping": 5.0,
    "embedding_scale": 3.0,
    "expert_gating_func": 2,
    "expert_weights_scale": 0.37,
    "final_logit_softcapping": 5.0,
    "logit_scale": 0.37,
    "nextn_predict_layers": 1,
    "residual_scale": 0.37,
    "rope.dimension_count": 6,
    "rope.freq_base": 777.0,
    "rope.freq_base_swa": 777.0,
    "rope.scaling.alpha": 50.0,
    "rope.scaling.factor": 3.0,
    "swiglu_clamp_exp": 2.0,
    "unheard_of": 1,
}
"""Keys without the architecture, with values that no test file has."""

NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "attn_logit_softcapping": 0.0,
    "rope.scaling.finetuned": True,
    "tensor_data_layout": "reference",
    "unheard_of": 0,
}


@dataclass(frozen=True)
class Content:
    """A GGUF file's metadata and tensors."""

    fields: list[tuple[str, Any, gguf.GGUFValueType, gguf.GGUFValueType | None]]
    tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]

    @classmethod
    def read(cls, path: Path) -> Content:
        reader = gguf.GGUFReader(path)
        fields = [
            (f.name, f.contents(), f.types[0], f.types[1] if len(f.types) > 1 else None)
            for f in reader.fields.values()
            if not f.name.startswith("GGUF.")
        ]
        tensors = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
        return cls(fields, tensors)

    @property
    def architecture(self) -> str:
        return next(value for name, value, *_ in self.fields if name == "general.architecture")

    def write(
        self,
        path: Path,
        values: dict[str, Any] | None = None,
        tensors: dict[str, np.ndarray] | None = None,
    ) -> Path:
        """Write the content with other values and tensors instead or in addition."""
        writer = gguf.GGUFWriter(str(path), self.architecture)
        changed = {f"{self.architecture}.{k}": v for k, v in (values or {}).items()}
        for name, value, kind, inner in self.fields:
            if name not in changed and name != "general.architecture":
                writer.add_key_value(name, value, kind, inner)
        for name, value in changed.items():
            kind = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}[type(value)]
            writer.add_key_value(name, value, gguf.GGUFValueType[kind])
        for name, (data, kind) in self.tensors.items():
            if name not in (tensors or {}):
                writer.add_tensor(name, data, raw_dtype=kind)
        for name, data in (tensors or {}).items():
            writer.add_tensor(name, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def computed(path: Path) -> tuple[str, list[torch.Tensor], list[torch.Tensor]] | str:
    """What the model computes, or the error that refuses the file."""
    try:
        checkpoint = GGUFCheckpoint(path, {})
        config = checkpoint.config
        model = model_class(config.architecture)(config, "float32")
        weights = model.load(checkpoint, ReferenceBackend())
    except ModelError as error:
        return str(error)
    layers = {name: part for name, part in weights.items() if name != "ropes"}
    settings = shape_of(config) + "".join(map(str, numbers_in(layers)))
    return settings, rotations_of(config), list(tensors_in(layers))


def numbers_in(value: Any) -> Iterator[Any]:
    """Every number, text and None within dicts, lists, tuples and dataclasses, in their order."""
    if isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(part)
    elif is_dataclass(value):
        for part in fields(value):
            yield from numbers_in(getattr(value, part.name))
    elif not isinstance(value, torch.Tensor):
        yield value


def is_same(one: Any, other: Any) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    tables = [*zip(one[1], other[1], strict=True), *zip(one[2], other[2], strict=True)]
    return one[0] == other[0] and all(a.shape == b.shape and torch.equal(a, b) for a, b in tables)


ALWAYS = ("deepseek2", "gemma3", "granite", "llama", "phi3", "stablelm")
"""Files that the fast tests change, too."""


def cases() -> Iterator[Any]:
    for file in {file.name: file for file in reversed(KNOWN + FILES)}.values():
        marks = () if file.name in ALWAYS else pytest.mark.slow
        yield pytest.param(file, marks=marks, id=file.name)


@pytest.fixture(params=list(cases()))
def content(request: pytest.FixtureRequest, tmp_path: Path) -> Content:
    _, path = convert(tmp_path, request.param, request.param.make())
    return Content.read(path)


def test_a_setting_is_refused_or_has_an_effect(content: Content, tmp_path: Path) -> None:
    right = computed(content.write(tmp_path / "same.gguf"))
    assert not isinstance(right, str), right

    ignored = [
        key
        for key, value in SETTINGS.items()
        if is_same(computed(content.write(tmp_path / "a.gguf", {key: value})), right)
        and not _has_no_such_part(content, key)
    ]

    assert ignored == []


def _has_no_such_part(content: Content, key: str) -> bool:
    """True for rotary settings of a model without a rotary embedding."""
    return content.architecture == "gpt2" and key.startswith("rope.")


def test_a_neutral_change_has_no_effect(content: Content, tmp_path: Path) -> None:
    right = computed(content.write(tmp_path / "same.gguf"))

    for key, value in NEUTRAL.items():
        if any(name == f"{content.architecture}.{key}" for name, *_ in content.fields):
            continue
        found = computed(content.write(tmp_path / "a.gguf", {key: value}))
        assert is_same(found, right), (key, found if isinstance(found, str) else "differs")


def test_a_tensor_that_is_added_renamed_or_missing_is_refused(
    content: Content, tmp_path: Path
) -> None:
    size = next(value for name, value, *_ in content.fields if name.endswith("embedding_length"))
    ones = np.ones(size, np.float32)
    added = {
        "blk.0.attn_sub_norm.weight": ones,
        "blk.0.attn_norm.extra": ones,
        "blk.9.attn_norm.weight": ones,
        "token_types.weight": ones,
        "output_norm.scale": ones,
    }
    for name, data in added.items():
        found = computed(content.write(tmp_path / "a.gguf", tensors={name: data}))
        assert isinstance(found, str) and "that the model does not use" in found, name

    for name in content.tensors:
        if name.startswith("rope_"):
            continue
        left = {k: v for k, v in content.tensors.items() if k != name}
        path = Content(content.fields, left).write(tmp_path / "a.gguf")
        if name == "output.weight" or name.endswith(".bias"):
            continue  # another valid model: a tied head, or no bias
        assert isinstance(computed(path), str), name


def test_the_sweep_finds_a_setting_that_nothing_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = File("llama", "mixtral")
    _, path = convert(tmp_path, file, file.make())
    content = Content.read(path)
    monkeypatch.setattr(gguf_config.Metadata, "check_all_read", lambda self, architecture: None)

    with pytest.raises(AssertionError, match=r"attention\.clamp_kqv"):
        test_a_setting_is_refused_or_has_an_effect(content, tmp_path)
