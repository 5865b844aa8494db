"""Reference checkpoints to our variables and back, one function a kind and direction.

Every conversion keeps the float32 values bit for bit.  A checkpoint of another architecture raises
ValueError, naming the first tensor that does not fit.
"""

from collections.abc import Iterable, Mapping
import fnmatch

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax.models import discriminators, inception, lpips, quantizer, vit
from gigatok_jax.models.generator import Generator, GeneratorConfig
from gigatok_jax.models.tokenizer import Tokenizer, TokenizerConfig
from gigatok_jax.weights import layout, names

USAGE_NAME = "quantize.codebook_used"


def shapes(module: nn.Module, *inputs) -> dict:
    """The module's variables as unboxed shapes; nothing is allocated.

    An input is a `jax.ShapeDtypeStruct`, or the shape of a float32 one.
    """
    inputs = [jax.ShapeDtypeStruct(x, jnp.float32) if isinstance(x, tuple) else x for x in inputs]
    return nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))


def tokenizer_shapes(config: TokenizerConfig) -> dict:
    """Shapes of a tokenizer's parameters."""
    return shapes(Tokenizer(config), (1, config.image_size, config.image_size, 3))["params"]


def _refuse_unknown(
    tensors: Mapping[str, np.ndarray], entries: Iterable[layout.Entry], *ignored: str
) -> None:
    """Raises for a tensor that is neither an entry's nor matches one of the `ignored` globs."""
    known = {entry.name for entry in entries}
    unknown = [
        name
        for name in tensors
        if name not in known and not any(fnmatch.fnmatchcase(name, glob) for glob in ignored)
    ]
    if unknown:
        raise ValueError(
            f"tensor {unknown[0]!r} of shape {list(np.shape(tensors[unknown[0]]))} has no place in "
            f"this architecture (the first of {len(unknown)} such tensors)"
        )


def tokenizer_from_torch(tensors: Mapping[str, np.ndarray], config: TokenizerConfig) -> dict:
    """A reference tokenizer's tensors as `{"params": ..., "history": [65536] int32}`.

    Raises:
      ValueError: a tensor is missing, superfluous, or of another shape than `config` says.
    """
    entries = names.tokenizer(config)
    _refuse_unknown(tensors, entries, USAGE_NAME)
    params = layout.from_torch(tensors, entries, tokenizer_shapes(config))
    return {"params": params, "history": _history(tensors.get(USAGE_NAME))}


def _history(used: np.ndarray | None) -> np.ndarray:
    """The reference's usage buffer, codes stored as floats, as our history."""
    if used is None:
        return np.array(quantizer.empty_history())
    used = np.asarray(used)
    history = used.astype(np.int32)
    if used.shape != (quantizer.HISTORY_LENGTH,) or not np.array_equal(history, used):
        raise ValueError(
            f"tensor {USAGE_NAME!r} must hold {quantizer.HISTORY_LENGTH} whole numbers, the codes "
            f"last assigned; it has shape {list(used.shape)}"
        )
    return history


def tokenizer_to_torch(variables: Mapping, config: TokenizerConfig) -> dict[str, np.ndarray]:
    """The inverse of `tokenizer_from_torch`.

    Without a history in `variables`, or with one that has seen nothing (-1 throughout), the usage
    buffer is left out, as in a reference model that does not measure usage.
    """
    tensors = layout.to_torch(variables["params"], names.tokenizer(config))
    history = np.asarray(variables.get("history", -1))
    if np.any(history != -1):
        tensors[USAGE_NAME] = history.astype(np.float32)
    return tensors


def generator_shapes(config: GeneratorConfig) -> dict:
    """Shapes of a generator's parameters."""
    codes, classes = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 1), (1,)))
    return shapes(Generator(config), codes, classes)["params"]


def generator_from_torch(tensors: Mapping[str, np.ndarray], config: GeneratorConfig) -> dict:
    """A reference generator's tensors as `{"params": ...}`.

    Constants that old files hold (masks, rotary tables, caches) are dropped.

    Raises:
      ValueError: a tensor is missing, superfluous, or of another shape than `config` says.
    """
    entries = names.generator(config)
    _refuse_unknown(tensors, entries, "freqs_cis", "causal_mask", "*.kv_cache.*")
    return {"params": layout.from_torch(tensors, entries, generator_shapes(config))}


def generator_to_torch(variables: Mapping, config: GeneratorConfig) -> dict[str, np.ndarray]:
    """The inverse of `generator_from_torch`."""
    return layout.to_torch(variables["params"], names.generator(config))


def patchgan_from_torch(tensors: Mapping[str, np.ndarray], channels=(64, 128, 256, 512)) -> dict:
    """The PatchGAN discriminator's `{"params": ..., "batch_stats": ..., "batches": ...}`.

    `batches` holds PyTorch's count of training calls of each norm, scalars, int64.  Nothing here
    depends on it; it is kept for the way back.
    """
    entries = names.patchgan(channels)
    _refuse_unknown(tensors, entries, "*.num_batches_tracked")
    template = shapes(discriminators.PatchGAN(tuple(channels)), (1, 256, 256, 3))
    batches = {
        norm: np.asarray(tensors.get(name, 0), np.int64)
        for name, norm in names.patchgan_batches(channels).items()
    }
    return layout.from_torch(tensors, entries, template) | {"batches": batches}


