"""The vision transformer of the frozen networks: DINO's, DINOv2's, CLIP's and SigLIP's.

The reference takes the same of each teacher as semantic targets: the patch tokens after the final
norm (the class token is left out), before any pooling or projection.
"""

import dataclasses
import functools
import math

from einops import rearrange, repeat
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax import sharding
from gigatok_jax.models import layers, resize

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A frozen network's architecture and its input's normalization; the defaults are DINOv2's.

    Attributes:
      grid: side of the patch grid that the stored position table belongs to.
      mean, std: of the input in [0, 1], a channel.
      mlp_width: hidden width of the MLPs; None: four times `width`.
      activation: of the MLPs: "gelu" (exact), "gelu_tanh" or "quick_gelu".
      epsilon: of all norms.
      class_token: whether one stands before the patches.
      norm_in: a norm before the first block, as in CLIP; the patch embedding then has no bias.
      layer_scale: see `layers.Block`.
    """

    depth: int
    heads: int
    width: int
    patch_size: int
    grid: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    mlp_width: int | None = None
    activation: str = "gelu"
    epsilon: float = 1e-6
    class_token: bool = True
    norm_in: bool = False
    layer_scale: bool = True

    def __post_init__(self):
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        if self.activation not in layers.ACTIVATIONS:
            known = ", ".join(layers.ACTIVATIONS)
            raise ValueError(f"activation must be one of {known}, got {self.activation!r}")


DINOV2 = {
    "dinov2_vits14": ViTConfig(12, 6, 384, patch_size=14, grid=37),
    "dinov2_vitb14": ViTConfig(12, 12, 768, patch_size=14, grid=37),
    "dinov2_vitl14": ViTConfig(24, 16, 1024, patch_size=14, grid=37),
}
# The CLIP (DFN) and SigLIP-400M of the paper's Table 6; the reference loads Hugging Face's
# apple/DFN2B-CLIP-ViT-L-14 and google/siglip-so400m-patch14-224.
CLIP = {
    "clip_dfn_vitl14": ViTConfig(
        24,
        16,
        1024,
        patch_size=14,
        grid=16,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        activation="quick_gelu",
        epsilon=1e-5,
        norm_in=True,
        layer_scale=False,
    )
}
SIGLIP = {
    "siglip_so400m14": ViTConfig(
        27,
        16,
        1152,
        patch_size=14,
        grid=16,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        mlp_width=4304,
        activation="gelu_tanh",
        class_token=False,
        layer_scale=False,
    )
}
# The activation is the tanh approximation of GELU as the reference's discriminator has it; DINO
# itself was trained with the exact one.
DINO = {
    "dino_vits16": ViTConfig(
        12, 6, 384, patch_size=16, grid=14, layer_scale=False, activation="gelu_tanh"
    ),
}
FAMILIES = {"dinov2": DINOV2, "clip": CLIP, "siglip": SIGLIP}  # of teachers
PUBLISHED = DINOV2 | CLIP | SIGLIP


class ViT(nn.Module):
    """A teacher: patches, learned positions, pre-norm blocks, a final norm.

    Attributes:
      config: the architecture.
      remat: see `layers.remat`.
      dtype: of the computation.
    """

    config: ViTConfig
    remat: str = "none"
    dtype: layers.Dtype = jnp.float32

    def __call__(
        self, images: jax.Array, taps: tuple[int, ...] = ()
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
        """Encodes normalized images, see `preprocess`.

        Args:
          images: `[B, g*patch, g*patch, 3]`; the position table in the variables must be for a
            g x g grid (see `resize_positions`).
          taps: blocks, counted from 1, whose outputs are wanted as well (0: the input).

        Returns:
          Class token `[B, W]` and patch tokens `[B, g*g, W]` after the final norm, and the tapped
          blocks' patch tokens before it, each `[B, g*g, W]`.  Where there is no class token, the
          mean of the patch tokens stands for it.
        """
        x, tapped = self._tokens(images, taps)
        return x[:, 0], x[:, 1:], tuple(y[:, 1:] for y in tapped)

    def readouts(self, images: jax.Array, taps: tuple[int, ...]) -> jax.Array:
        """The tapped blocks' patch tokens plus their class token, `[taps, B, g*g, W]` float32.

        The arguments are those of a call.
        """
        tapped = jnp.stack(self._tokens(images, taps)[1]).astype(jnp.float32)
        return tapped[:, :, 1:] + tapped[:, :, :1]

    @nn.compact
    def _tokens(self, images, taps):
        """All tokens `[B, 1 + g*g, W]` after the final norm, and after the tapped blocks."""
        config = self.config
        patch = (config.patch_size,) * 2
        axes = (None, None, "conv_in", "embed")
        x = nn.Conv(
            config.width,
            patch,
            strides=patch,
            padding="VALID",
            use_bias=not config.norm_in,
            dtype=self.dtype,
            kernel_init=layers.partitioned(layers.default_init, *axes),
            promote_dtype=sharding.promote(*axes),
            name="patch_embed",
        )(images.astype(self.dtype))
        x = rearrange(x, "b h w c -> b (h w) c")
        init = layers.partitioned(layers.default_init, None, "embed")
        if config.class_token:
            token = self.param("class_token", init, (1, config.width)).astype(x.dtype)
            x = jnp.concatenate([repeat(token, "1 w -> b 1 w", b=len(x)), x], 1)
        x += self.param("positions", init, (x.shape[1], config.width)).astype(x.dtype)
        norm = functools.partial(layers.layer_norm, epsilon=config.epsilon, dtype=self.dtype)
        if config.norm_in:
            x = norm(name="norm_in")(x)
        block = functools.partial(
            layers.Block,
            heads=config.heads,
            epsilon=config.epsilon,
            layer_scale=config.layer_scale,
            mlp_width=config.mlp_width,
            activation=config.activation,
            dtype=self.dtype,
        )
        stack = layers.Transformer(config.depth, block, self.remat, name="layers")
        x, tapped = stack(x, taps=taps)
        outputs = (norm(name="norm")(x), *tapped)
        if not config.class_token:
            outputs = (jnp.concatenate([y.mean(1, keepdims=True), y], axis=1) for y in outputs)
        x, *tapped = outputs
        return x, tapped


def quarters(config: ViTConfig) -> tuple[int, ...]:
    """The five depths, as `taps`, that end the quarters of the stack; the first is the input."""
    return tuple(round(config.depth * quarter / 4) for quarter in range(5))


def normalize(images: jax.Array, config: ViTConfig) -> jax.Array:
    """Images in [-1, 1] with the mean and deviation that the network was trained with."""
    return ((images + 1) / 2 - jnp.asarray(config.mean)) / jnp.asarray(config.std)


def preprocess(images: jax.Array, config: ViTConfig, grid: int) -> jax.Array:
    """Images `[B, H, W, 3]` in [-1, 1] as the teacher's input for a grid x grid token grid."""
    return resize.bicubic(normalize(images, config), grid * config.patch_size)


def resize_positions(positions: jax.Array, grid: int) -> jax.Array:
    """Resamples a position table `[g*g, W]` to `[grid*grid, W]`.

    A class token's row before the grid's, `[1 + g*g, W]`, is kept.  Bicubic with antialiasing,
    once, in float32.
    """
    side = math.isqrt(len(positions))
    if side == grid:
        return positions
    first = len(positions) - side**2
    # PyTorch's antialiased kernel has a = -0.5, which is jax.image.resize's.
    table = rearrange(jnp.asarray(positions[first:]), "(h w) c -> h w c", h=side)
    table = jax.image.resize(
        table, (grid, grid, table.shape[-1]), "bicubic", precision=jax.lax.Precision.HIGHEST
    )
    return np.concatenate([positions[:first], rearrange(table, "h w c -> (h w) c")])
