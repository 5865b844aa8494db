"""Trains the embedded teacher: `python -m tools.train_embedded_teacher --out=DIR`.

A small ViT with DINOv2's architecture learns labeled drawings (`data.drawings`): the class token
predicts the class, and patch tokens predict what each patch shows. Two blocks' outputs also predict
the pixels, because a perceptual distance must notice changes of appearance that a classifier would
ignore.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
import functools
import multiprocessing
import pathlib
import time

from einops import rearrange, reduce
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gigatok_jax import bundles
from gigatok_jax.data import drawings
from gigatok_jax.models import vit

IMAGE_SIZE = 64
CLASSES = len(drawings.CLASS_NAMES)
CONFIG = vit.ViTConfig(depth=6, heads=3, width=96, patch_size=8, grid=8)
PIXEL_TAPS = (3, 6)  # blocks whose outputs predict the pixels
PIXEL_WEIGHT = 1.0


class Pretext(nn.Module):
    """The teacher, and heads that only its training needs."""

    config: vit.ViTConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
        """Images `[B, S, S, 3]` in [-1, 1] to logits `[B, 10]` and `[B, T, 11]`, and pixels."""
        config = self.config
        inputs = vit.preprocess(images, config, config.grid)
        token, patches, taps = vit.ViT(config, name="teacher")(inputs, taps=PIXEL_TAPS)
        pixels = [
            nn.Dense(3 * config.patch_size**2, name=f"pixels_{tap}")(nn.LayerNorm()(x))
            for tap, x in zip(PIXEL_TAPS, taps, strict=True)
        ]
        return (
            nn.Dense(CLASSES, name="classes")(token),
            nn.Dense(CLASSES + 1, name="parts")(patches),
            pixels,
        )


def draw_all(count: int, split: str, seed: int) -> dict[str, np.ndarray]:
    """Draws in parallel: images uint8 `[N, S, S, 3]`, masks uint8 `[N, S, S]`, labels `[N]`."""
    draw = functools.partial(drawings.draw, image_size=IMAGE_SIZE, seed=seed, split=split)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        drawn = list(pool.map(draw, range(count), chunksize=100))
    return {
        "image": np.stack([d.image for d in drawn]),
        "mask": np.stack([np.round(255 * d.mask).astype(np.uint8) for d in drawn]),
        "label": np.array([d.label for d in drawn]),
    }


def sampling_matrix(start: jax.Array, length: jax.Array, width: jax.Array) -> jax.Array:
    """`[S, S]` rows that crop an axis to [start, start + length) pixels, resize and blur it.

    Each sampling point is the center of a triangular filter of half-width `width` pixels. With a
    negative `length`, the axis is read backwards from `start`.
    """
    at = jnp.arange(IMAGE_SIZE) + 0.5
    center = start + at * (length / IMAGE_SIZE)
    weights = jnp.maximum(0, 1 - jnp.abs(center[:, None] - at) / width) + 1e-9
    return weights / weights.sum(axis=1, keepdims=True)


def augment(key: jax.Array, image: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Crop, flip, color, blur and noise of one image `[S, S, 3]` in [-1, 1] and its mask.

    A third of the images are neither resized nor blurred, and half have no noise.
    """
    keys = jax.random.split(key, 8)
    plain = jax.random.uniform(keys[0]) < 1 / 3
    length = jnp.where(plain, IMAGE_SIZE, IMAGE_SIZE * jax.random.uniform(keys[1], minval=0.75))
    top, left = jax.random.uniform(keys[2], (2,)) * (IMAGE_SIZE - length)
    width = jnp.where(plain, 1, jnp.exp(jax.random.uniform(keys[3], maxval=1.4)))
    flip = jax.random.bernoulli(keys[4])
    rows = sampling_matrix(top, length, width)
    columns = sampling_matrix(
        jnp.where(flip, left + length, left), jnp.where(flip, -length, length), width
    )
    image = jnp.einsum("ts,ur,src->tuc", rows, columns, image)
    mask = jnp.einsum("ts,ur,sr->tu", rows, columns, mask)

    brightness, contrast, saturation = jax.random.uniform(keys[5], (3,), minval=-1)
    mean = image.mean(axis=(0, 1))
    image = mean + 0.3 * brightness + (1 + 0.3 * contrast) * (image - mean)
    gray = image.mean(axis=-1, keepdims=True)
    image = gray + (1 + 0.3 * saturation) * (image - gray)
    noise = 0.2 * jnp.maximum(0, jax.random.uniform(keys[6], minval=-1))
    image += noise * jax.random.normal(keys[7], image.shape)
    return jnp.clip(image, -1, 1), mask


def part_labels(masks: jax.Array, labels: jax.Array) -> jax.Array:
    """Content of each patch: probabilities `[B, T, 11]` of background, then the classes."""
    size = CONFIG.patch_size
    cover = reduce(masks, "b (h p) (w q) -> b (h w) 1", "mean", p=size, q=size)
    shown = cover * jax.nn.one_hot(labels, CLASSES)[:, None]
    return jnp.concatenate([1 - cover, shown], axis=-1)


