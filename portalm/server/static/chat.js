// A conversation: its messages, the answer being streamed, and the buttons that control it.

import { errorText, Refused, streamChat } from "./api.js";
import { showMarkdown } from "./markdown.js";

const SAVED = "portalm-conversation";

const ENDS = {
  length: "truncated: the maximum number of tokens or the end of the context was reached",
  abort: "truncated: the server aborted it",
  stopped: "stopped",
};

const $ = (id) => document.getElementById(id);

export class Chat {
  #messages = []; // {role, content}; answers also have {thoughts, figures}
  #onLocked;
  #isUsable = false;
  #answering = null; // AbortController of the answer being streamed

  /** `onLocked()` is called when the server asks for an API key. */
  constructor(onLocked) {
    this.#onLocked = onLocked;
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    $("prompt").addEventListener("keydown", (event) => {
      // with an input method, Enter may confirm a character: that one does not send
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    $("prompt").addEventListener("input", () => fitHeight($("prompt")));
    $("stop").addEventListener("click", () => this.#answering?.abort());
    $("regenerate").addEventListener("click", () => this.regenerate());
    $("clear").addEventListener("click", () => this.clear());
    this.#messages = JSON.parse(sessionStorage.getItem(SAVED) ?? "[]");
    for (const message of this.#messages) this.#append(message);
    this.#update();
  }

  /** Whether a message may be sent now. */
  set isUsable(isUsable) {
    this.#isUsable = isUsable;
    this.#update();
  }

  /** Send the text of the input box. */
  async send() {
    const content = $("prompt").value.trim();
    if (!content || !this.#isUsable || this.#answering) return;
    $("prompt").value = "";
    fitHeight($("prompt"));
    this.#messages.push({ role: "user", content });
    this.#append(this.#messages.at(-1));
    await this.#answer();
  }

  /** Generate another answer to the last message. */
  async regenerate() {
    if (!this.#isUsable || this.#answering) return;
    for (const error of $("messages").querySelectorAll(".error")) error.remove();
    if (this.#messages.at(-1)?.role === "assistant") {
      this.#messages.pop();
      [...$("messages").querySelectorAll(".assistant")].at(-1).remove();
    }
    await this.#answer();
  }

  /** Delete the conversation. */
  clear() {
    this.#answering?.abort();
    this.#messages = [];
    for (const node of $("messages").querySelectorAll("article")) node.remove();
    this.#save();
    $("prompt").focus();
  }

  async #answer() {
    const messages = this.#messages; // `clear` replaces the list
    const abort = new AbortController();
    const answer = { role: "assistant", content: "", thoughts: "", figures: "" };
    const article = this.#append(answer);
    article.setAttribute("aria-busy", "true"); // screen readers wait until it is complete
    this.#answering = abort;
    this.#update();
    $("progress").textContent = "Answering…";
    const show = onceAFrame(() => {
      const isAtEnd = atEnd($("messages"));
      showMessage(article, answer);
      if (isAtEnd) scrollToEnd($("messages"));
    });
    try {
      await stream(requestOf(messages), answer, abort.signal, show);
    } catch (error) {
      if (messages === this.#messages) this.#fail(error);
    }
    show.now();
    article.removeAttribute("aria-busy");
    const isKept = answer.content || answer.thoughts;
    if (isKept && messages === this.#messages) messages.push(answer);
    if (!isKept) article.remove();
    this.#answering = null;
    $("progress").textContent = "";
    this.#save();
  }

  #fail(error) {
    if (error instanceof Refused && error.status === 401) this.#onLocked();
    const node = document.createElement("article");
    node.className = "error";
    node.setAttribute("role", "alert");
    node.textContent = errorText(error);
    $("messages").append(node);
    scrollToEnd($("messages"));
  }

  #append(message) {
    const article = document.createElement("article");
    article.className = message.role;
    const who = document.createElement("h3");
    who.className = "unseen";
    who.textContent = message.role === "user" ? "You" : "Answer";
    const body = document.createElement("div");
    body.className = "body";
    article.append(who, body);
    if (message.role === "assistant") {
      const thoughts = document.createElement("details");
      thoughts.className = "thoughts";
      const summary = document.createElement("summary");
      summary.textContent = "Thoughts";
      thoughts.append(summary, document.createElement("div"));
      body.before(thoughts);
      const figures = document.createElement("p");
      figures.className = "figures";
      article.append(figures);
    }
    showMessage(article, message);
    $("messages").append(article);
    scrollToEnd($("messages"));
    return article;
  }

  #save() {
    try {
      sessionStorage.setItem(SAVED, JSON.stringify(this.#messages));
    } catch {
      sessionStorage.removeItem(SAVED);
      $("progress").textContent = "The conversation is too long to be restored if this tab is reloaded.";
    }
    this.#update();
  }

  #update() {
    const isFree = this.#answering === null;
    $("hint").hidden = this.#messages.length > 0;
    $("send").hidden = !isFree;
    $("stop").hidden = isFree;
    $("send").disabled = !this.#isUsable;
    $("regenerate").disabled = !this.#isUsable || !isFree || !this.#messages.length;
    $("clear").disabled = !this.#messages.length;
  }
}

/** Body of the request: the page's settings and the conversation so far. */
function requestOf(conversation) {
  const body = { messages: conversation.map(({ role, content }) => ({ role, content })) };
  const system = $("system").value.trim();
  if (system) body.messages.unshift({ role: "system", content: system });
  if ($("temperature").value) body.temperature = Number($("temperature").value);
  if ($("max-tokens").value) body.max_tokens = Number($("max-tokens").value);
  return body;
}

/** Fill `answer` from the stream. Throws any error except that of the Stop button. */
async function stream(body, answer, signal, show) {
  const asked = performance.now();
  let first = null; // {time, tokens} at the first text
  let last = null;
  let end = "";
  const figures = () => {
    const parts = [];
    if (last !== null) {
      parts.push(`${last.tokens.toLocaleString("en")} token${last.tokens === 1 ? "" : "s"}`);
      const seconds = (last.time - first.time) / 1000;
      if (seconds > 0) parts.push(`${((last.tokens - first.tokens) / seconds).toFixed(1)} tokens/s`);
      parts.push(`first token after ${Math.round(first.time - asked)} ms`);
    }
    if (ENDS[end]) parts.push(ENDS[end]);
    return parts.join(" · ");
  };
  try {
    for await (const chunk of streamChat(body, signal)) {
      const [choice] = chunk.choices;
      const content = choice?.delta.content ?? "";
      const thought = choice?.delta.reasoning_content ?? "";
      if (content || thought) {
        last = { time: performance.now(), tokens: chunk.usage.completion_tokens };
        first ??= last;
        answer.content += content;
        answer.thoughts += thought;
      }
      end = choice?.finish_reason ?? end;
      answer.figures = figures();
      show();
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    end = "stopped";
    answer.figures = figures();
  }
}

function showMessage(article, message) {
  const body = article.querySelector(".body");
  if (message.role === "user") body.textContent = message.content;
  else {
    article.querySelector(".thoughts").hidden = !message.thoughts;
    article.querySelector(".thoughts div").textContent = message.thoughts;
    showMarkdown(body, message.content);
    article.querySelector(".figures").textContent = message.figures;
  }
}

/** Run `work` at most once per animation frame; `.now()` runs it at once. */
function onceAFrame(work) {
  let frame = null;
  const later = () => {
    frame ??= requestAnimationFrame(later.now);
  };
  later.now = () => {
    cancelAnimationFrame(frame);
    frame = null;
    work();
  };
  return later;
}

function atEnd(node) {
  return node.scrollHeight - node.scrollTop - node.clientHeight < 40;
}

function scrollToEnd(node) {
  node.scrollTop = node.scrollHeight;
}

function fitHeight(textarea) {
  textarea.style.height = "auto";
  textarea.style.height = `${textarea.scrollHeight + 2}px`;
}
