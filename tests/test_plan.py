"""Plans: what is counted, what is compiled, and what is printed."""

import dataclasses
import importlib.util
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import cli, sharding
from gigatok_jax.errors import RunStopped, UserError
from gigatok_jax.models import splash
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.models.layers import dot_product_attention
from gigatok_jax.planning import chips, flops, hlo, ledger, plan, programs
from gigatok_jax.sharding import MeshConfig
from gigatok_jax.training import generator
from gigatok_jax.training.generator import GeneratorRun
from gigatok_jax.training.optimizer import OptimizerConfig

from jaxprs import equations
import train_config

GENERATOR = GeneratorRun(
    model=GeneratorConfig(
        depth=2, heads=2, width=64, codes=8, codebook_size=64, classes=10, dropout=0.0
    ),
    optimizer=OptimizerConfig(warmup_steps=2),
    steps=10,
    batch_size=8,
    dtype="float32",
    remat="full",
)
CPU = chips.Topology("cpu", chips.CHIPS["v5e"], 1, jax.devices()[:1])
ESTIMATED = dataclasses.replace(CPU, devices=None)
CONFIG = f"--config={train_config.__file__}"
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs the cuda extra"
)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the tpu extra"
)


def layers(x, weights, *, scanned):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    if scanned:
        return jax.lax.scan(layer, x, weights)[0]
    for w in weights:
        x, _ = layer(x, w)
    return x


SHAPES = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 32), (5, 32, 32))]
FORWARD = 5 * 2 * 4 * 32 * 32


def gradient(scanned):
    return jax.grad(lambda *x: layers(*x, scanned=scanned).sum(), argnums=(0, 1))


@pytest.mark.parametrize("scanned", [True, False])
def test_traced_flops_count_every_turn_of_a_scan(scanned):
    assert flops.count(jax.make_jaxpr(gradient(scanned))(*SHAPES).jaxpr) == 3 * FORWARD


