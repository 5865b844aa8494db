"""A campaign of faults: kills, full disks, damaged files, lost processes, wrong values.

Not part of the tests, because it takes hours: `python -m tests.campaign` runs all of it,
`python -m tests.campaign kills --count=20` a part. Results are kept in `--out`, so that the same
command goes on after an interruption, and ends with a table.
"""
