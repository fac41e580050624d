"""Tensors of a checkpoint that nothing reads refuse it by name, unless no answer needs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from portalm.backend import load_backend
from portalm.config import EngineConfig
from portalm.errors import CheckpointError
from portalm.models.loader import open_checkpoint
from portalm.models.registry import ARCHITECTURES
from portalm.models.transformers_model import TransformersModel
from tests.models.test_families import CASES, NUM_OUT, PROMPTS, Case, engine_of
from tests.models.test_llama import saved
from tests.tiny import ask, run, tokens

Tensors = dict[str, torch.Tensor]
LAYER = "model.layers.1."


def change(folder: Path, edit: Callable[[Tensors], object]) -> Path:
    """Edit the tensors of the checkpoint in `folder`."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, {"format": "pt"})
    return folder


def add(name: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensor})


def answer(folder: Path, **settings: Any) -> list[int]:
    engine = engine_of(folder, device="cpu", **settings)
    ask(engine, "a", list(range(20)))
    return tokens(run(engine))["a"]


REFUSED = {
    "a norm": add(f"{LAYER}self_attn.q_norm.weight", torch.ones(16)),
    "a bias": add(f"{LAYER}mlp.up_proj.bias", torch.ones(96)),
    "a layer": add("model.layers.2.mlp.up_proj.weight", torch.ones(96, 64)),
    "a scale": add(f"{LAYER}mlp.up_proj.weight_scale", torch.ones(96, 1)),
    "a head that is not the embedding": lambda t: t.update(
        {"lm_head.weight": t["model.embed_tokens.weight"] * 2}
    ),
    "codes": lambda t: t.update(
        {f"{LAYER}mlp.up_proj.weight": t[f"{LAYER}mlp.up_proj.weight"].to(torch.float8_e4m3fn)}
    ),
    "8-bit numbers": lambda t: t.update(
        {f"{LAYER}self_attn.o_proj.weight": torch.ones(64, 64, dtype=torch.int8)}
    ),
}
HARMLESS = {
    "a rotary table": add(f"{LAYER}self_attn.rotary_emb.inv_freq", torch.ones(8)),
    "a prediction layer": add("mtp.layers.0.mlp.up_proj.weight", torch.ones(96, 64)),
    "scales of the KV cache": add(f"{LAYER}self_attn.k_proj.k_scale", torch.ones(1)),
    "a bias of zeros": add(f"{LAYER}mlp.up_proj.bias", torch.zeros(96)),
    "the embedding as the head": lambda t: t.update(
        {"lm_head.weight": t["model.embed_tokens.weight"].clone()}
    ),
}


@pytest.fixture(scope="module", params=["llama", "fallback"])
def tied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tied head, of a family and of a model that runs through transformers."""
    folder = tmp_path_factory.mktemp("tied")
    family = "Llama" if request.param == "llama" else "Helium"
    case = Case(family, {"tie_word_embeddings": True, "head_dim": 16})
    case.make().save_pretrained(folder)
    return folder


def copy(folder: Path, to: Path) -> Path:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize("name", REFUSED)
def test_a_tensor_that_nothing_reads_is_refused_by_name(
    tied: Path, tmp_path: Path, name: str
) -> None:
    folder = change(copy(tied, tmp_path), REFUSED[name])

    with pytest.raises(CheckpointError, match=r"'(model\.layers\.[12]\..*|lm_head\.weight)'"):
        engine_of(folder, device="cpu")


@pytest.mark.parametrize("name", HARMLESS)
def test_tensors_that_no_answer_needs_are_ignored(
    tied: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = change(copy(tied, tmp_path), HARMLESS[name])

    assert answer(folder) == answer(tied)
    assert ("scales of an 8-bit KV cache" in caplog.text) == (name == "scales of the KV cache")


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_causal_masks_of_old_checkpoints_are_ignored(tmp_path: Path, name: str) -> None:
    CASES[name].make().save_pretrained(tmp_path)
    plain = answer(tmp_path)
    prefix = "transformer.h.0.attn" if name == "gpt2" else "gpt_neox.layers.0.attention"
    mask = torch.ones(1, 1, 256, 256, dtype=torch.uint8).tril()

    change(tmp_path, add(f"{prefix}.bias", mask))
    change(tmp_path, add(f"{prefix}.masked_bias", torch.tensor(-1e9)))

    assert answer(tmp_path) == plain


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = f"{LAYER}mlp.up_proj.weight"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] * 2}, folder / "model-00002-of-00002.safetensors")

    with pytest.raises(CheckpointError, match=r"mlp.up_proj.weight' is also in model-00001"):
        engine_of(folder, device="cpu")


def test_a_tensor_that_the_index_does_not_list_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    file = folder / "model.safetensors"
    index = dict.fromkeys(load_file(file), file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    change(folder, REFUSED["a norm"])

    with pytest.raises(CheckpointError, match=r"does not use: '.*q_norm.weight'"):
        engine_of(folder, device="cpu")


def test_a_second_copy_of_the_weights_is_not_read(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    plain = answer(folder)

    save_file({"layers.0.attention.wq.weight": torch.ones(4)}, folder / "consolidated.safetensors")

    assert answer(folder) == plain


def glm4_moe(folder: Path) -> Any:
    """Save and return a model whose router has a bias that is a buffer in transformers' module."""
    changes = {"first_k_dense_replace": 1, "head_dim": 16, "moe_intermediate_size": 32,
               "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
               "n_group": 1, "topk_group": 1}  # fmt: skip
    model = Case("Glm4Moe", changes).make()
    model.model.layers[1].mlp.gate.e_score_correction_bias.uniform_(-1, 1)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def no_glm4_moe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run GLM-4-MoE through transformers' code."""
    monkeypatch.delitem(ARCHITECTURES, "Glm4MoeForCausalLM", raising=False)


