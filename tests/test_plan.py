"""Plans: what is counted, what is compiled, and what is printed."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from gigatok_jax import cli, sharding
from gigatok_jax.errors import RunStopped, UserError
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.planning import chips, flops, hlo, plan, programs
from gigatok_jax.sharding import MeshConfig
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


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:4", "v5e:2x2x2", "v4:2x2", "h100:0"])
def test_unknown_topologies_are_rejected(name):
    with pytest.raises(UserError, match="--topology: expected"):
        chips.topology(name)


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
