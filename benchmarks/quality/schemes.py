"""Measure size, speed and perplexity of one model in the formats of checkpoints.

    python benchmarks/quality/schemes.py [--only NAME,...] [--json FILE]

The model is the default one with its weights moved off the 4-bit grid of its file
(perplexity.py), in bfloat16. Each scheme rounds the layers' weights to nearest without
calibration data, the worst case of its kind, and writes them as the scheme's tools do; the
loader reads them back. Speed is one stream of 64 tokens after 32, on the CPU, median of five;
perplexity is that of perplexity.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from perplexity import TEXT, perplexity, write_off_grid
from safetensors.torch import load_file, save_file

from portalm import LLM, SamplingParams
from portalm.config import DEFAULT_MODEL

GROUP = 32
Parts = dict[str, torch.Tensor]
"""Suffixes of the names of a layer's linear weights."""


# -- rounding and writing ---------------------------------------------------------------------


def rounded(
    weight: torch.Tensor, bits: int, *, is_symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round to codes int64 [N, K], scales float16 and zeros int64 [N, K / GROUP]."""
    groups = weight.float().view(len(weight), -1, GROUP)
    most = (1 << bits) - 1
    if is_symmetric:
        scales = (groups.abs().amax(-1) / (most // 2)).half()
        zeros = torch.full(scales.shape, 1 << (bits - 1))
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((high - low) / most).half()
        zeros = (-low / scales.float()).round().long().clamp(0, most)
    codes = (groups / scales.float()[..., None]).round().long() + zeros[..., None]
    return codes.clamp(0, most).view(weight.shape), scales, zeros


def words(codes: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Pack [R, C] to int32 [R, C * bits / 32]: position i of a word holds column order[i]."""
    per_word = 32 // bits
    columns = codes.view(len(codes), -1, per_word)[..., list(order or range(per_word))]
    packed = (columns << (bits * torch.arange(per_word))).sum(-1).numpy()
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32).copy())


def awq(weight: torch.Tensor) -> Parts:
    codes, scales, zeros = rounded(weight, 4, is_symmetric=False)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words(codes.T.contiguous(), 4, order),
        "qzeros": words(zeros.T.contiguous(), 4, order),
        "scales": scales.T.contiguous(),
    }


def gptq(bits: int) -> Callable[[torch.Tensor], Parts]:
    def parts(weight: torch.Tensor) -> Parts:
        codes, scales, zeros = rounded(weight, bits, is_symmetric=True)
        return {
            "qweight": words(codes, bits).T.contiguous(),
            "qzeros": words((zeros.T - 1).contiguous(), bits),
            "scales": scales.T.contiguous(),
            "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
        }

    return parts


def w4a16(weight: torch.Tensor) -> Parts:
    codes, scales, _ = rounded(weight, 4, is_symmetric=True)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": words(codes, 4), "weight_scale": scales, "weight_shape": shape}


def w8a8(weight: torch.Tensor) -> Parts:
    scales = weight.float().abs().amax(1, keepdim=True) / 127
    return {"weight": (weight.float() / scales).round().to(torch.int8), "weight_scale": scales}


def fp8_rows(weight: torch.Tensor) -> Parts:
    scales = weight.float().abs().amax(1, keepdim=True) / 448
    return {"weight": (weight.float() / scales).to(torch.float8_e4m3fn), "weight_scale": scales}


