"""The C library's allocator, set up for a process that runs the same tail over and over.

By default glibc hands the memory of large activations back to the system after every operator and faults it in again at
the next: some 8,000 page faults and a quarter of the time of a batch of sixteen. Kept instead, the pages are reused.
"""

from __future__ import annotations

import ctypes
import logging
import sys

log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_KEEP_BYTES = 1 << 30  # free memory up to this stays with the process
_PAD_BYTES = 64 << 20  # the heap grows by this at a time
_MMAP_BYTES = 32 << 20  # the most glibc accepts; larger blocks still come straight from the system


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory; whether it did. Elsewhere (macOS, musl) nothing happens."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_THRESHOLD, _MMAP_BYTES), (_M_TRIM_THRESHOLD, _KEEP_BYTES), (_M_TOP_PAD, _PAD_BYTES))
    done = sum(bool(mallopt(ctypes.c_int(key), ctypes.c_int(value))) for key, value in settings) == len(settings)
    log.debug("glibc %s freed memory", "keeps" if done else "does not keep")
    return done
