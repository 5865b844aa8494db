"""FLOPs, bytes and kernels of a compiled program, read from its text (`compiled.as_text()`).

The text lists computations (the entry, bodies of loops, fusions) with one instruction per line.
Every instruction outside a fusion that moves bytes is a kernel. Its cost is the FLOPs of products
and convolutions, and the bytes that it reads from and writes to main memory. The body of a loop
counts once per iteration. XLA's own `cost_analysis` counts it only once, which is useless for
models that are loops over layers.

A fusion reads its operands and writes its result, but moves nothing in between. Where it takes a
slice of an operand (one layer of stacked weights), or writes a slice into its result, only the
slice is moved.
"""

from collections.abc import Iterable, Iterator
import dataclasses
import math
import re
from typing import NamedTuple

from gigatok_jax.planning.flops import window_hits

HEADER = re.compile(r"(?P<entry>ENTRY )?(?P<name>%[\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(
    r"  (?P<root>ROOT )?(?P<name>%[\w.\-]+) = (?P<type>.*?) (?P<opcode>[\w\-]+)"
    r"\((?P<arguments>.*?)\)(?P<attributes>, [\w\-]+=.*)?$"
)
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")  # such as bf16[8,128]{1,0:T(8,128)S(1)}
NAME = re.compile(r"%[\w.\-]+")

# Instructions that move nothing themselves, although the computations they call may.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "iota", "optimization-barrier",
}  # fmt: skip
NO_BITS_IN_NAME = {"pred": 8, "token": 0}
SCRATCH = ("s8", "u8")
READ_SLICES = ("slice", "dynamic-slice", "gather")


class Kernel(NamedTuple):
    """What a device runs as one; FLOPs and bytes are those of all its runs."""

    source: str  # where it comes from, such as "jit(step)/jvp(Generator)/layers/mlp_in/dot_general"
    shapes: str  # of its results
    runs: int
    flops: float
    moved: float  # bytes


class Array(NamedTuple):
    kind: str
    shape: tuple[int, ...]
    size: int  # bytes
    in_main_memory: bool  # False: in one of the chip's small, fast memories


