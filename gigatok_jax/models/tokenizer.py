"""The GigaTok image tokenizer (paper, 4.1): images to codes, and codes to images.

An image passes through these steps (shapes are those of the paper's B-L at 256 pixels):

    image               [B, 256, 256, 3]    in [-1, 1]
      CNN encoder       [B, 16, 16, 256]    grid of features
      transformer       [B, 256, 768]       1d: N latent queries attend to the grid; 2d: ViT on it
      linear, linear    [B, 256, 8]         latents
      quantizer         [B, 256]            codes, integers in [0, 16384)
      look-up, linear   [B, 256, 256]       N code vectors
      transformer       [B, 256, 1024]      1d: 16x16 queries attend to the latents; 2d: ViT
      conv              [B, 16, 16, 256]    grid of features
      CNN decoder       [B, 256, 256, 3]    image, not clipped

An early layer of the second transformer also feeds the projector, whose output the semantic loss
aligns with the features of a frozen teacher.
"""

import functools
import math
from typing import Annotated, Literal

from einops import rearrange, repeat
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from gigatok_jax import sharding
from gigatok_jax.config import configclass
from gigatok_jax.models import cnn, layers, lookup_free, quantizer


@configclass
class TransformerSize:
    """Depth, heads and width of one transformer."""

    depth: PositiveInt  # layers
    heads: PositiveInt  # of attention
    width: PositiveInt  # features of a token, a multiple of `heads`

    @model_validator(mode="after")
    def _check(self):
        if self.width % self.heads:
            raise ValueError(f"width: expected a multiple of heads={self.heads}, got {self.width}")
        return self


@configclass
class TokenizerConfig(cnn.Levels):
    """A tokenizer's architecture: all that determines its parameters and outputs."""

    encoder: TransformerSize  # the transformer between CNN encoder and quantizer
    decoder: TransformerSize  # the transformer between quantizer and CNN decoder
    layout: Literal["1d", "2d"] = "1d"  # "1d": Q-Former over latent queries; "2d": ViT on the grid
    image_size: PositiveInt = 256  # side in pixels
    latents: PositiveInt = 256  # codes per image, N
    base_channels: PositiveInt = 128  # unit of `channel_multipliers`
    # Width of each level of the CNN. From one level to the next, the side of the grid is halved.
    channel_multipliers: tuple[PositiveInt, ...] = (1, 1, 2, 2, 4)
    residual_blocks: PositiveInt = 2  # per level of the CNN encoder; the CNN decoder has one more
    z_channels: PositiveInt = 256  # width of the grid between CNN and transformer
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # in the CNN's residual blocks
    # "vq": nearest code; "ibq": largest inner product; without a codebook: "fsq", "lfq", "bsq".
    quantizer: Literal["vq", "fsq", "lfq", "bsq", "ibq"] = "vq"
    codebook_size: Annotated[int, Field(ge=2, le=2**30)] = 16_384  # number of different codes, K
    code_dim: PositiveInt = 8  # channels of a latent, D
    fsq_levels: tuple[Annotated[int, Field(ge=2)], ...] = ()  # of "fsq": values of each channel
    # "vq" compares latents and codes on the unit sphere, or as they are.
    normalize_codes: bool = True
    # How gradients pass "vq": to the latent as they are, or turned by the rotation trick.
    gradient: Literal["straight_through", "rotation"] = "straight_through"
    semantic_layer: int = 3  # decoder layer, counted from 1, that the semantic loss reads
    semantic_dim: NonNegativeInt = 768  # width of the teacher's features; 0: no projector
    # Standard deviation of initial kernels: "reference" is 0.02; "fan_in" is fan_in^-0.5, which
    # narrow networks need.
    init: Literal["reference", "fan_in"] = "reference"

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """The parameters' first-level names, by the part of the tokenizer that they belong to."""
        parts = {
            "encoder": ("cnn_encoder", "encoder", "encoder_out", "quant_conv"),  # to the latents
            "quantizer": ("codebook",) if self.has_codebook else (),
            "decoder": ("post_quant_conv", "decoder", "decoder_out", "cnn_decoder"),
            "projector": ("projector",) if self.semantic_dim else (),
        }
        return {part: names for part, names in parts.items() if names}

    @property
    def has_codebook(self) -> bool:
        """Whether codes are learned vectors."""
        return self.quantizer in ("vq", "ibq")

    @model_validator(mode="after")
    def _check_quantizer(self):
        name, levels = self.quantizer, self.fsq_levels
        if name != "fsq" and levels:
            raise ValueError(f"fsq_levels: expected none with quantizer={name!r}, got {levels}")
        if name == "fsq" and len(levels) != self.code_dim:
            raise ValueError(
                f"fsq_levels: expected one for each of code_dim={self.code_dim} channels, got "
                f"{levels}"
            )
        if name == "fsq" and math.prod(levels) != self.codebook_size:
            raise ValueError(
                f"codebook_size: expected {math.prod(levels)}, the product of fsq_levels={levels}, "
                f"got {self.codebook_size}"
            )
        if name in ("lfq", "bsq") and math.log2(self.codebook_size) != self.code_dim:
            raise ValueError(
                f"codebook_size: expected 2^{self.code_dim} with quantizer={name!r} and "
                f"code_dim={self.code_dim}, got {self.codebook_size}"
            )
        for field, default in (("gradient", "straight_through"), ("normalize_codes", True)):
            found = getattr(self, field)
            if name != "vq" and found != default:  # it would do nothing
                raise ValueError(
                    f"{field}: expected {default!r} with quantizer={name!r}, got {found!r}"
                )
        return self

    @model_validator(mode="after")
    def _check(self):
        if not self.channel_multipliers:
            raise ValueError("channel_multipliers: expected at least one, got none")
        if self.image_size % self.factor:
            raise ValueError(
                f"image_size: expected a multiple of {self.factor} (the CNN's downsampling), got "
                f"{self.image_size}"
            )
        if self.semantic_dim and not 1 <= self.semantic_layer <= self.decoder.depth:
            raise ValueError(
                f"semantic_layer: expected 1..{self.decoder.depth} (the decoder's depth), got "
                f"{self.semantic_layer}"
            )
        if self.layout == "2d" and self.latents != self.grid**2:
            raise ValueError(
                f"latents: expected {self.grid**2} (the {self.grid}x{self.grid} grid) in a 2d "
                f"tokenizer, got {self.latents}"
            )
        if self.layout == "1d":
            if self.latents & (self.latents - 1):
                raise ValueError(
                    f"latents: expected a power of two in a 1d tokenizer, got {self.latents}"
                )
            rows, columns = _blocks(max(self.latents.bit_length() - 2, 0))
            if self.grid % rows or self.grid % columns:
                raise ValueError(
                    f"latents: the queries are pooled from {rows}x{columns} blocks, which do not "
                    f"divide the {self.grid}x{self.grid} grid; expected fewer latents or another "
                    f"image_size, got {self.latents}"
                )
        return self


