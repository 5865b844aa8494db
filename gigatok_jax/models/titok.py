"""TiTok (Yu et al. 2024, "An Image is Worth 32 Tokens for Reconstruction and Generation").

A published tokenizer whose codes have no place in the image. Shapes are those of B-64:

    image                  [B, 256, 256, 3]    in [-1, 1]
      patches              [B, 256, 768]       16x16 patches of 16x16 pixels
      ViT                  [B, 64, 768]        of patches and latent tokens; keeps the latter
      linear               [B, 64, 12]         latents
      nearest code         [B, 64]             codes, integers in [0, 4096)
      look-up, linear      [B, 64, 768]
      ViT                  [B, 256, 768]       of mask tokens and codes; keeps the former
      MLP, softmax         [B, 256, 1024]      weights of the codes of MaskGIT's VQGAN
      CNN decoder          [B, 256, 256, 3]    of the weighted means of these codes; not clipped

The last two steps are those of tokenizers trained in two stages: first to predict the codes of
MaskGIT's VQGAN, then together with its decoder. Those trained in one stage end in a linear layer to
the pixels of each patch, and a convolution.

Outputs are those of the authors' program (github.com/bytedance/1d-tokenizer) with the same weights.
"""

import functools
from typing import Annotated, Literal

from einops import rearrange, repeat
import flax.linen as nn
import jax
import jax.numpy as jnp
from pydantic import Field, PositiveInt

from gigatok_jax.config import configclass
from gigatok_jax.models import cnn, layers, quantizer, vqgan
from gigatok_jax.models.tokenizer import TransformerSize

PATCH = 16
PIXELS = vqgan.MODELS["maskgit_vqgan"]  # whose decoder the two-stage tokenizers have


@configclass
class TitokConfig:
    """A tokenizer's architecture: all that determines its parameters and outputs."""

    encoder: TransformerSize
    decoder: TransformerSize
    latents: PositiveInt  # codes per image, N
    # Whether the decoder ends in that of MaskGIT's VQGAN. Latents and codes are then compared on
    # the unit sphere.
    two_stage: bool = False
    codebook_size: Annotated[int, Field(ge=2)] = 8192
    code_dim: PositiveInt = 64
    image_size: Literal[256] = 256

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // PATCH) ** 2


