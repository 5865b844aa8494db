"""The one place that knows the parameter names of the reference's checkpoints."""

from collections.abc import Iterator

from gigatok_jax.models import inception, lpips, vit
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.models.tokenizer import TokenizerConfig
from gigatok_jax.weights.layout import Entry

LINEAR = "o i -> i o"
CONV = "o i h w -> h w i o"
CONV_1D = "o i k -> k i o"
CONV_1X1 = "o i 1 1 -> i o"
PACKED_WEIGHT = "(p n h) i -> p i n h"
PACKED_BIAS = "(p n h) -> p n h"
IN_WEIGHT = "(n h) i -> i n h"
IN_BIAS = "(n h) -> n h"
OUT_WEIGHT = "o (n h) -> n h o"

DINO_HEADS = len(vit.quarters(vit.DINO["dino_vits16"]))


def _pair(name: str, path: str, pattern: str, **kwargs) -> Iterator[Entry]:
    """A weight and a bias."""
    yield Entry(f"{name}.weight", (f"{path}/kernel",), pattern, **kwargs)
    yield Entry(f"{name}.bias", (f"{path}/bias",), **kwargs)


def _norm(name: str, path: str, **kwargs) -> Iterator[Entry]:
    yield Entry(f"{name}.weight", (f"{path}/scale",), **kwargs)
    yield Entry(f"{name}.bias", (f"{path}/bias",), **kwargs)


def _attention(
    weight: str, bias: str, out: str, path: str, heads: int, layer: int
) -> Iterator[Entry]:
    projections = [f"{path}/{p}" for p in ("query", "key", "value")]
    kernels, biases = (tuple(f"{p}/{leaf}" for p in projections) for leaf in ("kernel", "bias"))
    sizes = (("p", 3), ("n", heads))
    yield Entry(weight, kernels, PACKED_WEIGHT, sizes, layer)
    yield Entry(bias, biases, PACKED_BIAS, sizes, layer)
    yield Entry(f"{out}.weight", (f"{path}/out/kernel",), OUT_WEIGHT, (("n", heads),), layer)
    yield Entry(f"{out}.bias", (f"{path}/out/bias",), layer=layer)


def _residual_block(name: str, path: str, shortcut: bool) -> Iterator[Entry]:
    for i in (1, 2):
        yield from _norm(f"{name}.norm{i}", f"{path}/norm{i}")
        yield from _pair(f"{name}.conv{i}", f"{path}/conv{i}", CONV)
    if shortcut:
        yield from _pair(f"{name}.nin_shortcut", f"{path}/shortcut", CONV)


def _cnn(config: TokenizerConfig) -> Iterator[Entry]:
    channels, levels = config.channels, len(config.channels)
    ours, theirs = "cnn_encoder", "encoder"
    yield from _pair(f"{theirs}.conv_in", f"{ours}/conv_in", CONV)
    width = channels[0]
    for level, features in enumerate(channels):
        for i in range(config.residual_blocks):
            name = f"{theirs}.conv_blocks.{level}.res.{i}"
            yield from _residual_block(name, f"{ours}/level{level}_block{i}", width != features)
            width = features
        if level < levels - 1:
            name = f"{theirs}.conv_blocks.{level}.downsample.conv"
            yield from _pair(name, f"{ours}/level{level}_down", CONV)

    ours, theirs = "cnn_decoder", "decoder"
    yield from _pair(f"{theirs}.conv_in", f"{ours}/conv_in", CONV)
    width = channels[-1]
    for step, level in enumerate(reversed(range(levels))):  # the reference counts from the coarse
        for leaf, parameter in (("gain", "gamma"), ("bias", "beta")):
            path = f"{ours}/level{level}_adaptive/{leaf}"
            yield from _pair(f"{theirs}.adaptive.{step}.{parameter}", path, LINEAR)
        for i in range(config.residual_blocks + 1):
            name = f"{theirs}.conv_blocks.{step}.res.{i}"
            path = f"{ours}/level{level}_block{i}"
            yield from _residual_block(name, path, width != channels[level])
            width = channels[level]
        if level > 0:
            name = f"{theirs}.conv_blocks.{step}.upsample.conv1"
            yield from _pair(name, f"{ours}/level{level}_up", CONV)

    for ours, theirs in (("cnn_encoder", "encoder"), ("cnn_decoder", "decoder")):
        for i in range(2):
            yield from _residual_block(f"{theirs}.mid.{i}", f"{ours}/mid_block{i}", False)
        yield from _norm(f"{theirs}.norm_out", f"{ours}/norm_out")
        yield from _pair(f"{theirs}.conv_out", f"{ours}/conv_out", CONV)


