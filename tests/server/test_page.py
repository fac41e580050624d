"""The page at /: what it may load, and what it shows in a real browser."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from portalm.config import EngineConfig
from portalm.engine.client import EngineClient
from portalm.server.app import build_app
from portalm.server.observability.metrics import Metrics
from portalm.server.state import ServerState
from tests.server.conftest import ENDLESS, RunningServer, make_model_folder, running_server

KEY = "sesame"
FILES = sorted((Path(__file__).parents[2] / "portalm/server/static").iterdir())
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")

needs_browser = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER),
    reason="no chromium and chromedriver here: apt-get install chromium chromium-driver",
)


# -- over HTTP ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = make_model_folder(tmp_path_factory.mktemp("page") / "tiny")
    flags = ("--device", "null", "--load-format", "dummy", "--api-key", KEY)
    with running_server(str(folder), "--served-model-name", "tiny", *flags) as server:
        yield server


def test_page_needs_no_key_and_loads_only_its_own_files(locked_server) -> None:
    with locked_server.client() as http:
        page = http.get("/")
        named = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        files = [http.get(f"/{name}") for name in named]

    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert len(named) >= 3 and all(name.startswith("static/") for name in named)
    assert [file.status_code for file in files] == [200] * len(named)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_of_the_page_name_no_other_host(path: Path) -> None:
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg\")[\w.]+", path.read_text()) == []
    assert "innerHTML" not in path.read_text()


@pytest.mark.parametrize(
    "name", ["none.js", "..%2Fpage.py", "..%5Cpage.py", "%2Fetc%2Fpasswd", "%2e%2e"]
)
def test_only_files_of_the_page_are_served(null_server: RunningServer, name: str) -> None:
    with null_server.client() as http:
        assert http.get(f"/static/{name}").status_code == 404


def test_status_requires_the_api_key(locked_server) -> None:
    with locked_server.client() as http:
        assert http.get("/status").status_code == 401
        assert http.get("/status", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_status_reports_model_device_and_load(null_server: RunningServer) -> None:
    with null_server.client() as http:
        body = {"prompt": "w5 w6", "max_tokens": 4, "ignore_eos": True}
        before = http.get("/status").json()
        http.post("/v1/completions", json=body)
        after = http.get("/status").json()

    assert (after["state"], after["reason"], after["model"]) == ("ready", None, "tiny")
    assert after["engine"]["device"] == "null"
    assert after["engine"]["max_model_len"] == 512
    assert after["load"]["generation_tokens_total"] - before["load"]["generation_tokens_total"] == 4
    assert after["load"]["time_s"] > before["load"]["time_s"]


def test_status_reports_loading_and_draining(tmp_path: Path) -> None:
    client = EngineClient(EngineConfig(model=str(make_model_folder(tmp_path / "tiny"))))
    state = ServerState(client=client, metrics=Metrics(client, "tiny"), model_names=("tiny",))
    with TestClient(build_app(state)) as http:
        loading = http.get("/status").json()
        state.is_draining = True
        draining = http.get("/status").json()

    assert (loading["state"], loading["engine"]) == ("loading", None)
    assert draining["state"] == "draining"
    assert "shutting down" in draining["reason"]


# -- in a browser -------------------------------------------------------------------------------


class Browser:
    """A tab of a headless Chromium, with helpers for the tests."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def open(self, server: RunningServer) -> None:
        self.driver.get(server.url)

    def text(self, selector: str) -> str:
        """Text of all elements that match; "" if none does."""
        script = "return [...document.querySelectorAll(arguments[0])].map(n => n.innerText)"
        return "\n".join(self.run(script, selector))

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def type(self, selector: str, text: str) -> None:
        node = self.driver.find_element("css selector", selector)
        node.clear()
        node.send_keys(text)

    def is_shown(self, selector: str) -> bool:
        return any(
            node.is_displayed() for node in self.driver.find_elements("css selector", selector)
        )

    def is_enabled(self, selector: str) -> bool:
        return bool(self.driver.find_element("css selector", selector).is_enabled())

    def wait(self, condition: Callable[[], object], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"timed out; the page: {self.text('body')}"
            time.sleep(0.05)

    def wait_for_state(self, state: str, seconds: float = 60) -> None:
        self.wait(lambda: self.text("#state") == state, seconds)

    def say(self, message: str) -> None:
        """Type a message and send it with Enter."""
        self.type("#prompt", message + "\n")

    def wait_for_answer(self) -> None:
        self.wait(lambda: not self.is_shown("#stop") and self.text(".assistant"))


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "disable-dev-shm-usage", f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
    try:
        driver.set_window_size(1280, 900)
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def browser(chromium: Any) -> Iterator[Browser]:
    """A new tab; afterwards its console must have no messages other than HTTP errors."""
    first = chromium.current_window_handle
    chromium.switch_to.new_window("tab")
    yield Browser(chromium)
    messages = [one for one in chromium.get_log("browser") if one["source"] != "network"]
    chromium.close()
    chromium.switch_to.window(first)
    assert messages == []


@pytest.fixture
def page(browser: Browser, model_server: RunningServer) -> Browser:
    browser.open(model_server)
    browser.wait_for_state("ready")
    return browser


WATCH = """
    window.lengths = new Set(); window.bodies = [];
    new MutationObserver(() => {
        const bodies = document.querySelectorAll(".assistant .body");
        window.lengths.add([...bodies].at(-1)?.innerText.length ?? 0);
    }).observe(document.getElementById("messages"), {childList: true, subtree: true});
    const fetch = window.fetch;
    window.fetch = (path, options) => {
        if (options?.body) window.bodies.push(JSON.parse(options.body));
        return fetch(path, options);
    };
"""


INK = """
    const canvas = document.getElementById("tokens-plot");
    const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d");
    copy.drawImage(canvas, 0, 0);
    const pixels = copy.getImageData(0, 0, canvas.width, canvas.height).data;
    const color = getComputedStyle(canvas).getPropertyValue("--plot-a").match(/[0-9a-f]{2}/g);
    const [r, g, b] = color.map((hex) => parseInt(hex, 16));
    let count = 0;
    for (let i = 0; i < pixels.length; i += 4)
        count += pixels[i] === r && pixels[i + 1] === g && pixels[i + 2] === b;
    return count;
"""  # number of pixels in the color of the line of generated tokens


@needs_browser
@pytest.mark.model
def test_answer_streams_and_the_plots_are_updated(page: Browser) -> None:
    page.run(WATCH)
    page.type("#temperature", "0")
    page.type("#max-tokens", "200")
    line_lengths = {page.run(INK)}

    def num_line_lengths() -> int:
        line_lengths.add(page.run(INK))
        return len(line_lengths)

    page.say("Write a long story about the sea.")
    page.wait(lambda: num_line_lengths() >= 4 and not page.is_shown("#stop"))

    lengths = page.run("return [...window.lengths]")
    assert len(lengths) >= 10 and lengths == sorted(lengths)
    assert re.search(
        r"^\d+ tokens · [\d.]+ tokens/s · first token after \d+ ms", page.text(".figures")
    )
    assert page.run("return window.bodies")[0]["max_tokens"] == 200
    assert "generated" in page.run(
        "return document.getElementById('tokens-plot').getAttribute('aria-label')"
    )
    assert "cpu" in page.text("#device")


@needs_browser
@pytest.mark.model
def test_requests_have_the_conversation_and_the_system_prompt(page: Browser) -> None:
    page.run(WATCH)
    page.type("#system", "Be brief.")
    page.type("#temperature", "0")
    page.type("#max-tokens", "12")
    page.say("What is the capital of France?")
    page.wait_for_answer()
    page.say("And of Italy?")
    page.wait_for_answer()
    page.click("#regenerate")
    page.wait(lambda: len(page.run("return window.bodies")) == 3)
    page.wait_for_answer()

    roles = [[m["role"] for m in body["messages"]] for body in page.run("return window.bodies")]
    assert roles[0] == ["system", "user"]
    assert roles[1] == roles[2] == ["system", "user", "assistant", "user"]
    assert "Paris" in page.text(".assistant")
    page.driver.refresh()
    page.wait(lambda: "Paris" in page.text(".assistant"))
    page.click("#clear")
    assert page.text("article") == ""
    assert page.is_shown("#hint")


@needs_browser
@pytest.mark.model
def test_stop_aborts_the_request_and_keeps_the_text(
    page: Browser, model_server: RunningServer
) -> None:
    page.type("#max-tokens", "1900")
    page.type("#temperature", "0")
    page.say(ENDLESS)
    page.wait(lambda: len(page.text(".assistant .body")) > 10)
    assert model_server.metric("num_requests_running") == 1
    page.click("#stop")

    page.wait(lambda: "stopped" in page.text(".figures"))
    model_server.wait_for("num_requests_running", 0)
    aborted = re.findall(
        r'^portalm:request_success_total{finished_reason="abort".*} (\S+)$',
        model_server.client().get("/metrics").text,
        re.MULTILINE,
    )
    assert len(aborted) == 1 and float(aborted[0]) >= 1
    assert len(page.text(".assistant .body")) > 10
    assert page.is_enabled("#send")


@needs_browser
@pytest.mark.model
def test_refused_request_shows_an_error_and_the_next_message_works(page: Browser) -> None:
    page.type("#max-tokens", "4")
    page.run("document.getElementById('prompt').value = 'word '.repeat(2100)")
    page.click("#send")
    page.wait(lambda: "The server refused the request" in page.text(".error[role=alert]"))

    page.click("#clear")
    page.say("Hello")
    page.wait_for_answer()
    assert page.text(".error") == ""


@needs_browser
@pytest.mark.model
def test_narrow_window_shows_chat_or_status_without_overflow(page: Browser) -> None:
    overflow = "return document.documentElement.scrollWidth - window.innerWidth"
    page.driver.set_window_size(500, 800)  # the minimum width of Chromium's windows
    try:
        assert page.is_shown("#prompt") and not page.is_shown("#tokens-plot")
        assert page.run(overflow) <= 0

        page.click("#show-status")

        assert page.is_shown("#tokens-plot") and not page.is_shown("#prompt")
        assert page.run(overflow) <= 0
    finally:
        page.driver.set_window_size(1280, 900)


@needs_browser
def test_api_key_is_asked_for_and_kept_only_in_the_tab(
    browser: Browser, locked_server: RunningServer
) -> None:
    browser.open(locked_server)
    browser.wait(lambda: browser.is_shown("#key-dialog"))
    browser.type("#key", "wrong\n")
    browser.wait(lambda: "is not valid" in browser.text("#key-reason"))
    browser.type("#key", f"{KEY}\n")
    browser.wait_for_state("ready")
    browser.type("#max-tokens", "4")
    browser.say("w5 w6")
    browser.wait_for_answer()

    kept = browser.run("return [localStorage.length, document.cookie, Object.keys(sessionStorage)]")
    assert kept[:2] == [0, ""]
    assert "portalm-api-key" in kept[2]
    browser.click("#forget-key")
    browser.wait(lambda: browser.is_shown("#key-dialog"))
    assert KEY not in browser.run("return JSON.stringify(sessionStorage)")


@contextlib.contextmanager
def server_with_stopped_engine(folder: Path) -> Iterator[RunningServer]:
    """Run a server that stays loading until its engine gets SIGCONT."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "portalm.cli.main", "serve", str(folder), "--port", str(port),
        "--device", "null", "--load-format", "dummy", "--shutdown-timeout", "0",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd="/")
    server = RunningServer(f"http://127.0.0.1:{port}", process, [])
    engine = None
    try:
        end = time.monotonic() + 30
        while time.monotonic() < end and engine is None:
            with contextlib.suppress(subprocess.CalledProcessError):
                engine = server.engine_pid()
                os.kill(engine, signal.SIGSTOP)
            time.sleep(0.02)
        while time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                server.client().get("/health/live")
                break
            time.sleep(0.1)
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if engine is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(engine, signal.SIGKILL)


@needs_browser
def test_page_shows_the_servers_state_from_loading_to_shutdown(
    browser: Browser, tmp_path: Path
) -> None:
    with server_with_stopped_engine(make_model_folder(tmp_path / "tiny")) as server:
        browser.open(server)
        browser.wait_for_state("loading")
        assert "the model is being loaded" in browser.text("#notice")
        assert not browser.is_enabled("#send")

        os.kill(server.engine_pid(), signal.SIGCONT)
        browser.wait_for_state("ready")
        assert browser.is_enabled("#send")
        assert not browser.is_shown("#notice")

        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)
        browser.wait_for_state("no connection")
        assert not browser.is_enabled("#send")
        assert browser.text("#notice").startswith("No connection")


REASONING = """
    const deltas = [{reasoning_content: "Hm, <b>"}, {reasoning_content: "2."}, {content: "Two."}];
    const chunks = deltas.map(
        (delta, i) => ({choices: [{delta}], usage: {completion_tokens: i + 1}})
    );
    const events = [...chunks.map((one) => JSON.stringify(one)), "[DONE]"];
    const stream = events.map((event) => `data: ${event}\\n\\n`).join("");
    const fetch = window.fetch;
    window.fetch = (path, options) =>
        options?.body ? Promise.resolve(new Response(stream)) : fetch(path, options);
"""  # a fake answer, because no small model has reasoning


@needs_browser
def test_reasoning_is_shown_separately_from_the_answer(
    browser: Browser, null_server: RunningServer
) -> None:
    browser.open(null_server)
    browser.wait_for_state("ready")
    browser.run(REASONING)
    browser.say("1 + 1?")
    browser.wait_for_answer()

    assert browser.text(".assistant .body") == "Two."
    assert browser.is_shown(".thoughts") and not browser.is_shown(".thoughts div")
    browser.click(".thoughts summary")
    assert browser.text(".thoughts div") == "Hm, <b>2."
    assert browser.text(".figures").startswith("3 tokens")


RENDERED = """
    const done = arguments[arguments.length - 1];
    import("/static/markdown.js").then(({showMarkdown}) => {
        const target = document.createElement("div");
        for (const text of arguments[0]) showMarkdown(target, text);
        done(target.outerHTML);
    });
"""

MARKDOWN = {
    "paragraphs": ("a\nb\n\nc", "<p>a\nb</p><p>c</p>"),
    "markup is text": (
        "<img src=x onerror=alert(1)><script>1</script>",
        "<p>&lt;img src=x onerror=alert(1)&gt;&lt;script&gt;1&lt;/script&gt;</p>",
    ),
    "only web links": ("[a](javascript:alert(1))", "<p>[a](javascript:alert(1))</p>"),
    "inline": (
        "**b** *i* `c*d*` ~~s~~ 2*3*4 a_b_c",
        "<p><strong>b</strong> <em>i</em> <code>c*d*</code> <s>s</s> 2*3*4 a_b_c</p>",
    ),
    "headings": ("# T\n### U", "<h3>T</h3><h5>U</h5>"),
    "lists": (
        "- a\n- b\n  1. c\n  2. d\n\ne",
        '<ul><li>a</li><li>b<ol start="1"><li>c</li><li>d</li></ol></li></ul><p>e</p>',
    ),
    "an item's own paragraphs": (
        "1. a\n\n   b\n2. c",
        '<ol start="1"><li>a<p>b</p></li><li>c</li></ol>',
    ),
    "quotes": ("> a\n> - b", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>"),
    "tables": (
        "| a | b |\n|---|:-:|\n| 1 | 2 |",
        "<div><table><thead><tr><th>a</th><th>b</th></tr></thead>"
        "<tbody><tr><td>1</td><td>2</td></tr></tbody></table></div>",
    ),
}


@needs_browser
def test_markdown_is_rendered_and_never_executed(
    browser: Browser, null_server: RunningServer
) -> None:
    browser.open(null_server)

    def shown(*texts: str) -> str:
        html = browser.driver.execute_async_script(RENDERED, texts)
        return re.sub(r' (?:class|tabindex)="[^"]*"', "", html)

    for name, (text, expected) in MARKDOWN.items():
        assert shown(text) == f"<div>{expected}</div>", name
    assert "<pre><code>x &lt; 1\n# y</code></pre>" in shown("```py\nx < 1\n# y\n```")
    assert "<pre><code>half</code></pre>" in shown("```py\nhalf")
    assert 'href="https://a.b/c"' in shown("see https://a.b/c.")
    assert shown("one\n\ntwo", "one\n\ntwo three") == shown("one\n\ntwo three")
    assert shown("one\n\ntwo", "one") == shown("one")


@needs_browser
def test_pathological_markdown_is_rendered_in_time(
    browser: Browser, null_server: RunningServer
) -> None:
    browser.open(null_server)
    strange = ["> " * 5000 + "x", "* " * 5000, "*a" * 20000, "`" * 20001, "[" * 20000, "|" * 9999]
    started = time.monotonic()

    for text in strange:
        assert browser.driver.execute_async_script(RENDERED, [text]).startswith("<div>")

    assert time.monotonic() - started < 5
