"""Kernels are interpreted here: tests of the GPU backends run on CPU tensors, without a GPU."""

from __future__ import annotations

import os

# before any kernel is imported: triton.jit asks once
os.environ["TRITON_INTERPRET"] = "1"
