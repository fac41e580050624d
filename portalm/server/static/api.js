// Talking to the server: the API key, what it says of itself, streams of answers, errors in words.

const KEY = "portalm-api-key";

/** The API key, kept for as long as the tab is. */
export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => sessionStorage.setItem(KEY, key),
  forget: () => sessionStorage.removeItem(KEY),
};

/** The server answered, and not with what was asked for. */
export class Refused extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** The server did not answer, or stopped in the middle. */
export class Unreachable extends Error {}

async function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  if (apiKey.get()) headers.set("Authorization", `Bearer ${apiKey.get()}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable("the server does not answer");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const message = body.error?.message ?? `status ${response.status}`;
  throw new Refused(response.status, message, response.headers.get("Retry-After"));
}

/** What the server says of itself, as /status has it. */
export async function getStatus() {
  const response = await ask("status", { signal: AbortSignal.timeout(10_000) }).catch((error) => {
    throw error.name === "TimeoutError" ? new Unreachable("the server does not answer") : error;
  });
  return response.json();
}

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      yield* parts;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable("the connection was lost in the middle of the answer");
  } finally {
    await reader.cancel().catch(() => {}); // a stream that has failed has nothing to cancel
  }
}

/** The chunks of a streamed chat completion; leaving the loop or aborting `signal` ends it. */
export async function* streamChat(body, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      ...body,
      stream: true,
      stream_options: { continuous_usage_stats: true },
    }),
    signal,
  });
  for await (const line of lines(response)) {
    if (line === "data: [DONE]") return;
    if (!line.startsWith("data: ")) continue;
    const chunk = JSON.parse(line.slice(6));
    if (chunk.error) throw new Refused(500, chunk.error.message);
    yield chunk;
  }
  throw new Unreachable("the connection was lost in the middle of the answer");
}

/** What went wrong, for a person. */
export function inWords(error) {
  if (error instanceof Unreachable) {
    return `No connection: ${error.message}. It may have ended or be starting again; try again in a moment.`;
  }
  if (!(error instanceof Refused)) return `This page failed: ${error.message}`;
  const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  if (error.status === 401) return "The server asks for a valid API key.";
  if (error.status === 413) return `Too long: ${error.message}`;
  if (error.status === 429) return `The server is busy: ${error.message}.${wait}`;
  if (error.status === 503) return `The server cannot answer now: ${error.message}.${wait}`;
  if (error.status < 500) return `The server refused this: ${error.message}`;
  return `The server failed on this: ${error.message}`;
}