def _blocks(level: int) -> tuple[int, int]:
    """Number of rows and columns of blocks into which `pool_queries` splits the grid."""
    return 2 ** (level // 2), 2 ** ((level + 1) // 2)


def pool_queries(grid: jax.Array, count: int) -> jax.Array:
    """Multi-level average pooling, which initializes the Q-Former's queries (paper, appendix C).

    Maps `[B, H, W, C]` to `[B, count, C]`, count a power of two: groups of 1, 1, 2, 4, ...,
    count / 2 block means, each group read row-major.
    """
    groups = []
    for group in range(count.bit_length()):
        rows, columns = _blocks(max(group - 1, 0))
        blocks = rearrange(grid, "b (r h) (c w) d -> b (r c) (h w) d", r=rows, c=columns)
        groups.append(blocks.mean(2, dtype=jnp.float32).astype(grid.dtype))
    return jnp.concatenate(groups, axis=1)


@flax.struct.dataclass
class TokenizerOutput:
    """Result of a training forward pass; losses are unweighted scalars."""

    reconstruction: jax.Array  # [B, H, W, 3] float32 in about [-1, 1], not clipped
    codes: jax.Array  # [B, N] int32
    codebook_loss: jax.Array
    commitment_loss: jax.Array  # includes its factor of 0.25, which "ibq" has in the other
    entropy_loss: jax.Array
    semantic_features: jax.Array | None  # [B, grid*grid, semantic_dim] float32
    direct: jax.Array | None  # [B, H, W, 3], decoded by the CNN from the CNN encoder's features
    feature_loss: jax.Array | None  # mean squared error of the decoder's grid to the encoder's


class TokenTransformer(nn.Module):
    """One of the tokenizer's two transformers, from `[B, S, z]` to `[B, T, W]`.

    In the 1d layout it is a Q-Former, whose queries attend to the embedded input as memory. The
    encoder pools its queries from the grid; the decoder copies them all from the first token. In
    the 2d layout it is a plain ViT over the grid.
    """

    config: TokenizerConfig
    decoder: bool
    remat: str = "none"
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, taps: tuple[int, ...] = ()):
        config = self.config
        size = config.decoder if self.decoder else config.encoder

        def positions(name, length):
            init = layers.partitioned(nn.initializers.normal(size.width**-0.5), None, "embed")
            return sharding.gather(self.param(name, init, (length, size.width)), None, "embed")

        grid_positions = positions("grid_positions", config.grid**2)
        x = layers.layer_norm(dtype=self.dtype, name="norm_in")(x)
        x = layers.dense(size.width, ("conv_in", "embed"), dtype=self.dtype, name="embed")(x)
        block = functools.partial(layers.Block, heads=size.heads, dtype=self.dtype)
        stack = layers.Transformer(size.depth, block, self.remat, name="layers")
        if config.layout == "2d":
            x, tapped = stack(x + grid_positions.astype(x.dtype), taps=taps)
        else:
            latent_positions = positions("latent_positions", config.latents)
            if self.decoder:
                queries = repeat(x[:, 0], "b w -> b t w", t=config.grid**2)
                x, tapped = stack(queries, x, grid_positions, latent_positions, taps=taps)
            else:
                grid = rearrange(x, "b (h w) c -> b h w c", h=config.grid)
                axes = ("embed", "embed_out")
                query = layers.dense(size.width, axes, dtype=self.dtype, name="query")
                queries = query(pool_queries(grid, config.latents))
                x, tapped = stack(queries, x, latent_positions, grid_positions, taps=taps)
        return layers.layer_norm(dtype=self.dtype, name="norm_out")(x), tapped