def _token_transformer(config: TokenizerConfig, decoder: bool) -> Iterator[Entry]:
    one_dimensional = config.layout == "1d"
    size = config.decoder if decoder else config.encoder
    ours = "decoder" if decoder else "encoder"
    if one_dimensional:
        theirs = "s1to2decoder" if decoder else "s2to1encoder"
    else:
        theirs = "s2ddecoder" if decoder else "s2dencoder"

    table = "n 1 w -> n w"
    yield Entry(f"{theirs}.positional_embedding", (f"{ours}/grid_positions",), table)
    if one_dimensional:
        name = f"{theirs}.latent_token_positional_embedding"
        yield Entry(name, (f"{ours}/latent_positions",), table)
        if not decoder:
            yield from _pair(f"{theirs}.global_proj", f"{ours}/query", LINEAR)
    yield from _pair(f"{theirs}.{ours}_embed", f"{ours}/embed", LINEAR)
    yield from _norm(f"{theirs}.ln_pre", f"{ours}/norm_in")

    norms = (
        ("norm_self", "norm_cross", "norm_mlp") if one_dimensional else ("norm_self", "norm_mlp")
    )
    attentions = {"self_attn": "self_attention"}
    if one_dimensional:
        attentions["multihead_attn"] = "cross_attention"
    block = f"{ours}/layers/block"
    for layer in range(size.depth):
        name = f"{theirs}.transformer.{layer}"
        for attention, path in attentions.items():
            packed = f"{name}.{attention}.in_proj"
            yield from _attention(
                f"{packed}_weight",
                f"{packed}_bias",
                f"{name}.{attention}.out_proj",
                f"{block}/{path}",
                size.heads,
                layer,
            )
        yield from _pair(f"{name}.linear1", f"{block}/mlp_in", LINEAR, layer=layer)
        yield from _pair(f"{name}.linear2", f"{block}/mlp_out", LINEAR, layer=layer)
        for i, norm in enumerate(norms, start=1):
            yield from _norm(f"{name}.norm{i}", f"{block}/{norm}", layer=layer)
    yield from _norm(f"{theirs}.ln_post", f"{ours}/norm_out")
    if decoder:
        yield from _pair(f"{theirs}.conv_out", "decoder_out", CONV)
        if config.semantic_dim:
            for i, path in ((0, "in"), (2, "hidden"), (4, "out")):
                yield from _pair(f"{theirs}.distill_mlp.{i}", f"projector/{path}", LINEAR)
    else:
        yield from _pair(f"{theirs}.conv_out", "encoder_out", CONV_1X1)


def tokenizer(config: TokenizerConfig) -> list[Entry]:
    """Entries of a GigaTok tokenizer, but for `quantize.codebook_used` (see `weights.convert`)."""
    return [
        *_cnn(config),
        *_token_transformer(config, decoder=False),
        *_token_transformer(config, decoder=True),
        Entry("quantize.embedding.weight", ("codebook",)),
        *_pair("quant_conv", "quant_conv", CONV_1X1),
        *_pair("post_quant_conv", "post_quant_conv", CONV_1X1),
    ]


def generator(config: GeneratorConfig) -> list[Entry]:
    """Entries of a GigaTok generator."""
    entries = [
        Entry("cls_embedding.embedding_table.weight", ("class_embedding",)),
        Entry("tok_embeddings.weight", ("embedding",)),
        Entry("norm.weight", ("norm_out/scale",)),
        Entry("output.weight", ("head/kernel",), LINEAR),
    ]
    if config.positions == "learned":
        entries.append(Entry("positional_embedding", ("positions",)))
    if config.adaln == "shared":
        entries += _pair("adaLN.1", "modulation", LINEAR)
    if config.adaln != "none":
        entries += _pair("final_adaLN.1", "modulation_out", LINEAR)
    block, heads = "layers/block", (("n", config.heads),)
    attention = f"{block}/attention"
    projections = tuple(f"{attention}/{p}/kernel" for p in ("query", "key", "value"))
    for layer in range(config.depth):
        name = f"layers.{layer}"
        packed = f"{name}.attention.wqkv.weight"
        out = f"{name}.attention.wo.weight"
        entries += [
            Entry(packed, projections, PACKED_WEIGHT, (("p", 3), *heads), layer),
            Entry(out, (f"{attention}/out/kernel",), OUT_WEIGHT, heads, layer),
            Entry(f"{name}.attention_norm.weight", (f"{block}/norm_attention/scale",), layer=layer),
            Entry(f"{name}.ffn_norm.weight", (f"{block}/norm_mlp/scale",), layer=layer),
        ]
        for theirs, ours in (("w1", "mlp_gate"), ("w3", "mlp_in"), ("w2", "mlp_out")):
            path = f"{block}/{ours}/kernel"
            entries.append(
                Entry(f"{name}.feed_forward.{theirs}.weight", (path,), LINEAR, layer=layer)
            )
        if config.qk_norm:
            for theirs, ours in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
                entries += _norm(f"{name}.attention.{theirs}", f"{attention}/{ours}", layer=layer)
        if config.adaln == "block":
            entries += _pair(
                f"{name}.adaLN_modulation.1", f"{block}/modulation", LINEAR, layer=layer
            )
        if config.adaln == "shared":
            entries.append(
                Entry(f"{name}.ada_gss", (f"{block}/offset",), "1 1 c w -> c w", layer=layer)
            )
    return entries


