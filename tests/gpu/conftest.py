"""Tests of the GPU backends run on CPU tensors, with kernels in Triton's interpreter."""

from __future__ import annotations

import os

# before any kernel is imported: triton.jit reads it once
os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl
from triton.runtime import interpreter

_patched: set[object] = set()


def _call(function: interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
    """Call a function inside a kernel without patching Triton's language again for each call.

    The kernel's own patch is already in place, and `tl.core`, which Triton's library uses, stays
    patched after the first call. This saves over half the time of kernels with many small
    functions.
    """
    if tl.core in function.fn.__globals__.values() and function.fn not in _patched:
        interpreter._patch_lang(function.fn)
        _patched.add(function.fn)
    return function.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = _call  # type: ignore[method-assign]
