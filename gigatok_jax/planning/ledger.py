"""Where a compiled program's bytes, FLOPs and kernels go, and the time that they take.

A device is busy for the sum of two times: all bytes at the bandwidth of a large addition, and all
FLOPs at the rate of a large product. On GPUs, a program of many short kernels is bound by the gaps
between them instead. The rates are those that an H100 was measured at, as shares of its data sheet,
and the gap is the time of sampling B (`benchmarks/README.md`) over the number of its kernels.
"""

import collections
from collections.abc import Sequence
import re

from gigatok_jax.planning.chips import Chip
from gigatok_jax.planning.hlo import Kernel, total

BANDWIDTH, RATE = 0.845, 0.81  # shares of the data sheet
GAP = 5e-6  # seconds between the starts of two short kernels of a GPU
CALIBRATION = (
    "time: bytes at 84.5 % of the bandwidth plus FLOPs at 81 % of the peak, or (GPUs) kernels at 5 "
    "us, as measured on an H100; for generator B's step, sampling B and sampling XXL this gave "
    "+3, -4 and +6 % of the measured time"
)
# What JAX and Flax add to the names of modules.
NOISE = re.compile(
    r"jit\(\w*\)|while|body|cond|closed_call|checkpoint|layers\.body|\w+\.\w+|branch_\d+_fun"
)


def seconds(chip: Chip, moved: float, flops: float, runs: int) -> float:
    """Estimated time of kernels on one device."""
    busy = moved / (BANDWIDTH * chip.bandwidth) + flops / (RATE * chip.flops)
    return max(busy, 0 if chip.axes else runs * GAP)


def table(kernels: Sequence[Kernel], chip: Chip, rows: int) -> str:
    """The `rows` largest places by bytes, their kernels added up, with a line for the rest."""
    places = collections.defaultdict(list)
    for kernel in kernels:
        places[place(kernel.source)].append(kernel)
    ranked = sorted(places.items(), key=lambda item: -sum(k.moved for k in item[1]))
    rest = [kernel for _, group in ranked[rows:] for kernel in group]
    listed = ranked[:rows] + ([(f"{len(ranked) - rows} other places", rest)] if rest else [])
    lines = [f"{'GB':>9} {'TFLOP':>8} {'kernels':>8} {'ms':>8}  place"]
    for name, group in [*listed, ("all", kernels)]:
        flops, moved, runs = total(group)
        lines.append(
            f"{moved / 1e9:9.2f} {flops / 1e12:8.2f} {runs:8d} "
            f"{seconds(chip, moved, flops, runs) * 1e3:8.2f}  {name}"
        )
    return "\n".join([*lines, CALIBRATION])


def place(source: str) -> str:
    """A kernel's module path and operation, and the pass that it belongs to.

    "jit(step)/transpose(jvp(Generator))/layers/block/mlp_in/dot_general" becomes
    "backward: Generator/layers/block/mlp_in/dot_general".
    """
    when = "forward: " if "jvp(" in source else ""
    if "transpose(" in source:
        when = "recomputed: " if "rematted_computation" in source else "backward: "
    parts = []
    for part in source.split("/"):
        part = re.sub(r"^(\w+\()+|\)+$", "", part) if "jvp(" in part else part
        if part and part != "rematted_computation" and not NOISE.fullmatch(part):
            parts += [part] if part not in parts[-1:] else []
    return when + ("/".join(parts) or "without a name")