def patchgan(channels: tuple[int, ...] = (64, 128, 256, 512)) -> list[Entry]:
    """Entries of the PatchGAN discriminator; running statistics live under `batch_stats/`."""
    entries = [*_pair("main.0", "params/conv0", CONV)]
    for i in range(1, len(channels)):
        conv, norm = f"main.{3 * i - 1}", f"main.{3 * i}"
        entries.append(Entry(f"{conv}.weight", (f"params/conv{i}/kernel",), CONV))
        entries.extend(_norm(norm, f"params/norm{i}"))
        entries.append(Entry(f"{norm}.running_mean", (f"batch_stats/norm{i}/mean",)))
        entries.append(Entry(f"{norm}.running_var", (f"batch_stats/norm{i}/var",)))
    return [*entries, *_pair(f"main.{3 * len(channels) - 1}", "params/conv_out", CONV)]


def patchgan_batches(channels: tuple[int, ...]) -> dict[str, str]:
    """PyTorch's counters of the PatchGAN's BatchNorm calls, and our name of each norm."""
    return {f"main.{3 * i}.num_batches_tracked": f"norm{i}" for i in range(1, len(channels))}


def dino_heads() -> list[Entry]:
    """Entries of the heads on a frozen DINO; singular vectors live under `batch_stats/`."""
    entries = []
    for i in range(DINO_HEADS):
        for name, path, window in (("0.0", "in", 1), ("1.fn.0", "mix", 9), ("2", "out", 1)):
            conv, ours, at = f"heads.{i}.{name}", f"head/conv_{path}", {"layer": i}
            params, vectors = f"params/{ours}", f"batch_stats/{ours}"
            flat = dict(pattern="(i k) -> k i", sizes=(("k", window),))
            entries += [
                Entry(f"{conv}.weight_orig", (f"{params}/kernel",), CONV_1D, **at),
                Entry(f"{conv}.bias", (f"{params}/bias",), **at),
                Entry(f"{conv}.weight_u", (f"{vectors}/u",), **at),
                Entry(f"{conv}.weight_v", (f"{vectors}/v",), **flat, **at),
            ]
        for name, path in (("0.1", "in"), ("1.fn.1", "mix")):
            entries += _norm(f"heads.{i}.{name}", f"params/head/norm_{path}", layer=i)
    return entries


def dino(config: vit.ViTConfig) -> list[Entry]:
    """Entries of a DINO backbone, or of a DINOv2 one without registers."""
    entries = [
        Entry("cls_token", ("class_token",), "1 n w -> n w"),
        Entry("pos_embed", ("positions",), "1 n w -> n w"),
        *_pair("patch_embed.proj", "patch_embed", CONV),
        *_norm("norm", "norm"),
    ]
    block = "layers/block"
    for layer in range(config.depth):
        name = f"blocks.{layer}"
        entries += [
            *_norm(f"{name}.norm1", f"{block}/norm_self", layer=layer),
            *_norm(f"{name}.norm2", f"{block}/norm_mlp", layer=layer),
            *_attention(
                f"{name}.attn.qkv.weight",
                f"{name}.attn.qkv.bias",
                f"{name}.attn.proj",
                f"{block}/self_attention",
                config.heads,
                layer,
            ),
            *_pair(f"{name}.mlp.fc1", f"{block}/mlp_in", LINEAR, layer=layer),
            *_pair(f"{name}.mlp.fc2", f"{block}/mlp_out", LINEAR, layer=layer),
        ]
        if config.layer_scale:
            entries += [
                Entry(f"{name}.ls1.gamma", (f"{block}/scale_self",), layer=layer),
                Entry(f"{name}.ls2.gamma", (f"{block}/scale_mlp",), layer=layer),
            ]
    return entries


