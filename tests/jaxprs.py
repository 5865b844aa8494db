"""A look into traced programs."""

from collections.abc import Iterator


def equations(jaxpr) -> Iterator:
    """All equations of a jaxpr, those of the jaxprs inside them included."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from equations(inner)
