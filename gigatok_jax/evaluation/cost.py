"""Cost of encoding and decoding, also relative to sampling (paper, Table 4)."""

from collections.abc import Callable, Sequence
import logging
import statistics
import time
from typing import Any

import jax
import numpy as np

from gigatok_jax import api, distributed, recipes
from gigatok_jax.data import pipeline
from gigatok_jax.evaluation import protocol
from gigatok_jax.models import generator, quantizer, tokenizer
from gigatok_jax.sampling import SamplingConfig

logger = logging.getLogger(__name__)

REPEATS = 3
ENCODER = ("encoder", "cnn_encoder", "quant_conv")  # parameters that decoding does not need


def shares(
    decoders: Sequence[str], generators: Sequence[str], *, batch_size: int, guidance: float
) -> dict[str, dict[str, float]]:
    """Measures the share of generation time that decoding takes on this machine.

    Weights are random, which does not affect the time.

    Args:
      decoders: names of tokenizers.
      generators: names of generators.
      batch_size: images per batch.
      guidance: scale; above 1, the generator computes each image twice.

    Returns:
      Shares in [0, 1], by decoder, then by generator.

    Raises:
      UserError: a name is unknown.
      ValueError: the guidance is below 1.
    """
    SamplingConfig(guidance=guidance)  # fails before anything is timed
    tokenizer_configs = {name: recipes.tokenizer_model(name) for name in decoders}
    generator_configs = {name: recipes.generator_model(name) for name in generators}
    decoding, sampling = {}, {}
    for name, config in tokenizer_configs.items():
        logger.info("timing the decoder of %s", name)
        shapes = tokenizer.param_shapes(config)
        params = _random({part: shapes[part] for part in shapes if not part.startswith(ENCODER)})
        weights = {"params": params, "history": np.array(quantizer.empty_history())}
        codes = np.zeros((batch_size, config.latents), np.int32)
        decoding[name] = _seconds(api.PretrainedTokenizer(config, weights).decode, codes)
    classes, key = np.zeros(batch_size, np.int32), jax.random.key(0)
    for name, config in generator_configs.items():
        logger.info("timing generator %s", name)
        weights = {"params": _random(generator.param_shapes(config))}
        sample = api.PretrainedGenerator(config, weights).sample
        sampling[name] = _seconds(sample, classes, key, guidance=guidance)
    return {
        decoder: {name: own / (own + seconds) for name, seconds in sampling.items()}
        for decoder, own in decoding.items()
    }


def codec(tokenizer: api.AnyTokenizer, batch_size: int) -> dict[str, Any]:
    """Measures how long encoding and decoding take on this machine.

    Each is the median of `REPEATS` calls after one that compiles, with the transfer of the input.
    Images are noise, which does not affect the time.

    Args:
      tokenizer: of any family.
      batch_size: images per batch, over all processes; each process times its own part.

    Returns:
      "encode_ms" and "decode_ms", milliseconds per image; and "protocol", see `protocol.stamp`,
      with the size of the batch and the hardware.
    """
    batch_size = max(batch_size // distributed.place()[1], 1)
    shape = (batch_size, *[tokenizer.config.image_size] * 2, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    codes = np.asarray(tokenizer.encode(images))
    per_image = 1_000 / batch_size
    return {
        "encode_ms": per_image * _seconds(tokenizer.encode, images),
        "decode_ms": per_image * _seconds(tokenizer.decode, codes),
        "protocol": protocol.stamp("time", batch_size=batch_size, hardware=_hardware()),
    }


def _hardware() -> str:
    """What this process computes on, such as "4 x TPU v4" or "1 CPU core"."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        cores = pipeline.cores()
        return f"{cores} CPU core{'s' * (cores > 1)}"
    kind = devices[0].device_kind
    return kind if len(devices) == 1 else f"{len(devices)} x {kind}"


def _random(shapes: Any) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.02 * rng.standard_normal(x.shape, np.float32), shapes)


def _seconds(function: Callable[..., jax.Array], *args: Any, **kwargs: Any) -> float:
    """Median time of a call after the first one, which compiles."""
    jax.block_until_ready(function(*args, **kwargs))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(*args, **kwargs))
        times.append(time.perf_counter() - start)
    return statistics.median(times)
