"""Kernels are interpreted here: tests of the GPU backends run on CPU tensors, without a GPU."""

from __future__ import annotations

import os

# before any kernel is imported: triton.jit asks once
os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl
from triton.runtime import interpreter

_patched: set[object] = set()


def _call(function: interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
    """A function called within a kernel, without patching the language for each call again.

    The kernel's own patch is in place; `tl.core`, which Triton's library is written with, stays
    patched once it is. That is more than half the time of a kernel of many small functions.
    """
    if tl.core in function.fn.__globals__.values() and function.fn not in _patched:
        interpreter._patch_lang(function.fn)
        _patched.add(function.fn)
    return function.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = _call  # type: ignore[method-assign]
