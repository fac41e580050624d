// Calls to the server: the API key, its status, streamed answers, and texts of errors.

const KEY = "portalm-api-key";

/** The API key, stored until the tab is closed. */
export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => sessionStorage.setItem(KEY, key),
  forget: () => sessionStorage.removeItem(KEY),
};

/** The server responded with an error. */
export class Refused extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** The server did not respond, or the connection was lost. */
export class Unreachable extends Error {}

async function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  if (apiKey.get()) headers.set("Authorization", `Bearer ${apiKey.get()}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable("the server does not respond");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const message = body.error?.message ?? `status ${response.status}`;
  throw new Refused(response.status, message, response.headers.get("Retry-After"));
}

/** The server's status, from /status. */
export async function getStatus() {
  const response = await ask("status", { signal: AbortSignal.timeout(10_000) }).catch((error) => {
    throw error.name === "TimeoutError" ? new Unreachable("the server does not respond") : error;
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
    throw new Unreachable("the connection was lost during the answer");
  } finally {
    await reader.cancel().catch(() => {}); // a failed stream cannot be canceled
  }
}

/** Chunks of a streamed chat completion. Leaving the loop or aborting `signal` ends it. */
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
  throw new Unreachable("the connection was lost during the answer");
}

/** Text of an error for the user. */
export function errorText(error) {
  if (error instanceof Unreachable) {
    return `No connection: ${error.message}. It may have shut down or be restarting. Try again in a moment.`;
  }
  if (!(error instanceof Refused)) return `This page failed: ${error.message}`;
  const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  if (error.status === 401) return "The server requires a valid API key.";
  if (error.status === 413) return `Too long: ${error.message}`;
  if (error.status === 429) return `The server is busy: ${error.message}.${wait}`;
  if (error.status === 503) return `The server is not available now: ${error.message}.${wait}`;
  if (error.status < 500) return `The server refused the request: ${error.message}`;
  return `The server failed on the request: ${error.message}`;
}
