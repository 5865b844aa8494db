"""How both sides of a comparison are timed."""

import math


def calls(seconds: float) -> int:
    """Calls that are queued and timed together, where one takes so many seconds."""
    return min(max(math.ceil(0.3 / seconds), 1), 20)
