"""The oracle of parity tests: greedy answers of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

NUM_OUT = 64
LENGTHS = (
    1, 2, 3, 5, 8, 13, 16, 17, 31, 32, 33, 64, 100, 128, 200, 255, 400, 700, 1024, 1500,
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """The answer of transformers to a prompt, in float32."""

    prompt: list[int]
    token_ids: list[int]
    margins: list[float]
    """Logit of the chosen token minus that of the second best, at each position."""


class Oracle:
    """The default model in transformers, from the same dequantized GGUF weights."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = (str(path.parent), {"gguf_file": path.name})
        self.tokenizer = AutoTokenizer.from_pretrained(source[0], **source[1])
        self.models = {
            dtype: AutoModelForCausalLM.from_pretrained(source[0], **source[1], dtype=dtype).eval()
            for dtype in (torch.float32, torch.bfloat16)
        }

    def answer(self, prompt: list[int]) -> Answer:
        """Generate 64 greedy tokens, ignoring end of sequence."""
        with torch.inference_mode():
            out = self.models[torch.float32].generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NUM_OUT,
                min_new_tokens=NUM_OUT,
                eos_token_id=-1,
                do_sample=False,
                repetition_penalty=1.0,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        top = [logits[0].float().topk(2).values for logits in out.logits]
        return Answer(
            prompt,
            out.sequences[0, len(prompt) :].tolist(),
            [float(t[0] - t[1]) for t in top],
        )

    def bf16_noise(self, token_ids: list[int]) -> float:
        """Maximum difference that bfloat16 makes to a logit after these tokens."""
        ids = torch.tensor([token_ids])
        with torch.inference_mode():
            exact, rough = (
                self.models[dtype](ids, logits_to_keep=1).logits[0, -1].float()
                for dtype in (torch.float32, torch.bfloat16)
            )
        return float((exact - rough).abs().max())
