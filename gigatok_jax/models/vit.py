"""The vision transformer of the frozen teachers: DINOv2's, CLIP's and SigLIP's architecture.

The reference takes the same of each as semantic targets: the patch tokens after the final norm (the
class token is left out), before any pooling or projection.
"""

import dataclasses
import functools
import math

from einops import rearrange, repeat
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax.models import layers, resize

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def quick_gelu(x: jax.Array) -> jax.Array:
    """OpenAI's approximation of GELU in the first CLIP, which DFN keeps."""
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": layers.gelu, "gelu_tanh": nn.gelu, "quick_gelu": quick_gelu}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A teacher's architecture and its input's normalization; the defaults are DINOv2's.

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
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
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
FAMILIES = {"dinov2": DINOV2, "clip": CLIP, "siglip": SIGLIP}
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

    @nn.compact
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
            activation=ACTIVATIONS[config.activation],
            dtype=self.dtype,
        )
        stack = layers.Transformer(config.depth, block, self.remat, name="layers")
        x, tapped = stack(x, taps=taps)
        x = norm(name="norm")(x)
        if not config.class_token:
            return x.mean(1), x, tapped
        return x[:, 0], x[:, 1:], tuple(y[:, 1:] for y in tapped)


def preprocess(images: jax.Array, config: ViTConfig, grid: int) -> jax.Array:
    """Images `[B, H, W, 3]` in [-1, 1] as the teacher's input for a grid x grid token grid."""
    images = (images + 1) / 2
    images = (images - jnp.asarray(config.mean)) / jnp.asarray(config.std)
    return resize.bicubic(images, grid * config.patch_size)


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
