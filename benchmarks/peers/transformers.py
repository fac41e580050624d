"""Hugging Face transformers: `generate`, in static batches."""

from __future__ import annotations

import sys
import time
from importlib import import_module
from typing import Any

from peers.base import Answer, Model, Venv, torch_dtype
from peers.worker import Generate, WorkerPeer, serve_calls


class Transformers(WorkerPeer):
    """A batch ends before the next one begins; there is no server."""

    name = "transformers"
    module = "peers.transformers"
    formats = ("bf16",)

    def install(self) -> str:
        """torch and transformers."""
        venv = Venv(self.settings, self.name)
        venv.install(["transformers", "safetensors"])
        return f"{venv.version('transformers')} in {torch_dtype()}"

    def arguments(self, model: Model, fmt: str) -> list[str]:
        """The folder and the dtype to compute in."""
        return [str(model.folder), torch_dtype()]


def load() -> Generate:
    """The model, and what answers with it."""
    torch: Any = import_module("torch")
    transformers: Any = import_module("transformers")
    dtype = getattr(torch, sys.argv[2])
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype)
    model.eval()

    class FirstToken:
        """A streamer of which only the time of the first token is used."""

        def __init__(self) -> None:
            self.first: float | None = None
            self.has_prompt = False

        def put(self, value: Any) -> None:
            if not self.has_prompt:
                self.has_prompt = True  # transformers puts the prompt first
            elif self.first is None:
                self.first = time.monotonic()

        def end(self) -> None:
            pass

    def generate(prompts: list[list[int]], num_out: int, concurrency: int) -> list[Answer]:
        answers = []
        for start in range(0, len(prompts), concurrency):
            ids = torch.tensor(prompts[start : start + concurrency])
            streamer = FirstToken() if len(ids) == 1 else None  # it takes no batches
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
