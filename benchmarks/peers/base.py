"""The interface of every peer: install, launch, answer, stop."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peers.process import Process

CONSTRAINTS = Path(__file__).with_name("constraints.txt")
FORMATS = ("bf16", "int8", "int4")
INSTALL_TIMEOUT_S = 3600

# fits every case; peers that reserve KV memory reserve this much
MAX_REQUESTS = 32
MAX_CONTEXT = 1024


class PeerUnavailable(Exception):
    """The peer cannot run on this machine or in this format; the text says why."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Folders, processors and pip settings of a run."""

    cache: Path
    """Folder of virtual environments, checkpoints and logs."""
    cpus: tuple[int, ...] = field(default_factory=lambda: tuple(sorted(os.sched_getaffinity(0))))
    """Processors that this process, and therefore every peer, may run on."""
    torch_args: tuple[str, ...] = ()
    """Arguments for pip when it installs torch, for example the index of its CPU build."""

    def log_of(self, name: str) -> Path:
        """Return the log file of a peer."""
        folder = self.cache / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.log"


@dataclass(frozen=True, slots=True)
class Answer:
    """Times of one request, time.monotonic() values, which all processes of a machine share."""

    sent: float
    first: float
    """Arrival of the first token."""
    last: float
    num_tokens: int
    num_first: int = 1
    """Number of tokens that had arrived at `first`."""
    text: str = ""
    token_ids: tuple[int, ...] = ()
    """Token ids, from peers that return ids instead of text."""


class Running(ABC):
    """A peer with a model loaded."""

    process: Process

    @abstractmethod
    def ask(self, prompts: Sequence[list[int]], num_out: int, concurrency: int) -> list[Answer]:
        """Answer all prompts, `concurrency` at a time; greedy, `num_out` tokens each.

        Args:
            prompts: token ids.
        """

    def close(self) -> None:
        """Stop its processes."""
        self.process.end()


class Venv:
    """The virtual environment of one peer, installed once per list of packages."""

    def __init__(self, settings: Settings, name: str) -> None:
        self.settings = settings
        self.folder = settings.cache / "venvs" / name
        self.python = self.folder / "bin" / "python"
        self.pins = _pins_of(name)

    def version(self, package: str) -> str:
        """Return the pinned version of `package`."""
        return self.pins[package]

    def install(
        self,
        packages: Sequence[str],
        *,
        left_out: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Install `packages` at the versions that constraints.txt has for this environment.

        A pinned torch is installed first: as a dependency, pip might choose a build of many
        gigabytes.

        Args:
            packages: package names.
            left_out: large dependencies that are not needed here.
            environment: environment variables for packages that are built.

        Raises:
            PeerUnavailable: pip failed.
        """
        pins = "".join(f"{package}=={version}\n" for package, version in self.pins.items())
        wanted = "\n".join([*packages, *left_out, pins])
        stamp = self.folder / ".installed"
        if stamp.exists() and stamp.read_text() == wanted:
            return
        if not self.python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(self.folder)], check=True)
        constraints = self.folder / "constraints.txt"
        constraints.write_text(pins)
        pinned = ["--constraint", str(constraints)]
        if "torch" in self.pins:
            self.pip([*pinned, *self.settings.torch_args, "torch"])
        if left_out:
            self.pip([*pinned, "--no-deps", *packages], environment)
            packages = self._dependencies(packages, left_out)
        self.pip([*pinned, *packages], environment)
        stamp.write_text(wanted)

    def _dependencies(self, packages: Sequence[str], left_out: Sequence[str]) -> list[str]:
        """Return the requirements of installed packages, without extras and `left_out`."""
        script = (
            "import importlib.metadata as m, sys; print('\\n'.join(m.requires(sys.argv[1]) or ()))"
        )
        found = []
        for package in packages:
            command = [str(self.python), "-c", script, package]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            for line in done.stdout.splitlines():
                name = re.split(r"[^\w.-]", line)[0]
                if "extra ==" not in line and name not in left_out:
                    found.append(line)
        return found

    def pip(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Run pip install."""
        print(f"{self.folder.name}: pip install {' '.join(arguments)}", file=sys.stderr)
        log = self.settings.log_of(f"install-{self.folder.name}")
        command = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check"]
        with log.open("a") as out:
            try:
                code = subprocess.run(
                    [*command, *arguments],
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **(environment or {})},
                    timeout=INSTALL_TIMEOUT_S,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired as error:
                raise PeerUnavailable(f"pip took over {INSTALL_TIMEOUT_S} s") from error
        if code:
            raise PeerUnavailable(f"pip install {' '.join(arguments)} failed: {last_error(log)}")


@dataclass(frozen=True, slots=True)
class Model:
    """One model in each layout that peers read, with the same weights."""

    name: str
    folder: Path
    """Folder with bfloat16 safetensors in Hugging Face's layout."""
    gguf: Path
    """GGUF file with the same weights in bfloat16."""


class Peer(ABC):
    """An engine to compare with: one file per engine, stateless, configured by its arguments."""

    name: str
    formats: Sequence[str] = FORMATS

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abstractmethod
    def install(self) -> str:
        """Install the peer and return its version. Raises `PeerUnavailable`."""

    def prepare(self, model: Model, fmt: str) -> None:  # noqa: B027 - most peers need no conversion
        """Convert the model before any measurement. Raises `PeerUnavailable`."""

    @abstractmethod
    def launch(self, model: Model, fmt: str) -> Running:
        """Start the peer; return once it accepts requests. Raises `PeerUnavailable`."""

    def check_format(self, fmt: str) -> None:
        """Raise `PeerUnavailable` for an unsupported format."""
        if fmt not in self.formats:
            raise PeerUnavailable(f"{self.name} is measured in {', '.join(self.formats)} only")


def _pins_of(section: str) -> dict[str, str]:
    """Read one section of constraints.txt: package -> version."""
    pins = {}
    is_inside = False
    for line in CONSTRAINTS.read_text().splitlines():
        if line.startswith("# ["):
            is_inside = line == f"# [{section}]"
        elif is_inside and "==" in line:
            package, _, version = line.partition("==")
            pins[package] = version.strip()
    return pins


def cpu_flags() -> frozenset[str]:
    """Read the instruction sets that the operating system reports."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def torch_dtype() -> str:
    """Return the dtype of torch's fast matrix products: float32 without bf16 instructions."""
    return "bfloat16" if cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"} else "float32"


def last_error(log: Path) -> str:
    """Return the line of a log that most likely states the reason."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    for line in reversed(lines):
        if "error" in line.lower():
            return line[:300]
    return lines[-1][:300] if lines else "no output"
