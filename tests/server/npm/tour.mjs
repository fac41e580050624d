// Typical calls of the npm openai SDK against the server at OPENAI_BASE_URL (the default
// model, with the API key in OPENAI_API_KEY) and, for embeddings, at EMBEDDINGS_BASE_URL.

import assert from 'node:assert/strict';
import { test } from 'node:test';
import OpenAI, { AuthenticationError, BadRequestError, NotFoundError } from 'openai';
import { zodResponseFormat } from 'openai/helpers/zod';
import { z } from 'zod';

const client = new OpenAI({ maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: 'user', content: 'What is the capital of France?' }];
const asked = { model, messages, temperature: 0, max_completion_tokens: 24 };

test('models are listed and found by name', async () => {
  assert.equal((await client.models.retrieve(model)).id, model);
});

test('a chat is answered', async () => {
  const answer = await client.chat.completions.create(asked);

  assert.match(answer.choices[0].message.content, /Paris/);
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
});

test('a streamed chat is the same answer', async () => {
  const whole = await client.chat.completions.create(asked);
  const options = { stream: true, stream_options: { include_usage: true } };
  let [text, usage, reasons] = ['', null, []];

  for await (const chunk of await client.chat.completions.create({ ...asked, ...options })) {
    text += chunk.choices[0]?.delta.content ?? '';
    usage = chunk.usage ?? usage;
    reasons.push(chunk.choices[0]?.finish_reason ?? null);
  }

  assert.equal(text, whole.choices[0].message.content);
  assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
  assert.deepEqual(reasons.filter((one) => one !== null), [whole.choices[0].finish_reason]);
});

test('the stream helper collects the message', async () => {
  const pieces = [];
  const stream = client.chat.completions.stream(asked).on('content', (piece) => pieces.push(piece));

  const message = await stream.finalMessage();

  assert.match(message.content, /Paris/);
  assert.equal(pieces.join(''), message.content);
});

test('a text is completed, whole and streamed, with logprobs', async () => {
  const body = { model, prompt: 'Once upon a time', max_tokens: 8, seed: 5, logprobs: 2 };
  const whole = await client.completions.create(body);
  let text = '';

  for await (const chunk of await client.completions.create({ ...body, stream: true })) {
    text += chunk.choices[0].text;
  }

  assert.equal(text, whole.choices[0].text);
  assert.equal(whole.choices[0].logprobs.tokens.join(''), text);
});

test('a chat has logprobs', async () => {
  const answer = await client.chat.completions.create({ ...asked, logprobs: true, top_logprobs: 3 });
  const [first] = answer.choices[0].logprobs.content;

  assert.equal(answer.choices[0].logprobs.content.length, answer.usage.completion_tokens);
  assert.ok(first.top_logprobs.length >= 3 && first.logprob <= 0);
});

test('an answer is parsed into its schema', async () => {
  const City = z.object({ name: z.string().max(20), capital: z.boolean() });
  const format = zodResponseFormat(City, 'city');

  const answer = await client.chat.completions.parse({
    ...asked, max_completion_tokens: 60, response_format: format,
  });

  assert.equal(typeof answer.choices[0].message.parsed.name, 'string');
  assert.equal(typeof answer.choices[0].message.parsed.capital, 'boolean');
});

const weather = {
  type: 'function',
  function: {
    name: 'get_weather',
    parameters: {
      type: 'object',
      properties: { city: { type: 'string', enum: ['Paris', 'Oslo'] } },
      required: ['city'],
    },
  },
};

test('a required tool call fits its schema, whole and streamed', async () => {
  const body = {
    ...asked, max_completion_tokens: 60, tools: [weather], tool_choice: 'required',
    parallel_tool_calls: false,
  };

  const whole = await client.chat.completions.create(body);
  const streamed = await client.chat.completions.stream(body).finalMessage();

  assert.equal(whole.choices[0].finish_reason, 'tool_calls');
  for (const [call] of [whole.choices[0].message.tool_calls, streamed.tool_calls]) {
    assert.equal(call.function.name, 'get_weather');
    assert.ok(['Paris', 'Oslo'].includes(JSON.parse(call.function.arguments).city));
  }
});

test('a response streams, is stored, and can be continued', async () => {
  const first = await client.responses.stream({
    model, input: 'What is the capital of France?', max_output_tokens: 24, temperature: 0,
  }).finalResponse();
  const kept = await client.responses.retrieve(first.id);
  const second = await client.responses.create({
    model, input: 'Say it again.', previous_response_id: first.id, max_output_tokens: 8,
  });

  assert.match(kept.output_text ?? kept.output[0].content[0].text, /Paris/);
  assert.ok(second.usage.input_tokens > first.usage.total_tokens);
});

test('texts are embedded', async () => {
  const encoder = new OpenAI({ baseURL: process.env.EMBEDDINGS_BASE_URL, maxRetries: 0 });
  const input = ['A man is eating food.', 'Someone is having a meal.', 'Stocks fell on Monday.'];

  const answer = await encoder.embeddings.create({ model: 'encoder', input });

  const [food, meal, market] = answer.data.map((one) => one.embedding);
  const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  assert.ok(dot(food, meal) > dot(food, market) + 0.2);
});

test('errors are those of the SDK', async () => {
  const refused = { ...asked, temperature: -1 };

  await assert.rejects(client.chat.completions.create(refused), (error) => {
    assert.ok(error instanceof BadRequestError);
    assert.equal(error.param, 'temperature');
    return true;
  });
  await assert.rejects(client.chat.completions.create({ ...asked, model: 'other' }), NotFoundError);
  const stranger = new OpenAI({ apiKey: 'wrong', maxRetries: 0 });
  await assert.rejects(stranger.models.list(), AuthenticationError);
});

test('a stream can be canceled', async () => {
  const stream = await client.completions.create({
    model, prompt: 'Once', max_tokens: 1500, stream: true,
  });
  let num_chunks = 0;

  for await (const chunk of stream) {
    if (chunk.choices.length && ++num_chunks === 3) break;
  }

  assert.ok(stream.controller.signal.aborted);
  assert.match((await client.chat.completions.create(asked)).choices[0].message.content, /Paris/);
});
