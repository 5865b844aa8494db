"""gigatok report DIR [DIR ...] [--out=FILE.html]

Writes one HTML file with the tables, curves, pictures and settings that `gigatok probe` or
`gigatok train` left in DIR. A probe must be finished; a training run need not be. Several runs of
one kind appear side by side: probes in the paper's table and figures, training runs in shared
charts.
"""

import pathlib

from absl import flags

from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import report

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "out", "", "output file (default: report.html in the first DIR)", flag_values=FLAGS
)


def run(positional: list[str]) -> None:
    if not positional:
        raise UserError("expected at least one workdir of a probe or a training run")
    workdirs = [pathlib.Path(workdir) for workdir in positional]
    out = pathlib.Path(FLAGS.out) if FLAGS.out else workdirs[0] / "report.html"
    report.write(workdirs, out)
    print(out)
