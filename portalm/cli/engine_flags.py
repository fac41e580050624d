"""Flags for the fields of `EngineConfig`, shared by all commands that run a model."""

from __future__ import annotations

import argparse
import json
from typing import Any

from portalm.backend import SCALED_KV_DTYPES
from portalm.config import QUANTIZATIONS

_DTYPES = ("auto", "float32", "float16", "bfloat16")


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per setting. A flag that is not given leaves `EngineConfig`'s default."""
    flags = parser.add_argument_group("engine")

    def add(name: str, help: str, **options: Any) -> None:
        flags.add_argument(name, help=help, default=argparse.SUPPRESS, **options)

    flags.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of flags by name; flags on the command line override it (default: none)",
    )
    add("--model", "local folder, .gguf file, or Hugging Face id of the model")
    add(
        "--tokenizer",
        "local folder or Hugging Face id of the tokenizer (default: the model's own)",
    )
    add("--device", "backend to run on, or auto for the fastest; see `portalm devices`")
    add(
        "--dtype",
        "data type of weights and activations; auto is the checkpoint's if the device supports it",
        choices=_DTYPES,
    )
    add(
        "--quantization",
        "how weights are computed: auto keeps the checkpoint's quantization where the device "
        "supports it; none dequantizes to --dtype; int8, int4 and fp8 round weights that have more "
        "bits, and activations to 8 bits; the name of a scheme is auto, but requires it of the "
        "checkpoint",
        choices=QUANTIZATIONS,
    )
    add(
        "--max-model-len",
        "maximum tokens of a prompt and its answer together, for example 4096 or 32k "
        "(default: auto, the model's longest context)",
        type=_length,
    )
    add("--block-size", "number of tokens per KV block", type=int)
    flags.add_argument(
        "--gpu-memory-utilization",
        "--device-memory-utilization",
        dest="gpu_memory_utilization",
        help="fraction of the device's memory to use, above 0 and at most 1 (default: 0.9 of the "
        "device's own memory; of memory shared with the host, what --max-num-seqs can use)",
        type=float,
        default=argparse.SUPPRESS,
    )
    add(
        "--kv-cache-memory-bytes",
        "size of the KV cache in bytes; overrides --gpu-memory-utilization "
        "(default: what memory allows)",
        type=int,
    )
    add(
        "--kv-cache-dtype",
        "data type of cached keys and values; auto is --dtype; int8 and fp8 store 8 bits and a "
        "scale per token and head",
        choices=(*_DTYPES, *SCALED_KV_DTYPES),
    )
    add(
        "--num-gpu-blocks-override",
        "number of KV blocks to allocate; overrides every other size (default: what memory allows)",
        type=int,
    )
    add(
        "--cpu-threads",
        "number of compute threads on the CPU (default: one per core that the process may use)",
        type=int,
    )
    add("--max-num-seqs", "maximum number of requests in one step", type=int)
    add("--max-num-batched-tokens", "maximum number of tokens computed in one step", type=int)
    add(
        "--enable-chunked-prefill",
        "split long prompts over several steps",
        action=argparse.BooleanOptionalAction,
    )
    add(
        "--enable-prefix-caching",
        "reuse KV blocks of earlier requests that began with the same tokens",
        action=argparse.BooleanOptionalAction,
    )
    add(
        "--scheduling-policy",
        "order of waiting requests: by arrival, or by priority (lower first)",
        choices=("fcfs", "priority"),
    )
    add(
        "--async-scheduling",
        "plan a step while the previous one runs, if the backend supports it",
        action=argparse.BooleanOptionalAction,
    )
    add(
        "--load-format",
        "format of the checkpoint; auto detects it, dummy makes random weights for tests",
        choices=("auto", "safetensors", "gguf", "dummy"),
    )
    add(
        "--revision",
        "branch, tag or commit on the Hugging Face hub (default: the default branch)",
    )
    add(
        "--trust-remote-code",
        "let a tokenizer run Python code from its repository",
        action="store_true",
    )
    add(
        "--hf-overrides",
        "JSON object of values that replace those of config.json (default: none)",
        type=json.loads,
    )
    add("--seed", "seed of requests that have none", type=int)
    add(
        "--enforce-eager",
        "run steps without capturing them as graphs (slower; for debugging)",
        action="store_true",
    )
    add("--max-logprobs", "maximum value of a request's logprobs and prompt_logprobs", type=int)
    add("--chat-template", "Jinja chat template, or the path of one (default: the model's own)")


def engine_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings that were given, by the field names of `EngineConfig`."""
    from dataclasses import fields

    from portalm.config import EngineConfig

    given = vars(arguments)
    settings = {f.name: given[f.name] for f in fields(EngineConfig) if f.name in given}
    if isinstance(settings.get("hf_overrides"), dict):
        settings["hf_overrides"] = tuple(sorted(settings["hf_overrides"].items()))
    return settings


def _length(text: str) -> int | None:
    """Parse a length: 4096, 32k (32,768) or auto (None)."""
    if text == "auto":
        return None
    if text.lower().endswith("k"):
        return int(float(text[:-1]) * 1024)
    return int(text)
