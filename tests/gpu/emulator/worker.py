"""Runs kernels on the emulator, in a process that was started with AddressSanitizer.

Each piece of memory is a malloc of exact size: an access out of bounds aborts the process. Requests
and answers are pickles on stdin and stdout.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import sys

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]


def call(
    library: ctypes.CDLL,
    name: str,
    arguments: list[int | float | tuple[int, int]],
    memory: list[bytes],
    is_reversed: bool,
) -> tuple[str, list[bytes]]:
    """Call launcher `name`; return the emulator's error (or "") and the memory afterwards.

    A pair among the arguments is an address: the index of a piece of memory and an offset into it.
    """
    places = [libc.malloc(max(len(piece), 1)) for piece in memory]
    for place, piece in zip(places, memory, strict=True):
        ctypes.memmove(place, piece, len(piece))
    values: list[ctypes.c_double | ctypes.c_int64] = []
    for argument in arguments:
        if isinstance(argument, tuple):
            values.append(ctypes.c_int64(places[argument[0]] + argument[1]))
        elif isinstance(argument, float):
            values.append(ctypes.c_double(argument))
        else:
            values.append(ctypes.c_int64(argument))
    library.set_reversed(ctypes.c_int64(is_reversed))
    getattr(library, name)(*values)
    library.take_error.restype = ctypes.c_char_p
    error = library.take_error().decode()
    after = [ctypes.string_at(place, len(p)) for place, p in zip(places, memory, strict=True)]
    for place in places:
        libc.free(place)
    return error, after


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of kernels must not mix with the answers
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(call(library, *request), answers)
        answers.flush()


if __name__ == "__main__":
    main()
