"""Ten steps of a tiny tokenizer or generator on meshes of eight CPU devices; run by a test.

python mesh_worker.py OUT.json TASK [all]: for each mesh, the metrics of all steps, and how far the
last parameters are from those of one device, relative to their norm, or to that of parameters of
1e-2 where they are smaller.
"""

import os

import conftest  # sets the flags that make compiling cheap

os.environ["XLA_FLAGS"] = " ".join([*conftest.FLAGS, "--xla_force_host_platform_device_count=8"])
os.environ["JAX_PLATFORMS"] = "cpu"

import json
import sys

from flax import linen as nn
import jax
import numpy as np
import optax

from gigatok_jax import sharding
from gigatok_jax.models import lpips, vit
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.models.tokenizer import TransformerSize
from gigatok_jax.sharding import MeshConfig
from gigatok_jax.training import checkpoints, loop, task
from gigatok_jax.training import generator as generator_training
from gigatok_jax.training import tokenizer as tokenizer_training
from gigatok_jax.training.generator import GeneratorRun, GeneratorTask
from gigatok_jax.training.optimizer import OptimizerConfig
from gigatok_jax.training.tokenizer import Frozen, ObjectiveConfig, TokenizerRun, TokenizerTask

import tiny

STEPS, BATCH = 10, 8
MESHES = [(1, 1, 1), (2, 2, 2)]
MORE = [(8, 1, 1), (1, 8, 1), (4, 2, 1)]
ADAMW = OptimizerConfig(rate=1e-4, warmup_steps=2)


def _sgd(config, steps, start=0):
    """In place of AdamW, which makes full steps of gradients that are nothing but rounding.

    A tokenizer has many: keys' biases, biases before norms, attention that is even at first.
    """
    del config, steps, start
    return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(3e-5, momentum=0.9))


def tokenizer():
    """Every loss there is, the older recipe's auxiliary ones too."""
    task.optimizer.make_optimizer = tokenizer_training.make_optimizer = _sgd
    teacher = vit.ViTConfig(depth=1, heads=2, width=16, patch_size=4, grid=8)
    run = TokenizerRun(
        model=tiny.config(
            image_size=16,
            latents=4,
            channel_multipliers=(1, 1),
            decoder=TransformerSize(1, 2, 16),
            semantic_dim=16,
            gradient="rotation",
        ),
        objective=ObjectiveConfig(
            entropy=0.005,
            # VGG takes minutes to compile for eight devices; `all` has it.
            perceptual_distance="lpips" if "all" in sys.argv else "teacher",
            disc_start=0,
            discriminator_channels=(8, 16),
            auxiliary_steps=STEPS,
        ),
        optimizer=ADAMW,
        steps=STEPS,
        batch_size=BATCH,
        average_decay=0.9,
        remat="none",
    )
    images = np.zeros((1, 32, 32, 3), np.float32)
    shapes = [
        nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])
        for module, inputs in ((vit.ViT(teacher), (images,)), (lpips.LPIPS(), (images, images)))
    ]
    teacher_params, lpips_params = map(tiny.fill, shapes)
    # The weights of the distance are positive, as trained ones are.
    frozen = Frozen(teacher_params, jax.tree.map_with_path(_positive, lpips_params))

    def batch(rng):
        return {"image": rng.integers(0, 256, (BATCH, 16, 16, 3), np.uint8)}

    return TokenizerTask(run, teacher), frozen, batch


def _positive(path, leaf):
    return np.abs(leaf) if path[-1].key.startswith("lin") else leaf


def generator():
    generator_training.CHUNK_ELEMENTS = 2**8  # in chunks on all meshes
    model = GeneratorConfig(2, 2, 16, codes=16, codebook_size=64, classes=8)
    run = GeneratorRun(
        model=model,
        optimizer=ADAMW,
        steps=STEPS,
        batch_size=BATCH,
        average_decay=0.9,
        accumulate=2,
        remat="none",
    )

    def batch(rng):
        codes = rng.integers(0, 64, (BATCH, 16), np.int32)
        return {"codes": codes, "label": rng.integers(0, 8, BATCH, np.int32)}

    return GeneratorTask(run), None, batch


def run(make_task, sizes, start=None):
    """Ten steps; `start` is the state to start from, in place of the task's own."""
    training, frozen, make_batch = make_task()
    config = MeshConfig(*sizes)
    mesh = sharding.make_mesh(config, jax.devices()[: int(np.prod(sizes))])
    abstract = loop.abstract_state(training, mesh)
    if start is None:
        state = loop.fresh_state(training, abstract, 0)
    else:
        state = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), start, abstract)
    first = jax.tree.map(np.array, state)  # `step` reuses its memory
    digest = checkpoints._digests(state, {})
    step = loop.jit_step(training, abstract, mesh)
    frozen = sharding.put(frozen, sharding.frozen_shardings(frozen, mesh, shard=True))
    rng, rows = np.random.default_rng(0), []
    for n in range(STEPS):
        batch = sharding.put_batch(mesh, make_batch(rng))
        state, metrics = step(state, batch, frozen, phase=training.phase(n))
        rows.append({name: float(value) for name, value in metrics.items()})
    return rows, first, digest, jax.device_get(state)


def _distance(one, other):
    scale = max(np.linalg.norm(other), 1e-2 * other.size**0.5)
    return float(np.linalg.norm(one - other) / scale)


def main(path, task, *more):
    results, start = {}, None
    for sizes in MESHES + (MORE if more else []):
        make_task = {"tokenizer": tokenizer, "generator": generator}[task]
        rows, first, digest, state = run(make_task, sizes, start)
        if sizes == MESHES[0]:
            single = state
            # The generator's states also show that a mesh does not change how a run starts; that
            # of a tokenizer would take ten seconds to compile.
            start = first if task == "tokenizer" else None
        distances = {
            jax.tree_util.keystr(path): _distance(one, other)
            for (path, one), other in zip(
                jax.tree_util.tree_leaves_with_path(state.params),
                jax.tree.leaves(single.params),
                strict=True,
            )
        }
        results["x".join(map(str, sizes))] = {
            "rows": rows,
            "digest": digest,
            "distances": distances,
        }
        print(sizes, sorted(((d, name) for name, d in distances.items()), reverse=True)[:4])
    with open(path, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
