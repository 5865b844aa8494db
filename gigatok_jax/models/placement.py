"""Where arrays lie while a program for several devices is traced, by their logical axes."""

from collections.abc import Callable
import contextvars
from typing import Any

import flax.linen as nn
import jax

# What a run on several devices sets while its program is traced: logical axes of an array to its
# sharding. Flax's own constraints do nothing but under `jax.set_mesh`, where DenseGeneral breaks.
current: contextvars.ContextVar[Callable[[tuple[str | None, ...]], Any] | None] = (
    contextvars.ContextVar("placement", default=None)
)

# Axes that parameters are divided over in memory only: where they are used they are whole, as
# partial sums of activations would be far larger.
STORED = ("embed", "conv_out")


def place(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins the sharding of an array of the given logical axes; nothing on a single device."""
    sharding_of = current.get()
    return x if sharding_of is None else jax.lax.with_sharding_constraint(x, sharding_of(axes))


def gather(x: jax.Array, *axes: str | None) -> jax.Array:
    """A parameter of the given logical axes, whole along those of `STORED`.

    So is its gradient, until all devices' shares are added.
    """
    return place(x, *(None if axis in STORED else axis for axis in axes))


def promote(*axes: str | None) -> Callable:
    """For the `promote_dtype` of a Linen layer whose kernel has the given logical axes.

    Kernel and bias are gathered in the type of the computation, which may be half as wide.
    """

    def promote_and_gather(x, kernel, bias, *, dtype):
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=dtype)
        kernel = gather(kernel, *axes)
        return x, kernel, bias if bias is None else gather(bias, *axes[-bias.ndim :])

    return promote_and_gather
