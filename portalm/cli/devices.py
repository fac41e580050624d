"""`portalm devices`, `doctor` and `collect-env`: report on the devices and this installation."""

from __future__ import annotations

import argparse


def add_devices(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `portalm devices`: one line per backend, and details of those that are available."""
    parser = commands.add_parser(
        "devices", help="list the backends, and why those that cannot run here cannot"
    )
    parser.set_defaults(run=run_devices)


def run_devices(arguments: argparse.Namespace) -> int:
    """Print every backend; return 1 if --device auto finds none."""
    from portalm.backend import choose_backend, report_backends

    chosen = choose_backend()
    for name, report in report_backends().items():
        mark = "*" if name == chosen else " "
        state = "available" if report.is_available else "unavailable"
        print(f"{mark} {name:<10} {state:<11} {report.summary}")
        for key, value in report.details if report.is_available else ():
            print(f"    {key}: {value}")
    print()
    if chosen is None:
        print("--device auto finds no usable device; run `portalm doctor` for details")
        return 1
    print(f"* used by --device auto: {chosen}")
    return 0


def add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `portalm doctor`: versions, the model cache, and a small test of each device."""
    parser = commands.add_parser("doctor", help="check this installation and report problems")
    parser.set_defaults(run=run_doctor)


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print versions and test every device; return 1 if there is a problem."""
    from portalm.backend import choose_backend, load_backend, report_backends
    from portalm.errors import PortaLMError

    _print_versions()
    _print_cache()
    chosen = choose_backend()
    is_healthy = chosen is not None
    for name, report in report_backends().items():
        used = " (used by --device auto)" if name == chosen else ""
        print(f"\ndevice {name}{used}: {report.summary}")
        for key, value in report.details:
            print(f"  {key}: {value}")
        if not report.is_available:
            continue
        try:
            backend = load_backend(name)
            backend.probe(timeout_s=10.0)
        except PortaLMError as error:
            print(f"  BROKEN: {error}")
            is_healthy = False
            continue
        memory = backend.memory()
        where = "shared with the host" if memory.host_shared else "of its own"
        print(
            f"  works; {memory.free / 2**30:.1f} of {memory.total / 2**30:.1f} GiB memory free, "
            f"{where}"
        )
    print(f"\n{'no problems found' if is_healthy else 'problems found: see above'}")
    return 0 if is_healthy else 1


def add_collect_env(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `portalm collect-env`: versions and devices for a bug report."""
    parser = commands.add_parser(
        "collect-env", help="print the versions and devices to include in a bug report"
    )
    parser.set_defaults(run=run_collect_env)


def run_collect_env(arguments: argparse.Namespace) -> int:
    """Print versions, machine and devices."""
    from portalm.backend import report_backends

    _print_versions()
    for name, report in report_backends().items():
        print(f"device {name}: {report.summary}")
        for key, value in report.details:
            print(f"  {key}: {value}")
    return 0


def _print_versions() -> None:
    import importlib.metadata
    import os
    import platform
    import re

    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print(f"machine: {platform.platform()}, {os.cpu_count()} CPUs, {memory_bytes / 2**30:.0f} GiB")
    print(f"python: {platform.python_version()}")
    needed = [one for one in importlib.metadata.requires("portalm") or () if "extra ==" not in one]
    for requirement in ("portalm", *needed):
        package = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        try:
            print(f"{package}: {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package}: not installed")


def _print_cache() -> None:
    from portalm.config import DEFAULT_MODEL, cache_dir
    from portalm.models.hub import find_cached

    found = find_cached(DEFAULT_MODEL)
    print(f"cache folder: {cache_dir()}")
    state = f"at {found}" if found else "not downloaded yet (run `portalm pull`)"
    print(f"default model {DEFAULT_MODEL}: {state}")
