"""The vision transformer of the frozen networks, in DINO's and DINOv2's architecture."""

import dataclasses
import functools

from einops import rearrange, repeat
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax.models import layers, resize

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A frozen network's architecture and its input's normalization.

    Attributes:
      grid: side of the patch grid that the stored position table belongs to.
      layer_scale, activation: see `layers.Block`.
      mean, std: of the input in [0, 1], a channel.
    """

    depth: int
    heads: int
    width: int
    patch_size: int
    grid: int
    layer_scale: bool = True
    activation: str = "gelu"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self):
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))


DINOV2 = {
    "dinov2_vits14": ViTConfig(12, 6, 384, patch_size=14, grid=37),
    "dinov2_vitb14": ViTConfig(12, 12, 768, patch_size=14, grid=37),
    "dinov2_vitl14": ViTConfig(24, 16, 1024, patch_size=14, grid=37),
}

# The activation is the tanh approximation of GELU as the reference's discriminator has it; DINO
# itself was trained with the exact one.
DINO = {
    "dino_vits16": ViTConfig(
        12, 6, 384, patch_size=16, grid=14, layer_scale=False, activation="gelu_tanh"
    ),
}


class ViT(nn.Module):
    """Class token, learned positions, pre-norm blocks; see `ViTConfig` for what differs."""

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
          blocks' patch tokens before it, each `[B, g*g, W]`.
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
            dtype=self.dtype,
            kernel_init=layers.partitioned(layers.default_init, *axes),
            name="patch_embed",
        )(images.astype(self.dtype))
        x = rearrange(x, "b h w c -> b (h w) c")
        init = layers.partitioned(layers.default_init, None, "embed")
        class_token = self.param("class_token", init, (1, config.width))
        x = jnp.concatenate([repeat(class_token, "1 w -> b 1 w", b=len(x)).astype(x.dtype), x], 1)
        x += self.param("positions", init, (x.shape[1], config.width)).astype(x.dtype)
        block = functools.partial(
            layers.Block,
            heads=config.heads,
            epsilon=1e-6,
            layer_scale=config.layer_scale,
            activation=config.activation,
            dtype=self.dtype,
        )
        stack = layers.Transformer(config.depth, block, self.remat, name="layers")
        x, tapped = stack(x, taps=taps)
        return layers.layer_norm(epsilon=1e-6, dtype=self.dtype, name="norm")(x), tapped


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
    """Resamples a position table `[1 + g*g, W]` to `[1 + grid*grid, W]`, the first row kept.

    Bicubic with antialiasing, once, in float32.
    """
    side = round((len(positions) - 1) ** 0.5)
    if side == grid:
        return positions
    # PyTorch's antialiased kernel has a = -0.5, which is jax.image.resize's.
    table = rearrange(jnp.asarray(positions[1:]), "(h w) c -> h w c", h=side)
    table = jax.image.resize(
        table, (grid, grid, table.shape[-1]), "bicubic", precision=jax.lax.Precision.HIGHEST
    )
    return np.concatenate([positions[:1], rearrange(table, "h w c -> (h w) c")])