def fp8_blocks(weight: torch.Tensor) -> Parts:
    rows, columns = (-(-n // 128) for n in weight.shape)
    padded = torch.zeros(rows * 128, columns * 128)
    padded[: weight.shape[0], : weight.shape[1]] = weight.float()
    scales = padded.view(rows, 128, columns, 128).abs().amax((1, 3)) / 448
    wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    wide = wide[: weight.shape[0], : weight.shape[1]]
    return {"weight": (weight.float() / wide).to(torch.float8_e4m3fn), "weight_scale_inv": scales}


NF4 = (-1.0, -0.6961928, -0.5250731, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
       0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.5626170, 0.72295684,
       1.0)  # fmt: skip
"""Dettmers et al., "QLoRA", 2023."""


def nf4(weight: torch.Tensor) -> Parts:
    blocks = weight.float().reshape(-1, 64)
    largest, levels = blocks.abs().amax(1), torch.tensor(NF4)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / largest[:, None], middles).flatten()
    state = {"quant_type": "nf4", "blocksize": 64, "shape": [*weight.shape], "dtype": "bfloat16"}
    return {
        "weight": (codes[0::2] * 16 + codes[1::2]).to(torch.uint8)[:, None],
        "weight.absmax": largest,
        "weight.quant_map": levels,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


# -- the schemes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    """A scheme: how layers are written, its config.json entry, and settings at load."""

    write: Callable[[torch.Tensor], Parts] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    gguf_type: str | None = None


def _group(bits: int, kind: str, strategy: str) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy}
    return {"config_groups": {"group_0": {"weights": weights}}}


_TENSORS = {"quant_method": "compressed-tensors"}
SCHEMES = {
    "bfloat16": Scheme(),
    "--quantization int8": Scheme(settings={"quantization": "int8"}),
    "--quantization int4": Scheme(settings={"quantization": "int4"}),
    "AWQ int4": Scheme(awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "GPTQ int4": Scheme(gptq(4), {"quant_method": "gptq", "bits": 4}),
    "GPTQ int8": Scheme(gptq(8), {"quant_method": "gptq", "bits": 8}),
    "compressed-tensors w4a16": Scheme(
        w4a16, {**_TENSORS, "format": "pack-quantized", **_group(4, "int", "group")}
    ),
    "compressed-tensors w8a8": Scheme(
        w8a8, {**_TENSORS, "format": "int-quantized", **_group(8, "int", "channel")}
    ),
    "FP8 by rows": Scheme(
        fp8_rows, {**_TENSORS, "format": "float-quantized", **_group(8, "float", "channel")}
    ),
    "FP8 by blocks": Scheme(fp8_blocks, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "bitsandbytes nf4": Scheme(nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    **{f"GGUF {name}": Scheme(gguf_type=name) for name in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")},
}


def write(source: Path, folder: Path, scheme: Scheme) -> Path:
    """Write the model of `source` in `scheme`; return the path to load."""
    if scheme.gguf_type is not None:
        return write_gguf(source, folder, scheme.gguf_type)
    tensors = load_file(source / "model.safetensors")
    if scheme.write is not None:
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            parts = scheme.write(tensors.pop(name))
            stem = name.removesuffix(".weight")
            tensors |= {f"{stem}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    values = json.loads((source / "config.json").read_text())
    if scheme.config:
        values["quantization_config"] = scheme.config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def write_gguf(source: Path, folder: Path, kind: str) -> Path:
    """Write one GGUF file, matrices rounded by the gguf package, names as in llama.cpp."""
    import gguf

    values = json.loads((source / "config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, values["num_hidden_layers"])
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(values["num_hidden_layers"])
    writer.add_context_length(values["max_position_embeddings"])
    writer.add_embedding_length(values["hidden_size"])
    writer.add_feed_forward_length(values["intermediate_size"])
    writer.add_head_count(values["num_attention_heads"])
    writer.add_head_count_kv(values["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(values["rms_norm_eps"])
    writer.add_rope_freq_base(values["rope_theta"])
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    for name, tensor in load_file(source / "model.safetensors").items():
        array = tensor.float().numpy()
        part = name.split(".")[-2]
        if part in heads:  # rotary pairs are adjacent in GGUF
            halves = array.reshape(values[heads[part]], 2, -1, array.shape[1])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        full = names.get_name(name, (".weight", ".bias"))
        if name.endswith("_proj.weight"):
            quantized = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(full, gguf.quants.quantize(array, quantized), raw_dtype=quantized)
        elif array.ndim == 2:
            half = array.astype(np.float16)
            writer.add_tensor(full, half)
        else:
            writer.add_tensor(full, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# -- measuring --------------------------------------------------------------------------------


def measure(path: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Measure the file size in MB, tokens per second of one stream, and perplexity."""
    file = path if path.is_file() else path / "model.safetensors"
    llm = LLM(
        str(path),
        tokenizer=DEFAULT_MODEL,
        device="cpu",
        dtype="bfloat16",
        use_tqdm=False,
        **settings,
    )
    params = SamplingParams(temperature=0.0, max_tokens=65, ignore_eos=True)
    speeds = []
    for i in range(6):  # the first run warms up
        prompt = [100 + i, *range(1000, 1031)]
        [output] = llm.generate([prompt], params, use_tqdm=False)
        metrics = output.metrics
        assert metrics is not None and metrics.finished_time and metrics.first_token_time
        speeds.append(64 / (metrics.finished_time - metrics.first_token_time))
    return {
        "file_mb": file.stat().st_size / 1e6,
        "tokens_per_s": statistics.median(speeds[1:]),
        "perplexity": perplexity(llm, TEXT.read_text()),
    }


def main() -> None:
    """Print a row for each scheme."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(SCHEMES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    print("| scheme | file, MB | tokens/s | perplexity | |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "source"
        source.mkdir()
        write_off_grid(source)
        for name in args.only.split(","):
            scheme = SCHEMES[name]
            folder = Path(place) / "written"
            folder.mkdir()
            started = time.monotonic()
            row = found[name] = measure(write(source, folder, scheme), scheme.settings)
            shutil.rmtree(folder)
            base = next(iter(found.values()))["perplexity"]
            print(
                f"| {name} | {row['file_mb']:.0f} | {row['tokens_per_s']:.1f} "
                f"| {row['perplexity']:.3f} | {100 * (row['perplexity'] / base - 1):+.2f} % |",
                flush=True,
            )
            print(f"  {time.monotonic() - started:.0f} s", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
