"""Compare embeddings per second with transformers: same encoder, texts and machine, in one run.

Texts of mixed lengths become normalized means of hidden states; tokenization is included.
transformers computes them in padded batches, sorted by length (as sentence-transformers does).
The sides alternate in one process over several rounds; figures are medians, ratios those of the
medians.

    python benchmarks/engine/embeddings.py [--rounds 3] [--dtype float32]
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from portalm import LLM
from portalm.config import DEFAULT_ENCODER
from portalm.models.hub import resolve_model

NUM_TEXTS, BATCH = 256, 32
RESULTS = Path(__file__).parents[1] / "results"
TEXT = "the sea a ship under grey clouds went slowly home and nobody on shore saw its light"


def make_texts(seed: int) -> list[str]:
    """Return texts of 3 to 220 words, mostly short, some near the encoder's limit."""
    rng = random.Random(seed)
    words = TEXT.split()
    lengths = [min(220, 3 + int(rng.expovariate(1 / 30))) for _ in range(NUM_TEXTS)]
    return [" ".join(rng.choice(words) for _ in range(length)) for length in lengths]


class Transformers:
    """transformers with static batches of texts of similar length."""

    def __init__(self, dtype: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = resolve_model(DEFAULT_ENCODER)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> torch.Tensor:
        """Return the vectors, float32 [N, C]."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out = torch.empty(len(texts), self.model.config.hidden_size)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            batch = self.tokenizer([texts[i] for i in rows], padding=True, return_tensors="pt")
            hidden = self.model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None]
            out[rows] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
        return out


class PortaLM:
    """PortaLM through its offline API."""

    def __init__(self, dtype: str) -> None:
        self.llm = LLM(DEFAULT_ENCODER, dtype=dtype, use_tqdm=False)

    def embed(self, texts: list[str]) -> torch.Tensor:
        """Return the vectors, float32 [N, C]."""
        outputs = self.llm.embed(texts, use_tqdm=False)
        return torch.tensor([output.outputs.embedding for output in outputs])


def rate(embed: Callable[[list[str]], torch.Tensor], texts: list[str]) -> float:
    """Measure texts per second."""
    started = time.perf_counter()
    embed(texts)
    return len(texts) / (time.perf_counter() - started)


def main() -> None:
    """Measure, print and write a result file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()

    ours, theirs = PortaLM(options.dtype), Transformers(options.dtype)
    texts = make_texts(0)
    difference = (ours.embed(texts[:32]) - theirs.embed(texts[:32])).abs().max()
    assert difference < (1e-4 if options.dtype == "float32" else 0.05), float(difference)

    num_threads = torch.get_num_threads()
    rounds: dict[str, list[float]] = {"portalm": [], "portalm_server": [], "transformers": []}
    for i in range(options.rounds):
        texts = make_texts(i + 1)
        rounds["portalm"].append(rate(ours.embed, texts))
        torch.set_num_threads(
            1
        )  # as in the server's engine process, whose only threads are the kernels' own
        rounds["portalm_server"].append(rate(ours.embed, texts))
        torch.set_num_threads(num_threads)
        rounds["transformers"].append(rate(theirs.embed, texts))
        print({name: round(values[-1], 1) for name, values in rounds.items()}, flush=True)
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    ready = ours.llm.engine.ready
    today = datetime.date.today().isoformat()
    result = {
        "what": f"{NUM_TEXTS} texts of 3 to 220 words to normalised vectors; transformers in "
        f"padded batches of {BATCH} sorted by length",
        "model": DEFAULT_ENCODER,
        "dtype": options.dtype,
        "date": today,
        "machine": platform.machine(),
        "cpu": ready.device_summary,
        "torch": torch.__version__,
        "threads": num_threads,
        "texts_per_second": rounds,
        "medians": medians,
        "ratios": {
            name: medians[name] / medians["transformers"] for name in ("portalm", "portalm_server")
        },
    }
    path = RESULTS / f"{today}-embeddings-{options.dtype}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"medians": medians, "ratios": result["ratios"]}, indent=1))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
