"""How both sides of a comparison are timed."""

import math


def calls(seconds: float, backend: str) -> int:
    """Calls that are queued and timed together, where one takes so many seconds.

    On CPUs one: there, calls that are queued may run side by side.
    """
    return 1 if backend == "cpu" else min(max(math.ceil(0.3 / seconds), 1), 20)
