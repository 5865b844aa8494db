"""The benchmarks: each case prepares one call of the program, and states its least cost."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax import config as configs
from gigatok_jax import frozen_networks, recipes, sampling, sharding
from gigatok_jax.errors import UserError
from gigatok_jax.models import generator, inception, layers, quantizer, tokenizer
from gigatok_jax.models.layers import compute_dtype
from gigatok_jax.models.tokenizer import Tokenizer
from gigatok_jax.pictures import to_float
from gigatok_jax.planning import flops, programs
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.sharding import MeshConfig
from gigatok_jax.training import loop
from gigatok_jax.training.generator import validation_loss
from gigatok_jax.training.task import RunConfig

remat = ""  # policy for training steps; "": the config's


@dataclasses.dataclass
class Rival:
    """Input of the same computation in `benchmarks.yardstick`.

    Attributes:
      task: a key of its TASKS.
      trees: parameters, by name.
      arrays: inputs, by name.
      config: settings, by name.
      expected: computes our result for its check; called before the case.
      agrees: compares our result with its result.
    """

    task: str
    trees: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    config: Mapping[str, Any]
    expected: Callable[[], Any]
    agrees: Callable[[np.ndarray, np.ndarray], bool]


@dataclasses.dataclass
class Case:
    """One benchmark.

    Attributes:
      call: runs it once; the timer waits for the result.
      images: number of images per call.
      flops: FLOPs of products and convolutions per call.
      bytes: least memory traffic per call, such as parameters read and state written.
      compile_seconds: time to compile it, or None.
      memory: bytes of the compiled program's arguments, results and temporaries, or None.
      limit, limited_by: another lower bound on the time, in seconds, and its name.
      rival: the same computation in PyTorch, or a plain function to compare with, or None.
      seconds: runs and times one call, in place of `call`.
      repeats: most calls to time; 0: as many as requested.
      close: frees its resources.
    """

    call: Callable[[], Any] | None
    images: int
    flops: float = 0.0
    bytes: float = 0.0
    compile_seconds: float | None = None
    memory: int | None = None
    limit: float = 0.0
    limited_by: str = ""
    rival: Rival | Callable[[], Any] | None = None
    seconds: Callable[[], float] | None = None
    repeats: int = 0
    close: Callable[[], None] = lambda: None


def fill(shapes: Any, seed: int = 0) -> Any:
    """Random parameters, scaled like trained ones, so that errors show in the outputs."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = rng.random(leaf.shape, dtype=np.float32)  # normal numbers take minutes for large models
        x -= 0.5
        x *= 12**0.5
        name = path[-1].key
        if name == "scale":
            return 1 + 0.1 * x
        if name.startswith("lin"):  # LPIPS's weights
            return np.abs(x)
        x *= 0.1 if name == "bias" else float(np.prod(leaf.shape[:-1])) ** -0.5
        return x

    return jax.tree.map_with_path(draw, shapes)


