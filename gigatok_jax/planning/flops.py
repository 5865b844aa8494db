"""FLOPs of products and convolutions, counted in a traced program.

All else (norms, activations, the optimizer) is left out: on the chips of interest it is bound by
memory, and a few percent of the count.
"""

import math
from typing import Any

import numpy as np


def count(jaxpr: Any) -> float:
    """FLOPs of a traced program, on all devices together.

    Bodies of scans count as often as they run, so that what a remat policy computes again counts
    too; of a conditional the costliest branch counts, and nothing that no result depends on.

    Raises:
      ValueError: a while loop's number of turns is not known before it runs.
    """
    return _count(jaxpr, [True] * len(jaxpr.outvars))[0]


def _count(jaxpr: Any, used: list[bool]) -> tuple[float, list[bool]]:
    """FLOPs of the outputs that are used, and which inputs they take."""
    needed = {id(variable) for variable, use in zip(jaxpr.outvars, used, strict=True) if use}
    total = 0.0
    for equation in reversed(jaxpr.eqns):
        outputs = [id(variable) in needed for variable in equation.outvars]
        if not any(outputs):
            continue
        flops, inputs = _equation(equation, outputs)
        total += flops
        needed |= {id(v) for v, use in zip(equation.invars, inputs, strict=True) if use}
    return total, [id(variable) in needed for variable in jaxpr.invars]


def _equation(equation, used: list[bool]) -> tuple[float, list[bool]]:
    name, params = equation.primitive.name, equation.params
    everything = [True] * len(equation.invars)
    if name == "dot_general":
        return _dot(equation), everything
    if name == "conv_general_dilated":
        return _convolution(equation), everything
    if name == "scan":
        return _scan(equation, used)
    if name == "cond":
        counts = [_count(branch.jaxpr, used) for branch in params["branches"]]
        taken = [any(uses) for uses in zip(*(uses for _, uses in counts), strict=True)]
        return max(flops for flops, _ in counts), [True, *taken]
    inner = [
        getattr(value, "jaxpr", value)
        for value in params.values()
        if hasattr(value, "eqns") or hasattr(value, "jaxpr")
    ]
    if len(inner) == 1 and len(inner[0].outvars) == len(used):
        flops, inputs = _count(inner[0], used)
        return flops, inputs if len(inputs) == len(everything) else everything
    total = sum(_count(jaxpr, [True] * len(jaxpr.outvars))[0] for jaxpr in inner)
    if name == "while" and total:
        raise ValueError("a while loop with products in it has no known number of turns")
    return total, everything


def _scan(equation, used: list[bool]) -> tuple[float, list[bool]]:
    body, length = equation.params["jaxpr"].jaxpr, equation.params["length"]
    # Constants, what is carried, what is scanned; only the last gains an axis.
    scanned = sum(
        v.aval.ndim != w.aval.ndim for v, w in zip(equation.invars, body.invars, strict=True)
    )
    carried = sum(
        v.aval.ndim == w.aval.ndim for v, w in zip(equation.outvars, body.outvars, strict=True)
    )
    constants = len(body.invars) - scanned - carried
    while True:
        flops, inputs = _count(body, used)
        # What one turn takes from the turn before it is used there.
        carry = inputs[constants : constants + carried]
        wider = [a or b for a, b in zip(used[:carried], carry, strict=True)] + used[carried:]
        if wider == used:
            return length * flops, inputs
        used = wider


def _dot(equation) -> float:
    left = equation.invars[0].aval.shape
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _convolution(equation) -> float:
    x, kernel = (variable.aval.shape for variable in equation.invars)
    out = equation.outvars[0].aval.shape
    params = equation.params
    inputs, kernels, outputs = params["dimension_numbers"]
    hits = [
        window_hits(x[i], kernel[k], out[o], stride, low, lhs, rhs)
        for i, k, o, stride, (low, _), lhs, rhs in zip(
            inputs[2:],
            kernels[2:],
            outputs[2:],
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            strict=True,
        )
    ]
    batch = x[inputs[0]] / params["batch_group_count"]
    # The kernel's input axis is a group's share of the channels already.
    return 2 * batch * out[outputs[1]] * kernel[kernels[1]] * math.prod(hits)


def window_hits(
    length: int, size: int, outputs: int, stride: int = 1, low: int = 0, lhs: int = 1, rhs: int = 1
) -> int:
    """Pairs of an output and a tap of the window, along one axis, that meet an input.

    Those that meet padding, or the zeros of a dilated input, cost nothing.

    Args:
      length, size, outputs: extents of the input, the window and the output.
      stride: of the window.
      low: padding before the input.
      lhs, rhs: dilation of the input and of the window.
    """
    place = np.arange(outputs)[:, None] * stride + np.arange(size) * rhs - low
    inside = (place >= 0) & (place <= (length - 1) * lhs) & (place % lhs == 0)
    return int(np.count_nonzero(inside))
