"""Hugging Face transformers: `generate` with static batches."""

from __future__ import annotations

import sys
import time
from importlib import import_module
from typing import Any

from peers.base import Answer, Model, Venv, torch_dtype
from peers.worker import Generate, WorkerPeer, serve_calls


class Transformers(WorkerPeer):
    """Static batches without a server: a batch ends before the next one starts."""

    name = "transformers"
    module = "peers.transformers"
    formats = ("bf16",)

    def install(self) -> str:
        """Install torch and transformers."""
        venv = Venv(self.settings, self.name)
        venv.install(["transformers", "safetensors"])
        return f"{venv.version('transformers')} in {torch_dtype()}"

    def arguments(self, model: Model, fmt: str) -> list[str]:
        """Return the worker's arguments: the folder and the dtype."""
        return [str(model.folder), torch_dtype()]


def load() -> Generate:
    """Load the model; return the function that answers prompts."""
    torch: Any = import_module("torch")
    transformers: Any = import_module("transformers")
    dtype = getattr(torch, sys.argv[2])
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype)
    model.eval()

    class FirstToken:
        """A streamer that records the time of the first token."""

        def __init__(self) -> None:
            self.first: float | None = None
            self.has_prompt = False

        def put(self, value: Any) -> None:
            if not self.has_prompt:
                self.has_prompt = True  # transformers emits the prompt first
            elif self.first is None:
                self.first = time.monotonic()

        def end(self) -> None:
            pass

    def generate(prompts: list[list[int]], num_out: int, concurrency: int) -> list[Answer]:
        answers = []
        for start in range(0, len(prompts), concurrency):
            ids = torch.tensor(prompts[start : start + concurrency])
            streamer = FirstToken() if len(ids) == 1 else None  # streamers do not support batches
            sent = time.monotonic()
            with torch.inference_mode():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=num_out,
                    min_new_tokens=num_out,
                    do_sample=False,
                    pad_token_id=0,
                    streamer=streamer,
                )
            last = time.monotonic()
            first = streamer.first if streamer is not None and streamer.first else last
            answers += [
                Answer(sent, first, last, len(row), token_ids=tuple(row))
                for row in out[:, ids.shape[1] :].tolist()
            ]
        return answers

    return generate


if __name__ == "__main__":
    serve_calls(load)
