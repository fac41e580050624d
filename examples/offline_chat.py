"""Stream an answer to a conversation."""

from portalm import LLM, SamplingParams

llm = LLM(max_model_len=2048)
messages = [
    {"role": "system", "content": "You answer in one sentence."},
    {"role": "user", "content": "What is the capital of France?"},
]
prompt = llm.get_tokenizer().apply_chat_template(messages, add_generation_prompt=True)
for delta in llm.stream(prompt, SamplingParams(temperature=0, max_tokens=32)):
    print(delta.text, end="", flush=True)
print()
