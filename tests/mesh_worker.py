"""Ten steps of a tiny tokenizer and generator on meshes of eight CPU devices; run by a test.

python mesh_worker.py OUT.npz: for each task and mesh, the metrics of all steps, how far the last
parameters are from those of one device, and the bytes of the largest replicated parameter.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import json
import sys

from flax import linen as nn
import jax
import numpy as np

from gigatok_jax.models import lpips, vit
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.models.tokenizer import TransformerSize
from gigatok_jax.training import loop, partitioning
from gigatok_jax.training.generator import GeneratorTraining
from gigatok_jax.training.optimizer import OptimizerConfig
from gigatok_jax.training.partitioning import MeshConfig
from gigatok_jax.training.tokenizer import Frozen, ObjectiveConfig, TokenizerTraining

import tiny

STEPS, BATCH = 10, 8
MESHES = [(1, 1, 1), (2, 2, 2), (8, 1, 1), (1, 8, 1), (4, 2, 1)]
OPTIMIZER = OptimizerConfig(rate=1e-4, warmup_steps=2)


def tokenizer():
    """Every loss there is, the older recipe's auxiliary ones too."""
    teacher = vit.ViTConfig(depth=1, heads=2, width=16, patch_size=4, grid=8)
    training = TokenizerTraining(
        tiny.config(
            image_size=16,
            latents=4,
            channel_multipliers=(1, 1),
            decoder=TransformerSize(1, 2, 16),
            semantic_dim=16,
            gradient="rotation",
        ),
        ObjectiveConfig(
            entropy=0.1, disc_start=5, discriminator_channels=(8, 16), auxiliary_steps=STEPS
        ),
        OPTIMIZER,
        STEPS,
        average_decay=0.9,
        teacher=teacher,
    )
    images = np.zeros((1, 16, 16, 3), np.float32)
    shapes = [
        nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])
        for module, inputs in ((vit.ViT(teacher), (images,)), (lpips.LPIPS(), (images, images)))
    ]
    frozen = Frozen(*map(tiny.fill, shapes))

    def batch(rng):
        return {"image": rng.integers(0, 256, (BATCH, 16, 16, 3), np.uint8)}

    return training, frozen, batch


def generator():
    model = GeneratorConfig(2, 2, 16, codes=16, codebook_size=64, classes=8)
    training = GeneratorTraining(model, OPTIMIZER, STEPS, average_decay=0.9, accumulate=2)

    def batch(rng):
        codes = rng.integers(0, 64, (BATCH, 16), np.int32)
        return {"codes": codes, "label": rng.integers(0, 8, BATCH, np.int32)}

    return training, None, batch


def run(task, sizes):
    training, frozen, make_batch = task()
    config = MeshConfig(*sizes)
    mesh = partitioning.make_mesh(config, jax.devices()[: int(np.prod(sizes))])
    abstract = loop.abstract_state(training, mesh)
    state = loop.fresh_state(training, abstract, 0)
    step = loop.jit_step(training, abstract, mesh)
    frozen = partitioning.put(frozen, partitioning.frozen_shardings(frozen, mesh, shard=True))
    rng, rows = np.random.default_rng(0), []
    for n in range(STEPS):
        batch = partitioning.put_batch(mesh, make_batch(rng))
        state, metrics = step(state, batch, frozen, phase=training.phase(n))
        rows.append({name: float(value) for name, value in metrics.items()})
    replicated = [leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.is_fully_replicated]
    return rows, jax.device_get(state), max(replicated)


def main(path):
    results = {}
    for task in (tokenizer, generator):
        for sizes in MESHES:
            rows, state, replicated = run(task, sizes)
            if sizes == MESHES[0]:
                single = state
            distance = jax.tree.map(
                lambda a, b: float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-8)),
                state.params,
                single.params,
            )
            results[f"{task.__name__} {sizes}"] = {
                "rows": rows,
                "distance": max(jax.tree.leaves(distance)),
                "replicated": replicated,
            }
            print(task.__name__, sizes, results[f"{task.__name__} {sizes}"]["distance"], flush=True)
    with open(path, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(sys.argv[1])
