"""`portalm collect-env` prints what a bug report needs."""

from __future__ import annotations

import importlib.metadata

import pytest

from portalm.cli.main import main


def test_collect_env_lists_every_dependency_and_device(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    status = main(["collect-env"])

    out = capsys.readouterr().out
    assert status == 0
    for package in ("portalm", "torch", "fastapi", "pyzmq"):
        assert f"{package}: {importlib.metadata.version(package)}" in out
    assert "device null: " in out and " CPUs, " in out
    assert "hf_secret" not in out
