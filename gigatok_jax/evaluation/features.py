"""Frozen networks whose features compare sets of images: FID's Inception, or a ViT."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gigatok_jax import bundles, frozen_networks, pictures, sharding
from gigatok_jax.errors import UserError
from gigatok_jax.models import inception, vit

INCEPTION = "inception"
DINOV2_GRID = 16  # patches per side at 224 pixels, the usual size in evaluations of DINOv2


class Extractor:
    """A frozen network on all local devices, which share each batch.

    Attributes:
      distance: name of the Fréchet distance of its features: "fid", "fd_dinov2", "fd_teacher".
      fingerprint: see `bundles.fingerprint`.
      widths: number of features by name, see `__call__`.

    Args:
      apply: pure function of parameters and uint8 images `[B, H, W, 3]` to features `[B, D]`.
      params: its parameters.
    """

    def __init__(
        self, distance: str, apply: Callable[[Any, jax.Array], dict[str, jax.Array]], params: Any
    ):
        @jax.jit
        def exact(params, images):
            # By default, TPUs and GPUs multiply in bfloat16 or TF32, which shifts the distances.
            with jax.default_matmul_precision("highest"):
                return apply(params, images)

        mesh = sharding.local_mesh()
        self._batch = sharding.batch_sharding(mesh)
        self._apply, self._params = exact, jax.device_put(params, sharding.replicated(mesh))
        self.distance, self.fingerprint = distance, bundles.fingerprint(params)
        shapes = jax.eval_shape(exact, params, jax.ShapeDtypeStruct((1, 64, 64, 3), np.uint8))
        self.widths = {name: shape.shape[1] for name, shape in shapes.items()}

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Features of uint8 images `[B, H, W, 3]`, float32.

        Returns:
          "pool" `[B, D]`; from Inception also "spatial" `[B, 2023]` and "log_probabilities"
          `[B, 1008]`.
        """
        # All devices need the same number of images, so repeat the last one to fill the batch.
        missing = -len(images) % self._batch.mesh.size
        filled = np.concatenate([images, images[-1:].repeat(missing, axis=0)])
        features = self._apply(self._params, jax.device_put(filled, self._batch))
        return {name: np.asarray(x)[: len(images)] for name, x in features.items()}


def load(name: str) -> Extractor:
    """Loads an extractor.

    Args:
      name: "inception", or a teacher that `frozen_networks.load_teacher` knows. A teacher's feature
        is its class token, and the distance is called "fd_dinov2" or "fd_teacher", never "fid".

    Raises:
      UserError: the name is unknown, or the weights are missing.
    """
    if name == INCEPTION:
        return _inception()
    config, params = frozen_networks.load_teacher(name, "--features", INCEPTION)
    dinov2 = config in vit.DINOV2.values()
    grid = DINOV2_GRID if dinov2 else config.grid
    params["positions"] = vit.resize_positions(params["positions"], grid)

    def apply(params, images):
        inputs = vit.preprocess(pictures.to_float(images), config, grid)
        return {"pool": vit.ViT(config).apply({"params": params}, inputs)[0]}

    return Extractor("fd_dinov2" if dinov2 else "fd_teacher", apply, params)


def _inception() -> Extractor:
    try:
        params = frozen_networks.load_inception()
    except UserError as error:
        raise UserError(
            f"{error}; or compare a teacher's features with --features=dinov2_vitb14 or "
            "--features=embedded (in a probe, --config.features)"
        ) from None

    def apply(params, images):
        features = inception.Inception().apply({"params": params}, inception.preprocess(images))
        logits = features.pop("logits") - params["fc"]["bias"]  # as in ADM's evaluator
        return features | {"log_probabilities": jax.nn.log_softmax(logits)}

    return Extractor("fid", apply, params)
