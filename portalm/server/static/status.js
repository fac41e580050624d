// The server's status as text and plots, updated every second while the page is visible.

import { getStatus, Refused, Unreachable } from "./api.js";
import { Plot } from "./plot.js";

const POLL_MS = 1000;

const WORDS = {
  connecting: "connecting",
  loading: "loading",
  ready: "ready",
  draining: "shutting down",
  unhealthy: "unhealthy",
  unreachable: "no connection",
  locked: "API key needed",
};

const $ = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
const rate = (value) => (value < 10 ? value.toFixed(1) : Math.round(value).toLocaleString("en"));
const count = (value) => value.toLocaleString("en");

export class Status {
  /** loading, ready, draining or unhealthy (as in /status), or unreachable, locked, connecting. */
  state = "connecting";
  #onState;
  #before = null;
  #timer = null;
  #isAsking = false;
  #tokens = new Plot($("tokens-plot"), { colors: ["--plot-a", "--plot-b"] });
  #requests = new Plot($("requests-plot"), { colors: ["--plot-a", "--plot-b"] });
  #kv = new Plot($("kv-plot"), {
    colors: ["--plot-a", "--plot-b"],
    format: (value) => `${value} %`,
  });

  /** `onState(state)` is called when the state changes. */
  constructor(onState) {
    this.#onState = onState;
    document.addEventListener("visibilitychange", () => this.ask());
  }

  /** Update now and then every second, except while the tab is hidden or a key is missing. */
  async ask() {
    clearTimeout(this.#timer);
    if (document.hidden || this.#isAsking) return;
    this.#isAsking = true;
    try {
      this.#show(await getStatus());
    } catch (error) {
      if (!this.#fail(error)) return;
    } finally {
      this.#isAsking = false;
    }
    this.#timer = setTimeout(() => this.ask(), POLL_MS);
  }

  /** Start again with another API key. */
  retry() {
    this.#setState("connecting", "");
    return this.ask();
  }

  /** Show an error; returns whether to try again. */
  #fail(error) {
    if (error instanceof Refused && error.status === 401) {
      this.#setState("locked", "This server requires an API key.");
      return false;
    }
    if (!(error instanceof Refused || error instanceof Unreachable)) throw error;
    this.#before = null;
    this.#setState("unreachable", `No connection: ${error.message}. Retrying every second.`);
    return true;
  }

  #show(status) {
    this.#setState(status.state, status.reason, status.loading);
    $("model").textContent = $("model-name").textContent = status.model;
    document.title = `${status.model} · PortaLM`;
    $("uptime").textContent = duration(status.uptime_s);
    $("restarts").textContent = status.engine_restarts;
    $("version").textContent = status.version;
    if (status.engine !== null) this.#showEngine(status.engine);
    this.#showLoad(status.load);
  }

  #showEngine(engine) {
    $("device").textContent = `${engine.device}: ${engine.device_summary}`;
    $("dtype").textContent = engine.dtype;
    $("context").textContent = `${count(engine.max_model_len)} tokens`;
    $("kv-room").textContent = `${count(engine.kv_tokens)} tokens`;
  }

  #showLoad(load) {
    const before = this.#before;
    this.#before = load;
    $("num-running").textContent = load.num_running;
    $("num-waiting").textContent = load.num_waiting;
    $("kv-used").textContent = percent(load.kv_used);
    $("kv-cached").textContent = percent(load.kv_cached);
    $("prefix-hits").textContent = load.prefix_queries_total
      ? percent(load.prefix_hits_total / load.prefix_queries_total)
      : "–";
    this.#requests.add(
      load.time_s,
      [load.num_running, load.num_waiting],
      `requests: ${load.num_running} running, ${load.num_waiting} waiting`,
    );
    this.#kv.add(
      load.time_s,
      [100 * load.kv_used, 100 * load.kv_cached],
      `KV cache: ${percent(load.kv_used)} in use, ${percent(load.kv_cached)} cached`,
    );
    if (before === null || load.time_s <= before.time_s) return;
    const perSecond = (name) => (load[name] - before[name]) / (load.time_s - before.time_s);
    const [generated, prompt] = [perSecond("generation_tokens_total"), perSecond("prompt_tokens_total")];
    $("generated-rate").textContent = rate(generated);
    $("prompt-rate").textContent = rate(prompt);
    this.#tokens.add(
      load.time_s,
      [generated, prompt],
      `tokens per second: ${rate(generated)} generated, ${rate(prompt)} prompt`,
    );
  }

  #setState(state, reason, loading = null) {
    $("notice").hidden = !reason;
    setText($("notice-text"), reason ?? "");
    $("loading").hidden = loading === null;
    $("loading").value = loading?.share ?? 0;
    $("enter-key").hidden = state !== "locked";
    if (state === this.state) return;
    this.state = state;
    $("state").dataset.state = state;
    $("state").textContent = WORDS[state];
    this.#onState(state);
  }
}

/** Write only changed text: screen readers announce every write. */
function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function duration(seconds) {
  const parts = [
    [Math.floor(seconds / 86400), "d"],
    [Math.floor(seconds / 3600) % 24, "h"],
    [Math.floor(seconds / 60) % 60, "min"],
    [Math.floor(seconds) % 60, "s"],
  ];
  const first = parts.findIndex(([number]) => number > 0);
  return parts
    .slice(first < 0 ? 3 : first)
    .slice(0, 2)
    .map(([number, unit]) => `${number} ${unit}`)
    .join(" ");
}
