"""The vision transformer of the frozen networks: DINO, DINOv2, CLIP and SigLIP.

    images                 [B, g * patch, g * patch, 3]
      patches, positions   [B, 1 + g * g, W]   the class token, if any, comes first
      blocks               [B, 1 + g * g, W]
      norm                 [B, W], [B, g * g, W]

As in the reference, the semantic targets of every teacher are its patch tokens after the final
norm, before any pooling or projection.
"""

import functools
import math
from typing import Literal

from einops import rearrange, repeat
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from pydantic import PositiveFloat, PositiveInt

from gigatok_jax.config import configclass
from gigatok_jax.models import layers, resize

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALVES = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@configclass
class ViTConfig:
    """A frozen network's architecture and input normalization; the defaults are DINOv2's."""

    depth: PositiveInt
    heads: PositiveInt
    width: PositiveInt
    patch_size: PositiveInt
    grid: PositiveInt  # side of the patch grid of the stored position table
    mean: tuple[float, float, float] = IMAGENET_MEAN  # per channel, of images in [0, 1]
    std: tuple[float, float, float] = IMAGENET_STD
    mlp_width: PositiveInt | None = None  # hidden width of the MLPs; None: four times `width`
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"  # of the MLPs; "gelu" is exact
    epsilon: PositiveFloat = 1e-6  # of all norms
    class_token: bool = True
    # Before the first block, as in CLIP; drops the bias of the patch embedding.
    norm_in: bool = False
    layer_scale: bool = True  # see `layers.Block`


# Depth, heads, width, patch size and grid, then the differences from DINOv2.
DINOV2 = {
    "dinov2_vits14": ViTConfig(12, 6, 384, 14, 37),
    "dinov2_vitb14": ViTConfig(12, 12, 768, 14, 37),
    "dinov2_vitl14": ViTConfig(24, 16, 1024, 14, 37),
}
# The CLIP (DFN) and SigLIP-400M of the paper's Table 6; the reference loads Hugging Face's
# apple/DFN2B-CLIP-ViT-L-14 and google/siglip-so400m-patch14-224.
CLIP_OPTIONS = {"activation": "quick_gelu", "epsilon": 1e-5, "norm_in": True, "layer_scale": False}
CLIP = {"clip_dfn_vitl14": ViTConfig(24, 16, 1024, 14, 16, *OPENAI, **CLIP_OPTIONS)}
SIGLIP_OPTIONS = {"activation": "gelu_tanh", "class_token": False, "layer_scale": False}
SIGLIP = {"siglip_so400m14": ViTConfig(27, 16, 1152, 14, 16, *HALVES, 4304, **SIGLIP_OPTIONS)}
# The reference's discriminator uses the tanh approximation of GELU, although DINO was trained with
# exact GELU.
DINO_OPTIONS = {"activation": "gelu_tanh", "layer_scale": False}
DINO = {"dino_vits16": ViTConfig(12, 6, 384, 16, 14, **DINO_OPTIONS)}

FAMILIES = {"dinov2": DINOV2, "clip": CLIP, "siglip": SIGLIP}  # of teachers
PUBLISHED = DINOV2 | CLIP | SIGLIP


class ViT(nn.Module):
    """Patch embedding, learned positions, pre-norm blocks, and a final norm."""

    config: ViTConfig
    remat: str = "none"  # see `layers.remat`
    dtype: layers.Dtype = jnp.float32

    def __call__(
        self, images: jax.Array, taps: tuple[int, ...] = ()
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
        """Encodes images from `preprocess`; for other grids, see `resize_positions`.

        Returns:
          Class token `[B, W]` and patch tokens `[B, g*g, W]` after the final norm, and the patch
          tokens of the blocks in `taps`, counted from 1 (0: the input), without it. If the network
          has no class token, the mean of its patch tokens replaces it.
        """
        x, tapped = self._tokens(images, taps)
        return x[:, 0], x[:, 1:], tuple(y[:, 1:] for y in tapped)

    def readouts(self, images: jax.Array, taps: tuple[int, ...]) -> jax.Array:
        """Patch tokens plus the class token of the tapped blocks, `[taps, B, g*g, W]` float32."""
        tapped = jnp.stack(self._tokens(images, taps)[1]).astype(jnp.float32)
        return tapped[:, :, 1:] + tapped[:, :, :1]

    @nn.compact
    def _tokens(self, images, taps):
        """All tokens `[B, 1 + g*g, W]` after the final norm, and after the tapped blocks."""
        config = self.config
        x = layers.conv(
            config.width,
            config.patch_size,
            ("conv_in", "embed"),
            strides=config.patch_size,
            padding="VALID",
            use_bias=not config.norm_in,
            trained=False,
            dtype=self.dtype,
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


def param_shapes(config: ViTConfig) -> dict:
    """Shapes of a ViT's parameters, before `resize_positions`; allocates nothing."""
    side = config.grid * config.patch_size
    return layers.param_shapes(ViT(config), (1, side, side, 3))


def quarters(config: ViTConfig) -> tuple[int, ...]:
    """Taps at 0, 1/4, 1/2, 3/4 and all of the depth; the first is the input."""
    return tuple(round(config.depth * quarter / 4) for quarter in range(5))


def normalize(images: jax.Array, config: ViTConfig) -> jax.Array:
    """Normalizes images in [-1, 1] to the mean and deviation of the network's training."""
    return ((images + 1) / 2 - jnp.asarray(config.mean)) / jnp.asarray(config.std)


def preprocess(images: jax.Array, config: ViTConfig, grid: int) -> jax.Array:
    """Resizes and normalizes images `[B, H, W, 3]` in [-1, 1] for a grid x grid token grid."""
    return resize.bicubic(normalize(images, config), grid * config.patch_size)


def resize_positions(positions: jax.Array, grid: int) -> jax.Array:
    """Resizes a position table `[g*g, W]` to `[grid*grid, W]`, bicubic with antialiasing.

    The row of a class token, in `[1 + g*g, W]`, is kept.
    """
    side = math.isqrt(len(positions))
    if side == grid:
        return positions
    first = len(positions) - side**2
    table = rearrange(jnp.asarray(positions[first:]), "(h w) c -> h w c", h=side)
    # PyTorch's antialiased kernel has a = -0.5, which is jax.image.resize's.
    table = jax.image.resize(
        table, (grid, grid, table.shape[-1]), "bicubic", precision=jax.lax.Precision.HIGHEST
    )
    return np.concatenate([positions[:first], rearrange(table, "h w c -> (h w) c")])
