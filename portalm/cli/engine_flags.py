"""Flags for the fields of `EngineConfig`, shared by all commands that run a model."""

from __future__ import annotations

import argparse
import json
from typing import Any

from portalm.backend import SCALED_KV_DTYPES
from portalm.config import QUANTIZATIONS

_DTYPES = ("auto", "float32", "float16", "bfloat16")


class _Flags:
    """An argument group whose flags have no default: `EngineConfig` has it."""

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self._group = parser.add_argument_group(title)

    def add(self, *names: str, help: str, **options: Any) -> None:
        self._group.add_argument(*names, help=help, default=argparse.SUPPRESS, **options)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per setting. A flag that is not given leaves `EngineConfig`'s default."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of flags by name; flags on the command line override it (default: none)",
    )
    _add_model_flags(_Flags(parser, "model"))
    _add_memory_flags(_Flags(parser, "memory"))
    _add_scheduling_flags(_Flags(parser, "scheduling"))


def _add_model_flags(flags: _Flags) -> None:
    """Add flags for the model, its device and its checkpoint."""
    flags.add("--model", help="local folder, .gguf file, or Hugging Face id of the model")
    flags.add(
        "--tokenizer",
        help="local folder or Hugging Face id of the tokenizer (default: the model's own)",
    )
    flags.add(
        "--revision",
        help="branch, tag or commit on the Hugging Face hub (default: the default branch)",
    )
    flags.add(
        "--load-format",
        help="format of the checkpoint; auto detects it, dummy makes random weights for tests",
        choices=("auto", "safetensors", "gguf", "dummy"),
    )
    flags.add(
        "--trust-remote-code",
        help="let a tokenizer run Python code from its repository",
        action="store_true",
    )
    flags.add(
        "--hf-overrides",
        help="JSON object of values that replace those of config.json (default: none)",
        type=json.loads,
    )
    flags.add(
        "--chat-template", help="Jinja chat template, or the path of one (default: the model's own)"
    )
    flags.add("--device", help="backend to run on, or auto for the fastest; see `portalm devices`")
    flags.add(
        "--dtype",
        help="data type of weights and activations; auto is the checkpoint's if the device "
        "supports it",
        choices=_DTYPES,
    )
    flags.add(
        "--quantization",
        help="how weights are computed: auto keeps the checkpoint's quantization where the device "
        "supports it; none dequantizes to --dtype; int8, int4 and fp8 round weights that have more "
        "bits, and activations to 8 bits; the name of a scheme is auto, but requires it of the "
        "checkpoint",
        choices=QUANTIZATIONS,
    )
    flags.add(
        "--cpu-threads",
        help="number of compute threads on the CPU (default: one per core that the process may "
        "use)",
        type=int,
    )
    flags.add(
        "--enforce-eager",
        help="run steps without capturing them as graphs (slower; for debugging)",
        action="store_true",
    )


def _add_memory_flags(flags: _Flags) -> None:
    """Add flags for the context length and the KV cache."""
    flags.add(
        "--max-model-len",
        help="maximum tokens of a prompt and its answer together, for example 4096 or 32k "
        "(default: auto, the model's longest context)",
        type=_length,
    )
    flags.add("--block-size", help="number of tokens per KV block", type=int)
    flags.add(
        "--gpu-memory-utilization",
        "--device-memory-utilization",
        dest="gpu_memory_utilization",
        help="fraction of the device's memory to use, above 0 and at most 1 (default: 0.9 of the "
        "device's own memory; of memory shared with the host, what --max-num-seqs can use)",
        type=float,
    )
    flags.add(
        "--kv-cache-memory-bytes",
        help="size of the KV cache in bytes; overrides --gpu-memory-utilization "
        "(default: what memory allows)",
        type=int,
    )
    flags.add(
        "--kv-cache-dtype",
        help="data type of cached keys and values; auto is --dtype; int8 and fp8 store 8 bits and "
        "a scale per token and head",
        choices=(*_DTYPES, *SCALED_KV_DTYPES),
    )
    flags.add(
        "--num-gpu-blocks-override",
        help="number of KV blocks to allocate; overrides every other size "
        "(default: what memory allows)",
        type=int,
    )
    flags.add(
        "--enable-prefix-caching",
        help="reuse KV blocks of earlier requests that began with the same tokens",
        action=argparse.BooleanOptionalAction,
    )


def _add_scheduling_flags(flags: _Flags) -> None:
    """Add flags for batching, scheduling and limits of requests."""
    flags.add("--max-num-seqs", help="maximum number of requests in one step", type=int)
    flags.add(
        "--max-num-batched-tokens", help="maximum number of tokens computed in one step", type=int
    )
    flags.add(
        "--enable-chunked-prefill",
        help="split long prompts over several steps",
        action=argparse.BooleanOptionalAction,
    )
    flags.add(
        "--scheduling-policy",
        help="order of waiting requests: by arrival, or by priority (lower first)",
        choices=("fcfs", "priority"),
    )
    flags.add(
        "--async-scheduling",
        help="plan a step while the previous one runs, if the backend supports it",
        action=argparse.BooleanOptionalAction,
    )
    flags.add("--seed", help="seed of requests that have none", type=int)
    flags.add(
        "--generation-config",
        help="source of the sampling parameters that a request does not set: auto (the model's "
        "generation_config.json or GGUF metadata), vllm (none), or a path",
        metavar="auto|vllm|PATH",
    )
    flags.add(
        "--max-logprobs", help="maximum value of a request's logprobs and prompt_logprobs", type=int
    )


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
