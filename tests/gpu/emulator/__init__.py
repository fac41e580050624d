"""The device code of the native kernels on this machine's CPU, under AddressSanitizer and UBSan.

`Emulator(wave)` builds csrc_cuda for waves of 32 or 64 lanes and replaces the native module:
`native(method, ...)` calls a method of `NativeKernels` with tensors of this process. Launches run
in a worker process, which has the sanitizers loaded and works on a copy of the tensors' memory.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from portalm_backends.gpu_common.native import NativeKernels

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
COMPILER = shutil.which("g++") or ""
WAVES = (32, 64)


class KernelFault(Exception):
    """A kernel accessed memory out of bounds, diverged at a barrier, or raced."""


@functools.cache
def build(*, is_whole: bool) -> dict[int, Path]:
    """Build the libraries, by number of lanes in a wave, unless these sources were built before.

    With `is_whole` they contain every kernel of csrc_cuda/instances.h, which takes long to compile.
    """
    sources = [HERE / "fibers.cpp", ROOT / "csrc_cuda/launchers.cpp", HERE / "kernels.cpp"]
    headers = sorted((*HERE.glob("*.h"), *(ROOT / "csrc_cuda").glob("*.*h")))
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in (Path(__file__), *sources, *headers)))
    folder = ROOT / f"build/emulator/{'all' if is_whole else 'few'}-{digest.hexdigest()[:16]}"
    libraries = {wave: folder / f"wave{wave}.so" for wave in WAVES}
    if folder.exists():
        return libraries

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        options = [
            *sanitize, "-std=c++20", "-fPIC", "-O1", "-g1", "-Wall", "-Wextra", "-Werror",
            "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc_cuda'}", f"-I{HERE}",
            *([] if is_whole else ["-DPORTALM_FEW_KERNELS"]),
        ]  # fmt: skip
        jobs = [(source, f"{source.stem}.o", []) for source in sources[:2]]
        jobs += [(sources[2], f"kernels{wave}.o", [f"-DPORTALM_EMULATED={wave}"]) for wave in WAVES]
        compilations = [
            subprocess.Popen(
                [COMPILER, *options, *more, "-c", source, "-o", target], cwd=unfinished
            )
            for source, target, more in jobs
        ]
        if any(compilation.wait() for compilation in compilations):
            raise RuntimeError("the emulator does not compile; the compiler's output is above")
        for wave, library in libraries.items():
            objects = ["fibers.o", "launchers.o", f"kernels{wave}.o"]
            subprocess.run(
                [COMPILER, "-shared", *sanitize, *objects, "-o", library.name],
                cwd=unfinished, check=True,
            )  # fmt: skip
        Path(unfinished).rename(folder)
        Path(unfinished).mkdir()  # TemporaryDirectory removes it
    return libraries


class Emulator:
    """Replaces portalm_backends._cuda and ._rocm in tests."""

    def __init__(self, wave: int, *, is_whole: bool = False) -> None:
        self._library = build(is_whole=is_whole)[wave]
        self._tensors: list[torch.Tensor] = []  # tensors whose memory a launch may access
        self._worker: subprocess.Popen[bytes] | None = None

    def native(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call `NativeKernels.method(...)` with its launches on the emulator."""
        self._tensors = list(_tensors_of((args, kwargs)))
        with unittest.mock.patch.object(torch, "empty", self._empty):
            try:
                return getattr(NativeKernels(self, lambda: 0), method)(*args, **kwargs)
            finally:
                self._tensors = []

    def _empty(self, size: Any, **kwargs: Any) -> torch.Tensor:
        """Replace `torch.empty`: results are filled with NaN or -7 and passed to the worker."""
        made = torch.full(
            (size,) if isinstance(size, int) else size,
            torch.nan if kwargs["dtype"].is_floating_point else -7,
            **kwargs,
        )
        self._tensors.append(made)
        return made

    def __getattr__(self, kernel: str) -> Callable[..., None]:
        return functools.partial(self.launch, kernel)

    def launch(self, kernel: str, *given: int | float | torch.Tensor) -> None:
        """Run a launcher of csrc_cuda/launchers.h twice, with threads in both orders."""
        self._tensors += [x for x in given if isinstance(x, torch.Tensor)]
        arguments = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in given]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in self._tensors}
        starts = [start for start in storages if start]
        memory = [ctypes.string_at(start, storages[start].nbytes()) for start in starts]

        def place(argument: int | float) -> int | float | tuple[int, int]:
            for i, start in enumerate(starts):
                if isinstance(argument, int) and 0 <= argument - start < len(memory[i]):
                    return i, argument - start
            return argument

        placed = [place(argument) for argument in arguments]
        forward, backward = (self._call(kernel, placed, memory, order) for order in (False, True))
        if forward != backward:
            raise KernelFault(f"{kernel}: the result depends on the order of threads")
        for start, after in zip(starts, forward, strict=True):
            ctypes.memmove(start, after, len(after))

    def _call(self, *request: Any) -> list[bytes]:
        if self._worker is None:
            self._worker = self._start()
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        pickle.dump(request, self._worker.stdin)
        self._worker.stdin.flush()
        try:
            error, memory = pickle.load(self._worker.stdout)
        except EOFError:  # a sanitizer ended the worker
            report = self._worker.communicate()[1].decode()
            self._worker = None
            raise KernelFault(f"{request[0]}: {report}") from None
        if error:
            raise KernelFault(f"{request[0]}: {error}")
        return memory

    def _start(self) -> subprocess.Popen[bytes]:
        runtimes = [
            subprocess.check_output([COMPILER, f"-print-file-name={name}"], text=True).strip()
            for name in ("libasan.so", "libubsan.so")
        ]
        environment = {
            **os.environ,
            "LD_PRELOAD": " ".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=16",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        return subprocess.Popen(
            [sys.executable, "-S", str(HERE / "worker.py"), str(self._library)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def close(self) -> None:
        """Stop the worker process."""
        if self._worker is not None:
            self._worker.communicate()
            self._worker = None


def _tensors_of(x: Any) -> Iterator[torch.Tensor]:
    for leaf in tree_flatten(x)[0]:
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf):
            yield from _tensors_of([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
