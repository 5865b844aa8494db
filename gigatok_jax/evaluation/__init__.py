"""Evaluation of tokenizers and generators."""

from collections.abc import Mapping
from typing import Any


def print_metrics(metrics: Mapping[str, Any]) -> None:
    """Prints a table of the metrics that are numbers, and the remark on them if there is one."""
    for name, value in metrics.items():
        if isinstance(value, int):
            print(f"  {name:<18}{value:>12,}")
        elif isinstance(value, float):
            print(f"  {name:<18}{value:12.4f}")
    if remark := metrics.get("remark"):
        print(f"  {remark}")
