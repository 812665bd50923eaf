"""Keeps freed memory in the training process instead of returning it to the system after every step."""

import ctypes
import logging
import platform

log = logging.getLogger(__name__)

# malloc.h of glibc
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
KEPT = 2**30
OLDER = 2**25  # the largest M_MMAP_THRESHOLD of glibc before 2.35 or so


def keep() -> None:
    """Let the C library keep up to a gibibyte of freed memory; does nothing if it is not glibc.

    Each step on the CPU allocates the same hundreds of megabytes. By default they go back to the system in between, and
    every 4 kB come back zeroed by a page fault: a tenth of a step (docs/performance.md). Threads other than the main
    one, such as Ray trains in, have heaps of 64 MiB, which go back whole once empty if they exceed the pad.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for parameter in (M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD):
        if not (libc.mallopt(parameter, KEPT) or libc.mallopt(parameter, OLDER)):
            log.warning("the C library does not keep freed memory: mallopt refused %d for %d", KEPT, parameter)