@dataclasses.dataclass(eq=False)
class Instruction:
    opcode: str
    arguments: str  # as written: operands, number of a parameter, or value of a constant
    attributes: str
    arrays: list[Array]  # the result; a tuple has several
    operands: list["Instruction"]
    users: list[tuple["Instruction", int]]  # and their operand number of this one

    @property
    def size(self) -> int:
        """Bytes of the result, wherever it is stored."""
        return sum(array.size for array in self.arrays)

    @property
    def moved(self) -> int:
        """Bytes of the result that pass through main memory; the scratch of a library does not."""
        library = self.opcode == "custom-call"
        return sum(
            array.size
            for array in self.arrays
            if array.in_main_memory and not (library and array.kind in SCRATCH)
        )

    @property
    def shapes(self) -> str:
        """Types and shapes of the result."""
        return ", ".join(f"{each.kind}[{','.join(map(str, each.shape))}]" for each in self.arrays)

    def attribute(self, name: str, pattern: str = r"([^,\s]+)") -> str:
        """What `pattern` captures after `name=` (by default up to a comma), or ""."""
        found = re.search(rf"\b{name}={pattern}", self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> str:
        """Name of the computation that a fusion or a call runs."""
        return self.attribute("calls") or self.attribute("to_apply")


class Program:
    """A compiled program, parsed from its text."""

    def __init__(self, text: str):
        self._computations: dict[str, list[Instruction]] = {}
        self._parameters: dict[tuple[str, int], Instruction] = {}  # by computation and number
        self._roots: dict[str, Instruction] = {}
        for line in text.splitlines():
            if header := HEADER.match(line):
                where, known = header["name"], {}
                current = self._computations[where] = []
                if header["entry"]:
                    self._entry = where
            elif found := INSTRUCTION.match(line):
                arguments, attributes = found["arguments"], found["attributes"] or ""
                arrays = [_array(*array) for array in ARRAY.findall(found["type"])]
                operands = [known[name] for name in NAME.findall(arguments) if name in known]
                new = Instruction(found["opcode"], arguments, attributes, arrays, operands, [])
                for place, operand in enumerate(operands):
                    operand.users.append((new, place))
                known[found["name"]] = new
                current.append(new)
                if new.opcode == "parameter":
                    self._parameters[where, int(arguments)] = new
                if found["root"]:
                    self._roots[where] = new

    def cost(self) -> tuple[float, float]:
        """FLOPs of one device, and bytes to and from its main memory, for one run of the program.

        Raises:
          NotImplementedError: the text does not give the number of iterations of a loop.
        """
        flops, moved, _ = total(self.kernels())
        return flops, moved

    def kernels(self) -> list["Kernel"]:
        """All kernels that one device runs; raises as `cost` does."""
        return list(self._kernels(self._entry, 1))

    def _kernels(self, name: str, runs: int) -> Iterator["Kernel"]:
        for instruction in self._computations[name]:
            match instruction.opcode:
                case "while":
                    turns = runs * self._iterations(instruction)
                    for part in ("body", "condition"):
                        yield from self._kernels(instruction.attribute(part), turns)
                case "conditional":
                    listed = instruction.attribute("branch_computations", r"\{([^}]*)\}")
                    names = NAME.findall(listed) or [
                        instruction.attribute(f"{value}_computation") for value in ("true", "false")
                    ]
                    branches = [list(self._kernels(branch, runs)) for branch in names]
                    yield from max(branches, key=lambda ks: sum(k.flops + k.moved for k in ks))
                case "call" | "async-start":
                    yield from self._kernels(instruction.called, runs)
                case _:
                    moved, flops = self._bytes(instruction), self._total_flops(instruction)
                    if moved or flops:
                        source = instruction.attribute("op_name", r'"([^"]*)"')
                        yield Kernel(source, instruction.shapes, runs, runs * flops, runs * moved)

    def _total_flops(self, instruction: Instruction) -> float:
        """FLOPs of an instruction, and of those in it if it is a fusion."""
        if instruction.opcode != "fusion":
            return _flops(instruction)
        return sum(map(self._total_flops, self._computations[instruction.called]))

    def _iterations(self, loop: Instruction) -> int:
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        # The TPU compiler omits the count, but loops of `lax.scan` run from 0 to a constant.
        root = self._roots[loop.attribute("condition")]
        limits = [x.arguments for x in root.operands if x.opcode == "constant"]
        if "direction=LT" not in root.attributes or not limits or not limits[0].isdigit():
            raise NotImplementedError("a compiled loop has no known number of iterations")
        return int(limits[0])

    def _bytes(self, instruction: Instruction) -> float:
        """Bytes that an instruction outside a fusion reads and writes itself."""
        opcode, operands = instruction.opcode, instruction.operands
        allocation = 'custom_call_target="AllocateBuffer"' in instruction.attributes
        if opcode in FREE or opcode.endswith("-start") or allocation:
            return 0
        if opcode.endswith("-done"):  # an asynchronous copy, of which one side counts
            return max(array.size for array in instruction.arrays)
        if opcode in READ_SLICES:
            return 2 * instruction.moved
        if opcode == "dynamic-update-slice":
            return 2 * operands[1].moved
        if opcode != "fusion":
            return instruction.moved + sum(operand.moved for operand in operands)
        total = 0
        for place, operand in enumerate(operands):
            uses = list(self._uses(self._parameters[instruction.called, place]))
            read = operand.moved
            slices = (*READ_SLICES, "dynamic-update-slice")
            if uses and all(at == 0 and user.opcode in slices for user, at in uses):
                sliced = sum(user.size for user, _ in uses if user.opcode in READ_SLICES)
                read = min(read, sliced)
            total += read
        written = sum(self._updates(instruction.called))
        return total + (min(written, instruction.moved) if written else instruction.moved)

    def _uses(self, value: Instruction) -> Iterator[tuple[Instruction, int]]:
        """The instructions that read a value inside a fusion, nested ones included, and where."""
        for user, place in value.users:
            if user.opcode == "bitcast":
                yield from self._uses(user)
            elif user.opcode == "fusion":
                yield from self._uses(self._parameters[user.called, place])
            else:
                yield user, place

    def _updates(self, fusion: str) -> Iterator[int]:
        """Bytes of each slice that a fusion writes into a larger array."""
        for instruction in self._computations[fusion]:
            if instruction.opcode == "dynamic-update-slice":
                yield instruction.operands[1].size
            elif instruction.opcode == "fusion":
                yield from self._updates(instruction.called)


def total(kernels: Iterable[Kernel]) -> tuple[float, float, int]:
    """FLOPs, bytes and runs of kernels together."""
    flops = moved = runs = 0
    for kernel in kernels:
        flops, moved, runs = flops + kernel.flops, moved + kernel.moved, runs + kernel.runs
    return flops, moved, runs


def _array(kind: str, shape: str, layout: str) -> Array:
    extents = tuple(int(extent) for extent in shape.split(",") if extent)
    bits = NO_BITS_IN_NAME[kind] if kind in NO_BITS_IN_NAME else int(re.search(r"\d+", kind)[0])
    return Array(kind, extents, math.ceil(bits / 8) * math.prod(extents), "S(" not in layout)


def _flops(instruction: Instruction) -> float:
    """FLOPs of a product, a convolution, or a library's call that computes them."""
    shapes = [operand.arrays[0].shape for operand in instruction.operands if operand.arrays]
    result = instruction.arrays[0].shape if instruction.arrays else ()
    match instruction.opcode:
        case "dot":
            return _product(instruction, "lhs_contracting_dims", r"\{([\d,]*)\}", shapes[0])
        case "convolution":
            return _convolution(instruction, *shapes[:2], result)
        case "custom-call":
            target = instruction.attribute("custom_call_target", r'"([^"]*)"')
            if target.startswith("__cublas$"):
                pattern = r'\[([\d",]*)\]'
                return _product(instruction, '"lhs_contracting_dimensions":', pattern, shapes[0])
            if target in ROLES:
                arrays = dict(zip(ROLES[target], (*shapes[:2], result), strict=True))
                return _convolution(instruction, arrays["x"], arrays["kernel"], arrays["out"])
            if target.startswith("__cudnn$fmha"):
                return _attention(instruction, shapes[0])
            # Pallas' kernels say what they cost.
            stated = re.search(r'"?flops"?[:=] ?"?(\d+)', instruction.attributes)
            return float(stated[1]) if stated else 0
    return 0


# Operands and result of cuDNN's convolutions, of which gradients are described as what they are of.
ROLES = {
    "__cudnn$convForward": ("x", "kernel", "out"),
    "__cudnn$convBiasActivationForward": ("x", "kernel", "out"),
    "__cudnn$convBackwardInput": ("out", "kernel", "x"),
    "__cudnn$convBackwardFilter": ("x", "out", "kernel"),
}


def _product(instruction: Instruction, name: str, pattern: str, left: tuple[int, ...]) -> float:
    found = re.search(re.escape(name) + "=?" + pattern, instruction.attributes)
    axes = re.findall(r"\d+", found[1])
    contracted = math.prod(left[int(axis)] for axis in axes)
    return 2 * math.prod(instruction.arrays[0].shape) * contracted


def _attention(instruction: Instruction, query: tuple[int, ...]) -> float:
    """cuDNN's attention: two products forward, five backward; of a causal one, half is skipped."""
    found = re.search(
        r'"intermediate_tensor_shape".*?"dimensions": ?\[([^]]*)\]', instruction.attributes
    )
    scores = math.prod(int(extent) for extent in re.findall(r"\d+", found[1]))
    products = 5 if "Backward" in instruction.attributes else 2
    causal = 0.5 if re.search('"mask_type": ?"CAUSAL"', instruction.attributes) else 1
    return 2 * products * causal * scores * query[-1]


def _convolution(instruction: Instruction, x: tuple, kernel: tuple, out: tuple) -> float:
    # Such as b01f_01io->b01f: batch, features, a kernel's input and output, numbered spatial axes.
    inputs, kernels, outputs = re.split("_|->", instruction.attribute("dim_labels"))
    window = instruction.attribute("window", r"\{([^}]*)\}")
    rank = len(kernels) - 2

    def setting(name, default):
        found = re.search(rf"\b{name}=([\dx_\-]+)", window)
        # Padding is written as 1_2: before and after.
        return [int(v.split("_")[0]) for v in found[1].split("x")] if found else [default] * rank

    settings = (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
    extents = [
        [shape[labels.index(str(axis))] for axis in range(rank)]
        for shape, labels in ((x, inputs), (kernel, kernels), (out, outputs))
    ]
    hits = map(window_hits, *extents, *(setting(*each) for each in settings))
    batch = x[inputs.index("b")] // int(instruction.attribute("batch_group_count") or 1)
    features = kernel[kernels.index("i")] * out[outputs.index("f")]
    return 2 * batch * features * math.prod(hits)
