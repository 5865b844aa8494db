"""Evaluation of tokenizers and generators."""

from collections.abc import Mapping
from typing import Any


def print_metrics(metrics: Mapping[str, Any]) -> None:
    """Prints a table of the metrics that are numbers."""
    for name, value in metrics.items():
        if isinstance(value, int):
            print(f"  {name:<18}{value:>12,}")
        elif isinstance(value, float):
            print(f"  {name:<18}{value:12.4f}")
