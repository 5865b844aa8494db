"""Reference checkpoints to our variables and back, one function a kind and direction."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import flax.linen as nn

from gigatok_jax.models import discriminators, lpips, quantizer, vit
from gigatok_jax.models.tokenizer import Tokenizer, TokenizerConfig
from gigatok_jax.weights import names

USAGE_NAME = "quantize.codebook_used"


def shapes(module: nn.Module, *inputs) -> dict:
    """The module's variables as unboxed shapes; nothing is allocated."""
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs]
    return nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))


def tokenizer_shapes(config: TokenizerConfig) -> dict:
    """Shapes of a tokenizer's parameters."""
    return shapes(Tokenizer(config), (1, config.image_size, config.image_size, 3))["params"]


def _refuse_unknown(tensors: Mapping, entries, ignored: tuple[str, ...] = ()) -> None:
    known = {entry.name for entry in entries}
    unknown = [n for n in tensors if n not in known and not n.endswith(ignored or ("\0",))]
    if unknown:
        raise ValueError(
            f"tensor {unknown[0]!r} has no place in this architecture "
            f"({len(unknown)} such tensors)"
        )


def tokenizer_from_torch(tensors: Mapping[str, np.ndarray], config: TokenizerConfig) -> dict:
    """A reference tokenizer's tensors as `{"params": ..., "history": [65536] int32}`.

    Raises:
      ValueError: a tensor is missing, superfluous, or of another shape than `config` says.
    """
    entries = names.tokenizer(config)
    _refuse_unknown(tensors, entries, (USAGE_NAME,))
    params = names.from_torch(tensors, entries, tokenizer_shapes(config))
    history = np.asarray(quantizer.empty_history())
    if USAGE_NAME in tensors:
        history = np.asarray(tensors[USAGE_NAME]).astype(np.int32)
    return {"params": params, "history": history}


def tokenizer_to_torch(variables: Mapping, config: TokenizerConfig) -> dict[str, np.ndarray]:
    """The inverse of `tokenizer_from_torch`; assignments not yet made are written as code 0."""
    tensors = names.to_torch(variables["params"], names.tokenizer(config))
    tensors[USAGE_NAME] = np.maximum(np.asarray(variables["history"]), 0).astype(np.float32)
    return tensors


def patchgan_from_torch(tensors: Mapping[str, np.ndarray]) -> dict:
    """The PatchGAN discriminator's `{"params": ..., "batch_stats": ...}`."""
    entries = names.patchgan()
    _refuse_unknown(tensors, entries, ("num_batches_tracked",))
    template = shapes(discriminators.PatchGAN(), (1, 256, 256, 3))
    return names.from_torch(tensors, entries, template)


def dinov2_from_torch(tensors: Mapping[str, np.ndarray], config: vit.ViTConfig) -> dict:
    """A DINOv2 backbone's parameters, with the position table of the file."""
    entries = names.dinov2(config)
    _refuse_unknown(tensors, entries, ("mask_token",))
    side = config.grid * config.patch_size
    return names.from_torch(tensors, entries, shapes(vit.ViT(config), (1, side, side, 3))["params"])


def dinov2_to_torch(params: Mapping, config: vit.ViTConfig) -> dict[str, np.ndarray]:
    return names.to_torch(params, names.dinov2(config))


def lpips_from_torch(tensors: Mapping[str, np.ndarray]) -> dict:
    """LPIPS's parameters from a whole module, or torchvision's VGG-16 plus the linear layers."""
    whole = any(name.startswith("net.") for name in tensors)
    entries = names.lpips_whole() if whole else names.vgg16() + names.lpips_linear()
    template = shapes(lpips.LPIPS(), (1, 32, 32, 3), (1, 32, 32, 3))["params"]
    return names.from_torch(tensors, entries, template)


def lpips_to_torch(params: Mapping) -> dict[str, np.ndarray]:
    return names.to_torch(params, names.lpips_whole())
