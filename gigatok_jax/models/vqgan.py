"""The VQGAN and its successors: published tokenizers whose whole network is convolutional.

    image        [B, H, W, 3]      in [-1, 1]
      CNN encoder, 1x1 convolution
    latents      [B, N, D]         one for each cell of the grid, row-major
      quantizer
    codes        [B, N]            integers in [0, K)
      look-up, 1x1 convolution, CNN decoder
    image        [B, H, W, 3]      not clipped

Outputs are those of the authors' programs with the same weights. The networks are those of

* LlamaGen (Sun et al. 2024, "Autoregressive Model Beats Diffusion", github.com/FoundationVision/
  LlamaGen), a VQGAN with few code dimensions, on the unit sphere;
* the VQGAN (Esser et al. 2021, "Taming Transformers", github.com/CompVis/taming-transformers);
* IBQ (Shi et al. 2024, "Scalable Image Tokenization with Index Backpropagation Quantization",
  github.com/TencentARC/SEED-Voken), a deeper VQGAN whose codes are chosen by inner product;
* MaskGIT's VQGAN (Chang et al. 2022, "MaskGIT", weights and program as in
  github.com/bytedance/1d-tokenizer);
* Open-MAGVIT2 (Luo et al. 2024, "Open-MAGVIT2", github.com/TencentARC/SEED-Voken), whose codes are
  the signs of the latents.
"""

import dataclasses
from typing import Annotated, Literal

from einops import rearrange
import flax.linen as nn
import jax
import jax.numpy as jnp
from pydantic import Field, PositiveInt, model_validator

from gigatok_jax.config import configclass
from gigatok_jax.models import cnn, layers, lookup_free, quantizer


@dataclasses.dataclass(frozen=True)
class Family:
    """What the tokenizers of one program have in common."""

    cnn: cnn.Design
    quant_convs: bool = True  # 1x1 convolutions before and after the quantizer
    unit_range: bool = False  # whether the network's images are in [0, 1], not in [-1, 1]


VQGAN = Family(cnn.Design(attention=True, up="nearest", adaptive=False))
FAMILIES = {
    "llamagen": VQGAN,
    "taming": VQGAN,
    "maskgit": Family(
        cnn.Design(
            bias=False,
            shortcut="result",
            more_blocks=0,
            down="pool",
            up="nearest",
            adaptive=False,
            out_kernel=1,
        ),
        quant_convs=False,
        unit_range=True,
    ),
    "open_magvit2": Family(
        cnn.Design(bias=False, middle_blocks=4, more_blocks=0, down="padded_conv", out_kernel=1),
        quant_convs=False,
    ),
}


@configclass
class VqganConfig(cnn.Levels):
    """A tokenizer's architecture: all that determines its parameters and outputs."""

    # The program whose layers it has; IBQ has those of "taming". The names of the tensors in
    # PyTorch differ too.
    family: Literal["llamagen", "taming", "maskgit", "open_magvit2"]
    # How a code is chosen: "vq": the nearest one; "ibq": the most probable by inner product;
    # "lfq": by the signs of the latent, without a table of codes.
    quantizer: Literal["vq", "ibq", "lfq"] = "vq"
    codebook_size: Annotated[int, Field(ge=2)] = 16_384
    code_dim: PositiveInt = 256
    normalize_codes: bool = False  # "vq": compare latents and codes on the unit sphere
    image_size: PositiveInt = 256
    base_channels: PositiveInt = 128
    channel_multipliers: tuple[PositiveInt, ...] = (1, 1, 2, 2, 4)  # one per level
    residual_blocks: PositiveInt = 2  # per level of the encoder
    z_channels: PositiveInt = 256  # of the encoder's output

    @property
    def latents(self) -> int:
        """Codes per image, N."""
        return self.grid**2

    @model_validator(mode="after")
    def _check(self):
        if not self.channel_multipliers:
            raise ValueError("channel_multipliers: expected at least one, got none")
        if self.image_size % self.factor:
            raise ValueError(
                f"image_size: expected a multiple of {self.factor} (the downsampling), got "
                f"{self.image_size}"
            )
        if not FAMILIES[self.family].quant_convs and self.code_dim != self.z_channels:
            raise ValueError(
                f"code_dim: expected z_channels={self.z_channels}, because {self.family!r} has no "
                f"convolution in between, got {self.code_dim}"
            )
        if self.quantizer == "lfq" and self.codebook_size != 2**self.code_dim:
            raise ValueError(
                f"codebook_size: expected 2**code_dim={2**self.code_dim} of the quantizer 'lfq', "
                f"got {self.codebook_size}"
            )
        if self.quantizer != "vq" and self.normalize_codes:
            raise ValueError(
                f"normalize_codes: expected False of the quantizer {self.quantizer!r}, got True"
            )
        return self


