"""python -m benchmarks.compare A.json B.json: two runs of `benchmarks.run` side by side."""

import argparse
import pathlib
from typing import Any

from benchmarks.run import describe_machine, read

FIELDS = {"seconds": "seconds", "compile": "compile_seconds", "memory, GB": "memory_bytes"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", nargs=2, type=pathlib.Path, metavar="FILE.json")
    first, second = (read(parser, path) for path in parser.parse_args().reports)
    print("\n".join(table(first, second)))


def table(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Lines with A, B and A / B of each shared measurement, then those of one file only."""
    lines = [
        f"{name}: {describe_machine(r['machine'])}" for name, r in (("A", first), ("B", second))
    ]
    one, other = first["results"], second["results"]
    lines.append(
        f"{'':<34}" + "".join(f"{f'{field}: A':>16}{'B':>10}{'A/B':>7}" for field in FIELDS)
    )
    for name in one:
        if name in other:
            cells = (_cells(one[name][key], other[name][key], key) for key in FIELDS.values())
            lines.append(f"{name:<34}" + "".join(cells))
    for name, alone in (("A", one.keys() - other.keys()), ("B", other.keys() - one.keys())):
        if alone:
            lines.append(f"only in {name}: {', '.join(sorted(alone))}")
    return lines


def _cells(one: float | None, other: float | None, key: str) -> str:
    if one is None or other is None:
        return f"{'':>33}"
    scale = 1e9 if key.endswith("bytes") else 1
    ratio = f"{one / other:.2f}" if other else ""
    return f"{one / scale:>16.4g}{other / scale:>10.4g}{ratio:>7}"


if __name__ == "__main__":
    main()
