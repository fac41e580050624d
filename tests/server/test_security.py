"""API keys, origins, TLS, private sockets, and no unpickling."""

from __future__ import annotations

import ast
import asyncio
import os
import signal
import ssl
import stat
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import zmq

import portalm
from portalm.config import EngineConfig
from portalm.engine.client import EngineClient
from portalm.engine.process import EngineProcess
from portalm.errors import ConfigError
from portalm.logs import LogConfig
from portalm.server.api_keys import ApiKeys
from tests.server.conftest import make_model_folder, running_server

NULL = ("--device", "null", "--load-format", "dummy")
BODY = {"prompt": "w5", "max_tokens": 2}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# -- keys -------------------------------------------------------------------------------------


def test_key_file_is_reloaded_on_sighup_and_no_key_is_logged(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "tiny")
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst-secret\n\nsecond-secret\n")
    flags = ("--api-key-file", str(file), "--api-key", "given-secret")
    with running_server(str(folder), *NULL, *flags) as server, server.client() as http:

        def statuses() -> list[int]:
            keys = ("first-secret", "second-secret", "third-secret", "given-secret", "# ours")
            asked = [http.get("/v1/models", headers=bearer(key)) for key in keys]
            http.post("/v1/completions", json=BODY, headers=bearer("first-secret"))
            return [response.status_code for response in asked]

        before = statuses()
        file.write_text("third-secret\n")
        server.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 10
        while http.get("/v1/models", headers=bearer("third-secret")).status_code != 200:
            assert time.monotonic() < end
        after = statuses()
        file.write_text("")  # a file without keys must not open the server to everyone
        server.process.send_signal(signal.SIGHUP)
        while not any("keys are unchanged" in line for line in server.output):
            assert time.monotonic() < end
            time.sleep(0.02)
        at_last = statuses()

    assert before == [200, 200, 401, 200, 401]
    assert after == at_last == [401, 401, 200, 200, 401]
    assert "secret" not in "".join(server.output).replace("given-secret", "")
    assert "given-secret" not in "".join(server.output)


@pytest.mark.parametrize("content", [None, "", "# nothing\n"])
def test_key_file_without_keys_is_rejected(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)

    with pytest.raises(ConfigError, match="api-key-file"):
        ApiKeys(file=file)


def test_tenant_names_do_not_reveal_keys() -> None:
    keys = ApiKeys(["one", "two"])

    one, two = keys.tenant(b"Bearer one"), keys.tenant(b"bearer two")

    assert one and two and one != two
    assert "one" not in one
    assert keys.tenant(b"Basic one") is keys.tenant(b"Bearer on") is keys.tenant(b"") is None


# -- origins, TLS, sockets --------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--allowed-origins", "https://ours.example")])
def test_only_allowed_origins_get_cors_headers(tmp_path: Path, flags: tuple[str, ...]) -> None:
    folder = make_model_folder(tmp_path / "tiny")
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x"}
    allowed = []
    with (
        running_server(str(folder), *NULL, "--api-key", "k", *flags) as server,
        server.client() as http,
    ):
        for origin in ("https://ours.example", "https://theirs.example"):
            first = http.options("/v1/completions", headers={"Origin": origin, **asks})
            then = http.post(
                "/v1/completions", json=BODY, headers={"Origin": origin, **bearer("k")}
            )
            assert then.status_code == 200
            allowed.append([r.headers.get("Access-Control-Allow-Origin") for r in (first, then)])

    ours = "https://ours.example" if flags else None
    assert allowed == [[ours, ours], [None, None]]


def test_https_with_a_certificate(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "tiny")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out",
         str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    trusted = ssl.create_default_context(cafile=str(certificate))
    flags = ("--ssl-keyfile", str(key), "--ssl-certfile", str(certificate))
    with running_server(str(folder), *NULL, *flags) as server:
        assert server.url.startswith("https://")
        with httpx.Client(base_url=server.url, verify=trusted) as http:
            assert http.post("/v1/completions", json=BODY).status_code == 200
        with httpx.Client(base_url=server.url) as http, pytest.raises(httpx.ConnectError):
            http.get("/health")


def test_invalid_certificate_is_a_one_line_error(tmp_path: Path) -> None:
    import sys

    folder = make_model_folder(tmp_path / "tiny")
    (tmp_path / "cert.pem").write_text("none")
    command = [sys.executable, "-m", "portalm.cli.main", "serve", str(folder), "--port", "0"]
    done = subprocess.run(
        [*command, *NULL, "--ssl-certfile", str(tmp_path / "cert.pem")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.returncode == 2
    assert "certificate" in done.stderr
    assert "Traceback" not in done.stderr


def test_engine_socket_is_private_to_the_user(tmp_path: Path) -> None:
    client = EngineClient(EngineConfig(model=str(tmp_path)))
    folder = client._supervisor._folder

    async def open_and_close() -> dict[str, int]:
        process = EngineProcess(zmq.Context.instance(), folder, 1, logs=LogConfig())
        found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
        await process.end()
        await client.shutdown()
        return found

    mode = stat.S_IMODE(folder.stat().st_mode)
    before = os.umask(0)  # the modes must not depend on the umask
    try:
        files = asyncio.run(open_and_close())
    finally:
        os.umask(before)

    assert mode == 0o700
    assert files == {"engine-1": 0o600, "pulse-1": 0o600}


# -- untrusted code ---------------------------------------------------------------------------

_UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


def test_no_module_unpickles() -> None:
    root = Path(portalm.__file__).parents[1]
    files = [*(root / "portalm").rglob("*.py"), *(root / "backends").rglob("*.py")]
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]}
            elif isinstance(node, ast.Attribute):
                is_bad = node.attr in ("send_pyobj", "recv_pyobj") or (
                    node.attr == "load" and ast.unparse(node.value) == "torch"
                )
                names = {"pickle"} if is_bad else set()
            else:
                continue
            if names & _UNSAFE_MODULES:
                found.append(f"{file}:{node.lineno}")

    assert len(files) > 100
    assert found == []


def test_remote_code_is_not_trusted_by_default() -> None:
    assert EngineConfig().trust_remote_code is False
