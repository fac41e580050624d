"""Rank texts by how similar they are to a question."""

from portalm import LLM

llm = LLM("sentence-transformers/all-MiniLM-L6-v2")
question = "How do I reset my password?"
texts = [
    "Our office is open from nine to five.",
    "Choose 'forgot password' on the sign-in page to get a new one.",
    "Parking is free for visitors.",
]
scores = [output.outputs.score for output in llm.score(question, texts)]
for score, text in sorted(zip(scores, texts, strict=True), reverse=True):
    print(f"{score:.3f}  {text}")
