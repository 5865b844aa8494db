"""The tensor names of all reference checkpoints, which no other module knows.

Each public function lists the tensors of one architecture. In rows for `_layers`, `{layer}` stands
for the number of a layer.
"""

from collections.abc import Iterable, Iterator
import dataclasses

from gigatok_jax.models import cnn, inception, lpips
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.models.titok import PIXELS, TitokConfig
from gigatok_jax.models.tokenizer import TokenizerConfig
from gigatok_jax.models.vit import ViTConfig
from gigatok_jax.models.vqgan import FAMILIES, VqganConfig
from gigatok_jax.weights.layout import Entry

USAGE = "quantize.codebook_used"  # a tokenizer's last codes assigned
# By the kinds of `weights.convert`: globs of tensors without a counterpart here.
IGNORED = {
    "tokenizer": (USAGE,),
    "titok": (),
    "vqgan": (USAGE, "loss.*"),  # discriminators and LPIPS
    "generator": ("freqs_cis", "causal_mask", "*.kv_cache.*"),  # constants in older checkpoints
    "dino": ("mask_token",),
    "dinov2": ("mask_token",),
    "clip": ("visual.proj",),
    "siglip": ("vision_model.head.*", "vision_model.embeddings.position_ids"),
    # The `lpips` package saves the linear layers twice.
    "lpips": ("classifier.*", "scaling_layer.*", "lins.*"),
    "inception": ("*.num_batches_tracked",),
}
# Prefixes of the network's tensors in files that also hold others.
TOWERS = {"clip": "visual.", "siglip": "vision_model."}

LINEAR = "o i -> i o"
CONV = "o i h w -> h w i o"
CONV_1X1 = "o i 1 1 -> i o"
IN_CONV_1X1 = "(n h) i 1 1 -> i n h"
OUT_CONV_1X1 = "o (n h) 1 1 -> n h o"
PACKED_WEIGHT = "(p n h) i -> p i n h"
PACKED_BIAS = "(p n h) -> p n h"
IN_WEIGHT = "(n h) i -> i n h"
IN_BIAS = "(n h) -> n h"
OUT_WEIGHT = "o (n h) -> n h o"

BLOCK = "layers/block"
QKV = ("query", "key", "value")


def _pair(name: str, path: str, pattern: str = LINEAR) -> Iterator[Entry]:
    """A weight and a bias."""
    yield Entry(f"{name}.weight", (f"{path}/kernel",), pattern)
    yield Entry(f"{name}.bias", (f"{path}/bias",))


def _norm(name: str, path: str) -> Iterator[Entry]:
    yield Entry(f"{name}.weight", (f"{path}/scale",))
    yield Entry(f"{name}.bias", (f"{path}/bias",))


def _layers(depth: int, rows: list[Entry]) -> Iterator[Entry]:
    """Repeats rows for every layer; our parameters are stacked over layers, the reference's not."""
    for layer in range(depth):
        for row in rows:
            yield dataclasses.replace(row, name=row.name.format(layer=layer), layer=layer)


def _attention(packed: str, out: str, path: str, heads: int) -> Iterator[Entry]:
    """Attention whose query, key and value projections are one packed tensor in PyTorch."""
    sizes = (("p", 3), ("n", heads))
    kernels, biases = (tuple(f"{path}/{p}/{leaf}" for p in QKV) for leaf in ("kernel", "bias"))
    yield Entry(f"{packed}weight", kernels, PACKED_WEIGHT, sizes)
    yield Entry(f"{packed}bias", biases, PACKED_BIAS, sizes)
    yield from _attention_out(out, path, heads)


def _attention_out(name: str, path: str, heads: int) -> Iterator[Entry]:
    yield Entry(f"{name}.weight", (f"{path}/out/kernel",), OUT_WEIGHT, (("n", heads),))
    yield Entry(f"{name}.bias", (f"{path}/out/bias",))


@dataclasses.dataclass(frozen=True)
class CNNNames:
    """What a program calls the modules of its CNN.

    `{level}` counts resolutions from the highest, `{step}` in order of use.
    """

    encoder_level: str
    decoder_level: str
    block: str  # residual blocks in a level
    middle: tuple[str, ...]  # in order of use
    down: str  # in a level of the encoder
    up: str  # in a level of the decoder
    adaptive: str = "adaptive.{level}"


