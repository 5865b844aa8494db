"""FLOPs of a traced program: dead code is removed, then products and convolutions are counted.

The body of a scan counts once per iteration, and recomputation by a remat policy counts too. The
rest (norms, activations, the optimizer) is left out: on accelerators it is limited by memory, and
it is a few percent of the FLOPs.
"""

from collections.abc import Iterator
import math
from typing import Any

from jax.interpreters import partial_eval
import numpy as np


def count(jaxpr: Any) -> float:
    """FLOPs of a jaxpr, over all devices. Of a conditional, the costliest branch counts.

    Raises:
      NotImplementedError: a while loop, whose length is unknown, contains products.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(needed)


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters: bodies of loops, branches, called functions."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):
                yield getattr(item, "jaxpr", item)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inner = [_count(body) for body in inner_jaxprs(equation)]
        if name == "dot_general":
            total += _product(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == "scan":
            total += equation.params["length"] * sum(inner)
        elif name == "cond":
            total += max(inner)
        elif name == "while" and sum(inner):
            raise NotImplementedError("a while loop with products in it has no known length")
        elif name == "shard_map":
            total += equation.params["mesh"].size * sum(inner)
        elif name.startswith("dot_product_attention"):
            total += _attention(equation, products=4 if "bwd" in name else 2)
        elif name == "pallas_call":
            total += math.prod(equation.params["grid_mapping"].grid) * sum(inner)
        else:
            total += sum(inner)
    return total


def _product(equation: Any) -> float:
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _attention(equation: Any, products: int) -> float:
    """cuDNN's attention, without the products that its backward pass repeats."""
    query, key = (variable.aval.shape for variable in equation.invars[:2])  # [B, T, heads, dim]
    return 2 * products * math.prod(query) * key[1]


def _convolution(equation: Any) -> float:
    x, kernel = (variable.aval.shape for variable in equation.invars)
    out, params = equation.outvars[0].aval.shape, equation.params
    # For each array: axes of the batch (in a kernel, output features), the features, and space.
    inputs, kernels, outputs = params["dimension_numbers"]
    hits = map(
        window_hits,
        (x[axis] for axis in inputs[2:]),
        (kernel[axis] for axis in kernels[2:]),
        (out[axis] for axis in outputs[2:]),
        params["window_strides"],
        (low for low, _ in params["padding"]),
        params["lhs_dilation"],
        params["rhs_dilation"],
    )
    # A kernel's input axis has the features of one group only.
    batch = x[inputs[0]] / params["batch_group_count"]
    return 2 * batch * out[outputs[1]] * kernel[kernels[1]] * math.prod(hits)


def window_hits(
    length: int, size: int, outputs: int, stride: int, low: int, dilation: int, spread: int
) -> int:
    """Counts the products of a convolution along one axis: pairs of an output and a window tap.

    Pairs that read padding, or the zeros in a dilated input, cost nothing.

    Args:
      length, size, outputs: extents of the input, the window and the output.
      stride: of the window.
      low: padding before the input.
      dilation: distance between elements of the input, with zeros between them.
      spread: distance between taps of the window.
    """
    place = np.arange(outputs)[:, None] * stride + np.arange(size) * spread - low
    inside = (place >= 0) & (place <= (length - 1) * dilation) & (place % dilation == 0)
    return int(np.count_nonzero(inside))
