"""FLOPs and bytes of a compiled program, with loops counted as often as they turn.

XLA's own `cost_analysis` counts the body of a loop once, and layers are loops here.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
import re

from gigatok_jax.planning.flops import window_hits

ITEM_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "c64": 8, "c128": 16, "token": 0}
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
NAME = re.compile(r"%[\w.\-]+")
HEADER = re.compile(r"(ENTRY )?(%[\w.\-]+) \(.*\{$")

# What has no cost of its own, or whose cost is that of the computation it calls.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id", "replica-id", "iota", "optimization-barrier"),
}
ALLOCATION = 'custom_call_target="AllocateBuffer"'


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in a program: its extents, its bytes, and whether they are in main memory."""

    shape: tuple[int, ...]
    bytes: int
    main: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode, operands: as in the text; operands are names.
      arrays: of its result, more than one where that is a tuple.
      text: attributes, and operands as they are written.
      root: whether the computation's result is this one's.
    """

    name: str
    opcode: str
    operands: tuple[str, ...]
    arrays: tuple[Array, ...]
    text: str
    root: bool

    @property
    def size(self) -> int:
        """Bytes of the result, wherever it lies."""
        return sum(array.bytes for array in self.arrays)

    @property
    def bytes(self) -> int:
        """Of the result, in main memory."""
        return sum(array.bytes for array in self.arrays if array.main)

    def attribute(self, name: str) -> str:
        """Value of `name=` up to the next comma or blank; empty without it."""
        found = re.search(rf"[ ,{{]{name}=([^,\s]+)", self.text)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs of products and convolutions, and bytes to and from main memory, on one device."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __rmul__(self, times: float) -> "Cost":
        return Cost(times * self.flops, times * self.bytes)


class Program:
    """A compiled program's computations, parsed from `compiled.as_text()`."""

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            header = HEADER.match(line)
            if header:
                current = self._computations[header[2]] = {}
                self._entry = header[2] if header[1] else self._entry
            elif line.startswith("  ") and " = " in line:
                instruction = _parse(line)
                current[instruction.name] = instruction

    def cost(self) -> Cost:
        """Of one run of the program.

        Raises:
          ValueError: a loop's number of turns is not in the text.
        """
        return self._cost(self._entry, fused=False)

    @functools.cache  # noqa: B019 - a program lives as long as its plan
    def _cost(self, name: str, *, fused: bool) -> Cost:
        total = Cost()
        for instruction in self._computations[name].values():
            total += self._instruction(name, instruction, fused)
        return total

    def _instruction(self, where: str, instruction: Instruction, fused: bool) -> Cost:
        opcode = instruction.opcode
        total = Cost(bytes=0.0 if fused else self._bytes(where, instruction))
        if opcode == "while":
            body, condition = (instruction.attribute(x) for x in ("body", "condition"))
            turn = self._cost(body, fused=fused) + self._cost(condition, fused=fused)
            total += self._turns(instruction) * turn
        elif opcode == "conditional":
            costs = [self._cost(name, fused=fused) for name in _branches(instruction)]
            total += max(costs, key=lambda cost: cost.flops)
        elif opcode == "fusion":
            total += self._cost(instruction.attribute("calls"), fused=True)
        elif opcode in ("call", "async-start"):
            called = instruction.attribute("to_apply") or instruction.attribute("calls")
            total += self._cost(called, fused=fused)
        elif opcode == "dot":
            total += Cost(self._dot(where, instruction))
        elif opcode == "convolution":
            total += Cost(self._convolution(where, instruction))
        return total

    def _turns(self, loop: Instruction) -> int:
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text)
        if known:
            return int(known[1])
        # A counter from 0, compared with a constant.
        condition = self._computations[loop.attribute("condition")]
        root = next(i for i in condition.values() if i.root)
        limits = [
            re.match(r"\((\d+)\)", condition[operand].text)
            for operand in root.operands
            if condition[operand].opcode == "constant"
        ]
        if root.opcode != "compare" or "direction=LT" not in root.text or not any(limits):
            raise ValueError(f"loop {loop.name} has no known number of turns")
        return int(limits[0][1])

    def _shape(self, where: str, instruction: Instruction, operand: int) -> tuple[int, ...]:
        return self._computations[where][instruction.operands[operand]].arrays[0].shape

    def _dot(self, where: str, instruction: Instruction) -> float:
        left = self._shape(where, instruction, 0)
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)[1]
        contracted = [left[int(axis)] for axis in axes.split(",") if axis]
        return 2 * math.prod(instruction.arrays[0].shape) * math.prod(contracted)

    def _convolution(self, where: str, instruction: Instruction) -> float:
        x, kernel = (self._shape(where, instruction, i) for i in (0, 1))
        out = instruction.arrays[0].shape
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
        inputs, kernels, outputs = labels[1], labels[2], labels[3]
        window = dict(re.findall(r"(\w+)=([\dx_\-]+)", _window(instruction.text)))
        hits = 1
        for axis in (label for label in kernels if label.isdigit()):
            i = int(axis)

            def setting(name, default, i=i):
                return window[name].split("x")[i] if name in window else default

            hits *= window_hits(
                x[inputs.index(axis)],
                kernel[kernels.index(axis)],
                out[outputs.index(axis)],
                int(setting("stride", 1)),
                int(setting("pad", "0_0").split("_")[0]),
                int(setting("lhs_dilate", 1)),
                int(setting("rhs_dilate", 1)),
            )
        batch = x[inputs.index("b")] // int(instruction.attribute("batch_group_count") or 1)
        return 2 * batch * out[outputs.index("f")] * kernel[kernels.index("i")] * hits

    def _bytes(self, where: str, instruction: Instruction) -> float:
        """Read and written by an instruction that stands by itself, or by a fusion."""
        computation, opcode = self._computations[where], instruction.opcode
        if opcode in FREE or opcode.endswith("-start") or ALLOCATION in instruction.text:
            return 0.0
        if opcode.endswith("-done"):  # a transfer that began before: one side is counted
            return max(array.bytes for array in instruction.arrays)
        operands = [computation[name] for name in instruction.operands if name in computation]
        if opcode == "dynamic-slice":
            return 2 * instruction.bytes
        if opcode == "dynamic-update-slice":
            return 2 * operands[1].bytes
        if opcode == "fusion":
            return self._fusion_bytes(instruction, operands)
        return instruction.bytes + sum(operand.bytes for operand in operands)

    def _fusion_bytes(self, fusion: Instruction, operands: list[Instruction]) -> float:
        """Of a large array that a fusion takes a slice of, or writes one to, the slice counts."""
        body, total = fusion.attribute("calls"), 0.0
        for operand, parameter in zip(operands, self._parameters(body), strict=True):
            uses = list(self._uses(body, parameter))
            if uses and all(place == 0 and use.opcode in SLICES for use, place in uses):
                read = sum(use.size for use, _ in uses if use.opcode == "dynamic-slice")
                total += min(read, operand.bytes)
            else:
                total += operand.bytes
        updates = list(self._updates(body))
        return total + (min(sum(updates), fusion.bytes) if updates else fusion.bytes)

    def _parameters(self, where: str) -> list[str]:
        """Names of a computation's parameters, in order."""
        numbers = {
            instruction.name: int(instruction.text[1 : instruction.text.index(")")])
            for instruction in self._computations[where].values()
            if instruction.opcode == "parameter"
        }
        return sorted(numbers, key=numbers.get)

    def _uses(self, where: str, name: str) -> Iterator[tuple[Instruction, int]]:
        """What takes a value of a fusion's computation, and as which operand.

        Instructions of fusions within it are among them.
        """
        for user in self._computations[where].values():
            for place, operand in enumerate(user.operands):
                if operand != name:
                    continue
                if user.opcode == "bitcast":
                    yield from self._uses(where, user.name)
                elif user.opcode == "fusion":
                    inner = user.attribute("calls")
                    yield from self._uses(inner, self._parameters(inner)[place])
                else:
                    yield user, place

    def _updates(self, where: str) -> Iterator[int]:
        """Bytes of each slice that a fusion's computation writes into a larger array."""
        computation = self._computations[where]
        for instruction in computation.values():
            if instruction.opcode == "dynamic-update-slice":
                yield computation[instruction.operands[1]].size
            elif instruction.opcode == "fusion":
                yield from self._updates(instruction.attribute("calls"))


