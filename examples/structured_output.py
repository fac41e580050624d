"""Get JSON that matches a schema."""

import json

from portalm import LLM, SamplingParams
from portalm.sampling_params import StructuredOutputs

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "population": {"type": "integer"}},
    "required": ["city", "population"],
}

llm = LLM(max_model_len=2048)
params = SamplingParams(
    temperature=0, max_tokens=64, structured_outputs=StructuredOutputs(json=SCHEMA)
)
[output] = llm.chat(
    [{"role": "user", "content": "Describe Paris as JSON with city and population."}], params
)
print(json.loads(output.outputs[0].text))
