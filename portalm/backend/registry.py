"""Finding installed backends by entry point, and loading one."""

from __future__ import annotations

import importlib.metadata

from portalm.backend.capabilities import DeviceReport
from portalm.backend.protocol import API_VERSION, Backend
from portalm.errors import BackendUnavailable, ConfigError

ENTRY_POINT_GROUP = "portalm.backends"


def find_backends() -> dict[str, type[Backend] | Exception]:
    """Return every installed backend's class by name, or the exception that its import raised."""
    found: dict[str, type[Backend] | Exception] = {}
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            found[entry_point.name] = entry_point.load()
        except Exception as error:  # a broken third-party backend must not hide the others
            found[entry_point.name] = error
    return found


def report_backends() -> dict[str, DeviceReport]:
    """Return each installed backend's report, in the order in which `auto` prefers them."""
    found = find_backends()

    def rank(name: str) -> int:
        backend = found[name]
        return -100 if isinstance(backend, Exception) or _api_problem(backend) else backend.rank

    return {name: _report(found[name]) for name in sorted(found, key=lambda n: (-rank(n), n))}


def choose_backend() -> str | None:
    """Return what `auto` means here: the available backend of the highest rank; None if none is."""
    found = find_backends()
    for name, report in report_backends().items():
        backend = found[name]
        if report.is_available and not isinstance(backend, Exception) and backend.rank >= 0:
            return name
    return None


def load_backend(device: str = "auto") -> Backend:
    """Start the backend named `device`; auto: the available one of the highest rank."""
    found = find_backends()
    reports = report_backends()
    available = sorted(name for name, report in reports.items() if report.is_available)
    if device == "auto":
        chosen = choose_backend()
        if chosen is None:
            raise BackendUnavailable("auto", "no backend found a device it can use", available)
        device = chosen
    if not device:
        raise ConfigError("device must not be empty: use auto or a name from `portalm devices`")
    if device not in found:
        raise BackendUnavailable(
            device,
            f"no installed package provides a backend of that name (entry-point group "
            f"{ENTRY_POINT_GROUP!r}; installed: {', '.join(sorted(found)) or 'none'})",
            available,
        )
    backend = found[device]
    if isinstance(backend, Exception) or not reports[device].is_available:
        raise BackendUnavailable(device, reports[device].summary, available)
    return backend()


def _report(backend: type[Backend] | Exception) -> DeviceReport:
    if isinstance(backend, Exception):
        return DeviceReport(
            is_available=False,
            summary=f"its package cannot be imported ({type(backend).__name__}: {backend})",
        )
    if problem := _api_problem(backend):
        return DeviceReport(is_available=False, summary=problem)
    try:
        return backend.find()
    except Exception as error:  # find() must not raise; one that does must not hide the others
        return DeviceReport(
            is_available=False, summary=f"its find() failed ({type(error).__name__}: {error})"
        )


def _api_problem(backend: type[Backend]) -> str | None:
    """Return why the backend's API version does not fit; None if it does."""
    major, minor = API_VERSION
    match getattr(backend, "api_version", None):
        case (int(found), int()) if found == major:
            return None
        case (int(found), int(found_minor)):
            return (
                f"it is written for backend API {found}.{found_minor}, and this PortaLM has "
                f"{major}.{minor}: install a release of the backend for API {major}.x, or a "
                f"release of PortaLM with API {found}.x"
            )
        case other:
            return (
                f"its api_version is {other!r}, and this PortaLM has backend API {major}.{minor}: "
                f"set `api_version = (major, minor)` in {backend.__name__} to the version that it "
                f"is written for"
            )