def test_traced_flops_count_all_devices_and_blocks_of_splash_attention(monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    q = jax.ShapeDtypeStruct((8, 256, 2, 64), jnp.bfloat16)
    with sharding.use(sharding.make_mesh(sharding.MeshConfig())):
        jaxpr = jax.make_jaxpr(splash.attention)(q, q, q)
    assert flops.count(jaxpr) == 2 * 2 * 8 * 2 * 256 * 256 * 64


@pytest.mark.parametrize("scanned", [True, False])
def test_compiled_flops_count_every_turn_of_a_loop(scanned):
    text = jax.jit(gradient(scanned)).lower(*SHAPES).compile().as_text()
    assert (" while(" in text) == scanned
    assert hlo.Program(text).cost()[0] == 3 * FORWARD


SLICED = """
%sliced (stack: f32[12,8,8], turn: s32[]) -> f32[1,8,8] {
  %stack = f32[12,8,8] parameter(0)
  %turn = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,8,8] dynamic-slice(%stack, %turn, %zero, %zero), dynamic_slice_sizes={1,8,8}
}

%written (stack: f32[12,8,8], turn: s32[], layer: f32[1,8,8]) -> f32[12,8,8] {
  %stack.2 = f32[12,8,8] parameter(0)
  %turn.2 = s32[] parameter(1)
  %layer = f32[1,8,8] parameter(2)
  %nought = s32[] constant(0)
  ROOT %update = f32[12,8,8] dynamic-update-slice(%stack.2, %layer, %turn.2, %nought, %nought)
}

%outer (old: f32[12,8,8], at: s32[]) -> f32[12,8,8] {
  %old = f32[12,8,8] parameter(0)
  %at = s32[] parameter(1)
  %taken = f32[1,8,8] fusion(%old, %at), kind=kLoop, calls=%sliced
  ROOT %new = f32[12,8,8] fusion(%old, %at, %taken), kind=kLoop, calls=%written
}

ENTRY %main (all: f32[12,8,8], i: s32[]) -> f32[12,8,8] {
  %all = f32[12,8,8] parameter(0)
  %i = s32[] parameter(1)
  %fused = f32[12,8,8] fusion(%all, %i), kind=kLoop, calls=%outer
  %near = f32[1,8,8]{2,1,0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %far = f32[1,8,8] custom-call(), custom_call_target="AllocateBuffer"
  %first = f32[12,8,8] fusion(%fused, %i, %near), kind=kLoop, calls=%written
  ROOT %second = f32[12,8,8] fusion(%first, %i, %far), kind=kLoop, calls=%written
}
"""


def test_fusions_move_only_the_slices_that_they_read_and_update():
    layer, index = 8 * 8 * 4, 4
    nested = layer + index + layer
    written, from_main_memory = index + layer, layer + index + layer
    assert hlo.Program(SLICED).cost()[1] == nested + written + from_main_memory


# Calls as in a program for an H100, with their descriptions cut to what is read.
CALLS = """
ENTRY %main (x: bf16[16,8], w: bf16[8,32], i: bf16[2,9,9,4], k: bf16[6,3,3,4]) -> bf16[16,32] {
  %x = bf16[16,8]{1,0} parameter(0)
  %w = bf16[8,32]{1,0} parameter(1)
  %i = bf16[2,9,9,4]{3,2,1,0} parameter(2)
  %k = bf16[6,3,3,4]{3,2,1,0} parameter(3)
  %conv = (bf16[2,7,7,6]{3,2,1,0}, u8[99]{0}) custom-call(%i, %k), WINDOW, \
custom_call_target="__cudnn$convForward", metadata={op_name="jit(step)/jvp(Net)/conv/convolve"}
  %o = bf16[2,7,7,6]{3,2,1,0} get-tuple-element(%conv), index=0
  %gradient = (bf16[2,9,9,4]{3,2,1,0}, u8[0]{0}) custom-call(%o, %k), WINDOW, \
custom_call_target="__cudnn$convBackwardInput", \
metadata={op_name="jit(step)/transpose(jvp(Net))/conv/convolve"}
  %q = bf16[2,5,3,64]{3,2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %attended = (bf16[2,3,5,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", \
metadata={op_name="jit(step)/transpose(jvp(Net))/checkpoint/rematted_computation/attention/fwd"}, \
backend_config={"intermediate_tensor_shape": {"dimensions": ["2", "3", "5", "5"]}, \
"mask_type": "CAUSAL"}
  %product = (bf16[16,32]{1,0}, s8[4194304]{0}) custom-call(%x, %w), \
custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/jvp(Net)/dense/dot"}, \
backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}
  ROOT %result = bf16[16,32]{1,0} get-tuple-element(%product), index=0
}
""".replace("WINDOW", "window={size=3x3}, dim_labels=b01f_o01i->b01f")


def test_libraries_calls_count_and_their_scratch_does_not():
    conv, gradient, attention, product = hlo.Program(CALLS).kernels()
    assert product.flops == 2 * 16 * 32 * 8
    assert product.moved == 2 * (16 * 8 + 8 * 32 + 16 * 32)
    assert conv.flops == gradient.flops == 2 * (2 * 7 * 7 * 6) * (3 * 3 * 4)
    assert conv.moved == gradient.moved == 2 * (2 * 9 * 9 * 4 + 6 * 3 * 3 * 4 + 2 * 7 * 7 * 6)
    assert attention.flops == 0.5 * 2 * 2 * (2 * 3 * 5 * 5 * 64)
    places = [ledger.place(each.source) for each in (conv, gradient, attention)]
    assert places == [
        "forward: Net/conv/convolve",
        "backward: Net/conv/convolve",
        "recomputed: Net/attention/fwd",
    ]


def test_ledger_has_the_largest_places_and_the_rest():
    chip = dataclasses.replace(chips.CHIPS["h100"], flops=1e6, bandwidth=1e6)
    kernels = [
        hlo.Kernel(f"jit(f)/{name}/add", "f32[1]", 2, 0, size)
        for name, size in (("a", 5e5), ("b", 1e5), ("a", 0), ("c", 2e5))
    ]
    first, rest, total = ledger.table(kernels, chip, 1).splitlines()[1:4]
    assert first.split()[4:] == ["a/add"] and rest.split()[4:] == ["2", "other", "places"]
    assert total.split()[2:] == ["8", f"{8e5 / 0.845e6 * 1e3:.2f}", "all"]


def test_traced_flops_leave_out_dead_code():
    def function(x, w):
        _, unused = jax.lax.scan(lambda c, w: (c, x @ w), 0, w)
        del unused
        return x @ w[0]

    assert flops.count(jax.make_jaxpr(function)(*SHAPES).jaxpr) == FORWARD / 5


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_flops_equal_those_of_xla(stride):
    def convolve(x, kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), ((0, 1), (1, 0)), dimension_numbers=dimensions
        )

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 9, 9, 4), (3, 3, 4, 8))]
    lowered = jax.jit(convolve).lower(*shapes)
    expected = lowered.cost_analysis()["flops"]
    assert flops.count(jax.make_jaxpr(convolve)(*shapes).jaxpr) == expected
    assert hlo.Program(lowered.compile().as_text()).cost()[0] == expected


