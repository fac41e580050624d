"""DeepSeek's checkpoints: layers that are not loaded, FP8 blocks, routing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from portalm.config import EngineConfig
from portalm.engine.engine import Engine
from portalm.errors import UnsupportedModel
from tests.models.test_families import CASES
from tests.tiny import ask, make_config_folder, run, tokens

BLOCK = 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny V3 checkpoint saved by transformers."""
    folder = tmp_path_factory.mktemp("deepseek")
    CASES["deepseek v3"].make().save_pretrained(folder)
    return folder


def rewrite(source: Path, folder: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def answer(folder: Path) -> list[int]:
    settings = {"model": str(folder), "device": "cpu", "dtype": "float32", "max_num_seqs": 2}
    engine = Engine(EngineConfig.from_dict({**settings, "max_model_len": 64}))
    ask(engine, "a", list(range(40)), max_tokens=16)
    [sampled] = tokens(run(engine)).values()
    return sampled


def test_layers_that_predict_further_tokens_are_not_loaded(
    checkpoint: Path, tmp_path: Path
) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    further = {
        name.replace("layers.1.", "layers.2."): torch.full_like(x, float("nan"))
        for name, x in tensors.items()
        if "layers.1." in name
    }
    further["model.layers.2.eh_proj.weight"] = torch.full((64, 128), float("nan"))
    folder = rewrite(checkpoint, tmp_path / "more", {**tensors, **further},
                     num_nextn_predict_layers=1)  # fmt: skip

    assert answer(folder) == answer(checkpoint)


def test_fp8_blocks_give_the_answers_of_the_same_float32_weights(
    checkpoint: Path, tmp_path: Path
) -> None:
    plain, coded = {}, {}
    for name, x in load_file(checkpoint / "model.safetensors").items():
        if not name.endswith("_proj.weight") and not name.endswith("with_mqa.weight"):
            plain[name] = coded[name] = x
            continue
        codes, scales = by_blocks(x)
        coded[name], coded[f"{name}_scale_inv"] = codes, scales
        wide = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        plain[name] = codes.float() * wide[: x.shape[0], : x.shape[1]]
    scheme = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    written = rewrite(checkpoint, tmp_path / "fp8", coded, quantization_config=scheme)

    assert "model.layers.1.self_attn.kv_b_proj.weight_scale_inv" in coded
    assert answer(written) == answer(rewrite(checkpoint, tmp_path / "plain", plain))


def by_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to FP8 codes [N, K] and a scale for each block."""
    rows, columns = (-(-n // BLOCK) for n in x.shape)
    scales = torch.empty(rows, columns)
    codes = torch.empty_like(x).to(torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            block = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            scales[i, j] = x[block].abs().max() / 448
            codes[block] = (x[block] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("DeepseekV3ForCausalLM", {"topk_method": "greedy"}, "topk_method is 'greedy'.*noaux_tc"),
        ("DeepseekV3ForCausalLM", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("DeepseekV2ForCausalLM", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("DeepseekV2ForCausalLM", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    ],
)
def test_unsupported_routing_is_refused(
    tmp_path: Path, architecture: str, changes: dict[str, Any], message: str
) -> None:
    folder = make_config_folder(tmp_path, architectures=[architecture], **changes)

    with pytest.raises(UnsupportedModel, match=message):
        Engine(EngineConfig.from_dict({"model": str(folder), "load_format": "dummy"}))
