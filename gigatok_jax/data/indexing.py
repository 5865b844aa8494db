"""The bounds of a source's examples."""

import operator


def checked(index: int, length: int) -> int:
    """`index`, or IndexError where it is outside [0, length)."""
    index = operator.index(index)
    if not 0 <= index < length:
        raise IndexError(f"index {index} is outside [0, {length})")
    return index
