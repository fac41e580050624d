"""What throughput and latency share: an engine in this process, and prompts for it."""

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
    """Lengths, result file, and the engine's flags."""
    parser.add_argument("--input-len", type=int, default=input_len, help="tokens of a prompt")
    parser.add_argument("--output-len", type=int, default=output_len, help="tokens of an answer")
    parser.add_argument("--result-json", default=None, help="file for all figures")
    add_engine_flags(parser)


def load(arguments: argparse.Namespace) -> LLM:
    """The engine, warm. Raises `ConfigError` for lengths that do not fit the model."""
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
            f"--input-len and --output-len make {longest} tokens, the model takes "
            f"{llm.engine.max_model_len}"
        )
    llm.generate([[_FIRST_ID] * 16], answer_of(4), use_tqdm=False)
    return llm


def make_prompt(rng: random.Random, llm: LLM, num_tokens: int) -> list[int]:
    """So many random tokens: the prefix cache finds none of them."""
    vocab_size = llm.engine.ready.vocab_size
    return [rng.randrange(_FIRST_ID, vocab_size) for _ in range(num_tokens)]


def answer_of(num_tokens: int) -> SamplingParams:
    """Exactly so many tokens, greedy, without text."""
    from portalm.sampling_params import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)


def describe(llm: LLM) -> dict[str, Any]:
    """What was measured."""
    ready = llm.engine.ready
    return {"model": ready.model, "device": ready.device, "dtype": ready.dtype}
