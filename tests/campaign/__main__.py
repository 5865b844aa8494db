"""Runs the parts of the campaign and prints the table; see the package's docstring."""

import argparse
import collections
import json
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# Compiling takes longer than what is run here.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.campaign import disk, fields, kills, mutations, processes  # noqa: E402

# Part, and how many cases of it are asked for.
PARTS = {
    "kills": (kills.cases, 100),
    "disk": (disk.cases, 50),
    "mutations": (mutations.cases, 1000),
    "processes": (processes.cases, 12),
    "fields": (fields.cases, None),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none: all")
    parser.add_argument("--count", type=int, help="cases; of kills and disk: for each verb")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "campaign")
    args = parser.parse_args()
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(unknown)}; known: {', '.join(PARTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(args.out / "compilations"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    os.environ["GIGATOK_CACHE"] = str(args.out / "cache")
    record = args.out / "results.jsonl"
    done = {key: row for key, row in read(record).items() if row["outcome"] != "failed"}
    for part in args.parts or PARTS:
        cases, count = PARTS[part]
        for name, run in cases(args.out / part, args.count or count):
            key = f"{part} {name}"
            if key in done:
                continue
            start = time.monotonic()
            try:
                outcome, detail, counted = run()
            except Exception as error:  # of the campaign itself, or a case that hangs
                outcome, detail, counted = "failed", f"{type(error).__name__}: {error}", {}
            row = {"case": key, "outcome": outcome, "detail": detail[-3000:], "counted": counted}
            row["seconds"] = round(time.monotonic() - start, 2)
            with record.open("a") as file:
                file.write(json.dumps(row) + "\n")
            done[key] = row
            if outcome == "failed":
                print(f"{key}: {row['detail']}", flush=True)
    return table(done.values())


def read(record: pathlib.Path) -> dict[str, dict]:
    """Finished cases by name."""
    lines = record.read_text().splitlines() if record.exists() else []
    return {row["case"]: row for row in map(json.loads, lines)}


def table(rows) -> int:
    """Prints the outcomes of each kind of case; returns 1 if any failed."""
    outcomes, counted = (collections.defaultdict(collections.Counter) for _ in range(2))
    seconds = collections.Counter()
    for row in rows:
        kind = " ".join(row["case"].split()[:2])
        outcomes[kind][row["outcome"]] += 1
        counted[kind].update(row["counted"])
        seconds[kind] += row["seconds"]
    for kind, found in outcomes.items():
        print(
            f"{kind:<32} {found.total():>5} cases {seconds[kind]:>7.0f} s  ",
            ", ".join(
                f"{count} {what}" for what, count in (*found.items(), *counted[kind].items())
            ),
        )
    return int(any(found["failed"] for found in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
