"""A look into traced programs."""

from collections.abc import Iterator

from gigatok_jax.planning.flops import inner_jaxprs


def equations(jaxpr) -> Iterator:
    """All equations of a jaxpr, including those of the jaxprs inside them."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in inner_jaxprs(equation):
            yield from equations(inner)