STEPS = ("conv_blocks.{step}", "conv_blocks.{step}", "res")
LEVELS = ("down.{level}", "up.{level}", "block")
# Of GigaTok, and of the families of `models.vqgan`.
CNN_NAMES = {
    "gigatok": CNNNames(
        *STEPS, ("mid.0", "mid.1"), "downsample.conv", "upsample.conv1", "adaptive.{step}"
    ),
    "llamagen": CNNNames(*STEPS, ("mid.0", "mid.1", "mid.2"), "downsample.conv", "upsample.conv"),
    "taming": CNNNames(
        *LEVELS, ("mid.block_1", "mid.attn_1", "mid.block_2"), "downsample.conv", "upsample.conv"
    ),
    "maskgit": CNNNames(*LEVELS, ("mid.0", "mid.1"), "", "upsample_conv"),
    "open_magvit2": CNNNames(
        *LEVELS, tuple(f"mid_block.{i}" for i in range(4)), "downsample", "upsample.conv1"
    ),
}


def _conv(name: str, path: str, bias: bool = True) -> Iterator[Entry]:
    weight, offset = _pair(name, path, CONV)
    yield from (weight, offset) if bias else (weight,)


def _residual_block(
    name: str, path: str, shortcut: bool = False, bias: bool = True
) -> Iterator[Entry]:
    for i in (1, 2):
        yield from _norm(f"{name}.norm{i}", f"{path}/norm{i}")
        yield from _conv(f"{name}.conv{i}", f"{path}/conv{i}", bias)
    if shortcut:
        yield from _conv(f"{name}.nin_shortcut", f"{path}/shortcut", bias)


def _pixel_attention(name: str, path: str) -> Iterator[Entry]:
    yield from _norm(f"{name}.norm", f"{path}/norm")
    path, heads = f"{path}/attention", (("n", 1),)
    for ours in QKV:
        yield Entry(f"{name}.{ours[0]}.weight", (f"{path}/{ours}/kernel",), IN_CONV_1X1, heads)
        yield Entry(f"{name}.{ours[0]}.bias", (f"{path}/{ours}/bias",), IN_BIAS, heads)
    yield Entry(f"{name}.proj_out.weight", (f"{path}/out/kernel",), OUT_CONV_1X1, heads)
    yield Entry(f"{name}.proj_out.bias", (f"{path}/out/bias",))


def _cnn(
    config: TokenizerConfig | VqganConfig,
    part: str,
    design: cnn.Design = cnn.GIGATOK,
    called: CNNNames = CNN_NAMES["gigatok"],
) -> Iterator[Entry]:
    """The convolutional "encoder" or "decoder"."""
    ours, encoder = f"cnn_{part}", part == "encoder"
    levels = list(enumerate(config.channels))
    lowest = len(levels) - 1
    if not encoder:
        levels.reverse()
    width, bias = levels[0][1], design.bias
    yield from _conv(f"{part}.conv_in", f"{ours}/conv_in", bias or not encoder)
    for step, (level, features) in enumerate(levels):
        place = {"step": step, "level": level}
        name = (called.encoder_level if encoder else called.decoder_level).format(**place)
        name, path = f"{part}.{name}", f"{ours}/level{level}"
        for i in range(config.residual_blocks + (0 if encoder else design.more_blocks)):
            block = f"{name}.{called.block}.{i}"
            yield from _residual_block(block, f"{path}_block{i}", width != features, bias)
            width = features
            if design.attention and level == lowest:
                yield from _pixel_attention(f"{name}.attn.{i}", f"{path}_attention{i}")
        if design.adaptive and not encoder:
            adaptive = f"{part}.{called.adaptive.format(**place)}"
            yield from _pair(f"{adaptive}.gamma", f"{path}_adaptive/gain")
            yield from _pair(f"{adaptive}.beta", f"{path}_adaptive/bias")
        if encoder and level < lowest and design.down != "pool":
            yield from _conv(f"{name}.{called.down}", f"{path}_down")
        if not encoder and level > 0:
            yield from _conv(f"{name}.{called.up}", f"{path}_up")
    middle = [f"mid_block{i}" for i in range(design.middle_blocks)]
    if design.attention:
        middle.insert(1, "mid_attention")
    for name, path in zip(called.middle, middle, strict=True):
        if path == "mid_attention":
            yield from _pixel_attention(f"{part}.{name}", f"{ours}/{path}")
        else:
            yield from _residual_block(f"{part}.{name}", f"{ours}/{path}", bias=bias)
    yield from _norm(f"{part}.norm_out", f"{ours}/norm_out")
    yield from _conv(f"{part}.conv_out", f"{ours}/conv_out")


