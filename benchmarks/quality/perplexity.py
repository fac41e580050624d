"""Measure the default model's perplexity on a bundled text by weight and KV cache format.

    python benchmarks/quality/perplexity.py [--model NAME] [--quantizations none,auto,int8,int4]
        [--kv-cache-dtypes auto,int8,fp8]

The text is the beginning of "Alice's Adventures in Wonderland" (Carroll, 1865, public domain),
in windows of 512 tokens. `none` computes in bfloat16, dequantizing the checkpoint if necessary.

The default model is stored in 4 bits, and rounding to 4 bits would reproduce those values at no
cost. A second table therefore rounds weights that are not on that grid: the same weights plus
uniform noise of up to half a step, as far from the grid as the original weights were. The last
table keeps the weights and rounds keys and values.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from portalm import LLM, SamplingParams
from portalm.backend import QUANTIZED_FORMATS, QuantizedWeight
from portalm.config import DEFAULT_MODEL, EngineConfig
from portalm.models.hub import resolve_model
from portalm.models.loader import open_checkpoint

TEXT = Path(__file__).parent / "text" / "alice.txt"
WINDOW = 512


def perplexity(llm: LLM, text: str) -> float:
    """Return exp of the mean negative log-probability of the tokens of `text` after the first."""
    token_ids = llm.get_tokenizer().encode(text)
    windows = [token_ids[i : i + WINDOW] for i in range(0, len(token_ids) - 1, WINDOW)]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    total, count = 0.0, 0
    for output in llm.generate([w for w in windows if len(w) > 1], params, use_tqdm=False):
        assert output.prompt_logprobs is not None
        assert output.prompt_token_ids is not None
        pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        for token_id, entry in pairs:
            total -= entry[token_id].logprob
            count += 1
    return math.exp(total / count)


def main() -> None:
    """Print a line for each weight format and each KV cache format."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--quantizations", default="none,auto,int8,int4")
    parser.add_argument("--kv-cache-dtypes", default="auto,int8,fp8")
    args = parser.parse_args()
    names = [name for name in args.quantizations.split(",") if name]
    print_table("quantization", names, model=args.model)
    if names and args.model == DEFAULT_MODEL:
        print("off the grid:")
        with tempfile.TemporaryDirectory() as folder:
            write_off_grid(Path(folder))
            names = [name for name in names if name != "auto"]
            print_table("quantization", names, model=folder, tokenizer=DEFAULT_MODEL)
    print("keys and values:")
    names = args.kv_cache_dtypes.split(",")
    print_table("kv_cache_dtype", names, model=args.model, quantization="none")


def print_table(setting: str, names: list[str], **settings: Any) -> None:
    """Print the perplexity for each value of a setting, and its change from the first value."""
    text = TEXT.read_text()
    base = None
    for name in names:
        values = {"device": "cpu", "dtype": "bfloat16", **settings, setting: name}
        llm = LLM(use_tqdm=False, **values)
        value = perplexity(llm, text)
        base = base or value
        print(f"{name:6s} {value:8.4f}  {100 * (value / base - 1):+6.2f} %", flush=True)


def write_off_grid(folder: Path) -> None:
    """Write the default model in bfloat16, each weight moved by up to half a step of its grid."""
    checkpoint = open_checkpoint(resolve_model(DEFAULT_MODEL), EngineConfig())
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in checkpoint.names():
        weight = checkpoint.weight(name)
        if isinstance(weight, QuantizedWeight):
            step = weight.scales.repeat_interleave(QUANTIZED_FORMATS[weight.format], dim=1)
            noise = torch.rand(weight.shape, generator=generator) - 0.5
            weight = weight.dequantize() + noise * step
        tensors[name] = weight.to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.safetensors")
    config = checkpoint.config
    values = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(values))


if __name__ == "__main__":
    main()
