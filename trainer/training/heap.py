"""How the C library keeps memory that was freed, on Linux.

glibc takes large blocks from the system one by one and gives each back when it is freed; but every
such block raises the size from which on it does so, up to 32 MB, and smaller blocks lie side by
side in one heap, where a hole that nothing fits into is held to the end. Weights that are read,
cast and packed leave such holes behind as large as a third of the model. So while weights come and
go each has pages of its own. Steps free and take the same blocks over and over and are quicker with
the heap, as long as it keeps what lies free at its end: else the system takes back hundreds of
megabytes after every step and clears them for the next one.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = -1  # in place of a size (mallopt(3))
_MIB = 2**20


def keep_big_blocks_apart() -> None:
    """From now on blocks of a megabyte and more go back to the system when they are freed."""
    _set(mmap=_MIB, trim=_MIB)


def keep_blocks_for_reuse() -> None:
    """From now on blocks up to 32 MB are kept for reuse, however many; what is free now goes back
    to the system."""
    library = _glibc()
    if library is not None:
        _set(mmap=32 * _MIB, trim=_NEVER)
        library.malloc_trim(0)


def _set(*, mmap: int, trim: int) -> None:
    """The sizes in bytes from which on a block has pages of its own, and from which on what is free
    at the end of the heap is given back."""
    library = _glibc()
    if library is not None:
        library.mallopt(_MMAP_THRESHOLD, mmap)
        library.mallopt(_TRIM_THRESHOLD, trim)


def _glibc() -> Any:
    """The C library; None where it is another or its heap is not the one that is used."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