class Projector(nn.Module):
    """Maps decoder features to the width of the teacher's features, for the semantic loss."""

    features: int
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = 4 * x.shape[-1]
        x = nn.silu(layers.dense(hidden, ("embed", "mlp"), dtype=self.dtype, name="in")(x))
        x = nn.silu(layers.dense(hidden, ("mlp", None), dtype=self.dtype, name="hidden")(x))
        x = layers.dense(self.features, ("mlp", None), dtype=self.dtype, name="out")(x)
        return x.astype(jnp.float32)


class Tokenizer(nn.Module):
    """Maps images to codes and back; see the top of this file."""

    config: TokenizerConfig
    remat: str = "none"  # of CNN blocks and transformer layers, see `layers.remat`
    dtype: layers.Dtype = jnp.float32  # norm statistics, code search and outputs are float32

    def setup(self):
        config, dtype = self.config, self.dtype
        common = dict(dropout=config.dropout, remat=self.remat, dtype=dtype)
        self.cnn_encoder = cnn.Encoder(
            config.channels, config.residual_blocks, config.z_channels, **common
        )
        self.encoder = TokenTransformer(config, decoder=False, remat=self.remat, dtype=dtype)
        self.encoder_out = layers.dense(
            config.z_channels, ("embed", "conv_out"), dtype=dtype, name="encoder_out"
        )

        def torch_default(features, fan_in, name):
            init = layers.uniform(fan_in**-0.5)
            options = {"kernel_init": init, "bias_init": init, "dtype": dtype}
            return layers.dense(features, (None, None), **options, name=name)

        def codebook_init(key, shape):
            codebook = layers.uniform(1 / shape[0])(key, shape)
            # Inner products with codes near 0 would make all of them equally probable for "ibq".
            return quantizer.normalize(codebook) if config.normalize_codes else codebook

        self.quant_conv = torch_default(config.code_dim, config.z_channels, "quant_conv")
        codebook = None
        if config.has_codebook:
            codebook = self.param(
                "codebook",
                layers.partitioned(codebook_init, "vocab", None),
                (config.codebook_size, config.code_dim),
            )
        self.quantizer = _quantizer(config, codebook)
        self.post_quant_conv = torch_default(config.z_channels, config.code_dim, "post_quant_conv")
        self.decoder = TokenTransformer(config, decoder=True, remat=self.remat, dtype=dtype)
        self.decoder_out = layers.conv(config.z_channels, dtype=dtype, name="decoder_out")
        if config.semantic_dim:
            self.projector = Projector(config.semantic_dim, dtype)
        self.cnn_decoder = cnn.Decoder(config.channels, config.residual_blocks, **common)

    def cnn_features(self, images: jax.Array) -> jax.Array:
        """Applies the CNN encoder: `[B, H, W, 3]` in [-1, 1] to `[B, grid, grid, z_channels]`."""
        return self.cnn_encoder(images.astype(self.dtype))

    def encoder_features(self, images: jax.Array) -> jax.Array:
        """Output of the encoder transformer, after its final LayerNorm, `[B, N, W]` float32."""
        return self._encode(self.cnn_features(images)).astype(jnp.float32)

    def latents(self, images: jax.Array) -> jax.Array:
        """Latents before normalization and quantization, `[B, N, D]` float32."""
        return self._latents(self.cnn_features(images))

    def encode(self, images: jax.Array) -> jax.Array:
        """Maps images `[B, H, W, 3]` in [-1, 1] to codes `[B, N]` int32."""
        return self.quantizer.encode(self.latents(images))

    def decode(self, codes: jax.Array) -> jax.Array:
        """Maps codes `[B, N]` to images `[B, H, W, 3]` float32, not clipped."""
        return self.cnn_decoder(self.decoder_grid(codes)).astype(jnp.float32)

    def decode_first(self, codes: jax.Array, keep: jax.Array) -> jax.Array:
        """`decode` of the first `keep` `[B]` codes; the codebook's mean replaces the others."""
        vectors = quantizer.look_up_first(self.quantizer, codes, keep, self.config.codebook_size)
        return self.cnn_decoder(self._decode_grid(vectors)[0].astype(jnp.float32)).astype(
            jnp.float32
        )

    def decoder_features(self, codes: jax.Array, layer: int) -> jax.Array:
        """Output of decoder transformer layer `layer` (from 1), `[B, grid*grid, W]` float32."""
        _, (features,) = self._decode_grid(self.quantizer.look_up(codes), taps=(layer,))
        return features.astype(jnp.float32)

    def decoder_grid(self, codes: jax.Array) -> jax.Array:
        """Input of the CNN decoder, `[B, grid, grid, z_channels]` float32."""
        return self._decode_grid(self.quantizer.look_up(codes))[0].astype(jnp.float32)

    def semantic_features(self, codes: jax.Array) -> jax.Array:
        """Projected features of the semantic layer, `[B, grid*grid, semantic_dim]` float32."""
        return self.projector(self.decoder_features(codes, self.config.semantic_layer))

    def __call__(
        self, images: jax.Array, *, entropy: bool = False, auxiliary: bool = False
    ) -> TokenizerOutput:
        """The training forward pass on `[B, H, W, 3]` images in [-1, 1].

        Without `entropy`, the entropy loss is 0. `auxiliary` adds the direct image and the feature
        loss, which only the older recipe uses.
        """
        config = self.config
        features = self.cnn_features(images)
        quantized = self.quantizer.quantize(self._latents(features), entropy=entropy)

        semantic = config.semantic_dim > 0
        taps = (config.semantic_layer,) if semantic else ()
        grid, tapped = self._decode_grid(quantized.vectors, taps=taps)
        feature_error = grid.astype(jnp.float32) - jax.lax.stop_gradient(features)
        return TokenizerOutput(
            reconstruction=self.cnn_decoder(grid).astype(jnp.float32),
            codes=quantized.codes,
            codebook_loss=jnp.float32(quantized.codebook_loss),
            commitment_loss=jnp.float32(quantized.commitment_loss),
            entropy_loss=jnp.float32(quantized.entropy_loss),
            semantic_features=self.projector(tapped[0]) if semantic else None,
            direct=self.cnn_decoder(features).astype(jnp.float32) if auxiliary else None,
            feature_loss=jnp.mean(feature_error**2) if auxiliary else None,
        )

    def _encode(self, features):
        return self.encoder(rearrange(features, "b h w c -> b (h w) c"))[0]

    def _latents(self, features):
        return self.quant_conv(self.encoder_out(self._encode(features))).astype(jnp.float32)

    def _decode_grid(self, quantized, taps=()):
        x = self.post_quant_conv(quantized.astype(self.dtype))
        x, tapped = self.decoder(x, taps)
        return self.decoder_out(rearrange(x, "b (h w) c -> b h w c", h=self.config.grid)), tapped