def clip(config: vit.ViTConfig) -> list[Entry]:
    """Entries of the vision tower of an open_clip model, but for the projection `visual.proj`."""
    entries = [
        Entry("visual.class_embedding", ("class_token",), "w -> 1 w"),
        Entry("visual.positional_embedding", ("positions",)),
        Entry("visual.conv1.weight", ("patch_embed/kernel",), CONV),
        *_norm("visual.ln_pre", "norm_in"),
        *_norm("visual.ln_post", "norm"),
    ]
    block = "layers/block"
    for layer in range(config.depth):
        name = f"visual.transformer.resblocks.{layer}"
        entries += [
            *_norm(f"{name}.ln_1", f"{block}/norm_self", layer=layer),
            *_norm(f"{name}.ln_2", f"{block}/norm_mlp", layer=layer),
            *_attention(
                f"{name}.attn.in_proj_weight",
                f"{name}.attn.in_proj_bias",
                f"{name}.attn.out_proj",
                f"{block}/self_attention",
                config.heads,
                layer,
            ),
            *_pair(f"{name}.mlp.c_fc", f"{block}/mlp_in", LINEAR, layer=layer),
            *_pair(f"{name}.mlp.c_proj", f"{block}/mlp_out", LINEAR, layer=layer),
        ]
    return entries


def siglip(config: vit.ViTConfig) -> list[Entry]:
    """Entries of the vision tower of a SigLIP of `transformers`, but for its pooling head."""
    embeddings = "vision_model.embeddings"
    entries = [
        *_pair(f"{embeddings}.patch_embedding", "patch_embed", CONV),
        Entry(f"{embeddings}.position_embedding.weight", ("positions",)),
        *_norm("vision_model.post_layernorm", "norm"),
    ]
    block, heads = "layers/block", (("n", config.heads),)
    for layer in range(config.depth):
        name = f"vision_model.encoder.layers.{layer}"
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value")):
            projection, path = f"{name}.self_attn.{theirs}_proj", f"{block}/self_attention/{ours}"
            entries += [
                Entry(f"{projection}.weight", (f"{path}/kernel",), IN_WEIGHT, heads, layer),
                Entry(f"{projection}.bias", (f"{path}/bias",), IN_BIAS, heads, layer),
            ]
        out, path = f"{name}.self_attn.out_proj", f"{block}/self_attention/out"
        entries += [
            Entry(f"{out}.weight", (f"{path}/kernel",), OUT_WEIGHT, heads, layer),
            Entry(f"{out}.bias", (f"{path}/bias",), layer=layer),
            *_norm(f"{name}.layer_norm1", f"{block}/norm_self", layer=layer),
            *_norm(f"{name}.layer_norm2", f"{block}/norm_mlp", layer=layer),
            *_pair(f"{name}.mlp.fc1", f"{block}/mlp_in", LINEAR, layer=layer),
            *_pair(f"{name}.mlp.fc2", f"{block}/mlp_out", LINEAR, layer=layer),
        ]
    return entries


def vgg16() -> list[Entry]:
    """Entries of torchvision's VGG-16, convolutions only (`features.N`)."""
    return [
        entry
        for _, index, path in _vgg_layers()
        for entry in _pair(f"features.{index}", path, CONV)
    ]


def lpips_linear() -> list[Entry]:
    """Entries of LPIPS's five linear layers."""
    return [
        Entry(f"lin{i}.model.1.weight", (f"lin{i}",), "1 c 1 1 -> c")
        for i in range(len(lpips.STAGES))
    ]


def lpips_whole() -> list[Entry]:
    """Entries of an LPIPS module saved whole (`net.sliceN.M`)."""
    convs = [
        entry
        for stage, index, path in _vgg_layers()
        for entry in _pair(f"net.slice{stage}.{index}", path, CONV)
    ]
    return convs + lpips_linear()


def _vgg_layers() -> Iterator[tuple[int, int, str]]:
    """Stage, index in torchvision's Sequential, and our path of each convolution."""
    index = 0
    for stage, widths in enumerate(lpips.STAGES, start=1):
        for i in range(1, len(widths) + 1):
            yield stage, index, f"vgg/conv{stage}_{i}"
            index += 2  # the ReLU after it
        index += 1  # max pooling


def inception_fid() -> list[Entry]:
    """Entries of FID's Inception as `pt_inception-2015-12-05` has it."""
    entries = []
    for name in inception.layer_names():
        entries.append(Entry(f"{name}.conv.weight", (f"{name}/conv/kernel",), CONV))
        entries.extend(_norm(f"{name}.bn", name))
        entries.append(Entry(f"{name}.bn.running_mean", (f"{name}/mean",)))
        entries.append(Entry(f"{name}.bn.running_var", (f"{name}/var",)))
    return [*entries, *_pair("fc", "fc", LINEAR)]
