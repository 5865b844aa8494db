"""Gradients of a batch in parts, one after the other, for batches that memory does not hold."""

from collections.abc import Callable
from typing import Any

from einops import rearrange
import jax
import jax.numpy as jnp


def divide(batch: Any, parts: int) -> Any:
    """Pytree of `[B, ...]` to `[parts, B / parts, ...]`.

    Image i goes to part i mod `parts`, so that each is spread over all devices that share a batch.
    """
    return jax.tree.map(lambda x: rearrange(x, "(b p) ... -> p b ...", p=parts), batch)


def join(divided: Any) -> Any:
    """Undoes `divide`."""
    return jax.tree.map(lambda x: rearrange(x, "p b ... -> (b p) ..."), divided)


def mean_gradients(
    loss: Callable[..., tuple[jax.Array, tuple[dict[str, jax.Array], Any, Any]]],
    parts: int,
    params: Any,
    carry: Any,
    data: Any,
    key: jax.Array,
) -> tuple[Any, dict[str, jax.Array], Any, Any]:
    """The gradient of a loss, a mean over a batch, as the mean of that over its parts.

    Args:
      loss: `params, carry, data, key` to a scalar, and metrics (means as well), the next part's
        carry, and outputs by image.
      parts: number of them, see `divide`.
      params: what the gradient is of.
      carry: what each part leaves to the next, or None.
      data: pytree of arrays `[B, ...]`, B a multiple of `parts`.
      key: random; each part has one of its own.

    Returns:
      Gradients, metrics, the last part's carry, and outputs `[B, ...]` in the batch's order.
    """
    gradient = jax.grad(loss, has_aux=True)
    if parts == 1:
        gradients, (metrics, carry, outputs) = gradient(params, carry, data, key)
        return gradients, metrics, carry, outputs

    def add(state, part):
        totals, carry = state
        gradients, (metrics, carry, outputs) = gradient(params, carry, *part)
        return (jax.tree.map(jnp.add, totals, (gradients, metrics)), carry), outputs

    divided = (divide(data, parts), jax.random.split(key, parts))
    first = jax.tree.map(lambda x: x[0], divided)
    gradients, (metrics, _, _) = jax.eval_shape(gradient, params, carry, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (gradients, metrics))
    (totals, carry), outputs = jax.lax.scan(add, (zeros, carry), divided)
    gradients, metrics = jax.tree.map(lambda x: x / parts, totals)
    return gradients, metrics, carry, join(outputs)
