"""Finding, reporting and loading backends, including those of other packages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from portalm.backend import (
    API_VERSION,
    choose_backend,
    find_backends,
    load_backend,
    report_backends,
)
from portalm.errors import BackendUnavailable, ConfigError
from portalm_backends.null.backend import NullBackend
from portalm_backends.reference.backend import ReferenceBackend

CLASS = """
from portalm.backend import DeviceReport
from portalm_backends.reference.backend import ReferenceBackend

class Device(ReferenceBackend):
    name = {name!r}
    rank = {rank}
    {declaration}

    @classmethod
    def find(cls):
        {find}
"""
IS_HERE = "return DeviceReport(is_available=True, summary='one of a kind')"
IS_MISSING = "return DeviceReport(is_available=False, summary='no /dev/abacus: buy one')"


class Site:
    """A folder on the path, to install packages with backends in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(
        self,
        name: str,
        find: str = IS_HERE,
        rank: int = 5,
        code: str = CLASS,
        declaration: str = "",
    ) -> None:
        """Install a distribution with one backend."""
        module = f"portalm_test_{name}"
        text = code.format(name=name, rank=rank, find=find, declaration=declaration)
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


# -- backends that ship with PortaLM ----------------------------------------------------------


def test_the_built_in_backends_are_found() -> None:
    found = find_backends()

    assert found["reference"] is ReferenceBackend
    assert found["null"] is NullBackend
    assert "cpu" in found


def test_reports_are_sorted_by_rank() -> None:
    names = list(report_backends())

    assert names.index("cpu") < names.index("reference") < names.index("null")


def test_reference_and_null_are_available_everywhere() -> None:
    reports = report_backends()

    for name in ("reference", "null"):
        assert reports[name].is_available
        assert "\n" not in reports[name].summary
        assert load_backend(name).name == name


def test_each_load_creates_a_new_backend() -> None:
    assert load_backend("reference") is not load_backend("reference")


def test_auto_loads_the_chosen_backend() -> None:
    assert load_backend().name == load_backend("auto").name == choose_backend()


# -- backends of other packages ---------------------------------------------------------------


def test_a_backend_of_another_package_is_loaded(site: Site) -> None:
    site.install("abacus")

    assert report_backends()["abacus"].summary == "one of a kind"
    assert load_backend("abacus").name == "abacus"


def test_auto_picks_the_highest_available_rank(site: Site) -> None:
    site.install("abacus", rank=1000)
    site.install("quipu", rank=2000, find=IS_MISSING)

    assert choose_backend() == "abacus"
    assert list(report_backends())[:2] == ["quipu", "abacus"]
    assert load_backend("auto").name == "abacus"


def test_auto_never_picks_a_rank_below_zero(site: Site) -> None:
    site.install("abacus", rank=-1)

    assert choose_backend() != "abacus"
    assert load_backend("abacus").name == "abacus"


def test_a_package_that_cannot_be_imported_hides_no_other(site: Site) -> None:
    site.install("broken", code="import a_module_that_is_not_installed")

    report = report_backends()["broken"]

    assert not report.is_available
    assert "cannot be imported (ModuleNotFoundError" in report.summary
    assert "a_module_that_is_not_installed" in report.summary
    assert load_backend("reference").name == "reference"
    with pytest.raises(BackendUnavailable, match="cannot be imported"):
        load_backend("broken")


def test_a_backend_whose_find_fails_hides_no_other(site: Site) -> None:
    site.install("rude", find="raise OSError('driver too old')")

    report = report_backends()["rude"]

    assert not report.is_available
    assert report.summary == "its find() failed (OSError: driver too old)"
    assert load_backend("auto").name != "rude"


# -- API version ------------------------------------------------------------------------------

MAJOR, MINOR = API_VERSION


@pytest.mark.parametrize("minor", [0, MINOR, MINOR + 1])
def test_a_backend_of_any_minor_version_is_loaded(site: Site, minor: int) -> None:
    site.install("abacus", declaration=f"api_version = ({MAJOR}, {minor})")

    assert load_backend("abacus").api_version == (MAJOR, minor)


@pytest.mark.parametrize("major", [MAJOR - 1, MAJOR + 1])
def test_a_backend_of_another_major_version_is_refused(site: Site, major: int) -> None:
    site.install("abacus", rank=1000, declaration=f"api_version = ({major}, 3)")

    with pytest.raises(BackendUnavailable) as caught:
        load_backend("abacus")

    assert (
        f"device 'abacus' cannot run here: it is written for backend API {major}.3, and this "
        f"PortaLM has {MAJOR}.{MINOR}: install a release of the backend for API {MAJOR}.x, or a "
        f"release of PortaLM with API {major}.x"
    ) in str(caught.value)
    assert choose_backend() != "abacus"
    assert next(iter(report_backends())) != "abacus"


def test_a_backend_that_derives_from_the_base_class_has_the_current_version(site: Site) -> None:
    site.install("abacus")

    assert load_backend("abacus").api_version == API_VERSION


@pytest.mark.parametrize("declared", ["None", "'1.0'", "1", "(1,)", "(1, 0, 0)"])
def test_a_backend_without_a_usable_version_is_refused(site: Site, declared: str) -> None:
    site.install("abacus", declaration=f"api_version = {declared}")

    with pytest.raises(BackendUnavailable, match=r"set `api_version = \(major, minor\)` in Device"):
        load_backend("abacus")


def test_a_class_without_base_and_version_is_refused(site: Site) -> None:
    site.install("abacus", code="class Device:\n    name, rank = {name!r}, {rank}")

    with pytest.raises(BackendUnavailable, match="its api_version is None"):
        load_backend("abacus")


# -- errors -----------------------------------------------------------------------------------


def test_an_unavailable_device_is_refused_with_what_is_missing(site: Site) -> None:
    site.install("abacus", find=IS_MISSING)

    with pytest.raises(BackendUnavailable) as caught:
        load_backend("abacus")

    message = str(caught.value)
    assert "device 'abacus' cannot run here: no /dev/abacus: buy one" in message
    assert "reference" in message and "`portalm devices`" in message


def test_an_unknown_device_is_refused_with_the_installed_ones() -> None:
    with pytest.raises(BackendUnavailable) as caught:
        load_backend("vax")

    message = str(caught.value)
    assert "device 'vax' cannot run here: no installed package provides" in message
    assert "cpu, null, reference" in message


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="device must not be empty"):
        load_backend("")