class TokenTransformer(nn.Module):
    """A ViT over a class token, image tokens `[B, P, W]` and latent tokens `[B, N, W]`."""

    size: TransformerSize
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, latent: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the image tokens and the latent tokens after the last layer and a norm."""
        batch, patches, width = image.shape

        def table(name, length):
            init = layers.partitioned(nn.initializers.normal(width**-0.5), None, "embed")
            return self.param(name, init, (length, width)).astype(self.dtype)

        token = repeat(table("class_token", 1), "1 w -> b 1 w", b=batch)
        image = jnp.concatenate([token, image], 1) + table("positions", 1 + patches)
        latent = latent + table("latent_positions", latent.shape[1])
        x = jnp.concatenate([image, latent], 1)
        x = layers.layer_norm(dtype=self.dtype, name="norm_in")(x)
        block = functools.partial(layers.Block, heads=self.size.heads, dtype=self.dtype)
        x, _ = layers.Transformer(self.size.depth, block, name="layers")(x)
        x = layers.layer_norm(dtype=self.dtype, name="norm_out")(x[:, 1:])
        return x[:, :patches], x[:, patches:]


class Titok(nn.Module):
    """Maps images to codes and back; see the top of this file."""

    config: TitokConfig
    dtype: layers.Dtype = jnp.float32  # norm statistics, code search and outputs are float32

    def setup(self):
        config, dtype = self.config, self.dtype
        width, out = config.encoder.width, config.decoder.width

        def table(name, axis, shape, deviation):
            init = layers.partitioned(nn.initializers.normal(deviation), axis, None)
            return self.param(name, init, shape)

        self.patch_embed = layers.conv(
            width,
            PATCH,
            ("conv_in", "embed"),
            strides=PATCH,
            padding="VALID",
            trained=False,
            dtype=dtype,
            name="patch_embed",
        )
        self.latent_tokens = table("latent_tokens", None, (config.latents, width), width**-0.5)
        self.encoder = TokenTransformer(config.encoder, dtype)
        self.encoder_out = layers.dense(
            config.code_dim, ("embed", None), dtype=dtype, name="encoder_out"
        )
        codebook = table(
            "codebook", "vocab", (config.codebook_size, config.code_dim), config.code_dim**-0.5
        )
        self.quantizer = quantizer.VQ(codebook, unit=config.two_stage)
        self.embed = layers.dense(out, (None, "embed"), dtype=dtype, name="embed")
        self.mask_token = table("mask_token", None, (1, out), out**-0.5)
        self.decoder = TokenTransformer(config.decoder, dtype)
        if config.two_stage:
            self.proxy_hidden = layers.dense(
                2 * out, ("embed", "mlp"), dtype=dtype, name="proxy_hidden"
            )
            self.proxy_out = layers.dense(
                PIXELS.codebook_size, ("mlp", None), dtype=dtype, name="proxy_out"
            )
            self.proxy_codebook = table(
                "proxy_codebook",
                "vocab",
                (PIXELS.codebook_size, PIXELS.code_dim),
                PIXELS.code_dim**-0.5,
            )
            self.cnn_decoder = cnn.Decoder(
                PIXELS.channels,
                PIXELS.residual_blocks,
                design=vqgan.FAMILIES[PIXELS.family].cnn,
                dtype=dtype,
            )
        else:
            self.patch_out = layers.dense(
                3 * PATCH**2, ("embed", None), dtype=dtype, name="patch_out"
            )
            self.conv_out = layers.conv(3, dtype=dtype, name="conv_out")

    def latents(self, images: jax.Array) -> jax.Array:
        """Latents before normalization and quantization, `[B, N, D]` float32."""
        config = self.config
        x = self.patch_embed(((images + 1) / 2).astype(self.dtype))
        x = rearrange(x, "b h w c -> b (h w) c")
        tokens = repeat(self.latent_tokens.astype(x.dtype), "n w -> b n w", b=len(x))
        _, x = self.encoder(x, tokens)
        if config.two_stage:
            # As in the authors' program, which means to transpose here but reads the numbers in
            # another shape: a latent mixes parts of all tokens.
            x = x.reshape(len(x), config.encoder.width, config.latents).swapaxes(1, 2)
        return self.encoder_out(x).astype(jnp.float32)

    def encode(self, images: jax.Array) -> jax.Array:
        """Maps images `[B, 256, 256, 3]` in [-1, 1] to codes `[B, N]` int32."""
        return self.quantizer.encode(self.latents(images))

    def decode(self, codes: jax.Array) -> jax.Array:
        """Maps codes `[B, N]` to images, float32 in about [-1, 1], not clipped."""
        return self._decode(self.decoder_features(codes))

    def decode_first(self, codes: jax.Array, keep: jax.Array) -> jax.Array:
        """`decode` of the first `keep` `[B]` codes; the codebook's mean replaces the others."""
        size = self.config.codebook_size
        vectors = quantizer.look_up_first(self.quantizer, codes, keep, size)
        return self._decode(self._decoder_features(vectors))

    def _decode(self, x):
        side = self.config.image_size // PATCH
        if self.config.two_stage:
            weights = nn.softmax(self._proxy_logits(x))
            x = (weights @ self.proxy_codebook).astype(self.dtype)
            x = self.cnn_decoder(rearrange(x, "b (h w) c -> b h w c", h=side))
        else:
            x = self.patch_out(x)
            pattern = "b (h w) (r s c) -> b (h r) (w s) c"
            x = self.conv_out(rearrange(x, pattern, h=side, r=PATCH, s=PATCH))
        return 2 * x.astype(jnp.float32) - 1

    def decoder_features(self, codes: jax.Array) -> jax.Array:
        """Image tokens of the decoder's ViT, after its final LayerNorm, `[B, 256, W]`."""
        return self._decoder_features(self.quantizer.look_up(codes))

    def _decoder_features(self, vectors):
        x = self.embed(vectors.astype(self.dtype))
        mask = self.mask_token.astype(x.dtype)
        masks = repeat(mask, "1 w -> b p w", b=len(x), p=self.config.patches)
        return self.decoder(masks, x)[0]

    def proxy_logits(self, codes: jax.Array) -> jax.Array:
        """Logits of the codes of MaskGIT's VQGAN, `[B, 256, 1024]` float32; only if two-stage.

        Their softmax weights the codes whose mean the CNN decodes.
        """
        return self._proxy_logits(self.decoder_features(codes))

    def _proxy_logits(self, x):
        return self.proxy_out(nn.tanh(self.proxy_hidden(x))).astype(jnp.float32)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Reconstructs images in [-1, 1]."""
        return self.decode(self.encode(images))


SIZES = {
    "s": TransformerSize(depth=8, heads=8, width=512),
    "b": TransformerSize(depth=12, heads=12, width=768),
    "l": TransformerSize(depth=24, heads=16, width=1024),
}


def _model(encoder: str, decoder: str, latents: int, **changes) -> TitokConfig:
    return TitokConfig(SIZES[encoder], SIZES[decoder], latents, **changes)


_TWO_STAGE = {"two_stage": True, "codebook_size": 4096, "code_dim": 12}
MODELS = {
    "titok_l32": _model("l", "l", 32, **_TWO_STAGE),
    "titok_b64": _model("b", "b", 64, **_TWO_STAGE),
    "titok_s128": _model("s", "s", 128, **_TWO_STAGE),
    "titok_bl64_vq8k": _model("b", "l", 64),
    "titok_bl128_vq8k": _model("b", "l", 128),
    "titok_sl256_vq8k": _model("s", "l", 256),
}
