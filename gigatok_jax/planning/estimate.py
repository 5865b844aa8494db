"""A program's temporaries, estimated from its trace where it cannot be compiled."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax

# What a compiler computes within the operation that reads it, so that it takes no memory.
FUSED = {
    *("abs", "add", "add_any", "and", "broadcast_in_dim", "ceil", "clamp", "convert_element_type"),
    *("copy", "cos", "div", "eq", "erf", "exp", "expand_dims", "floor", "ge", "gt", "integer_pow"),
    *("is_finite", "le", "log", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or"),
    *("pow", "reshape", "rev", "rsqrt", "select_n", "shift_right_logical", "sign", "sin", "slice"),
    *("sqrt", "square", "squeeze", "stop_gradient", "sub", "tanh", "transpose", "xor", "iota"),
    *("name", "sharding_constraint", "random_bits", "random_unwrap", "random_wrap", "split"),
}
CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"}


@dataclasses.dataclass
class _Event:
    """One operation: arrays that it reads, arrays that it writes, and what it needs meanwhile."""

    reads: set[int]
    writes: list[tuple[int, int]]
    within: list["_Event"]


def temporaries(trace: Callable[[int], Any], batch: int) -> int:
    """Bytes, at the worst moment, of what a program computes from a batch and has yet to use.

    What does not grow with the batch, such as gradients, is left out.

    Args:
      trace: batch size to the program's jaxpr; its structure must not depend on the size.
      batch: of one device.
    """
    small, large = (_events(trace(size)) for size in (batch, 2 * batch))
    return _peak(small, large)


def _peak(small: list[_Event], large: list[_Event]) -> int:
    """Most bytes alive at once, counting for each array by how much it is larger in `large`."""
    last = {}
    for time, event in enumerate(small):
        last |= dict.fromkeys(event.reads, time)
        last |= {array: last.get(array, time) for array, _ in event.writes}
    ends: dict[int, list[int]] = {}
    for array, time in last.items():
        ends.setdefault(time, []).append(array)
    alive, sizes, peak = 0, {}, 0
    for time, (event, twice) in enumerate(zip(small, large, strict=True)):
        within = _peak(event.within, twice.within) if event.within else 0
        written = 0
        for (array, size), (_, double) in zip(event.writes, twice.writes, strict=True):
            sizes[array] = max(double - size, 0)
            written += sizes[array]
        peak = max(peak, alive + max(within, written))
        alive += written
        alive -= sum(sizes.get(array, 0) for array in ends.get(time, ()))
    return peak


def _events(jaxpr: Any) -> list[_Event]:
    events: list[_Event] = []
    environment: dict[int, frozenset[int]] = {}
    counter = iter(range(1, 10**9))
    _walk(jaxpr, environment, events, counter)
    kept = {id for variable in jaxpr.outvars for id in _sources(environment, variable)}
    events.append(_Event(set(kept), [], []))
    return _live(events)


def _sources(environment, variable) -> frozenset[int]:
    """Arrays in memory that a variable is computed from; none for literals and inputs."""
    return environment.get(id(variable), frozenset())


def _walk(jaxpr, environment, events, counter) -> None:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inner = [
            getattr(value, "jaxpr", value)
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
            if _is_jaxpr(value)
        ]
        reads = [_sources(environment, variable) for variable in equation.invars]
        if name in CALLS and len(inner[0].invars) == len(reads):
            body = inner[0]
            environment |= dict(zip(map(id, body.invars), reads, strict=True))
            _walk(body, environment, events, counter)
            for outside, inside in zip(equation.outvars, body.outvars, strict=True):
                environment[id(outside)] = _sources(environment, inside)
            continue
        large = frozenset().union(*reads)
        if name in FUSED and len(large) <= 1:
            environment |= {id(variable): large for variable in equation.outvars}
            continue
        writes = []
        for variable in equation.outvars:
            number = next(counter)
            environment[id(variable)] = frozenset([number])
            writes.append((number, _bytes(variable.aval)))
        within = [event for body in inner[:1] for event in _events(body)]
        events.append(_Event(set(large), writes, within))


def _live(events: list[_Event]) -> list[_Event]:
    """The events that the last one's arrays depend on."""
    needed, kept = set(events[-1].reads), [events[-1]]
    for event in reversed(events[:-1]):
        if any(array in needed for array, _ in event.writes):
            needed |= event.reads
            kept.append(event)
    return kept[::-1]


def _is_jaxpr(value) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def _bytes(aval) -> int:
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 8)
