"""Verbs that train, and what comes before: pack, encode, plan, train."""

from typing import Any

from gigatok_jax.commands.verbs import (
    PROCESSES,
    REQUIRED,
    TOKENIZER,
    batch_size,
    check_data,
    data_of,
    flag,
    required,
    verb,
)
from gigatok_jax.errors import UserError
from gigatok_jax.files import as_path


@verb(
    "train a tokenizer, a generator or a linear probe, or resume training",
    required("workdir", "folder of the run"),
    *PROCESSES,
    configs={"config": REQUIRED},
)
def train(config, workdir: str) -> None:
    """gigatok train --config=tokenizer:b_l --workdir=DIR [--config.FIELD=VALUE ...]

    Trains from scratch, or resumes from the newest checkpoint in DIR. Writes config.json,
    checkpoints/, metrics.jsonl, tensorboard/, pictures/ and, at the end, bundle/ to DIR.
    """
    from gigatok_jax.training import TASKS, loop

    if not isinstance(config, tuple(TASKS.values())):
        raise UserError(f"--config: expected a training run ({', '.join(TASKS)})")
    written = ("bundle", "checkpoints", "pictures", "tensorboard")
    check_data("workdir", as_path(workdir), config.data, *written)
    loop.train(config, as_path(workdir))


@verb(
    "store a data set's images as records, for fast reading",
    flag(
        "multi_string",
        "from",
        None,
        "folder of images, or .tar or .parquet files: a folder, a pattern, or repeated",
        required=True,
    ),
    required("out", "folder for the records; with --to=tfds, DATA_DIR/NAME/VERSION"),
    flag("enum", "to", "records", ["records", "tfds"], "for data.source=records, or a TFDS set"),
    flag(
        "integer",
        "holdout",
        20,
        "if --from has no validation images, hold out one image in so many; 0: none",
        lower_bound=0,
    ),
    flag("integer", "shard_images", 1024, "images per shard", lower_bound=1),
    *PROCESSES,
    devices=False,
)
def pack(out: str, **options: Any) -> None:
    """gigatok pack --from=PATH [--from=PATH ...] --out=DIR

    Stores images in ArrayRecord shards, with the bytes of their files, labels, names and class
    names. PATH is one of these, or a pattern such as "/data/photos-{train,val}-*.tar":
      a folder of images, as for data.source=folder
      tar files: webdataset shards, or ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar
      Parquet files, as in ILSVRC/imagenet-1k on the Hugging Face Hub
    After a kill, the same command resumes. Files that have changed since are rejected. To train on
    the records, use --config.data.source=records --config.data.path=DIR. With --to=tfds, DIR is
    DATA_DIR/NAME/VERSION, such as /data/tfds/imagenet2012/5.1.0: to train on them, use
    --config.data.path=DATA_DIR --config.data.name=NAME.
    """
    from gigatok_jax import distributed, packing

    folder = as_path(out)
    with distributed.locked(folder):
        packing.pack(options.pop("from"), folder, **options)


@verb(
    "store the codes of a data set",
    required("tokenizer", TOKENIZER),
    required("out", "folder for the codes"),
    flag(
        "list",
        "crop_factors",
        ["1.1"],
        "store ten crops per factor, from a centre crop of factor times the image size; "
        "1.1,1.05 adds the reference's second set; empty: one centre crop",
    ),
    batch_size(32, "images read, and crops encoded, per batch"),
    flag("integer", "shard_images", 4096, "images per shard", lower_bound=1),
    flag(
        "enum",
        "format",
        "records",
        ["records", "parquet", "npz"],
        "also write one file per split for other programs; records: do not",
    ),
    flag("boolean", "overwrite", False, "replace the codes in --out"),
    *PROCESSES,
    configs={"config": REQUIRED},
)
def encode(tokenizer: str, config, out: str, crop_factors: list[str], **options: Any) -> None:
    """gigatok encode --tokenizer=NAME --config=FILE --out=DIR [--config.data.FIELD=VALUE ...]

    Stores the codes of the config's data set: ten crops of each training image, and the centre crop
    of each validation image. After a kill, the same command resumes. Images that have changed since
    are rejected; --overwrite encodes them anew. To train on the codes, use
    --config.data.source=codes --config.data.path=DIR. For other programs, --format=parquet adds
    train.parquet and validation.parquet (a row per crop: codes, label, key, crop), and --format=npz
    adds train.npz and validation.npz (codes [images, crops, N], labels, keys).
    """
    from gigatok_jax import api, distributed, encoding

    try:
        factors = tuple(float(factor) for factor in crop_factors)
    except ValueError:
        raise UserError(f"--crop_factors: expected numbers, got {crop_factors}") from None
    data, folder = data_of(config), as_path(out)
    check_data("out", folder, data)
    loaded = api.load_tokenizer(tokenizer, where="--tokenizer")
    with distributed.locked(folder):
        encoding.encode(loaded, data, folder, crop_factors=factors, **options)


@verb(
    "compile a run for hardware you need not have: memory, FLOPs, time",
    required("topology", "devices, such as v5e:4x4 or h100:8"),
    flag(
        "integer",
        "ledger",
        0,
        "print where bytes, FLOPs and kernels go, in this many rows; 0: do not",
        lower_bound=0,
    ),
    flag("enum", "job", "train", ["train", "sample"], "program to compile"),
    flag(
        "float",
        "utilisation",
        0.4,
        "fraction of the peak FLOPs that a step is assumed to reach",
        lower_bound=0.01,
        upper_bound=1.0,
    ),
    flag(
        "float",
        "effort",
        -1.0,
        "compiler effort: -1 is quick, 0 is that of a real run; JAX 0.11 and newer always use 0",
        lower_bound=-1.0,
        upper_bound=1.0,
    ),
    configs={"config": REQUIRED},
    devices=False,
)
def plan(config, topology: str, job: str, utilisation: float, effort: float, ledger: int) -> None:
    """gigatok plan --config=tokenizer:xl_xxl --topology=v5p:4x4x2 [--config.FIELD=VALUE ...]

    Compiles the training step (or a generator's sampling, with --job=sample) for devices that need
    not exist: TPUs (v4 or v5p as CHIP:AxBxC, v5e or v6e as CHIP:AxB) with the `tpu` extra, GPUs
    (a100, h100, h200 or b200 as CHIP:COUNT or CHIP:HOSTSxCOUNT) with `cuda`. Without the extra,
    estimates from shapes. Prints memory per device, FLOPs, bytes, kernels, a lower bound on the
    step's time, and days of training. If memory is too small, lists settings that fit, and exits
    with 1. --ledger=30 shows the 30 places that move most bytes.
    """
    from gigatok_jax.planning import plan as planning
    from gigatok_jax.training import GeneratorRun, TokenizerRun

    if not isinstance(config, TokenizerRun | GeneratorRun):
        raise UserError("--config: expected the training run of a tokenizer or a generator")
    planning.plan(config, topology, job, utilisation, effort, ledger)
