"""The native module (csrc_cpu/bindings.cpp): addresses and sizes in, nothing to check types of."""

from typing import Any

def __getattr__(name: str) -> Any: ...