def tree_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _compile(function: Callable, *arguments, **static) -> tuple[Callable, dict[str, Any]]:
    """The compiled function, and its costs as fields of `Case`."""
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    traced = jitted.trace(*arguments, **static)
    lowered = traced.lower()
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    total = memory and (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return compiled, {
        "flops": flops.count(traced.jaxpr.jaxpr),
        "compile_seconds": seconds,
        "memory": total or None,
    }


def _images(batch: int, size: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (batch, size, size, 3), np.uint8)


def _tokenizer(name: str, batch: int):
    config = recipes.tokenizer_model(name)
    params = jax.device_put(fill(tokenizer.param_shapes(config)))
    return config, params, Tokenizer(config, dtype=compute_dtype("auto"))


def encode(model: str, batch: int) -> Case:
    config, params, module = _tokenizer(model, batch)
    images = jax.device_put(_images(batch, config.image_size))

    def run(params, images):
        return module.apply({"params": params}, to_float(images), method=Tokenizer.encode)

    compiled, costs = _compile(run, params, images)
    rival = Rival(
        "encode",
        {"params": params},
        {"image": images},
        dataclasses.asdict(config),
        lambda: compiled(params, images),
        lambda one, other: np.mean(one == other) > (0.98 if _tolerance() < 1e-2 else 0.5),
    )
    size = (
        tree_bytes(params["cnn_encoder"])
        + tree_bytes(params["encoder"])
        + tree_bytes(params["codebook"])
    )
    return Case(lambda: compiled(params, images), batch, bytes=size, rival=rival, **costs)


def decode(model: str, batch: int) -> Case:
    config, params, module = _tokenizer(model, batch)
    codes = np.random.default_rng(1).integers(0, config.codebook_size, (batch, config.latents))
    codes = jax.device_put(codes.astype(np.int32))

    def run(params, codes):
        return module.apply({"params": params}, codes, method=Tokenizer.decode)

    compiled, costs = _compile(run, params, codes)

    def agrees(one, other):
        return np.abs(one - other.transpose(0, 2, 3, 1)).max() < _tolerance() * np.abs(one).max()

    rival = Rival(
        "decode",
        {"params": params},
        {"codes": codes},
        dataclasses.asdict(config),
        lambda: compiled(params, codes),
        agrees,
    )
    size = tree_bytes(params["cnn_decoder"]) + tree_bytes(params["decoder"])
    return Case(lambda: compiled(params, codes), batch, bytes=size, rival=rival, **costs)


def _tolerance() -> float:
    """Relative error of results that rounding may cause."""
    return 1e-3 if compute_dtype("auto") == jnp.float32 else 5e-2


def tokenizer_step(model: str, batch: int, *, adversarial: bool = False) -> Case:
    """The step before or after `disc_start`, with the config's losses, teacher and LPIPS."""
    run = dataclasses.replace(configs.load(f"tokenizer:{model}"), **_fields(batch))
    step = _Step(run)
    images = _images(batch, run.model.image_size)
    case = step.case({"image": images}, run.total_steps - 1 if adversarial else 0)
    trees = step.trees | {
        "teacher": step.frozen.teacher,
        "lpips": step.frozen.lpips,
    }
    config = dataclasses.asdict(run.model) | {
        "adversarial": adversarial,
        "channels": run.objective.discriminator_channels,
        "entropy": run.objective.entropy,
        "teacher_heads": frozen_networks.architecture(run.objective.teacher).heads,
    }

    def expected():
        return case.call()["total"]  # of the first step, before its update

    case.rival = Rival("tokenizer_step", trees, {"image": images}, config, expected, _near)
    return case


def generator_step(model: str, batch: int) -> Case:
    run = dataclasses.replace(configs.load(f"generator:{model}"), **_fields(batch))
    run = run.for_classes(1_000)  # of ImageNet
    step = _Step(run)
    rng = np.random.default_rng(1)
    codes = rng.integers(0, run.model.codebook_size, (batch, run.model.codes), np.int32)
    arrays = {"codes": codes, "label": rng.integers(0, run.model.classes, batch, np.int32)}
    case = step.case(arrays, 0)
    config = dataclasses.asdict(run.model) | {"class_dropout": run.class_dropout}

    def expected():  # without dropout
        loss = functools.partial(validation_loss, run.model, dtype=step.task.dtype)
        return jax.jit(loss)(step.state.params, codes, arrays["label"]).mean()

    case.rival = Rival("generator_step", step.trees, arrays, config, expected, _near)
    return case


def _fields(batch: int) -> dict[str, Any]:
    """Fields of a config that a benchmark overrides."""
    fields = {
        "batch_size": batch,
        "mesh": MeshConfig(),
        "dtype": jnp.dtype(compute_dtype("auto")).name,
    }
    return fields | ({"remat": remat} if remat else {})


def _near(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(abs(one - other) < _tolerance() * max(abs(one), 1))


class _Step:
    """The training step that `train` runs, with random weights."""

    def __init__(self, run: RunConfig):
        self.mesh = sharding.make_mesh(run.mesh)
        self.task, frozen = programs.abstract_task(run)
        self.frozen = jax.tree.map(np.asarray, fill(frozen))
        abstract = loop.abstract_state(self.task, self.mesh)
        self.trees = {"params": fill(abstract.params)}
        state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
        state = state.replace(params=self.trees["params"])
        if hasattr(state, "discriminator"):
            self.trees["discriminator"] = fill(abstract.discriminator["params"])
            weights = {"params": self.trees["discriminator"]}
            state = state.replace(discriminator=state.discriminator | weights)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        self.state = jax.device_put(state, shardings)

    def case(self, arrays: dict[str, np.ndarray], number: int) -> Case:
        """The case of step `number`."""
        size = len(next(iter(arrays.values())))
        batch = sharding.put_batch(self.mesh, {"label": np.zeros(size, np.int32)} | arrays)
        shardings = sharding.frozen_shardings(self.frozen, self.mesh, shard=False)
        frozen = sharding.put(self.frozen, shardings)
        step = loop.jit_step(self.task, self.state, self.mesh)
        phase = self.task.phase(number)
        compiled, costs = _compile(step, self.state, batch, frozen, phase=phase)
        moved = 2 * tree_bytes(self.state) + tree_bytes(frozen)

        def call():
            self.state, metrics = compiled(self.state, batch, frozen)
            return metrics

        return Case(call, size, bytes=moved, **costs)


def sample(model: str, batch: int, *, guidance: float = 1.0) -> Case:
    """All codes of a batch. The limit is to read weights and cache once per code."""
    config = recipes.generator_model(model)
    params, dtype = fill(generator.param_shapes(config)), compute_dtype("auto")
    placed = jax.device_put(params)
    classes = np.random.default_rng(1).integers(0, config.classes, batch, np.int32)
    keys = jax.random.split(jax.random.key(0), batch)

    def run(settings):
        def draw(params, classes, keys):
            return sampling.sample(config, params, classes, keys, settings, dtype)

        return draw

    compiled, costs = _compile(run(SamplingConfig(guidance=guidance)), placed, classes, keys)

    def greedy():
        settings = SamplingConfig(guidance=guidance, temperature=0.0)
        return jax.jit(run(settings))(placed, classes, keys)

    def agrees(one, other):
        # Once rounding changes a code, all later codes differ: compare only the first.
        codes, share = (8, 0.95) if _tolerance() < 1e-2 else (2, 0.5)
        return np.mean(one[:, :codes] == other[:, :codes]) > share

    rival = Rival(
        "sample",
        {"params": params},
        {"label": classes},
        dataclasses.asdict(config) | {"guidance": guidance},
        greedy,
        agrees,
    )
    item = jnp.dtype(dtype).itemsize
    rows = batch * (2 if guidance != 1 else 1)
    tables = sum(params[name].size for name in ("embedding", "class_embedding", "positions"))
    weights = sum(leaf.size for leaf in jax.tree.leaves(params)) - tables
    cache = rows * config.depth * config.width * (config.codes + 1)  # on average half, of two
    moved = item * config.codes * (weights + cache)
    return Case(lambda: compiled(placed, classes, keys), batch, bytes=moved, rival=rival, **costs)


def code_search(model: str, batch: int) -> Case:
    """The search with entropy loss, forward and backward, as in a tokenizer's step."""
    config = recipes.tokenizer_model(model)
    rng = np.random.default_rng(1)
    shapes = ((batch, config.latents, config.code_dim), (config.codebook_size, config.code_dim))
    z, codebook = (quantizer.normalize(rng.standard_normal(s, dtype=np.float32)) for s in shapes)

    def run(z, codebook):
        def loss(z, codebook):
            codes, entropy = quantizer.search(z, codebook, entropy=True)
            return entropy, codes

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(z, codebook)

    compiled, costs = _compile(run, z, codebook)
    return Case(lambda: compiled(z, codebook), batch, bytes=2 * tree_bytes((z, codebook)), **costs)


def features(model: str, batch: int) -> Case:
    """Inception's features for the metrics, in full float32."""
    if model != "inception":
        raise UserError(f"features:{model}: expected features:inception")
    shapes = layers.param_shapes(inception.Inception(), (1, 299, 299, 3))
    variables = {"params": fill(shapes)}
    images = _images(batch, 256)

    def run(variables, images):
        with jax.default_matmul_precision("highest"):
            return inception.Inception().apply(variables, inception.preprocess(images))

    compiled, costs = _compile(run, variables, images)
    return Case(lambda: compiled(variables, images), batch, bytes=tree_bytes(variables), **costs)
