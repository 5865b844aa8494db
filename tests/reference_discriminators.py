"""The reference's discriminators as our variables, which only tests need."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax.models import discriminators, vit
from gigatok_jax.weights import layout, names
from gigatok_jax.weights.layout import Entry


def patchgan(tensors: Mapping[str, np.ndarray]) -> dict:
    """The PatchGAN's `{"params": ..., "batch_stats": ...}`."""
    module = discriminators.PatchGAN()
    last = len(module.channels)
    entries = [*names._pair("main.0", "params/conv0", names.CONV)]
    for i in range(1, last):
        norm, stats = f"main.{3 * i}", f"batch_stats/norm{i}"
        entries += [
            Entry(f"main.{3 * i - 1}.weight", (f"params/conv{i}/kernel",), names.CONV),
            *names._norm(norm, f"params/norm{i}"),
            Entry(f"{norm}.running_mean", (f"{stats}/mean",)),
            Entry(f"{norm}.running_var", (f"{stats}/var",)),
        ]
    entries += names._pair(f"main.{3 * last - 1}", "params/conv_out", names.CONV)
    return _convert(tensors, entries, module, (1, 256, 256, 3))


def dino_heads(tensors: Mapping[str, np.ndarray]) -> dict:
    """The heads on a frozen DINO; `batch_stats` has their kernels' singular vectors."""
    config = vit.DINO["dino_vits16"]
    entries = []
    for name, path, window in (("0.0", "in", 1), ("1.fn.0", "mix", 9), ("2", "out", 1)):
        conv = f"heads.{{layer}}.{name}"
        params, vectors = f"params/head/conv_{path}", f"batch_stats/head/conv_{path}"
        entries += [
            Entry(f"{conv}.weight_orig", (f"{params}/kernel",), "o i k -> k i o"),
            Entry(f"{conv}.bias", (f"{params}/bias",)),
            Entry(f"{conv}.weight_u", (f"{vectors}/u",)),
            Entry(f"{conv}.weight_v", (f"{vectors}/v",), "(i k) -> k i", (("k", window),)),
        ]
    entries += names._norm("heads.{layer}.0.1", "params/head/norm_in")
    entries += names._norm("heads.{layer}.1.fn.1", "params/head/norm_mix")
    count = len(vit.quarters(config))
    entries = list(names._layers(count, entries))
    return _convert(tensors, entries, discriminators.DinoHeads(), (count, 1, 1, config.width))


def _convert(tensors, entries: list[Entry], module: nn.Module, shape: tuple[int, ...]) -> dict:
    expected = {entry.name for entry in entries}
    assert expected == {name for name in tensors if not name.endswith("num_batches_tracked")}
    inputs = jax.ShapeDtypeStruct(shape, jnp.float32)
    template = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), inputs))
    return layout.from_torch(tensors, entries, template)