def test_buffers_in_the_checkpoint_are_weights(tmp_path: Path, no_glm4_moe: None) -> None:
    model = glm4_moe(tmp_path)
    engine = engine_of(tmp_path, device="cpu", max_model_len=200)

    for key, prompt in PROMPTS.items():
        ask(engine, key, prompt, max_tokens=NUM_OUT)

    for key, sampled in tokens(run(engine)).items():
        with torch.inference_mode():
            logits = model(torch.tensor([PROMPTS[key] + sampled])).logits[0]
        assert sampled == logits[len(PROMPTS[key]) - 1 : -1].argmax(-1).tolist(), key


@pytest.mark.parametrize("has_module_names", [True, False])
def test_buffers_that_transformers_keeps_in_float32_keep_it(
    tmp_path: Path, no_glm4_moe: None, has_module_names: bool
) -> None:
    saved = glm4_moe(tmp_path)
    if has_module_names:  # else each expert has its own tensors
        save_file(saved.state_dict(), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path, EngineConfig(model="x"))

    model = TransformersModel(checkpoint.config, "bfloat16")
    module: Any = model.load(checkpoint, load_backend("cpu"))["module"]

    bias = module.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, saved.model.layers[1].mlp.gate.e_score_correction_bias)
    assert module.lm_head.weight.dtype == torch.bfloat16


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
FP8_ROWS = {"num_bits": 8, "type": "float", "strategy": "channel"}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": FP8_ROWS}},
    "ignore": ["lm_head"],
}


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
def test_quantized_experts_that_run_through_transformers_are_dequantized(
    tmp_path: Path, no_glm4_moe: None, method: str
) -> None:
    """Each expert has its own tensors in the file, and transformers has one for all experts."""
    plain, coded = tmp_path / "plain", tmp_path / "coded"
    glm4_moe(plain)
    glm4_moe(coded)
    tensors = load_file(plain / "model.safetensors")
    written = dict(tensors)
    layers = [name for name in tensors if name.endswith("_proj.weight")]
    assert any(".experts.7.down_proj" in name for name in layers)
    for name in layers:
        rows, columns = tensors[name].shape
        size = (16, 16) if method == "fp8" else (1, columns)
        scales = torch.rand(rows // size[0], columns // size[1]) * 0.02 + 0.01
        wide = scales.repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)
        codes = (tensors[name] / wide).to(torch.float8_e4m3fn)
        tensors[name] = codes.float() * wide
        written |= {name: codes, f"{name}_scale{'_inv' if method == 'fp8' else ''}": scales}
    save_file(tensors, plain / "model.safetensors")
    save_file(written, coded / "model.safetensors")
    file = coded / "config.json"
    config = FP8 if method == "fp8" else COMPRESSED
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))

    assert answer(coded, max_model_len=64) == answer(plain, max_model_len=64)