def loss(params, images: jax.Array, masks: jax.Array, labels: jax.Array):
    """The training loss and its terms, for augmented images in [-1, 1]."""
    classes, parts, pixels = Pretext(CONFIG).apply({"params": params}, images)
    size = CONFIG.patch_size
    target = rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=size, q=size)
    terms = {
        "class": optax.softmax_cross_entropy_with_integer_labels(classes, labels).mean(),
        "part": optax.softmax_cross_entropy(parts, part_labels(masks, labels)).mean(),
        "pixel": sum(jnp.square(x - target).mean() for x in pixels),
    }
    return terms["class"] + terms["part"] + PIXEL_WEIGHT * terms["pixel"], terms


def make_optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay over `steps`; only kernels are decayed."""
    schedule = optax.warmup_cosine_decay_schedule(0, 2e-3, steps // 20, steps)
    kernels = functools.partial(
        jax.tree_util.tree_map_with_path, lambda path, _: path[-1].key == "kernel"
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=0.05, mask=kernels),
    )


def make_step(optimizer: optax.GradientTransformation, seed: int):
    """The jitted `(state, batch) -> (state, terms)`; the step number seeds the randomness."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        params, moments, number = state
        key = jax.random.fold_in(jax.random.key(seed), number)
        images, masks = jax.vmap(augment)(
            jax.random.split(key, len(batch["label"])),
            batch["image"] / 127.5 - 1,
            batch["mask"] / 255,
        )
        gradients, terms = jax.grad(loss, has_aux=True)(params, images, masks, batch["label"])
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments, number + 1), terms

    return step


@jax.jit
def _correct(params, batch) -> tuple[jax.Array, jax.Array]:
    """Which classes `[B]` and patches `[B, T]` are recognized."""
    classes, parts, _ = Pretext(CONFIG).apply({"params": params}, batch["image"] / 127.5 - 1)
    expected = part_labels(batch["mask"] / 255, batch["label"]).argmax(-1)
    return classes.argmax(-1) == batch["label"], parts.argmax(-1) == expected


def validate(params, data: dict[str, np.ndarray], batch_size: int = 250) -> dict[str, float]:
    """Shares of recognized classes and patches."""
    batches = (
        _correct(params, {k: v[i : i + batch_size] for k, v in data.items()})
        for i in range(0, len(data["label"]), batch_size)
    )
    classes, parts = (np.concatenate(x) for x in zip(*batches, strict=True))
    return {"class_accuracy": float(classes.mean()), "patch_accuracy": float(parts.mean())}


def sincos_positions(grid: int, width: int) -> np.ndarray:
    """`[1 + grid^2, width]`: sines and cosines of a patch's row and column; 0 for the class."""
    frequency = np.pi * np.geomspace(0.125, 1, width // 4)[:, None]  # radians per patch
    angle = frequency * np.arange(grid)
    wave = np.concatenate([np.sin(angle), np.cos(angle)]).T  # [grid, width / 2]
    patches = np.concatenate([np.repeat(wave, grid, axis=0), np.tile(wave, (grid, 1))], axis=1)
    return np.pad(patches, ((1, 0), (0, 0))).astype(np.float32)


def initial_params(seed: int) -> dict:
    """The models' own, except positions and layer scales, which a short run cannot learn."""
    images = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3))
    params = nn.meta.unbox(Pretext(CONFIG).init(jax.random.key(seed), images)["params"])
    teacher = params["teacher"]
    teacher["positions"] = 0.5 * jnp.asarray(sincos_positions(CONFIG.grid, CONFIG.width))
    block = teacher["layers"]["block"]
    for name in ("scale_self", "scale_mlp"):
        block[name] = jnp.ones_like(block[name])
    return params


def train(steps: int, batch_size: int, images: int, seed: int) -> tuple[dict, dict]:
    """Trains, printing progress; on one machine, equal arguments give equal weights.

    Returns:
      The teacher's parameters, and a record of the training for the bundle.
    """
    started = time.monotonic()
    data, held_out = draw_all(images, "train", seed), draw_all(500, "validation", seed)
    print(f"{images} drawings after {time.monotonic() - started:.0f} s", flush=True)

    optimizer = make_optimizer(steps)
    params = initial_params(seed)
    state = (params, optimizer.init(params), jnp.int32(0))
    step = make_step(optimizer, seed)
    order = np.random.default_rng(seed)
    for number in range(1, steps + 1):
        chosen = order.integers(images, size=batch_size)
        state, terms = step(state, {k: v[chosen] for k, v in data.items()})
        if number % max(1, steps // 30) == 0:
            figures = {k: float(v) for k, v in terms.items()} | validate(state[0], held_out)
            shown = "  ".join(f"{k} {v:.4f}" for k, v in figures.items())
            print(f"{number}/{steps}  {shown}  {time.monotonic() - started:.0f} s", flush=True)

    record = {
        "program": "tools.train_embedded_teacher",
        "steps": steps,
        "batch_size": batch_size,
        "images": images,
        "seed": seed,
        "validation": validate(state[0], held_out),
    }
    return state[0]["teacher"], record


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Trains the embedded teacher.")
    parser.add_argument("--out", required=True, help="directory of the bundle")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--images", type=int, default=12_000, help="drawings to learn from")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(arguments)
    params, record = train(flags.steps, flags.batch_size, flags.images, flags.seed)
    weights = {"params": jax.tree.map(lambda x: np.asarray(x, np.float16), params)}
    bundles.save(pathlib.Path(flags.out), "dinov2", CONFIG, weights, record)
    print(f"{flags.out}: {record['validation']}")


if __name__ == "__main__":
    main()
