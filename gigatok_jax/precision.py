"""The type of the computation, by name."""

import jax
import jax.numpy as jnp

DTYPES = ("auto", "float32", "bfloat16")


def compute_dtype(name: str):
    """The type that `name` of `DTYPES` stands for; "auto": bfloat16, but float32 on CPU.

    Parameters, losses, norms' statistics, softmax and the code search are float32 whichever it is.

    Raises:
      ValueError: for another name.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {name!r}")
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(name)
