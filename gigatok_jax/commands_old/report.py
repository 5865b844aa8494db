"""gigatok report DIR [DIR ...] [--out=FILE.html]

Shows what `gigatok probe` or `gigatok train` left in DIR in one HTML file: tables, curves, pictures
and settings. A probe must be finished, a training run need not be. Several of one kind are put side
by side: probes in the paper's table and figures, training runs in one chart a metric.
"""

import pathlib

from absl import flags

from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import report

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "out", "", "the file; by default report.html in the first DIR", flag_values=FLAGS
)


def run(positional: list[str]) -> None:
    if not positional:
        raise UserError("expected the workdir of a probe or a training run, or of several")
    workdirs = [pathlib.Path(workdir) for workdir in positional]
    out = pathlib.Path(FLAGS.out) if FLAGS.out else workdirs[0] / "report.html"
    report.write(workdirs, out)
    print(out)
