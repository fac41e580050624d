"""No change of a checkpoint changes its answers silently.

Each change of a good checkpoint is either refused, or gives the tokens of the weights that the
format's specification defines for the changed files (`stored_weights`). A neutral change must give
the tokens of the unchanged checkpoint. Faults planted in the loader are found by the same changes.
"""

from __future__ import annotations

import copy
import functools
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from portalm.errors import PortaLMError
from portalm.models import decoder
from portalm.models.loader import checkpoint
from portalm.quant import fp8
from portalm.quant.gptq import GPTQ
from portalm.quant.scheme import LayerParts, scaled_by_blocks
from tests.models import test_families, test_quantized_checkpoints
from tests.models.stored_weights import decode
from tests.models.test_bert import engine_of as encoder_of
from tests.models.test_bert import make as make_encoder
from tests.models.test_families import engine_of
from tests.models.test_quantized_checkpoints import LAYERS, answers, save

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


@dataclass
class Files:
    """A checkpoint's tensors and config.json."""

    tensors: Tensors
    config: Config

    @classmethod
    def of(cls, folder: Path) -> Files:
        config = json.loads((folder / "config.json").read_text())
        return cls(load_file(folder / "model.safetensors"), config)

    def write(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        tensors = {name: tensor.contiguous().clone() for name, tensor in self.tensors.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    def copy(self) -> Files:
        return Files(dict(self.tensors), copy.deepcopy(self.config))


# -- families ---------------------------------------------------------------------------------


def a_matrix(files: Files, rng: random.Random) -> str:
    """Choose a matrix of a layer."""
    layers = [n for n in sorted(files.tensors) if re.search(r"\.\d+\.", n)]
    return rng.choice([name for name in layers if files.tensors[name].ndim == 2])


def extra_norm(files: Files, rng: random.Random) -> None:
    stem = a_matrix(files, rng).rsplit(".", 2)[0]
    files.tensors[f"{stem}.further_norm.weight"] = torch.ones(16)


def extra_bias(files: Files, rng: random.Random) -> None:
    names = [n for n in sorted(files.tensors) if n.endswith(".weight") and "norm" not in n]
    name = rng.choice([n for n in names if n[:-6] + "bias" not in files.tensors])
    files.tensors[name[:-6] + "bias"] = torch.ones(files.tensors[name].shape[0])


def extra_scale(files: Files, rng: random.Random) -> None:
    files.tensors[f"{a_matrix(files, rng)}_scale"] = torch.tensor(0.5)


def extra_layer(files: Files, rng: random.Random) -> None:
    name = a_matrix(files, rng)
    parts = [part if not part.isdigit() else "77" for part in name.split(".")]
    files.tensors[".".join(parts)] = files.tensors[name]


def missing(files: Files, rng: random.Random) -> None:
    del files.tensors[rng.choice(sorted(files.tensors))]


def renamed(files: Files, rng: random.Random) -> None:
    name = rng.choice(sorted(files.tensors))
    files.tensors[f"{name}_2"] = files.tensors.pop(name)


def cut(files: Files, rng: random.Random) -> None:
    name = a_matrix(files, rng)
    files.tensors[name] = files.tensors[name][:-1]


def codes(dtype: torch.dtype) -> Callable[[Files, random.Random], None]:
    def change(files: Files, rng: random.Random) -> None:
        name = a_matrix(files, rng)
        files.tensors[name] = (files.tensors[name] * 20).to(dtype)

    return change


def scheme_of_another(files: Files, rng: random.Random) -> None:
    method = rng.choice(["awq", "gptq", "fp8", "bitsandbytes"])
    files.config["quantization_config"] = {"quant_method": method}


def harmless_scale(files: Files, rng: random.Random) -> None:
    files.tensors[f"{a_matrix(files, rng).rpartition('.')[0]}.k_scale"] = torch.tensor(0.5)


def rotary_table(files: Files, rng: random.Random) -> None:
    stem = a_matrix(files, rng).rsplit(".", 2)[0]
    files.tensors[f"{stem}.rotary_emb.inv_freq"] = torch.ones(8)


REFUSED: dict[str, Callable[[Files, random.Random], None]] = {
    "a further norm": extra_norm,
    "a further bias": extra_bias,
    "a further scale": extra_scale,
    "a further layer": extra_layer,
    "a missing tensor": missing,
    "a renamed tensor": renamed,
    "a cut matrix": cut,
    "8-bit floats": codes(torch.float8_e4m3fn),
    "8-bit integers": codes(torch.int8),
    "bytes": codes(torch.uint8),
}
NEUTRAL = {
    "settings without quantized weights": scheme_of_another,
    "a scale of the KV cache": harmless_scale,
    "a rotary table": rotary_table,
}


@functools.cache
def family(name: str, folder: Path) -> Files:
    """A good checkpoint of a family."""
    folder = folder / name.replace(" ", "_").replace(",", "")
    if name in ENCODERS:
        make_encoder(name, folder)
    else:
        test_families.CASES[name].make().save_pretrained(folder)
    return Files.of(folder)


ENCODERS = ("bert", "roberta", "modernbert")
FAMILIES = [*test_families.CASES, *ENCODERS]


def load(name: str, folder: Path) -> list[int] | None:
    """Load a checkpoint; a decoder's tokens of a prompt."""
    if name in ENCODERS:
        encoder_of(folder, device="cpu")
        return None
    engine = engine_of(folder, device="cpu", max_model_len=64)
    test_families.ask(engine, "a", list(range(20)), max_tokens=8)
    return test_families.tokens(test_families.run(engine))["a"]


def check_family(name: str, change: str, root: Path, seed: int) -> None:
    """Apply a change to the good checkpoint of a family: it must be refused, or neutral."""
    good = family(name, root)
    files = good.copy()
    ({**REFUSED, **NEUTRAL}[change])(files, random.Random(seed))
    folder = files.write(root / "changed")
    if change in NEUTRAL:
        assert load(name, folder) == load(name, good.write(root / "good"))
        return
    with pytest.raises(PortaLMError):
        load(name, folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("silence")


CHANGES = [*REFUSED, *NEUTRAL]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_change_of_a_family_is_refused_or_neutral(root: Path, name: str) -> None:
    """Two changes for each family; other families have others."""
    first = 2 * FAMILIES.index(name)
    for i in range(first, first + 2):
        check_family(name, CHANGES[i % len(CHANGES)], root, seed=i)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_change_of_a_family_is_refused_or_neutral(root: Path, name: str) -> None:
    for seed, change in enumerate(CHANGES):
        check_family(name, change, root, seed)


# -- schemes ----------------------------------------------------------------------------------

TARGET = "model.layers.1.mlp.up_proj"
Change = Callable[[Tensors, Config, random.Random], None]
"""Changes the parts of one layer, and quantization_config."""


def a_part(parts: Tensors, rng: random.Random) -> str:
    return rng.choice(sorted(parts))


def drop_part(parts: Tensors, config: Config, rng: random.Random) -> None:
    del parts[a_part(parts, rng)]


def rename_part(parts: Tensors, config: Config, rng: random.Random) -> None:
    name = a_part(parts, rng)
    parts[name + rng.choice(("_2", "_inv", ".old"))] = parts.pop(name)


def add_part(parts: Tensors, config: Config, rng: random.Random) -> None:
    name = rng.choice(
        ("weight_scale", "weight_scale_inv", "weight_zero_point", "weight_scale_2", "scales",
         "g_idx", "pre_quant_scale", "weight_global_scale", "weight", "bias", "qzeros")
    )  # fmt: skip
    parts.setdefault(name, torch.full((LAYERS[TARGET][0], 1), 2.0))


def change_dtype(parts: Tensors, config: Config, rng: random.Random) -> None:
    name = a_part(parts, rng)
    dtype = rng.choice(
        (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32,
         torch.int16, torch.int8, torch.uint8, torch.float8_e5m2, torch.float8_e4m3fn)
    )  # fmt: skip
    parts[name] = parts[name].to(dtype)


def view_bits(parts: Tensors, config: Config, rng: random.Random) -> None:
    """Give the same bytes another dtype of the same size."""
    name = a_part(parts, rng)
    same_size = {
        1: (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2),
        2: (torch.float16, torch.bfloat16, torch.int16),
        4: (torch.float32, torch.int32),
        8: (torch.float64, torch.int64),
    }
    dtype = rng.choice(same_size[parts[name].element_size()])
    parts[name] = parts[name].contiguous().view(dtype)


def change_values(parts: Tensors, config: Config, rng: random.Random) -> None:
    """Exchange the first and the last row of a part."""
    name = a_part(parts, rng)
    if parts[name].ndim:
        parts[name] = parts[name].flip(0)


def change_shape(parts: Tensors, config: Config, rng: random.Random) -> None:
    name = a_part(parts, rng)
    tensor = parts[name]
    changes: list[Callable[[], torch.Tensor]] = [tensor.flatten, lambda: tensor.unsqueeze(-1)]
    if tensor.ndim:
        changes += [lambda: tensor[:-1], lambda: torch.cat((tensor, tensor[:1]))]
    if tensor.ndim == 2:
        changes += [
            lambda: tensor.T,
            lambda: tensor[:, :-1],
            lambda: tensor.view(len(tensor) // 2, -1),
        ]
    parts[name] = rng.choice(changes)()


_VALUES: dict[str, tuple[Any, ...]] = {
    "quant_method": ("awq", "gptq", "fp8", "bitsandbytes", "compressed-tensors", "modelopt"),
    "bits": (4, 8, 3),
    "num_bits": (4, 8, 3),
    "group_size": (16, 32, 64, -1),
    "desc_act": (True, False),
    "checkpoint_format": ("gptq", "gptq_v2"),
    "version": ("gemm", "gemv"),
    "type": ("int", "float"),
    "strategy": ("tensor", "channel", "group", "block", "tensor_group"),
    "symmetric": (True, False),
    "targets": (["Linear"], ["re:.*down.*"], ["Embedding"], []),
    "weight_block_size": ([48, 48], [32, 48], [64, 64], None),
    "block_structure": ([48, 48], [32, 48], [64, 64]),
    "quant_algo": ("FP8", "NVFP4", "FP8_PER_CHANNEL_PER_TOKEN"),
}


def change_config(parts: Tensors, config: Config, rng: random.Random) -> None:
    """Change one of the settings, at any depth, or set one that is not there."""
    objects: list[Config] = [config]
    for found in objects:
        objects += [value for value in found.values() if isinstance(value, dict)]
    target = rng.choice(objects)
    key = rng.choice(sorted(target.keys() & _VALUES.keys()) or ["bits"])
    if rng.random() < 0.2:
        key = rng.choice(("desc_act", "checkpoint_format", "symmetric", "group_size"))
    target[key] = rng.choice(_VALUES[key])


PART_CHANGES: dict[str, Change] = {
    "a missing part": drop_part,
    "a renamed part": rename_part,
    "a further part": add_part,
    "a part of another dtype": change_dtype,
    "a part read as another dtype": view_bits,
    "a part with other values": change_values,
    "a part of another shape": change_shape,
    "another setting": change_config,
}


@functools.cache
def scheme(name: str, root: Path) -> Files:
    """A good checkpoint of a scheme."""
    folder = root / name.replace(" ", "_")
    return Files.of(save(folder, test_quantized_checkpoints.CASES[name], is_plain=False))


def parts_of(tensors: Tensors, layer: str) -> Tensors:
    stem = f"{layer}."
    return {n.removeprefix(stem): t for n, t in tensors.items() if n.startswith(stem)}


@functools.cache
def decoded(name: str, layer: str, config: str, root: Path) -> torch.Tensor | None:
    """An unchanged layer's weight under a config, by the specification."""
    weight = decode(parts_of(scheme(name, root).tensors, layer), json.loads(config))
    return None if weight is None else torch.from_numpy(weight).float()


def specified(name: str, parts: Tensors, config: Config, root: Path) -> Files | None:
    """The float32 checkpoint that the changed files define; None: they define none."""
    good = scheme(name, root)
    tensors = {n: t for n, t in good.tensors.items() if not n.startswith(tuple(LAYERS))}
    for layer, shape in LAYERS.items():
        if layer == TARGET:
            found = decode(parts, config)
            weight = None if found is None else torch.from_numpy(found).float()
        else:
            weight = decoded(name, layer, json.dumps(config), root)
        if weight is None or tuple(weight.shape) != shape:
            return None
        tensors[f"{layer}.weight"] = weight
    plain = {k: v for k, v in good.config.items() if k != "quantization_config"}
    return Files(tensors, plain)


def check_scheme(name: str, change: str, root: Path, seed: int) -> bool:
    """Apply a change to one layer of the good checkpoint of a scheme; True if it loads."""
    rng = random.Random(f"{name} {change} {seed}")
    files = scheme(name, root).copy()
    config = files.config["quantization_config"]
    parts = parts_of(files.tensors, TARGET)
    PART_CHANGES[change](parts, config, rng)
    files.tensors = {n: t for n, t in files.tensors.items() if not n.startswith(f"{TARGET}.")}
    files.tensors |= {f"{TARGET}.{part}": tensor for part, tensor in parts.items()}
    try:
        actual = answers(files.write(root / "changed"), dtype="float32")
    except PortaLMError:
        return False
    wanted = specified(name, parts, config, root)
    assert wanted is not None, f"{change} {seed}: it loads, but the format does not define it"
    assert actual == answers(wanted.write(root / "wanted"), dtype="float32"), f"{change} {seed}"
    return True


SCHEMES = [*test_quantized_checkpoints.CASES]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_change_of_a_scheme_is_refused_or_read_as_specified(root: Path, name: str) -> None:
    for change in PART_CHANGES:
        check_scheme(name, change, root, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_many_changes_of_a_scheme(root: Path, name: str) -> None:
    loads = [
        check_scheme(name, change, root, seed) for change in PART_CHANGES for seed in range(1, 7)
    ]

    assert any(loads) and not all(loads)


def wider_scales(parts: Tensors) -> None:
    for name, tensor in parts.items():
        if tensor.dtype == torch.float16:
            parts[name] = tensor.float()


@pytest.mark.parametrize("name", ["awq", "gptq", "w4a16", "w8a16", "fp8 by blocks", "modelopt fp8"])
def test_neutral_changes_of_a_scheme_change_no_token(root: Path, name: str) -> None:
    """Scales in more bits, and a scale of activations where the scheme has them."""
    good = scheme(name, root)
    files = good.copy()
    parts = parts_of(files.tensors, TARGET)
    wider_scales(parts)
    if "fp8" in name or name.startswith("w"):
        parts["input_scale"] = torch.tensor(0.5)
    files.tensors |= {f"{TARGET}.{part}": tensor for part, tensor in parts.items()}

    changed = answers(files.write(root / "changed"), dtype="float32")

    assert changed == answers(good.write(root / "good"), dtype="float32")


# -- planted faults ---------------------------------------------------------------------------


def ignore_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "check_all_read", lambda checkpoint, unused: None)


def cast_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "check_dtype", lambda path, name, dtype: None)


def forget_zero_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    read = GPTQ.read

    def wrong(self: GPTQ, parts: LayerParts) -> Any:
        self._zero_offset = 0
        return read(self, parts)

    monkeypatch.setattr(GPTQ, "read", wrong)


def guess_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(weight: torch.Tensor, scales: torch.Tensor, block: object = None) -> torch.Tensor:
        rows, columns = (-(-n // m) for n, m in zip(weight.shape, scales.shape, strict=True))
        return scaled_by_blocks(weight, scales, (rows, columns))

    monkeypatch.setattr(fp8, "scaled_by_blocks", wrong)


def accept_any_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    get = LayerParts.get
    known = tuple(d for d in vars(torch).values() if isinstance(d, torch.dtype))
    monkeypatch.setattr(
        LayerParts, "get", lambda self, *args, dtypes: get(self, *args, dtypes=known)
    )


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable[[Path, int], object]]] = {
    "unread tensors are ignored": (
        ignore_unread, lambda root, seed: check_family("qwen3", "a further norm", root, seed)
    ),
    "8-bit codes are cast": (
        cast_codes, lambda root, seed: check_family("qwen3", "8-bit floats", root, seed)
    ),
    "GPTQ's stored zeros are taken as they are": (
        forget_zero_offset,
        lambda root, seed: check_scheme("gptq", "a part with other values", root, seed),
    ),
    "the size of FP8 blocks is guessed": (
        guess_blocks,
        lambda root, seed: check_scheme("fp8 by blocks", "a part with other values", root, seed),
    ),
    "the dtype of parts is not checked": (
        accept_any_dtype,
        lambda root, seed: check_scheme("fp8 by rows", "a part read as another dtype", root, seed),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plant, check = FAULTS[name]
    check(root, 0)
    plant(monkeypatch)

    with pytest.raises((AssertionError, pytest.fail.Exception, RuntimeError)):
        for seed in range(10):
            check(root, seed)
