"""gigatok report DIR [DIR ...] [--out=FILE.html]

Puts finished probes, what `gigatok probe` left in DIR, side by side in one HTML file.
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
        raise UserError("expected the workdir of a probe, or of several")
    workdirs = [pathlib.Path(workdir) for workdir in positional]
    out = pathlib.Path(FLAGS.out) if FLAGS.out else workdirs[0] / "report.html"
    report.write(workdirs, out)
    print(out)