def _token_transformer(config: TokenizerConfig, part: str) -> Iterator[Entry]:
    """The transformer "encoder" or "decoder"; in the 1d layout a Q-Former."""
    one_dimensional, decoder = config.layout == "1d", part == "decoder"
    size = config.decoder if decoder else config.encoder
    if one_dimensional:
        name = "s1to2decoder" if decoder else "s2to1encoder"
        attentions = {"self_attn": "self_attention", "multihead_attn": "cross_attention"}
        norms = ("norm_self", "norm_cross", "norm_mlp")
    else:
        name, attentions = f"s2d{part}", {"self_attn": "self_attention"}
        norms = ("norm_self", "norm_mlp")

    table = "n 1 w -> n w"
    yield Entry(f"{name}.positional_embedding", (f"{part}/grid_positions",), table)
    if one_dimensional:
        latents = f"{name}.latent_token_positional_embedding"
        yield Entry(latents, (f"{part}/latent_positions",), table)
        if not decoder:
            yield from _pair(f"{name}.global_proj", f"{part}/query")
    yield from _pair(f"{name}.{part}_embed", f"{part}/embed")
    yield from _norm(f"{name}.ln_pre", f"{part}/norm_in")

    layer, block = f"{name}.transformer.{{layer}}", f"{part}/{BLOCK}"
    rows = [*_pair(f"{layer}.linear1", f"{block}/mlp_in")]
    rows += _pair(f"{layer}.linear2", f"{block}/mlp_out")
    for theirs, ours in attentions.items():
        packed, out = f"{layer}.{theirs}.in_proj_", f"{layer}.{theirs}.out_proj"
        rows += _attention(packed, out, f"{block}/{ours}", size.heads)
    for i, norm in enumerate(norms, start=1):
        rows += _norm(f"{layer}.norm{i}", f"{block}/{norm}")
    yield from _layers(size.depth, rows)

    yield from _norm(f"{name}.ln_post", f"{part}/norm_out")
    yield from _pair(f"{name}.conv_out", f"{part}_out", CONV if decoder else CONV_1X1)
    if decoder and config.semantic_dim:
        for i, ours in ((0, "in"), (2, "hidden"), (4, "out")):
            yield from _pair(f"{name}.distill_mlp.{i}", f"projector/{ours}")


def tokenizer(config: TokenizerConfig) -> list[Entry]:
    """Entries of a GigaTok tokenizer, except `USAGE`."""
    codebook = [Entry("quantize.embedding.weight", ("codebook",))]
    return [
        *_cnn(config, "encoder"),
        *_cnn(config, "decoder"),
        *_token_transformer(config, "encoder"),
        *_token_transformer(config, "decoder"),
        *(codebook if config.has_codebook else ()),
        *_pair("quant_conv", "quant_conv", CONV_1X1),
        *_pair("post_quant_conv", "post_quant_conv", CONV_1X1),
    ]


def vqgan(config: VqganConfig) -> list[Entry]:
    """Entries of a VQGAN or one of its successors, except `USAGE`."""
    family = FAMILIES[config.family]
    parts = [
        _cnn(config, part, family.cnn, CNN_NAMES[config.family]) for part in ("encoder", "decoder")
    ]
    if config.quantizer != "lfq":
        parts.append([Entry("quantize.embedding.weight", ("codebook",))])
    if family.quant_convs:
        parts += [_pair(name, name, CONV_1X1) for name in ("quant_conv", "post_quant_conv")]
    return [entry for part in parts for entry in part]


def _titok_transformer(config: TitokConfig, part: str) -> Iterator[Entry]:
    """The ViT of TiTok's "encoder" or "decoder"."""
    size = config.decoder if part == "decoder" else config.encoder
    yield Entry(f"{part}.class_embedding", (f"{part}/class_token",))
    yield Entry(f"{part}.positional_embedding", (f"{part}/positions",))
    latents = f"{part}.latent_token_positional_embedding"
    yield Entry(latents, (f"{part}/latent_positions",))
    yield from _norm(f"{part}.ln_pre", f"{part}/norm_in")
    yield from _norm(f"{part}.ln_post", f"{part}/norm_out")
    layer, block = f"{part}.transformer.{{layer}}", f"{part}/{BLOCK}"
    packed, out = f"{layer}.attn.in_proj_", f"{layer}.attn.out_proj"
    rows = [*_attention(packed, out, f"{block}/self_attention", size.heads)]
    rows += _norm(f"{layer}.ln_1", f"{block}/norm_self")
    rows += _norm(f"{layer}.ln_2", f"{block}/norm_mlp")
    rows += _pair(f"{layer}.mlp.c_fc", f"{block}/mlp_in")
    rows += _pair(f"{layer}.mlp.c_proj", f"{block}/mlp_out")
    yield from _layers(size.depth, rows)


