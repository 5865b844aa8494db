"""gigatok convert KIND --from=FILE --out=DIR, or --to-torch --from=DIR --out=FILE

Turns a checkpoint of the reference (.pt, .safetensors) into a bundle, or a bundle back.
KIND: tokenizer, generator, dino, dinov2, clip, siglip, lpips, inception.
A checkpoint in several files: --from=A --from=B.
"""

import pathlib

from absl import flags

from gigatok_jax.errors import UserError
from gigatok_jax.weights import convert

FLAGS = flags.FlagValues()
flags.DEFINE_multi_string("from", None, "what to read", flag_values=FLAGS)
flags.DEFINE_string("out", None, "what to write", flag_values=FLAGS)
flags.DEFINE_string(
    "model",
    "",
    "architecture: b_l, ... or dinov2_vitb14, ...; or a bundle of the same one",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "weights", "auto", "which of the checkpoint's weights: model, ema, or auto", flag_values=FLAGS
)
flags.DEFINE_boolean("to_torch", False, "bundle to checkpoint", flag_values=FLAGS)
flags.DEFINE_alias("to-torch", "to_torch", flag_values=FLAGS)
flags.mark_flags_as_required(["from", "out"], flag_values=FLAGS)


def run(positional: list[str]) -> None:
    if len(positional) != 1:
        raise UserError(f"expected one KIND of {', '.join(convert.KINDS)}, got {positional}")
    kind, sources, out = positional[0], FLAGS["from"].value, pathlib.Path(FLAGS.out)
    if FLAGS.to_torch:
        if len(sources) != 1:
            raise UserError(f"--from: expected one bundle, got {sources}")
        convert.to_file(kind, sources[0], out)
    else:
        convert.to_bundle(kind, sources, out, model=FLAGS.model, weights=FLAGS.weights)
    print(out)