class Vqgan(nn.Module):
    """Maps images to codes and back; see the top of this file.

    Images are `[B, image_size, image_size, 3]`.
    """

    config: VqganConfig
    dtype: layers.Dtype = jnp.float32  # norm statistics, code search and outputs are float32

    def setup(self):
        config, family = self.config, FAMILIES[self.config.family]
        shape = (config.channels, config.residual_blocks)
        options = {"design": family.cnn, "dtype": self.dtype}
        self.cnn_encoder = cnn.Encoder(*shape, config.z_channels, **options)
        self.cnn_decoder = cnn.Decoder(*shape, **options)
        if family.quant_convs:
            options = {"axes": (None, None), "dtype": self.dtype}
            self.quant_conv = layers.dense(config.code_dim, name="quant_conv", **options)
            self.post_quant_conv = layers.dense(
                config.z_channels, name="post_quant_conv", **options
            )
        if config.quantizer == "lfq":
            self.quantizer = lookup_free.LFQ(config.code_dim)
            return
        codebook = self.param(
            "codebook",
            layers.partitioned(layers.uniform(1 / config.codebook_size), "vocab", None),
            (config.codebook_size, config.code_dim),
        )
        self.quantizer = quantizer.VQ(codebook, config.normalize_codes)
        if config.quantizer == "ibq":
            self.quantizer = quantizer.IBQ(codebook)

    def latents(self, images: jax.Array) -> jax.Array:
        """Maps images in [-1, 1] to latents, before normalization and quantization.

        They are `[B, N, D]` float32, row-major.
        """
        family = FAMILIES[self.config.family]
        images = (images + 1) / 2 if family.unit_range else images
        x = self.cnn_encoder(images.astype(self.dtype))
        x = self.quant_conv(x) if family.quant_convs else x
        return rearrange(x, "b h w d -> b (h w) d").astype(jnp.float32)

    def encode(self, images: jax.Array) -> jax.Array:
        """Maps images in [-1, 1] to codes `[B, N]` int32."""
        return self.choose(self.latents(images))

    def choose(self, z: jax.Array) -> jax.Array:
        """The codes of latents, `[B, N, D]` to `[B, N]` int32."""
        return self.quantizer.encode(z)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Maps codes `[B, N]` to images, float32 in about [-1, 1], not clipped."""
        return self._decode(self.look_up(codes))

    def decode_first(self, codes: jax.Array, keep: jax.Array) -> jax.Array:
        """`decode` of the first `keep` `[B]` codes; the codebook's mean replaces the others."""
        size = self.config.codebook_size
        return self._decode(quantizer.look_up_first(self.quantizer, codes, keep, size))

    def _decode(self, vectors):
        family = FAMILIES[self.config.family]
        x = rearrange(vectors, "b (h w) d -> b h w d", h=self.config.grid).astype(self.dtype)
        x = self.post_quant_conv(x) if family.quant_convs else x
        images = self.cnn_decoder(x).astype(jnp.float32)
        return 2 * images - 1 if family.unit_range else images

    def look_up(self, codes: jax.Array) -> jax.Array:
        """The vectors of codes, `[B, N]` to `[B, N, D]` float32."""
        return self.quantizer.look_up(codes)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Reconstructs images in [-1, 1]."""
        return self.decode(self.encode(images))


F8 = (1, 2, 2, 4)  # channel multipliers of tokenizers whose grid has 1/8 of the image's side


def _llamagen(**changes) -> VqganConfig:
    return VqganConfig("llamagen", code_dim=8, normalize_codes=True, **changes)


def _ibq(codebook_size: int) -> VqganConfig:
    return VqganConfig("taming", "ibq", codebook_size, residual_blocks=4)


def _open_magvit2(**changes) -> VqganConfig:
    bits = {"codebook_size": 2**18, "code_dim": 18, "z_channels": 18}
    return VqganConfig("open_magvit2", "lfq", residual_blocks=4, **bits, **changes)


MODELS = {
    "llamagen_vq16": _llamagen(),
    "llamagen_vq16_384": _llamagen(image_size=384),
    "llamagen_vq8": _llamagen(channel_multipliers=F8),
    "taming_f16_1024": VqganConfig("taming", codebook_size=1024),
    "taming_f16_16384": VqganConfig("taming"),
    "ibq_1024": _ibq(1024),
    "ibq_8192": _ibq(8192),
    "ibq_16384": _ibq(16_384),
    "ibq_262144": _ibq(262_144),
    "maskgit_vqgan": VqganConfig("maskgit", codebook_size=1024),
    "open_magvit2_256": _open_magvit2(),
    "open_magvit2_128": _open_magvit2(image_size=128, channel_multipliers=F8),
}
