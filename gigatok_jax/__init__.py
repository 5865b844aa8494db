"""GigaTok image tokenizers in JAX: `import gigatok_jax as gt`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gigatok_jax.api import (
        generator_from_torch,
        load_generator,
        load_tokenizer,
        parameter_count,
        tokenizer_from_torch,
    )
    from gigatok_jax.evaluation.samples import compare

__all__ = [
    "compare",
    "generator_from_torch",
    "load_generator",
    "load_tokenizer",
    "parameter_count",
    "tokenizer_from_torch",
]


def __getattr__(name):
    # On first use: data workers and `gigatok --help` import this package without JAX.
    if name == "compare":
        from gigatok_jax.evaluation import samples

        return samples.compare
    if name in __all__:
        from gigatok_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
