"""How backends are found, reported and chosen; out-of-tree ones too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from portalm.backend import choose_backend, find_backends, load_backend, report_backends
from portalm.errors import BackendUnavailable, ConfigError
from portalm_backends.null.backend import NullBackend
from portalm_backends.reference.backend import ReferenceBackend

CLASS = """
from portalm.backend import DeviceReport
from portalm_backends.reference.backend import ReferenceBackend

class Device(ReferenceBackend):
    name = {name!r}
    rank = {rank}

    @classmethod
    def find(cls):
        {find}
"""
IS_HERE = "return DeviceReport(is_available=True, summary='one of a kind')"
IS_MISSING = "return DeviceReport(is_available=False, summary='no /dev/abacus: buy one')"


class Site:
    """A folder on the path to install packages of backends in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, name: str, find: str = IS_HERE, rank: int = 5, code: str = CLASS) -> None:
        """A distribution that brings one backend."""
        module = f"portalm_test_{name}"
        text = code.format(name=name, rank=rank, find=find)
        (self.folder / f"{module}.py").write_text(text)
        info = self.folder / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[portalm.backends]\n{name} = {module}:Device\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [m for m in sys.modules if m.startswith("portalm_test_")]:
        del sys.modules[name]
    return Site(tmp_path)


# -- those that come with PortaLM -------------------------------------------------------------


def test_the_backends_that_come_along_are_found() -> None:
    found = find_backends()

    assert found["reference"] is ReferenceBackend
    assert found["null"] is NullBackend
    assert "cpu" in found


def test_reports_come_best_first() -> None:
    names = list(report_backends())

    assert names.index("cpu") < names.index("reference") < names.index("null")


def test_reference_and_null_run_anywhere() -> None:
    reports = report_backends()

    for name in ("reference", "null"):
        assert reports[name].is_available
        assert "\n" not in reports[name].summary
        assert load_backend(name).name == name


def test_each_load_is_a_device_of_its_own() -> None:
    assert load_backend("reference") is not load_backend("reference")


def test_auto_takes_what_choose_names() -> None:
    assert load_backend().name == load_backend("auto").name == choose_backend()


# -- those that do not ------------------------------------------------------------------------


def test_a_package_elsewhere_brings_a_device(site: Site) -> None:
    site.install("abacus")

    assert report_backends()["abacus"].summary == "one of a kind"
    assert load_backend("abacus").name == "abacus"


def test_auto_takes_the_highest_rank_that_is_here(site: Site) -> None:
    site.install("abacus", rank=1000)
    site.install("quipu", rank=2000, find=IS_MISSING)

    assert choose_backend() == "abacus"
    assert list(report_backends())[:2] == ["quipu", "abacus"]
    assert load_backend("auto").name == "abacus"


def test_auto_never_takes_a_rank_below_zero(site: Site) -> None:
    site.install("abacus", rank=-1)

    assert choose_backend() != "abacus"
    assert load_backend("abacus").name == "abacus"


def test_a_package_that_does_not_import_hides_no_other(site: Site) -> None:
    site.install("broken", code="import a_module_that_nobody_has_installed")

    report = report_backends()["broken"]

    assert not report.is_available
    assert "cannot be imported (ModuleNotFoundError" in report.summary
    assert "a_module_that_nobody_has_installed" in report.summary
    assert load_backend("reference").name == "reference"
    with pytest.raises(BackendUnavailable, match="cannot be imported"):
        load_backend("broken")


def test_a_backend_that_cannot_tell_hides_no_other(site: Site) -> None:
    site.install("rude", find="raise OSError('driver too old')")

    report = report_backends()["rude"]

    assert not report.is_available
    assert report.summary == "its find() failed (OSError: driver too old)"
    assert load_backend("auto").name != "rude"


# -- what cannot be loaded --------------------------------------------------------------------


def test_a_device_that_is_not_here_says_what_is_missing(site: Site) -> None:
    site.install("abacus", find=IS_MISSING)

    with pytest.raises(BackendUnavailable) as caught:
        load_backend("abacus")

    message = str(caught.value)
    assert "device 'abacus' cannot run here: no /dev/abacus: buy one" in message
    assert "reference" in message and "`portalm devices`" in message


def test_a_device_of_no_package_says_which_there_are() -> None:
    with pytest.raises(BackendUnavailable) as caught:
        load_backend("vax")

    message = str(caught.value)
    assert "device 'vax' cannot run here: no installed package provides" in message
    assert "cpu, null, reference" in message


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="device must not be empty"):
        load_backend("")
