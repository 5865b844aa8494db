"""A linear probe's run: its configuration, and the job that the loop runs for it."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gigatok_jax import bundles, pictures, sharding
from gigatok_jax.data import codes, pipeline
from gigatok_jax.errors import UserError
from gigatok_jax.models import layers
from gigatok_jax.models.generator import Generator, GeneratorConfig
from gigatok_jax.models.tokenizer import Tokenizer, TokenizerConfig
from gigatok_jax.training import linear_probe as training
from gigatok_jax.training.evaluating import held_out_means
from gigatok_jax.training.generator import batch_codes
from gigatok_jax.training.loop import Job
from gigatok_jax.training.optimizer import OptimizerConfig
from gigatok_jax.training.run import RunConfig

FEATURES = ("generator", "encoder", "latents", "decoder")

RATE, WARMUP_EPOCHS = 0.1 / 256, 10  # MAE's linear probing: rate an image of a batch
OPTIMIZER = OptimizerConfig(
    algorithm="lars",
    rate=RATE * 16_384,
    final_rate=0.0,
    warmup_steps=WARMUP_EPOCHS * 1_280_000 // 16_384,
    weight_decay=0.0,
    clip=0.0,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbeRun(RunConfig):
    """All that determines a linear probe, beside what any run is told.

    Attributes:
      features: what is probed, its tokens averaged: "generator", the output of one of its layers,
        no class given, all codes but the last seen (paper, 3.1); or of the tokenizer: "encoder",
        the encoder transformer's output after its last LayerNorm, width W (appendix F); "latents",
        before the quantizer, width D; "decoder", the output of a layer of the decoder transformer.
      feature_batch_size: images at once through the frozen network, over all devices; divides a
        larger `batch_size`.
      layer: of the generator or the decoder, from 1; 0: the generator's middle layer, or the
        decoder's layer with the semantic loss.
      tokenizer, generator: bundles or workdirs. With codes for data a generator needs no tokenizer.
    """

    optimizer: OptimizerConfig = OPTIMIZER
    task: str = "linear_probe"
    epochs: float = 90.0
    batch_size: int = 16_384
    average_decay: float = 0.0
    evaluation_images: int = 50_000
    feature_batch_size: int = 1_024
    features: str = "generator"
    layer: int = 0
    tokenizer: str = ""
    generator: str = ""

    def __post_init__(self):
        super().__post_init__()
        if self.features not in FEATURES:
            raise ValueError(f"features must be one of {FEATURES}, got {self.features!r}")
        if self.average_decay:
            raise ValueError(f"average_decay must be 0 in a linear probe, got {self.average_decay}")
        if self.accumulate != 1:
            raise ValueError(
                "accumulate must be 1 in a linear probe, whose batches feature_batch_size divides, "
                f"got {self.accumulate}"
            )
        if self.batch_size > self.feature_batch_size and self.batch_size % self.feature_batch_size:
            raise ValueError(
                f"feature_batch_size must divide batch_size, {self.batch_size}, got "
                f"{self.feature_batch_size}"
            )
        if self.layer < 0:
            raise ValueError(f"layer must not be negative, got {self.layer}")

    def job(self, workdir: pathlib.Path, mesh: Mesh) -> Job:
        """Reads the networks, opens the data, and puts the run together.

        Raises:
          UserError: a network or the data are missing, or do not fit each other.
        """
        probed = _probed(self)
        batches = pipeline.train_batches(
            self.data,
            probed.image_size,
            self.batch_size,
            self.seed,
            *sharding.batch_block(mesh),
        )
        functions = training.LinearProbeTraining(
            probed.apply,
            probed.width,
            len(batches.class_names),
            self.optimizer,
            self.total_steps,
            self.feature_batch_size,
        )
        return Job(
            training=functions,
            frozen=probed.frozen,
            batches=batches,
            evaluate=_Evaluation(self, functions, probed.image_size, mesh),
            advise=lambda row: None,
            finish=functools.partial(_write_bundle, self, workdir, probed.description),
            identity={"features": probed.description, "networks": probed.fingerprint},
        )


@dataclasses.dataclass(frozen=True)
class _Probed:
    """The frozen networks and what is taken from them."""

    apply: Any
    frozen: Any
    width: int
    image_size: int
    description: str
    fingerprint: str


def _probed(run: LinearProbeRun) -> _Probed:
    dtype = layers.compute_dtype(run.dtype)
    tokenizer = generator = None
    if run.data.source != "codes" or run.features != "generator":
        if not run.tokenizer:
            raise UserError("config.tokenizer: empty; expected a tokenizer's bundle or workdir")
        tokenizer = bundles.load(run.tokenizer, "tokenizer", TokenizerConfig)
    if run.features == "generator":
        if not run.generator:
            raise UserError("config.generator: empty; expected a generator's bundle or workdir")
        generator = bundles.load(run.generator, "generator", GeneratorConfig)
        return _generator(run, generator, tokenizer, dtype)
    return _tokenizer(run, tokenizer, dtype)


def _generator(run, generator: bundles.Bundle, tokenizer: bundles.Bundle | None, dtype) -> _Probed:
    config = generator.config
    layer = _layer(run, config.depth // 2, config.depth)
    module = Generator(config, dtype=dtype)
    made_by = generator.made_by.get("tokenizer")
    if run.data.source == "codes":
        info = codes.find_info(run.data.path)
        info.check(codes=config.codes, codebook_size=config.codebook_size, tokenizer=made_by)
    elif made_by not in (None, tokenizer.fingerprint):
        raise UserError(
            f"config.tokenizer: {run.tokenizer} is not the tokenizer that the generator was "
            "trained on"
        )

    def apply(frozen, batch):
        seen = batch_codes(batch, tokenizer and tokenizer.config, frozen["tokenizer"], dtype)
        none = jnp.full(len(seen), config.null_class)
        features = module.apply(
            {"params": frozen["generator"]}, seen[:, :-1], none, layer, method=Generator.features
        )
        return features.mean(1)

    return _Probed(
        apply,
        {
            "generator": generator.weights["params"],
            "tokenizer": tokenizer and tokenizer.weights["params"],
        },
        config.width,
        tokenizer.config.image_size if tokenizer else 0,
        f"generator, output of layer {layer} of {config.depth}, width {config.width}",
        generator.fingerprint,
    )


def _tokenizer(run, tokenizer: bundles.Bundle, dtype) -> _Probed:
    if run.data.source == "codes":
        raise UserError("config.data.source: expected images for a tokenizer's features")
    config = tokenizer.config
    module = Tokenizer(config, dtype=dtype)
    kind, layer = run.features, None
    if kind == "decoder":
        layer = _layer(run, config.semantic_layer, config.decoder.depth)
    elif run.layer:
        raise UserError(f"config.layer: the {kind} features have no layers, got {run.layer}")
    width, text = {
        "encoder": (config.encoder.width, "encoder, output after the last LayerNorm"),
        "latents": (config.code_dim, "latents before the quantizer"),
        "decoder": (config.decoder.width, f"decoder, output of layer {layer}"),
    }[kind]

    def apply(frozen, batch):
        variables = {"params": frozen["tokenizer"]}
        if kind == "decoder":
            seen = batch_codes(batch, config, frozen["tokenizer"], dtype)
            features = module.apply(variables, seen, layer, method=Tokenizer.decoder_features)
        else:
            method = Tokenizer.encoder_features if kind == "encoder" else Tokenizer.latents
            features = module.apply(variables, pictures.to_float(batch["image"]), method=method)
        return features.mean(1)

    return _Probed(
        apply,
        {"tokenizer": tokenizer.weights["params"]},
        width,
        config.image_size,
        f"{text}, width {width}",
        tokenizer.fingerprint,
    )


def _layer(run: LinearProbeRun, default: int, depth: int) -> int:
    layer = run.layer or max(default, 1)
    if layer > depth:
        raise UserError(f"config.layer: expected 1 to {depth}, got {layer}")
    return layer


class _Evaluation:
    """Held-out accuracy and loss."""

    def __init__(
        self,
        run: LinearProbeRun,
        functions: training.LinearProbeTraining,
        image_size: int,
        mesh: Mesh,
    ):
        self._images, self._mesh = run.evaluation_images, mesh
        shared = sharding.batch_sharding(mesh)
        self._judge = jax.jit(functions.judge, out_shardings=shared)
        self._batches = pipeline.eval_batches(
            run.data, image_size, run.batch_size, *sharding.batch_block(mesh)
        )

    def __call__(self, state: training.LinearProbeState, frozen: Any):
        def measure(batch):
            values = self._judge(state, sharding.put_batch(self._mesh, batch), frozen)
            return jax.tree.map(sharding.local_block, values)

        self._batches.set_state({"next_batch": 0})
        with self._batches:
            means = held_out_means(measure, self._batches, self._images)
        return {f"held_out/{name}": value for name, value in means.items()}, {}


def _write_bundle(
    run: LinearProbeRun,
    workdir: pathlib.Path,
    description: str,
    state: training.LinearProbeState,
) -> None:
    bundles.save(
        workdir / "bundle",
        "linear_probe",
        None,
        {"params": state.params, "batch_stats": state.batch_stats},
        {"run": dataclasses.asdict(run), "step": int(state.step), "features": description},
    )
