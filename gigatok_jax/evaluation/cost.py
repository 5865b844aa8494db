"""What decoding the codes costs beside drawing them (Table 4)."""

from collections.abc import Callable, Sequence
import logging
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax import api, recipes
from gigatok_jax.models import quantizer
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.weights import convert

logger = logging.getLogger(__name__)

REPEATS = 3
ENCODER = ("encoder", "cnn_encoder", "quant_conv")  # parts of a tokenizer that do not decode


def shares(
    decoders: Sequence[str], generators: Sequence[str], *, batch_size: int, guidance: float
) -> dict[str, dict[str, float]]:
    """Share of the time of making images that the tokenizer's decoder takes, on this machine.

    Weights are random: they do not change the time.

    Args:
      decoders: names of tokenizers, whose decoders are timed.
      generators: names of generators.
      batch_size: images at once.
      guidance: scale; from above 1, the generator sees each image twice.

    Returns:
      Decoder to generator to share in [0, 1].

    Raises:
      UserError: a name is unknown.
      ValueError: the guidance is impossible.
    """
    SamplingConfig(guidance=guidance)  # refuses what is impossible before anything is timed
    configs = {name: recipes.tokenizer_model(name) for name in decoders}
    models = {name: recipes.generator_model(name) for name in generators}
    decoding, drawing = {}, {}
    for name, config in configs.items():
        logger.info("timing the decoder of %s", name)
        weights = {
            "params": _random(
                {
                    part: shapes
                    for part, shapes in convert.tokenizer_shapes(config).items()
                    if not part.startswith(ENCODER)
                }
            ),
            "history": np.array(quantizer.empty_history()),
        }
        tokenizer = api.PretrainedTokenizer(config, weights)
        codes = np.zeros((batch_size, config.latents), np.int32)
        decoding[name] = _seconds(lambda t=tokenizer, c=codes: t.decode(c))
    for name, config in models.items():
        logger.info("timing generator %s", name)
        weights = {"params": _random(convert.generator_shapes(config))}
        generator = api.PretrainedGenerator(config, weights)
        classes, key = np.zeros(batch_size, np.int32), jax.random.key(0)
        drawing[name] = _seconds(
            lambda g=generator, c=classes, k=key: g.sample(c, k, guidance=guidance)
        )
    return {
        decoder: {
            generator: decoding[decoder] / (decoding[decoder] + drawing[generator])
            for generator in generators
        }
        for decoder in decoders
    }


def _random(shapes: Any) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, dtype=np.float32)), shapes
    )


def _seconds(run: Callable[[], jax.Array]) -> float:
    """Median time of a call, the first one's compilation apart."""
    jax.block_until_ready(run())
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)