def titok(config: TitokConfig) -> list[Entry]:
    """Entries of a TiTok; a two-stage one holds the decoder of MaskGIT's VQGAN."""
    entries = [
        Entry("latent_tokens", ("latent_tokens",)),
        *_pair("encoder.patch_embed", "patch_embed", CONV),
        *_titok_transformer(config, "encoder"),
        *_pair("encoder.conv_out", "encoder_out", CONV_1X1),
        Entry("quantize.embedding.weight", ("codebook",)),
        *_pair("decoder.decoder_embed", "embed"),
        Entry("decoder.mask_token", ("mask_token",), "1 n w -> n w"),
        *_titok_transformer(config, "decoder"),
    ]
    if not config.two_stage:
        entries += _pair("decoder.ffn.0", "patch_out", CONV_1X1)
        return [*entries, *_pair("decoder.conv_out", "conv_out", CONV)]
    entries += _pair("decoder.ffn.0", "proxy_hidden", CONV_1X1)
    entries += _pair("decoder.ffn.2", "proxy_out", CONV_1X1)
    entries.append(Entry("pixel_quantize.embedding.weight", ("proxy_codebook",)))
    family = PIXELS.family
    for entry in _cnn(PIXELS, "decoder", FAMILIES[family].cnn, CNN_NAMES[family]):
        entries.append(dataclasses.replace(entry, name=f"pixel_{entry.name}"))
    return entries


def generator(config: GeneratorConfig) -> list[Entry]:
    """Entries of a generator; one with "rotary_2d" positions and no more is LlamaGen's."""
    layer, attention, heads = "layers.{layer}", f"{BLOCK}/attention", (("n", config.heads),)
    kernels = tuple(f"{attention}/{p}/kernel" for p in QKV)
    entries = [
        Entry("cls_embedding.embedding_table.weight", ("class_embedding",)),
        Entry("tok_embeddings.weight", ("embedding",)),
        Entry("norm.weight", ("norm_out/scale",)),
        Entry("output.weight", ("head/kernel",), LINEAR),
    ]
    rows = [
        Entry(f"{layer}.attention.wqkv.weight", kernels, PACKED_WEIGHT, (("p", 3), *heads)),
        Entry(f"{layer}.attention.wo.weight", (f"{attention}/out/kernel",), OUT_WEIGHT, heads),
        Entry(f"{layer}.attention_norm.weight", (f"{BLOCK}/norm_attention/scale",)),
        Entry(f"{layer}.ffn_norm.weight", (f"{BLOCK}/norm_mlp/scale",)),
        Entry(f"{layer}.feed_forward.w1.weight", (f"{BLOCK}/mlp_gate/kernel",), LINEAR),
        Entry(f"{layer}.feed_forward.w3.weight", (f"{BLOCK}/mlp_in/kernel",), LINEAR),
        Entry(f"{layer}.feed_forward.w2.weight", (f"{BLOCK}/mlp_out/kernel",), LINEAR),
    ]
    if config.positions == "learned":
        entries.append(Entry("positional_embedding", ("positions",)))
    if config.qk_norm:
        rows += _norm(f"{layer}.attention.q_norm", f"{attention}/query_norm")
        rows += _norm(f"{layer}.attention.k_norm", f"{attention}/key_norm")
    if config.adaln == "block":
        rows += _pair(f"{layer}.adaLN_modulation.1", f"{BLOCK}/modulation")
    if config.adaln == "shared":
        entries += _pair("adaLN.1", "modulation")
        rows.append(Entry(f"{layer}.ada_gss", (f"{BLOCK}/offset",), "1 1 c w -> c w"))
    if config.adaln != "none":
        entries += _pair("final_adaLN.1", "modulation_out")
    return [*entries, *_layers(config.depth, rows)]


def _vit_layers(
    config: ViTConfig, layer: str, norm: str, mlp: tuple[str, str], *more: Entry
) -> Iterator[Entry]:
    """Layers of a ViT: norms called `norm`1 and `norm`2, an MLP, and `more` rows."""
    rows = [
        *_norm(f"{layer}.{norm}1", f"{BLOCK}/norm_self"),
        *_norm(f"{layer}.{norm}2", f"{BLOCK}/norm_mlp"),
        *_pair(f"{layer}.mlp.{mlp[0]}", f"{BLOCK}/mlp_in"),
        *_pair(f"{layer}.mlp.{mlp[1]}", f"{BLOCK}/mlp_out"),
    ]
    return _layers(config.depth, [*rows, *more])


