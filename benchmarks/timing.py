"""How both sides of a comparison are timed."""

import math


def calls(seconds: float, backend: str) -> int:
    """Number of calls of this duration to queue and time together.

    On CPUs it is one, because queued calls may run in parallel there.
    """
    return 1 if backend == "cpu" else min(max(math.ceil(0.3 / seconds), 1), 20)
