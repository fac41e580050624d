"""Shared by bench throughput and latency: an engine in this process, and prompts for it."""

from __future__ import annotations

import argparse
import random
from typing import TYPE_CHECKING, Any

from portalm.cli.engine_flags import add_engine_flags

if TYPE_CHECKING:
    from portalm.llm import LLM
    from portalm.sampling_params import SamplingParams

_FIRST_ID = 3
"""Ids below are special tokens in many vocabularies."""


def add_offline_flags(parser: argparse.ArgumentParser, *, input_len: int, output_len: int) -> None:
    """Add flags for lengths, the result file and the engine."""
    parser.add_argument(
        "--input-len",
        type=int,
        default=input_len,
        help="tokens per prompt, on average where lengths vary",
    )
    parser.add_argument(
        "--output-len",
        type=int,
        default=output_len,
        help="tokens per answer, on average where lengths vary",
    )
    parser.add_argument(
        "--result-json", default=None, help="file to write all figures to as JSON (default: none)"
    )
    add_engine_flags(parser)


def load(arguments: argparse.Namespace) -> LLM:
    """Load and warm up the engine. Raises `ConfigError` if the lengths do not fit the model."""
    from portalm.cli.engine_flags import engine_settings
    from portalm.errors import ConfigError
    from portalm.llm import LLM

    for name in ("input_len", "output_len"):
        if getattr(arguments, name) < 1:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} must be at least 1, not {getattr(arguments, name)}")
    llm = LLM(**engine_settings(arguments))
    longest = arguments.input_len + arguments.output_len
    if longest > llm.engine.max_model_len:
        raise ConfigError(
            f"--input-len and --output-len add up to {longest} tokens, more than --max-model-len "
            f"({llm.engine.max_model_len})"
        )
    llm.generate([[_FIRST_ID] * 16], answer_of(4), use_tqdm=False)
    return llm


def make_prompt(rng: random.Random, llm: LLM, num_tokens: int) -> list[int]:
    """Return random token ids, so that the prefix cache has no hits."""
    vocab_size = llm.engine.ready.vocab_size
    return [rng.randrange(_FIRST_ID, vocab_size) for _ in range(num_tokens)]


def answer_of(num_tokens: int) -> SamplingParams:
    """Parameters of a greedy answer of exactly `num_tokens` tokens, without text."""
    from portalm.sampling_params import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)


def describe(llm: LLM) -> dict[str, Any]:
    """Describe the engine that was measured."""
    ready = llm.engine.ready
    return {"model": ready.model, "device": ready.device, "dtype": ready.dtype}