SLICES = ("dynamic-slice", "dynamic-update-slice")


def _parse(line: str) -> Instruction:
    head, _, rest = line.strip().partition(" = ")
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, text = rest[: rest.index("(")], rest[rest.index("(") :]
    return Instruction(
        name=head.removeprefix("ROOT "),
        opcode=opcode,
        operands=tuple(NAME.findall(text[: _closing(text) + 1])),
        arrays=tuple(_array(*found) for found in ARRAY.findall(kind)),
        text=text,
        root=head.startswith("ROOT "),
    )


def _closing(text: str) -> int:
    """Where the parenthesis that `text` begins with is closed."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced: {text[:80]}")


def _array(kind: str, shape: str, layout: str) -> Array:
    extents = tuple(int(extent) for extent in shape.split(",") if extent)
    bits = re.search(r"\d+", kind)
    item = ITEM_BYTES[kind] if kind in ITEM_BYTES else math.ceil(int(bits[0]) / 8)
    return Array(extents, item * math.prod(extents), main="S(" not in layout)


def _window(text: str) -> str:
    found = re.search(r"window=\{([^}]*)\}", text)
    return found[1] if found else ""


def _branches(instruction: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
    if listed:
        return NAME.findall(listed[1])
    return [instruction.attribute(f"{name}_computation") for name in ("true", "false")]
