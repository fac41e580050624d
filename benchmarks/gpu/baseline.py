"""The 8B shape in transformers: a static cache and torch.compile; continuous batching.

It takes minutes, so gpu_run.py runs it only where --only names it.
"""

from __future__ import annotations

import random
import time
from typing import Any

import torch

from gpu.common import Clock, Settings, report, run_sections, settings
from gpu.lengths import lengths_like_sharegpt


class Transformers:
    """The sections."""

    def __init__(self, run: Settings) -> None:
        """Make the model with random weights."""
        import transformers

        self.hf: Any = transformers
        self.run = run
        config = {k: v for k, v in run.model("8b").items() if k != "torch_dtype"}
        self.config = self.hf.LlamaConfig(**config)
        self.device = "cpu" if run.is_tiny else "cuda"
        with torch.device(self.device):
            model = self.hf.LlamaForCausalLM(self.config)
        self.model = model.to(torch.float32 if run.is_tiny else torch.bfloat16).eval()

    def one_stream(self, clock: Clock) -> None:
        """Measure one stream with a static cache, which generate compiles."""
        run = self.run
        shape = (1, run.scaled(512, 16))
        ids = torch.randint(3, self.config.vocab_size, shape, device=self.device)
        num_out = run.scaled(128, 4)
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        if not run.is_tiny:
            options["cache_implementation"] = "static"
        taken = 0.0
        for _ in range(2 if not run.is_tiny else 1):
            begin = time.perf_counter()
            self.model.generate(ids, max_new_tokens=num_out, min_new_tokens=num_out, **options)
            if not run.is_tiny:
                torch.cuda.synchronize()
            taken = time.perf_counter() - begin
        report("transformers: one stream, static cache", num_out / taken, "tok/s")

    def batching(self, clock: Clock) -> None:
        """Measure continuous batching."""
        if self.run.is_tiny or not hasattr(self.model, "generate_batch"):
            text = "skipped: it needs a GPU and a version of transformers with generate_batch"
            report("transformers: continuous batching", None, message=text)
            return
        count = 200
        rng = random.Random(0)
        prompts = [
            [rng.randrange(3, self.config.vocab_size) for _ in range(min(p, 1024))]
            for p, _ in lengths_like_sharegpt(1000)[:count]
        ]
        config = self.hf.GenerationConfig(
            max_new_tokens=198, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        begin = time.perf_counter()
        answers = self.model.generate_batch(inputs=prompts, generation_config=config)
        taken = time.perf_counter() - begin
        num_tokens = sum(len(answer.generated_tokens) for answer in answers.values())
        name = f"transformers: continuous batching, {count} requests"
        report(name, num_tokens / taken, "tok/s")


def main() -> None:
    """Run the selected sections."""
    run = settings()
    part = Transformers(run)
    run_sections(run, {"one stream": part.one_stream, "continuous batching": part.batching})


if __name__ == "__main__":
    main()
