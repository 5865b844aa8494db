"""Initial kernels: the reference's spread, or one that keeps a narrow network's signal alive."""

import functools

import jax
import numpy as np

from gigatok_jax.models import tokenizer

import tiny


def _spreads(init):
    config = tiny.config(init=init)
    init_params = functools.partial(tokenizer.init_params, tokenizer.Tokenizer(config))
    # It runs once: optimizing would take most of the time.
    options = {"xla_backend_optimization_level": 0}
    params = jax.jit(init_params, compiler_options=options)(jax.random.key(0))
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    spreads = {}
    for path, value in leaves:
        names = [entry.key for entry in path if hasattr(entry, "key")]
        if names[-1] == "kernel" and value.size > 500:
            spreads["/".join(names)] = (np.std(value), value.shape, "layers" in names)
    return spreads


def test_fan_in_init_has_unit_gain_where_the_reference_has_its_own_spread():
    reference, fan_in = _spreads("reference"), _spreads("fan_in")
    checked = 0
    for name, (spread, shape, stacked) in fan_in.items():
        packed = "_attention/" in name and "/out/" not in name
        if packed or "quant_conv" in name:
            assert spread == reference[name][0], name
            continue
        inputs = np.prod(shape[1:-1] if stacked else shape[:-1])
        np.testing.assert_allclose(spread, inputs**-0.5, rtol=0.15, err_msg=name)
        np.testing.assert_allclose(reference[name][0], 0.02, rtol=0.15, err_msg=name)
        checked += 1
    assert checked > 3
