"""What a CPU's memory costs a step. A step frees hundreds of megabytes and soon asks for as much
again; GNU's C library gives large pieces back to the system each time, and a fresh page costs more
than filling it. Not here: how much a step needs."""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt(3)
LARGE, NEVER = 1 << 30, -1


def keep_freed_memory() -> bool:
    """Tells this process's malloc to keep what is freed, in pieces of up to 1 GB, for what is asked
    for next. The process then stays as large as it was at most. Returns whether it was heard:
    nothing happens with another C library than GNU's."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    # Old ones take 32 MB at most.
    large = mallopt(MMAP_THRESHOLD, LARGE) or mallopt(MMAP_THRESHOLD, 32 << 20)
    return bool(large and mallopt(TRIM_THRESHOLD, NEVER))
