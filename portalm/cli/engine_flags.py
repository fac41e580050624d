"""EngineConfig's fields as flags, shared by every verb that runs a model."""

from __future__ import annotations

import argparse
import json
from typing import Any

from portalm.backend import SCALED_KV_DTYPES
from portalm.config import DEFAULT_MODEL, QUANTIZATIONS

_DTYPES = ("auto", "float32", "float16", "bfloat16")


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting; what is not given keeps the setting's own default."""
    flags = parser.add_argument_group("engine")

    def add(name: str, help: str, **options: Any) -> None:
        flags.add_argument(name, help=help, default=argparse.SUPPRESS, **options)

    flags.add_argument(
        "--config", metavar="FILE", help="YAML with any of these flags by name; flags given win"
    )
    add("--model", f"local folder, .gguf file or Hugging Face id (default {DEFAULT_MODEL})")
    add("--tokenizer", "where the tokenizer is, if not with the model")
    add("--device", "backend to use, or auto; `portalm devices` lists them")
    add("--dtype", "of weights and activations", choices=_DTYPES)
    add(
        "--quantization",
        "what weights are computed with: auto is the checkpoint's own few bits where the device "
        "can, none --dtype; int8, int4 and fp8 round those of more, and activations to 8 bits; "
        "others are auto for a checkpoint that must be of that scheme",
        choices=QUANTIZATIONS,
    )
    add("--max-model-len", "longest prompt plus answer, for example 4096 or 32k", type=_length)
    add("--block-size", "tokens per KV block", type=int)
    flags.add_argument(
        "--gpu-memory-utilization",
        "--device-memory-utilization",
        dest="gpu_memory_utilization",
        help="share of the device's memory to use, 0 to 1",
        type=float,
        default=argparse.SUPPRESS,
    )
    add("--kv-cache-memory-bytes", "size of the KV cache", type=int)
    add(
        "--kv-cache-dtype",
        "of keys and values; int8 and fp8 have a scale for each token and head",
        choices=(*_DTYPES, *SCALED_KV_DTYPES),
    )
    add("--num-gpu-blocks-override", "KV blocks to allocate", type=int)
    add(
        "--cpu-threads",
        "threads that compute on the host (default: one for each core it may use)",
        type=int,
    )
    add("--max-num-seqs", "requests that run at once", type=int)
    add("--max-num-batched-tokens", "tokens computed in one step", type=int)
    add(
        "--enable-chunked-prefill",
        "split long prompts over steps",
        action=argparse.BooleanOptionalAction,
    )
    add(
        "--enable-prefix-caching",
        "reuse KV blocks of earlier requests",
        action=argparse.BooleanOptionalAction,
    )
    add("--scheduling-policy", "order of the queue", choices=("fcfs", "priority"))
    add(
        "--async-scheduling",
        "plan a step while the one before runs",
        action=argparse.BooleanOptionalAction,
    )
    add("--load-format", "of the checkpoint", choices=("auto", "safetensors", "gguf", "dummy"))
    add("--revision", "branch, tag or commit on the hub")
    add("--trust-remote-code", "let a tokenizer run its own Python code", action="store_true")
    add("--hf-overrides", "JSON object that replaces values of config.json", type=json.loads)
    add("--seed", "seeds requests that bring none", type=int)
    add("--enforce-eager", "do not capture steps (slower; for debugging)", action="store_true")
    add("--max-logprobs", "most logprobs a request may ask for", type=int)
    add("--chat-template", "Jinja template, or the path of one")


def engine_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given, by EngineConfig's names."""
    from dataclasses import fields

    from portalm.config import EngineConfig

    given = vars(arguments)
    settings = {f.name: given[f.name] for f in fields(EngineConfig) if f.name in given}
    if isinstance(settings.get("hf_overrides"), dict):
        settings["hf_overrides"] = tuple(sorted(settings["hf_overrides"].items()))
    return settings


def _length(text: str) -> int | None:
    """4096, 32k (32,768 tokens) or auto."""
    if text == "auto":
        return None
    if text.lower().endswith("k"):
        return int(float(text[:-1]) * 1024)
    return int(text)