def test_traced_and_compiled_flops_of_a_training_step_agree():
    made = plan.make(GENERATOR, CPU)
    assert made.compiled_flops == pytest.approx(made.traced_flops, rel=0.02)
    assert made.traced_flops > 1.2 * made.model_flops
    assert made.fits


def test_parameters_are_divided_over_fsdp():
    mesh = MeshConfig(data=1, fsdp=-1)
    whole = programs.training(GENERATOR, sharding.abstract_mesh(MeshConfig(), 1))
    shared = programs.training(GENERATOR, sharding.abstract_mesh(mesh, 8))
    sizes = [program.memory["parameters"] for program in (whole, shared)]
    assert sizes[1] < sizes[0] / 4


def test_weights_are_gathered_and_activations_divided_by_batch():
    mesh = sharding.abstract_mesh(MeshConfig(data=1, fsdp=-1), 8)
    jaxpr = programs.training(GENERATOR, mesh).trace().jaxpr
    specs = {
        (equation.invars[0].aval.ndim, tuple(equation.params["sharding"].spec))
        for equation in equations(jaxpr)
        if equation.primitive.name == "sharding_constraint"
    }
    assert (3, (("data", "fsdp"), None, None)) in specs  # [B, T, W]
    assert (2, (None, "tensor")) in specs  # a kernel [W, hidden]
    assert not any("fsdp" in spec for _, spec in specs)


def test_shard_frozen_divides_the_frozen_networks():
    run = train_config.get_config()
    objective = dataclasses.replace(run.objective, perceptual=1.0)
    run = dataclasses.replace(run, objective=objective)
    sizes = []
    for shard in (False, True):
        mesh = MeshConfig(data=1, fsdp=-1, shard_frozen=shard)
        changed = dataclasses.replace(run, mesh=mesh)
        program = programs.training(changed, sharding.abstract_mesh(mesh, 8))
        sizes.append(program.memory["frozen networks"])
    assert sizes[1] < sizes[0] / 7


def test_traced_and_compiled_flops_of_sampling_agree():
    made = plan.make(dataclasses.replace(GENERATOR, batch_size=2), CPU, "sample")
    assert made.compiled_flops == pytest.approx(made.traced_flops, rel=0.05)


UNKNOWN = ["v9:2x2", "v5e", "v5e:4", "v5e:2x2x2", "v4:2x2", "h100:0", "h100:2x2x2", "h100:x8"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_topologies_are_rejected(name):
    with pytest.raises(UserError, match="--topology: expected"):
        chips.topology(name)


def test_gpus_in_several_hosts():
    assert chips.topology("h100:4x8").count == 32


@needs_cuda
@pytest.mark.parametrize("name", ["h100:1", "b200:1", "a100:2", "h200:2x2"])
def test_a_generator_compiled_for_gpus_has_cudnns_attention(name):
    model = dataclasses.replace(GENERATOR.model, width=128)
    run = dataclasses.replace(GENERATOR, model=model, dtype="bfloat16", remat="dots")
    made = plan.make(run, chips.topology(name))
    # Several devices share the batch by custom partitioning.
    names = ("dot_product_attention_fwd", "custom_partitioning")
    forward = [
        kernel
        for kernel in made.kernels
        if kernel.source.endswith(names) and not ledger.place(kernel.source).startswith("backward")
    ]
    # Each layer runs it forward once: "dots" keeps its results.
    assert sum(kernel.runs for kernel in forward) == run.model.depth
    assert made.compile_seconds and made.fits
    assert made.compiled_flops * made.topology.count == pytest.approx(made.traced_flops, rel=0.1)


def test_ledger_without_a_compiler_is_rejected(capsys):
    with mock.patch.object(importlib.util, "find_spec", return_value=None):
        assert cli.main(["plan", CONFIG, "--topology=h100:1", "--ledger=3"]) == 2
    assert "--ledger: expected the compiler of these devices" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["cpu", "gpu", "tpu"])
