// The page: a chat, the server's status, and a dialog for the API key.

import { apiKey } from "./api.js";
import { Chat } from "./chat.js";
import { Status } from "./status.js";

const USABLE = new Set(["ready", "unhealthy"]); // while an engine restarts, requests wait

const $ = (id) => document.getElementById(id);

const chat = new Chat(() => askForKey());
const status = new Status((state) => {
  chat.isUsable = USABLE.has(state);
  if (state === "locked") askForKey();
  $("forget-key").hidden = !apiKey.get();
});

function askForKey() {
  $("key-reason").textContent = apiKey.get()
    ? "This API key is not valid."
    : "This server requires an API key.";
  apiKey.forget();
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey.set($("key").value);
  $("key").value = "";
  $("key-dialog").close();
  status.retry();
});
$("key-cancel").addEventListener("click", () => $("key-dialog").close());
$("enter-key").addEventListener("click", askForKey);
$("forget-key").addEventListener("click", () => {
  apiKey.forget();
  status.retry();
});

for (const view of ["chat", "status"]) {
  $(`show-${view}`).addEventListener("click", () => {
    document.body.dataset.view = view;
    $("show-chat").setAttribute("aria-pressed", String(view === "chat"));
    $("show-status").setAttribute("aria-pressed", String(view === "status"));
  });
}

status.ask();
$("prompt").focus();