def patchgan_to_torch(variables: Mapping, channels=(64, 128, 256, 512)) -> dict[str, np.ndarray]:
    """The inverse of `patchgan_from_torch`; counts that `variables` lacks are written as 0."""
    batches = variables.get("batches", {})
    counts = {
        name: np.asarray(batches.get(norm, 0), np.int64)
        for name, norm in names.patchgan_batches(channels).items()
    }
    return layout.to_torch(variables, names.patchgan(channels)) | counts


def dino_heads_from_torch(tensors: Mapping[str, np.ndarray]) -> dict:
    """The dino discriminator's heads as `{"params": ..., "batch_stats": ...}`."""
    entries = names.dino_heads()
    _refuse_unknown(tensors, entries)
    width = vit.DINO["dino_vits16"].width
    template = shapes(discriminators.DinoHeads(), (names.DINO_HEADS, 1, 1, width))
    return layout.from_torch(tensors, entries, template)


def dino_heads_to_torch(variables: Mapping) -> dict[str, np.ndarray]:
    """The inverse of `dino_heads_from_torch`."""
    return layout.to_torch(variables, names.dino_heads())


def vit_shapes(config: vit.ViTConfig) -> dict:
    """Shapes of a teacher's parameters, with the position table of its file."""
    side = config.grid * config.patch_size
    return shapes(vit.ViT(config), (1, side, side, 3))["params"]


def dino_from_torch(tensors: Mapping[str, np.ndarray], config: vit.ViTConfig) -> dict:
    """A DINO or DINOv2 backbone's parameters, with the position table of the file.

    `mask_token`, which only DINOv2's own pre-training reads, is dropped.
    """
    entries = names.dino(config)
    _refuse_unknown(tensors, entries, "mask_token")
    return layout.from_torch(tensors, entries, vit_shapes(config))


def dino_to_torch(params: Mapping, config: vit.ViTConfig) -> dict[str, np.ndarray]:
    """The inverse of `dino_from_torch`, without a `mask_token`."""
    return layout.to_torch(params, names.dino(config))


def _tower(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """One of the two networks that a file of images' and texts' encoders holds."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def clip_from_torch(tensors: Mapping[str, np.ndarray], config: vit.ViTConfig) -> dict:
    """The parameters of the vision tower of an open_clip model.

    The text tower and the projection into the space it shares with images are dropped.
    """
    tensors, entries = _tower(tensors, "visual."), names.clip(config)
    _refuse_unknown(tensors, entries, "visual.proj")
    return layout.from_torch(tensors, entries, vit_shapes(config))


def clip_to_torch(params: Mapping, config: vit.ViTConfig) -> dict[str, np.ndarray]:
    """The inverse of `clip_from_torch`: the vision tower without its projection."""
    return layout.to_torch(params, names.clip(config))


def siglip_from_torch(tensors: Mapping[str, np.ndarray], config: vit.ViTConfig) -> dict:
    """The parameters of the vision tower of a SigLIP as `transformers` saves it.

    The text tower and the attention pooling (`head`) are dropped.
    """
    tensors, entries = _tower(tensors, "vision_model."), names.siglip(config)
    _refuse_unknown(tensors, entries, "vision_model.head.*", "vision_model.embeddings.position_ids")
    return layout.from_torch(tensors, entries, vit_shapes(config))


def siglip_to_torch(params: Mapping, config: vit.ViTConfig) -> dict[str, np.ndarray]:
    """The inverse of `siglip_from_torch`: the vision tower without its pooling."""
    return layout.to_torch(params, names.siglip(config))


def lpips_shapes() -> dict:
    """Shapes of LPIPS's parameters."""
    return shapes(lpips.LPIPS(), (1, 32, 32, 3), (1, 32, 32, 3))["params"]


def lpips_from_torch(tensors: Mapping[str, np.ndarray]) -> dict:
    """LPIPS's parameters from a whole module, or torchvision's VGG-16 plus the linear layers.

    Dropped: VGG-16's classifier, the constants of the input's scaling, and the second copy of the
    linear layers (`lins`) that the `lpips` package saves.
    """
    whole = any(name.startswith("net.") for name in tensors)
    entries = names.lpips_whole() if whole else names.vgg16() + names.lpips_linear()
    _refuse_unknown(tensors, entries, "classifier.*", "scaling_layer.*", "lins.*")
    return layout.from_torch(tensors, entries, lpips_shapes())


def lpips_to_torch(params: Mapping) -> dict[str, np.ndarray]:
    """The inverse of `lpips_from_torch`, under a whole module's names."""
    return layout.to_torch(params, names.lpips_whole())


def inception_from_torch(tensors: Mapping[str, np.ndarray]) -> dict:
    """Parameters of FID's Inception, from `pt_inception-2015-12-05`."""
    entries = names.inception_fid()
    _refuse_unknown(tensors, entries, "*.num_batches_tracked")
    size = inception.INPUT_SIZE
    template = shapes(inception.Inception(), (1, size, size, 3))["params"]
    return layout.from_torch(tensors, entries, template)


def inception_to_torch(params: Mapping) -> dict[str, np.ndarray]:
    """The inverse of `inception_from_torch`."""
    return layout.to_torch(params, names.inception_fid())