def test_implementations_follow_the_devices_of_the_mesh(target):
    device = mock.Mock(platform=target, compute_capability="9.0", spec=jax.Device)
    mesh = mock.Mock(spec=jax.sharding.Mesh)
    mesh.devices, mesh.shape = np.array([device]), {"data": 1, "fsdp": 1, "tensor": 1}
    q = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    with sharding.use(mesh), mock.patch("jax.nn.dot_product_attention") as attention:
        assert sharding.platform() == target
        dot_product_attention(q, q, q)
    expected = "cudnn" if target == "gpu" else "xla"
    assert attention.call_args.kwargs["implementation"] == expected
    blocks = jnp.zeros((1, 256, 2, 64), jnp.bfloat16)
    with (
        sharding.use(mesh),
        mock.patch.object(splash, "attention") as attention,
        mock.patch("jax.nn.dot_product_attention"),
    ):
        dot_product_attention(blocks, blocks, blocks)
    assert attention.called == (target == "tpu")
    with sharding.use(sharding.abstract_mesh(MeshConfig(), 1)):
        assert sharding.platform() == ""
    assert sharding.platform() == jax.default_backend()


def test_command_prints_what_fits(capsys):
    assert cli.main(["plan", CONFIG, "--config.remat=none", "--topology=h100:2"]) == 0
    out = capsys.readouterr().out
    assert "estimated from shapes" in out and "to spare" in out and "days" in out


def test_a_run_that_does_not_fit_stops_with_settings_that_do(capsys, monkeypatch):
    run = dataclasses.replace(GENERATOR, remat="none", batch_size=64)
    topology = chips.topology("h100:2")
    all_kept, recomputed = (
        sum(plan.estimated_memory(dataclasses.replace(run, remat=remat), topology).values())
        for remat in ("none", "dots")
    )
    memory = (all_kept + recomputed / (1 - plan.SPARE)) / 2
    small = dataclasses.replace(topology.chip, memory=memory)
    monkeypatch.setitem(chips.CHIPS, "h100", small)
    with pytest.raises(RunStopped, match="h100:2: the run does not fit in a device's memory"):
        plan.plan(run, "h100:2")
    out = capsys.readouterr().out
    assert "does NOT fit" in out
    assert "--config.remat=dots --config.mesh.data=-1 --config.mesh.fsdp=1: " in out


def test_batches_are_divided_into_parts_only_if_they_do_not_fit_whole():
    model = dataclasses.replace(GENERATOR.model, codes=1024)
    run = dataclasses.replace(GENERATOR, model=model, dtype="bfloat16", batch_size=64)
    whole, halved = (
        sum(plan.estimated_memory(dataclasses.replace(run, accumulate=parts), ESTIMATED).values())
        for parts in (1, 2)
    )
    memory = (whole + halved) / 2 / (1 - plan.SPARE)
    chip = dataclasses.replace(ESTIMATED.chip, memory=memory)
    found = plan.alternatives(run, dataclasses.replace(ESTIMATED, chip=chip))
    assert found and all(way.accumulate == 2 for way, _ in found)


def test_estimate_counts_a_chunk_of_logits():
    def temporaries(limit):
        with mock.patch.object(generator, "CHUNK_ELEMENTS", limit):
            plan._activations.cache_clear()
            return plan.estimated_memory(run, ESTIMATED)[plan.TEMPORARIES["train"]]

    model = dataclasses.replace(GENERATOR.model, codebook_size=2**14)
    run = dataclasses.replace(GENERATOR, model=model, batch_size=64, dtype="bfloat16")
    logits = 64 * 8 * 2**14
    whole, half, quarter = (temporaries(logits // parts) for parts in (1, 2, 4))
    assert whole > 2 * 2 * logits  # and their gradient, at two bytes each
    assert half - quarter >= 2 * 2 * logits / 4
    assert quarter < whole / 2
    plan._activations.cache_clear()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=h100:3"], "config.batch_size: expected a multiple of 3"),
        (["--topology=h100:2", "--job=sample"], "--job: sample needs a generator's config"),
    ],
)
def test_command_rejects_runs_that_cannot_be_planned(flags, message, capsys):
    assert cli.main(["plan", CONFIG, *flags]) == 2
    assert message in capsys.readouterr().err


@needs_libtpu
def test_a_tpu_program_divides_parameters_and_repeats_no_work():
    run = dataclasses.replace(
        GENERATOR, dtype="bfloat16", mesh=MeshConfig(data=1, fsdp=-1), batch_size=16
    )
    made = plan.make(run, chips.topology("v5e:2x2"))
    assert 4 * made.compiled_flops == pytest.approx(made.traced_flops, rel=0.15)