def dino(config: ViTConfig) -> list[Entry]:
    """Entries of a DINO backbone, or of a DINOv2 backbone without registers."""
    layer, attention = "blocks.{layer}", f"{BLOCK}/self_attention"
    rows = [*_attention(f"{layer}.attn.qkv.", f"{layer}.attn.proj", attention, config.heads)]
    if config.layer_scale:
        rows.append(Entry(f"{layer}.ls1.gamma", (f"{BLOCK}/scale_self",)))
        rows.append(Entry(f"{layer}.ls2.gamma", (f"{BLOCK}/scale_mlp",)))
    return [
        Entry("cls_token", ("class_token",), "1 n w -> n w"),
        Entry("pos_embed", ("positions",), "1 n w -> n w"),
        *_pair("patch_embed.proj", "patch_embed", CONV),
        *_norm("norm", "norm"),
        *_vit_layers(config, layer, "norm", ("fc1", "fc2"), *rows),
    ]


def clip(config: ViTConfig) -> list[Entry]:
    """Entries of the vision tower of an open_clip model, without `visual.proj`."""
    layer, attention = "visual.transformer.resblocks.{layer}", f"{BLOCK}/self_attention"
    packed, out = f"{layer}.attn.in_proj_", f"{layer}.attn.out_proj"
    rows = _attention(packed, out, attention, config.heads)
    return [
        Entry("visual.class_embedding", ("class_token",), "w -> 1 w"),
        Entry("visual.positional_embedding", ("positions",)),
        Entry("visual.conv1.weight", ("patch_embed/kernel",), CONV),
        *_norm("visual.ln_pre", "norm_in"),
        *_norm("visual.ln_post", "norm"),
        *_vit_layers(config, layer, "ln_", ("c_fc", "c_proj"), *rows),
    ]


def siglip(config: ViTConfig) -> list[Entry]:
    """Entries of the vision tower of a `transformers` SigLIP, without the pooling head."""
    embeddings, layer = "vision_model.embeddings", "vision_model.encoder.layers.{layer}"
    attention, heads = f"{BLOCK}/self_attention", (("n", config.heads),)
    rows = [*_attention_out(f"{layer}.self_attn.out_proj", attention, config.heads)]
    for ours in QKV:
        name, path = f"{layer}.self_attn.{ours[0]}_proj", f"{attention}/{ours}"
        rows.append(Entry(f"{name}.weight", (f"{path}/kernel",), IN_WEIGHT, heads))
        rows.append(Entry(f"{name}.bias", (f"{path}/bias",), IN_BIAS, heads))
    return [
        *_pair(f"{embeddings}.patch_embedding", "patch_embed", CONV),
        Entry(f"{embeddings}.position_embedding.weight", ("positions",)),
        *_norm("vision_model.post_layernorm", "norm"),
        *_vit_layers(config, layer, "layer_norm", ("fc1", "fc2"), *rows),
    ]


def lpips_vgg16(tensors: Iterable[str] = ("net.",)) -> list[Entry]:
    """Entries of LPIPS: VGG-16's convolutions and five linear layers.

    The names are those of a complete LPIPS module or, if no name in `tensors` begins with "net.",
    of torchvision's VGG-16 and the file of the linear layers.
    """
    whole = any(name.startswith("net.") for name in tensors)
    entries, index = [], 0  # in torchvision's Sequential
    for stage, widths in enumerate(lpips.STAGES, start=1):
        part = f"net.slice{stage}" if whole else "features"
        for i in range(1, len(widths) + 1):
            entries += _pair(f"{part}.{index}", f"vgg/conv{stage}_{i}", CONV)
            index += 2  # a ReLU follows each convolution
        index += 1  # and max pooling follows each stage
        name = f"lin{stage - 1}"
        entries.append(Entry(f"{name}.model.1.weight", (name,), "1 c 1 1 -> c"))
    return entries


def inception_fid() -> list[Entry]:
    """Entries of FID's Inception, file `pt_inception-2015-12-05`."""
    entries = [*_pair("fc", "fc")]
    for name in inception.layer_names():
        entries.append(Entry(f"{name}.conv.weight", (f"{name}/conv/kernel",), CONV))
        entries += _norm(f"{name}.bn", name)
        entries.append(Entry(f"{name}.bn.running_mean", (f"{name}/mean",)))
        entries.append(Entry(f"{name}.bn.running_var", (f"{name}/var",)))
    return entries
