"""Answer several prompts in one batch."""

from portalm import LLM, SamplingParams

llm = LLM()
prompts = ["The capital of France is", "The opposite of hot is"]
for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8)):
    print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
