"""Memory of a program's temporaries, estimated from its trace when no compiler is available.

Operations are assumed to run in the order of the trace. Elementwise operations that read one array
are assumed to be fused into the operation that reads their result, and take no memory. Every other
operation stores its results until the last operation that reads them. The estimate is the largest
sum of all arrays stored at the same time. An operation that contains a program (a loop's body, a
recomputed block) adds that program's own peak while it runs.

The size of an array is its growth when the batch is doubled. This leaves out arrays that do not
grow with the batch, such as gradients, which are easier to add up than to find in the trace.
"""

import dataclasses
import itertools
import math
from typing import Any

from gigatok_jax.planning.flops import inner_jaxprs

FUSED = {
    "abs", "add", "add_any", "and", "broadcast_in_dim", "ceil", "clamp", "convert_element_type",
    "copy", "cos", "div", "eq", "erf", "exp", "expand_dims", "floor", "ge", "gt", "integer_pow",
    "iota", "is_finite", "le", "log", "logistic", "lt", "max", "min", "mul", "name", "ne",
    "neg", "not", "or", "pow", "random_bits", "random_unwrap", "random_wrap", "reshape", "rev",
    "rsqrt", "select_n", "sharding_constraint", "shift_right_logical", "sign", "sin", "slice",
    "split", "sqrt", "square", "squeeze", "stop_gradient", "sub", "tanh", "transpose", "xor",
}  # fmt: skip
CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"}


@dataclasses.dataclass
class _Operation:
    reads: set[int]  # numbers of stored arrays
    writes: dict[int, int]  # number of a stored array to its bytes
    inside: int  # peak of the program inside, in bytes


def peak(jaxpr: Any, doubled: Any) -> int:
    """Peak bytes of temporaries.

    Args:
      jaxpr: of the program for one device's batch.
      doubled: the same program for twice the batch.
    """
    operations, results = _operations(jaxpr, doubled)
    sizes = {array: size for operation in operations for array, size in operation.writes.items()}
    # Going backwards, an array is alive from its last reader to the operation that writes it.
    alive, most = results, 0
    for operation in reversed(operations):
        if alive.isdisjoint(operation.writes):
            continue  # nothing depends on it
        alive = (alive - operation.writes.keys()) | operation.reads
        within = max(operation.inside, sum(operation.writes.values()))
        most = max(most, sum(sizes[array] for array in alive) + within)
    return most


def _operations(jaxpr: Any, doubled: Any) -> tuple[list[_Operation], set[int]]:
    """The operations that store arrays, and the arrays that the results are computed from."""
    operations: list[_Operation] = []
    stored: dict[int, int | None] = {}  # id of a variable to the stored array it is computed from
    numbers = itertools.count()

    def sources(variables):
        return {stored.get(id(variable)) for variable in variables} - {None}

    def bind(variables, others):
        stored.update({id(v): stored.get(id(o)) for v, o in zip(variables, others, strict=True)})

    def visit(jaxpr, doubled):
        for equation, twice in zip(jaxpr.eqns, doubled.eqns, strict=True):
            bodies = list(zip(inner_jaxprs(equation), inner_jaxprs(twice), strict=True))
            reads = sources(equation.invars)
            if equation.primitive.name in CALLS:
                called = bodies[0][0]
                bind(called.invars, equation.invars)
                visit(*bodies[0])
                bind(equation.outvars, called.outvars)
            elif equation.primitive.name in FUSED and len(reads) <= 1:
                array = next(iter(reads), None)
                stored.update(dict.fromkeys(map(id, equation.outvars), array))
            else:
                writes = {}
                for variable, larger in zip(equation.outvars, twice.outvars, strict=True):
                    stored[id(variable)] = array = next(numbers)
                    writes[array] = max(_bytes(larger.aval) - _bytes(variable.aval), 0)
                inside = peak(*bodies[0]) if bodies else 0
                operations.append(_Operation(reads, writes, inside))

    visit(jaxpr, doubled)
    return operations, sources(jaxpr.outvars)


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 8)
