"""gigatok reconstruct --tokenizer=DIR --images=PATH --out=DIR

Passes images (a file, or all below a folder) through a tokenizer. OUT gets grid.png (input over
output), images/ (one PNG each), and metrics.json: PSNR, SSIM, codebook usage, and LPIPS where its
weights are there (`gigatok weights fetch lpips_vgg16`).
"""

import logging
import pathlib

from absl import flags
import jax
import numpy as np
from tqdm import tqdm

from gigatok_jax import api, pictures
from gigatok_jax.data import crops
from gigatok_jax.data.folders import image_paths
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import reconstruction
from gigatok_jax.files import write_json

logger = logging.getLogger(__name__)

FLAGS = flags.FlagValues()
flags.DEFINE_string("tokenizer", None, "bundle or workdir", flag_values=FLAGS)
flags.DEFINE_string("images", None, "image file, or folder of images", flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder for the results", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 8, "images at once", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "ssim_range", 1, "data_range of SSIM; the reference passes 2", lower_bound=1, flag_values=FLAGS
)
flags.mark_flags_as_required(["tokenizer", "images", "out"], flag_values=FLAGS)


def run(positional: list[str]) -> None:
    if positional:
        raise UserError(f"{positional[0]!r}: unexpected argument")
    tokenizer = api.load_tokenizer(FLAGS.tokenizer)
    reconstruct(
        tokenizer,
        pathlib.Path(FLAGS.images),
        pathlib.Path(FLAGS.out),
        batch_size=FLAGS.batch_size,
        ssim_range=FLAGS.ssim_range,
    )


def reconstruct(
    tokenizer: api.PretrainedTokenizer,
    source: pathlib.Path,
    out: pathlib.Path,
    *,
    batch_size: int,
    ssim_range: int = 1,
) -> None:
    """Writes the files that the module's docstring names, and prints the metrics."""
    paths = image_paths(source)
    compare = reconstruction.comparison(ssim_range)
    # Whole rows where there are enough.
    columns = reconstruction.COLUMNS
    count = min(len(paths) // columns * columns or len(paths), reconstruction.SHOWN)
    wanted = {i * len(paths) // count for i in range(count)}  # spread over all classes
    rows, shown, codes_seen, skipped = [], [], set(), 0
    for start in tqdm(range(0, len(paths), batch_size), unit="batch", disable=None):
        batch, names = [], []
        for path in paths[start : start + batch_size]:
            try:
                image = crops.load(path)
            except crops.BadImage as error:
                logger.warning("skipped %s: %s", path, error)
                skipped += 1
                continue
            batch.append(crops.center_crop(image, tokenizer.config.image_size))
            names.append(path.relative_to(source) if source.is_dir() else pathlib.Path(path.name))
        if not batch:
            continue
        # Short batches are filled up, so that only one size is compiled.
        inputs = np.stack(batch + batch[-1:] * (batch_size - len(batch)))
        codes = tokenizer.encode(inputs)
        floats = tokenizer.decode(codes)
        outputs = np.asarray(pictures.to_uint8(floats))
        values = jax.device_get(compare(inputs, floats))
        codes_seen.update(np.unique(codes[: len(batch)]).tolist())
        for i, name in enumerate(names):
            pictures.save_png(out / "images" / _png(name), outputs[i])
            rows.append({"image": str(name)} | {k: float(v[i]) for k, v in values.items()})
            if len(rows) - 1 in wanted:
                shown.append((inputs[i], outputs[i]))
    if not rows:
        raise UserError(f"{source}: none of its {len(paths)} images can be read")
    reconstruction.write_grid(out / "grid.png", shown)
    means = {
        name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name != "image"
    }
    means["codebook_usage"] = len(codes_seen) / tokenizer.config.codebook_size
    write_json(
        out / "metrics.json", {"images": len(rows), "skipped": skipped, **means, "each": rows}
    )
    print(f"{len(rows)} images ({skipped} skipped)")
    for name, value in means.items():
        print(f"  {name:<16}{value:10.4f}")
    print(out)


def _png(name: pathlib.Path) -> pathlib.Path:
    """`a.png` for itself, `a.jpg.png` for `a.jpg`: neither hides the other."""
    return name if name.suffix == ".png" else name.with_name(f"{name.name}.png")
