"""Memory that stays with a process: what a network frees is what its next step asks for again.

glibc gives every large block back to the kernel when it is freed, and the kernel clears each page of it when it is
taken anew. A training step on the CPU frees and takes gigabytes: 40 % of its time went into that for base_cnn.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of malloc.h
_TOP_PAD_BYTES = 64 * 2**20


def keep_freed_memory() -> bool:
    """Let this process, and those it forks, keep freed memory for the next allocation; results do not change.

    The process stays at the size of its largest step until it ends.

    Returns:
        Whether the C library could be told: glibc's can, others are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    wishes = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all(mallopt(option, value) == 1 for option, value in wishes)
