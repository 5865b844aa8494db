"""The GigaTok image tokenizer: CNN, transformer, quantizer, transformer, CNN (paper, 4.1)."""

import dataclasses
import functools
import math

from einops import rearrange, repeat
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from gigatok_jax import sharding
from gigatok_jax.models import cnn, layers, quantizer

INITS = ("reference", "fan_in")


@dataclasses.dataclass(frozen=True)
class TransformerSize:
    """Depth, heads and width of one transformer."""

    depth: int
    heads: int
    width: int


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Everything that determines a tokenizer's parameters and what it computes.

    Raises ValueError, naming the field and what was expected, for a combination that cannot work.
    """

    encoder: TransformerSize
    decoder: TransformerSize
    layout: str = "1d"  # "1d": Q-Former over latent queries; "2d": ViT over the grid
    image_size: int = 256
    latents: int = 256  # number of codes an image, N
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    residual_blocks: int = 2  # a level in the CNN encoder; the CNN decoder has one more
    z_channels: int = 256
    dropout: float = 0.0  # in the CNN's residual blocks
    codebook_size: int = 16_384
    code_dim: int = 8
    normalize_codes: bool = True
    gradient: str = "straight_through"  # or "rotation"
    semantic_layer: int = 3  # decoder layer, counted from 1, that the semantic loss reads
    semantic_dim: int = 768  # width of the teacher's features; 0: no projector
    init: str = "reference"  # kernels of std 0.02; "fan_in": fan_in^-0.5, which narrow nets need

    @property
    def factor(self) -> int:
        """Down-sampling factor of the CNN."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def grid(self) -> int:
        """Side of the feature grid."""
        return self.image_size // self.factor

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(self.base_channels * m for m in self.channel_multipliers)

    def __post_init__(self):
        for name in ("encoder", "decoder"):
            size = getattr(self, name)
            if not isinstance(size, TransformerSize):  # a mapping, as read from a config file
                size = TransformerSize(**size)
                object.__setattr__(self, name, size)
            if min(size.depth, size.heads, size.width) < 1 or size.width % size.heads:
                raise ValueError(
                    f"{name}: depth, heads and width must be positive and heads must divide "
                    f"width, got {size.depth}/{size.heads}/{size.width}"
                )
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        for name in ("base_channels", "z_channels", "residual_blocks", "code_dim", "latents"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(
                f"channel_multipliers must be positive numbers, got {self.channel_multipliers}"
            )
        if self.image_size < self.factor or self.image_size % self.factor:
            raise ValueError(
                f"image_size must be a multiple of {self.factor} (the CNN's down-sampling), "
                f"got {self.image_size}"
            )
        if self.layout not in ("1d", "2d"):
            raise ValueError(f"layout must be '1d' or '2d', got {self.layout!r}")
        if self.gradient not in quantizer.GRADIENTS:
            raise ValueError(
                f"gradient must be one of {quantizer.GRADIENTS}, got {self.gradient!r}"
            )
        if self.init not in INITS:
            raise ValueError(f"init must be one of {INITS}, got {self.init!r}")
        if self.codebook_size < 2:
            raise ValueError(f"codebook_size must be at least 2, got {self.codebook_size}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.semantic_dim < 0:
            raise ValueError(f"semantic_dim must not be negative, got {self.semantic_dim}")
        if self.semantic_dim and not 1 <= self.semantic_layer <= self.decoder.depth:
            raise ValueError(
                f"semantic_layer must be in 1..{self.decoder.depth} (the decoder's depth), "
                f"got {self.semantic_layer}"
            )
        if self.layout == "2d" and self.latents != self.grid**2:
            raise ValueError(
                f"latents must be {self.grid**2} (the {self.grid}x{self.grid} grid) in a 2d "
                f"tokenizer, got {self.latents}"
            )
        if self.layout == "1d":
            if self.latents & (self.latents - 1):
                raise ValueError(
                    f"latents must be a power of two in a 1d tokenizer, got {self.latents}"
                )
            rows, columns = layers.query_blocks(max(self.latents.bit_length() - 2, 0))
            if self.grid % rows or self.grid % columns:
                raise ValueError(
                    f"latents: {self.latents} queries pool the {self.grid}x{self.grid} grid in "
                    f"{rows}x{columns} equal blocks, which do not divide it; use fewer latents "
                    f"or another image_size"
                )


@flax.struct.dataclass
class TokenizerOutput:
    """What a training step needs from one forward pass.

    Attributes:
      reconstruction: `[B, H, W, 3]` float32.
      codes: `[B, N]` int32.
      codebook_loss, commitment_loss, entropy_loss: scalars, unweighted but for the 0.25 that
        belongs to the commitment loss.
      semantic_features: `[B, grid*grid, semantic_dim]` float32, or None without a projector.
      direct: `[B, H, W, 3]`, the CNN decoder on the CNN encoder's own features, or None.
      feature_loss: mean squared error of the decoder transformer's grid against the (constant)
        CNN encoder features, or None.
    """

    reconstruction: jax.Array
    codes: jax.Array
    codebook_loss: jax.Array
    commitment_loss: jax.Array
    entropy_loss: jax.Array
    semantic_features: jax.Array | None
    direct: jax.Array | None
    feature_loss: jax.Array | None


def _codebook_init(normalized: bool):
    def init(key, shape, dtype=jnp.float32):
        bound = 1 / shape[0]
        codebook = jax.random.uniform(key, shape, dtype, -bound, bound)
        return quantizer.normalize(codebook) if normalized else codebook

    return init


class TokenTransformer(nn.Module):
    """One of the tokenizer's two transformers, from `[B, S, z]` to `[B, T, z or W]`.

    In the 1d layout, queries attend to the embedded input as memory (a Q-Former): the encoder
    pools its queries from the grid, the decoder starts all of them as the first token.  In the 2d
    layout it is a plain ViT over the grid.
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
                queries = layers.pool_queries(grid, config.latents)
                queries = layers.dense(
                    size.width, ("embed", "embed_out"), dtype=self.dtype, name="query"
                )(queries)
                x, tapped = stack(queries, x, latent_positions, grid_positions, taps=taps)
        x = layers.layer_norm(dtype=self.dtype, name="norm_out")(x)
        return x, tapped


class Projector(nn.Module):
    """Maps decoder features to the teacher's width, for the semantic loss."""

    features: int
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        axes = ("embed", "mlp")
        x = nn.silu(layers.dense(4 * width, axes, dtype=self.dtype, name="in")(x))
        x = nn.silu(layers.dense(4 * width, ("mlp", None), dtype=self.dtype, name="hidden")(x))
        x = layers.dense(self.features, ("mlp", None), dtype=self.dtype, name="out")(x)
        return x.astype(jnp.float32)


class Tokenizer(nn.Module):
    """Image to codes and back.

    Attributes:
      config: the architecture.
      remat: "none", "dots" or "full", for CNN blocks and transformer layers.
      dtype: type of the computation; parameters, norms' statistics, the code search and all
        outputs are float32.
    """

    config: TokenizerConfig
    remat: str = "none"
    dtype: layers.Dtype = jnp.float32

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
            init = layers.torch_uniform(fan_in)
            return layers.dense(
                features, (None, None), dtype=dtype, name=name, kernel_init=init, bias_init=init
            )

        self.quant_conv = torch_default(config.code_dim, config.z_channels, "quant_conv")
        self.codebook = self.param(
            "codebook",
            layers.partitioned(_codebook_init(config.normalize_codes), "vocab", None),
            (config.codebook_size, config.code_dim),
        )
        self.post_quant_conv = torch_default(config.z_channels, config.code_dim, "post_quant_conv")
        self.decoder = TokenTransformer(config, decoder=True, remat=self.remat, dtype=dtype)
        self.decoder_out = cnn.conv(config.z_channels, dtype=dtype, name="decoder_out")
        if config.semantic_dim:
            self.projector = Projector(config.semantic_dim, dtype)
        self.cnn_decoder = cnn.Decoder(config.channels, config.residual_blocks, **common)

    def cnn_features(self, images: jax.Array) -> jax.Array:
        """CNN encoder: `[B, H, W, 3]` in [-1, 1] to `[B, grid, grid, z_channels]`."""
        return self.cnn_encoder(images.astype(self.dtype))

    def encoder_features(self, images: jax.Array) -> jax.Array:
        """The encoder transformer's output after its last LayerNorm, `[B, N, W]` float32."""
        return self._encode(self.cnn_features(images)).astype(jnp.float32)

    def latents(self, images: jax.Array) -> jax.Array:
        """Latents before normalization and quantization, `[B, N, D]` float32."""
        return self._latents(self.cnn_features(images))

    def encode(self, images: jax.Array) -> jax.Array:
        """Codes `[B, N]` int32 of images `[B, H, W, 3]` in [-1, 1]."""
        z, codebook = self._code_space(self.latents(images))
        return quantizer.search(z, codebook)[0]

    def decode(self, codes: jax.Array) -> jax.Array:
        """Images `[B, H, W, 3]` float32, not clipped, of codes `[B, N]`."""
        grid, _ = self._decode_grid(self._look_up(codes))
        return self.cnn_decoder(grid).astype(jnp.float32)

    def decoder_features(self, codes: jax.Array, layer: int) -> jax.Array:
        """Output of the decoder transformer's `layer` (from 1), `[B, grid*grid, W]` float32."""
        _, (features,) = self._decode_grid(self._look_up(codes), taps=(layer,))
        return features.astype(jnp.float32)

    def decoder_grid(self, codes: jax.Array) -> jax.Array:
        """The CNN decoder's input, `[B, grid, grid, z_channels]` float32."""
        return self._decode_grid(self._look_up(codes))[0].astype(jnp.float32)

    def semantic_features(self, codes: jax.Array) -> jax.Array:
        """Projected features of the semantic layer, `[B, grid*grid, semantic_dim]` float32."""
        return self.projector(self.decoder_features(codes, self.config.semantic_layer))

    def __call__(
        self, images: jax.Array, *, entropy: bool = False, auxiliary: bool = False
    ) -> TokenizerOutput:
        """The training forward pass on `[B, H, W, 3]` images in [-1, 1].

        Args:
          images: the batch.
          entropy: whether to compute the entropy loss.
          auxiliary: whether to compute the older recipe's direct image and feature loss.
        """
        config = self.config
        features = self.cnn_features(images)
        z, codebook = self._code_space(self._latents(features))
        codes, entropy_loss = quantizer.search(z, codebook, entropy=entropy)
        q = codebook[codes]
        codebook_loss = jnp.mean((q - jax.lax.stop_gradient(z)) ** 2)
        commitment_loss = 0.25 * jnp.mean((jax.lax.stop_gradient(q) - z) ** 2)
        quantized = quantizer.pass_gradient(z, q, config.gradient)

        semantic = config.semantic_dim > 0
        taps = (config.semantic_layer,) if semantic else ()
        grid, tapped = self._decode_grid(quantized, taps=taps)
        feature_error = grid.astype(jnp.float32) - jax.lax.stop_gradient(features)
        return TokenizerOutput(
            reconstruction=self.cnn_decoder(grid).astype(jnp.float32),
            codes=codes,
            codebook_loss=codebook_loss,
            commitment_loss=commitment_loss,
            entropy_loss=entropy_loss,
            semantic_features=self.projector(tapped[0]) if semantic else None,
            direct=self.cnn_decoder(features).astype(jnp.float32) if auxiliary else None,
            feature_loss=jnp.mean(feature_error**2) if auxiliary else None,
        )

    def _encode(self, features):
        return self.encoder(rearrange(features, "b h w c -> b (h w) c"))[0]

    def _latents(self, features):
        x = self.encoder_out(self._encode(features))
        return self.quant_conv(x).astype(jnp.float32)

    def _code_space(self, z):
        """Latents and codebook as they are compared: on the unit sphere, if so configured."""
        if self.config.normalize_codes:
            return quantizer.normalize(z), quantizer.normalize(self.codebook)
        return z, self.codebook

    def _look_up(self, codes):
        codebook = self.codebook
        if self.config.normalize_codes:
            codebook = quantizer.normalize(codebook)
        return codebook[codes]

    def _decode_grid(self, quantized, taps=()):
        x = self.post_quant_conv(quantized.astype(self.dtype))
        x, tapped = self.decoder(x, taps)
        x = rearrange(x, "b (h w) c -> b h w c", h=self.config.grid)
        return self.decoder_out(x), tapped


def init_params(module: Tokenizer, key: jax.Array):
    """Fresh parameters, with their logical axes, as `module.config.init` says."""
    size = module.config.image_size
    params = module.init(key, jnp.zeros((1, size, size, 3)))["params"]
    if module.config.init == "reference":
        return params
    # Those that the reference draws in their own way keep it.
    packed = {"self_attention", "cross_attention"}

    def rescale(path, kernel):
        names = [entry.key for entry in path if hasattr(entry, "key")]
        if names[-1] != "kernel":
            return kernel
        if names[-2].endswith("quant_conv") or (packed & set(names) and names[-2] != "out"):
            return kernel
        shape = kernel.shape[1:-1] if "layers" in names else kernel.shape[:-1]
        return kernel * (math.prod(shape) ** -0.5 / layers.INIT_STD)

    return jax.tree_util.tree_map_with_path(rescale, params)


def param_shapes(config: TokenizerConfig) -> dict:
    """Shapes of a tokenizer's parameters; nothing is allocated."""
    return layers.param_shapes(Tokenizer(config), (1, config.image_size, config.image_size, 3))
