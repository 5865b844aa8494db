"""Initial kernels: the reference's spread, or one that keeps a narrow network's signal alive."""

import types

import flax.linen as nn
import jax
import numpy as np

from gigatok_jax.models import tokenizer

import tiny


def spreads(params) -> dict:
    """Path of each large kernel to its deviation, its shape, and whether it is stacked."""
    found = {}
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        names = [entry.key for entry in path]
        if names[-1] == "kernel" and value.size > 500:
            found["/".join(names)] = (np.std(value), value.shape, "layers" in names)
    return found


def test_fan_in_gives_unit_gain_except_where_the_reference_has_its_own_spread():
    init = tokenizer.Tokenizer(tiny.config()).init
    # It runs once: optimizing would take most of the time.
    init = jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})
    params = nn.meta.unbox(init(jax.random.key(0), tiny.images(1))["params"])
    made = types.SimpleNamespace(
        config=tiny.config(init="fan_in"), init=lambda *args: {"params": params}
    )
    reference = spreads(params)
    checked = 0
    for name, (spread, shape, stacked) in spreads(tokenizer.init_params(made, None)).items():
        packed = "_attention/" in name and "/out/" not in name
        if packed or "quant_conv" in name:
            assert spread == reference[name][0], name
            continue
        inputs = np.prod(shape[1:-1] if stacked else shape[:-1])
        np.testing.assert_allclose(spread, inputs**-0.5, rtol=0.15, err_msg=name)
        np.testing.assert_allclose(reference[name][0], 0.02, rtol=0.15, err_msg=name)
        checked += 1
    assert checked > 3
