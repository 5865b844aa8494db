"""Networks whose features tell sets of images apart: FID's Inception, or a semantic teacher."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from gigatok_jax import bundles, frozen, pictures
from gigatok_jax.errors import UserError
from gigatok_jax.models import inception, vit
from gigatok_jax.weights import kinds

INCEPTION = "inception"
DINOV2_GRID = 16  # 224 pixels, on which DINOv2 is usually evaluated


class Extractor:
    """A frozen network on all local devices, which share each batch.

    Attributes:
      distance: what the Fréchet distance of its features is called: "fid", "fd_dinov2", ...
      fingerprint: see `bundles.fingerprint`.
      widths: number of features by name, see `__call__`.

    Args:
      apply: pure function of parameters and uint8 images `[B, H, W, 3]` to features.
      params: its parameters.
    """

    def __init__(
        self, distance: str, apply: Callable[[Any, jax.Array], dict[str, jax.Array]], params: Any
    ):
        mesh = Mesh(np.array(jax.local_devices()), ("data",))
        self.distance, self.fingerprint = distance, bundles.fingerprint(params)

        @jax.jit
        def exactly(params, images):
            # TPUs and GPUs would round to bfloat16 or TF32, and distances with them.
            with jax.default_matmul_precision("highest"):
                return apply(params, images)

        self._apply, self._batch = exactly, NamedSharding(mesh, P("data"))
        image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.uint8)
        shapes = jax.eval_shape(exactly, params, image)
        self.widths = {name: shape.shape[1] for name, shape in shapes.items()}
        self._params = jax.device_put(params, NamedSharding(mesh, P()))

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Features of uint8 images `[B, H, W, 3]`, float32.

        Returns:
          "pool" `[B, D]`; of the Inception also "spatial" `[B, 2023]` and "log_probabilities"
          `[B, 1008]`.
        """
        missing = -len(images) % self._batch.mesh.size
        filled = np.concatenate([images, images[-1:].repeat(missing, axis=0)])
        features = self._apply(self._params, jax.device_put(filled, self._batch))
        return {name: np.asarray(x)[: len(images)] for name, x in features.items()}


def load(name: str) -> Extractor:
    """The extractor called `name`.

    Args:
      name: "inception"; or a teacher, see `frozen.load_teacher`, whose class token is taken: the
        distance is then `fd_dinov2`, or `fd_teacher` for another one, never FID.

    Raises:
      UserError: the name is unknown, or the weights are not there.
    """
    if name == INCEPTION:
        return _inception()
    try:
        config, params = frozen.load_teacher(name)
    except UserError as error:
        raise UserError(f"features: {error}; {INCEPTION} and embedded are others") from None
    dinov2 = config in vit.DINOV2.values()
    grid = DINOV2_GRID if dinov2 else config.grid
    params["positions"] = vit.resize_positions(params["positions"], grid)

    def apply(params, images):
        inputs = vit.preprocess(pictures.to_float(images), config, grid)
        return {"pool": vit.ViT(config).apply({"params": params}, inputs)[0]}

    distance = "fd_dinov2" if dinov2 else "fd_teacher"
    return Extractor(distance, apply, params)


def _inception() -> Extractor:
    try:
        directory = kinds.fetched_or_refuse("inception_fid")
    except UserError as error:
        raise UserError(
            f"{error}; or compare a teacher's features: --features=dinov2_vitb14, "
            "--features=embedded (of a probe --config.features)"
        ) from None
    params = bundles.load(directory, "inception").weights

    def apply(params, images):
        features = inception.Inception().apply({"params": params}, inception.preprocess(images))
        # ADM's evaluator leaves the bias out.
        logits = features["logits"] - params["fc"]["bias"]
        return {
            "pool": features["pool"],
            "spatial": features["spatial"],
            "log_probabilities": jax.nn.log_softmax(logits),
        }

    return Extractor("fid", apply, params)