def _quantizer(config: TokenizerConfig, codebook: jax.Array | None) -> quantizer.VQ:
    """The quantizer of the configuration; all have the methods of `VQ`."""
    match config.quantizer:
        case "vq":
            return quantizer.VQ(codebook, config.normalize_codes, config.gradient)
        case "ibq":
            return quantizer.IBQ(codebook)
        case "fsq":
            return lookup_free.FSQ(config.fsq_levels)
        case "lfq":
            return lookup_free.LFQ(config.code_dim)
        case "bsq":
            return lookup_free.BSQ(config.code_dim)


def init_params(module: Tokenizer, key: jax.Array):
    """Initializes parameters, with logical axes, according to `module.config.init`."""
    size = module.config.image_size
    params = module.init(key, jnp.zeros((1, size, size, 3)))["params"]
    if module.config.init == "reference":
        return params

    def rescale(path, kernel):
        names = [entry.key for entry in path if hasattr(entry, "key")]
        # These kernels are not initialized with 0.02 in the reference, and keep their scale.
        packed = {"self_attention", "cross_attention"} & set(names) and names[-2] != "out"
        if names[-1] != "kernel" or names[-2].endswith("quant_conv") or packed:
            return kernel
        shape = kernel.shape[1:-1] if "layers" in names else kernel.shape[:-1]
        return kernel * (math.prod(shape) ** -0.5 / layers.INIT_STD)

    return jax.tree_util.tree_map_with_path(rescale, params)


def param_shapes(config: TokenizerConfig) -> dict:
    """Shapes of a tokenizer's parameters; allocates nothing."""
    return layers.param_shapes(Tokenizer(config), (1, config.image_size, config.image_size, 3))
