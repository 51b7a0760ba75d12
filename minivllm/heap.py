"""The process's heap: memory that it has freed and its allocator has kept.

glibc keeps freed memory for the next request. A page goes back to the system only from the top of the heap, and one small block
that lives on holds everything below it: after hours of grammars and texts of all sizes a process is larger than what it holds.
So who has nothing to do gives back whole free pages, wherever they lie.
"""

import contextlib
import ctypes


def give_back() -> None:
    """Return free pages to the system (glibc's ``malloc_trim``); other allocators are left alone."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
