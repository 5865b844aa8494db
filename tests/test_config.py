"""Configurations: there and back, what is refused, and every name of configs/tokenizer.py."""

import dataclasses
import json
from typing import Literal

from pydantic import NonNegativeInt, model_validator
import pytest

from gigatok_jax import config, recipes
from gigatok_jax.config import configclass, from_mapping, to_config_dict
from gigatok_jax.errors import UserError
from gigatok_jax.training.tokenizer import TokenizerRun

# The paper's Table 9: depth/heads/width of encoder and decoder, batch, epochs.
TINY, S, B, L = (4, 4, 256), (6, 8, 512), (12, 12, 768), (24, 16, 1024)
TOKENIZERS = {
    "tiny_tiny": (TINY, TINY, 128, 100),
    "s_s": (S, S, 128, 100),
    "s_b": (S, B, 128, 200),
    "s_l": (S, L, 256, 200),
    "b_s": (B, S, 256, 200),
    "b_l": (B, L, 256, 200),
    "xl_xxl": ((36, 20, 1280), (48, 24, 1536), 256, 300),
    "s_s_2d": (S, S, 128, 100),
    "s_b_2d": (S, B, 128, 200),
    "b_l_2d": (B, L, 256, 200),
}


@configclass
class Inner:
    b: NonNegativeInt = 1
    rate: float = 0.5
    on: bool = False
    sizes: tuple[int, ...] = (1, 2)
    maybe: int | None = None
    kind: Literal["x", "y"] = "x"

    @model_validator(mode="after")
    def _check(self):
        if self.b > 9 and self.on:
            raise ValueError(f"b: expected at most 9 when on, got {self.b}")
        return self


@configclass
class Outer:
    name: str
    a: Inner = Inner()


def tokenizer_run(argument):
    return config.load(f"configs/tokenizer.py:{argument}")


@pytest.mark.parametrize("maybe", [None, 3])
def test_config_dict_and_json_give_the_dataclass_back(maybe):
    value = Outer("x", Inner(2, 1e-4, True, (3,), maybe))
    mapping = to_config_dict(value)
    assert mapping.a.sizes == (3,)
    assert from_mapping(Outer, mapping.to_dict()) == value
    assert from_mapping(Outer, json.loads(json.dumps(mapping.to_dict()))) == value


def test_fields_with_defaults_may_be_left_out():
    assert from_mapping(Outer, {"name": "x", "a": {"b": 5}}) == Outer("x", Inner(b=5))


def test_whole_number_is_taken_as_float():
    assert isinstance(from_mapping(Outer, {"name": "x", "a": {"rate": 1}}).a.rate, float)


@pytest.mark.parametrize(
    "mapping, message",
    [
        ({"a": {}}, "config.name: missing"),
        ({"name": "x", "aa": {}}, "config.aa: no such field; known: a, name"),
        ({"name": "x", "a": {"c": 1}}, "config.a.c: no such field; known: b, kind, maybe, on, "),
        ({"name": 1}, "config.name: expected string, got 1"),
        ({"name": "x", "a": 3}, "config.a: expected an object, got 3"),
        ({"name": "x", "a": {"b": 1.5}}, "config.a.b: expected integer, got 1.5"),
        ({"name": "x", "a": {"b": True}}, "config.a.b: expected integer, got True"),
        ({"name": "x", "a": {"rate": True}}, "config.a.rate: expected number, got True"),
        ({"name": "x", "a": {"rate": "1"}}, "config.a.rate: expected number, got '1'"),
        ({"name": "x", "a": {"on": 1}}, "config.a.on: expected boolean, got 1"),
        ({"name": "x", "a": {"sizes": 3}}, "config.a.sizes: expected array, got 3"),
        ({"name": "x", "a": {"sizes": [1, "2"]}}, "config.a.sizes.1: expected integer, got '2'"),
        ({"name": "x", "a": {"maybe": "3"}}, "config.a.maybe: expected integer, got '3'"),
        ({"name": "x", "a": {"b": -1}}, "config.a.b: expected greater than or equal to 0, got -1"),
        ({"name": "x", "a": {"kind": "z"}}, "config.a.kind: expected 'x' or 'y', got 'z'"),
        ({"name": "b\udcf1"}, "config.name: expected UTF-8, got 'b\\udcf1'; a link may rename it"),
        (
            {"name": "x", "a": {"sizes": ["\udcf1"]}},
            "config.a.sizes: expected UTF-8, got ['",
        ),
        (
            {"name": "x", "a": {"b": 10, "on": True}},
            "config.a.b: expected at most 9 when on, got 10",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_its_path(mapping, message):
    with pytest.raises(UserError) as error:
        from_mapping(Outer, mapping)
    assert str(error.value).startswith(message)


def test_path_may_be_a_files():
    with pytest.raises(UserError, match=r"^DIR/config.json: model.b: expected integer"):
        from_mapping(Inner, {"b": "1"}, "DIR/config.json: model")


def test_every_recipe_is_the_papers():
    assert recipes.TOKENIZERS.keys() == TOKENIZERS.keys()
    for name, (encoder, decoder, batch_size, epochs) in TOKENIZERS.items():
        run = tokenizer_run(name)
        model = run.model
        assert dataclasses.astuple(model.encoder) == encoder, name
        assert dataclasses.astuple(model.decoder) == decoder, name
        assert (run.batch_size, run.epochs) == (batch_size, epochs), name
        assert run.total_steps == epochs * 1_280_000 // batch_size, name
        assert model.layout == ("2d" if name.endswith("2d") else "1d"), name
        assert (model.image_size, model.latents, model.grid) == (256, 256, 16), name
        assert (model.codebook_size, model.code_dim, model.semantic_dim) == (16_384, 8, 768), name
        assert model == recipes.tokenizer_model(name), name
        assert model.gradient == "straight_through", name
        assert (run.optimizer.warmup_steps, run.objective.entropy) == (5_000, 0.005), name
        assert run.objective.auxiliary_steps == 0, name


@pytest.mark.parametrize("name", ["s_s", "b_l", "b_l_2d"])
def test_released_variant_is_the_older_recipe(name):
    run = tokenizer_run(f"{name},released")
    assert run.model == recipes.tokenizer_model(f"{name},released")
    assert run.model.gradient == "rotation"
    assert (run.optimizer.warmup_steps, run.objective.entropy) == (0, 0.0)
    assert run.objective.auxiliary_steps == 15_000


def test_released_xl_xxl_has_the_newer_recipe():
    run = tokenizer_run("xl_xxl,released")
    assert run.model.gradient == "rotation"
    assert (run.optimizer.warmup_steps, run.objective.entropy) == (5_000, 0.005)
    assert run.objective.auxiliary_steps == 0


def test_vanilla_variant_has_no_teacher():
    for argument in ("s_s,vanilla", "s_s,released,vanilla", "s_s,vanilla,released"):
        run = tokenizer_run(argument)
        assert run.model.semantic_dim == run.objective.semantic == 0
        assert (run.model.gradient == "rotation") == ("released" in argument)


def test_dino_disc_variant_has_another_discriminator_that_starts_later():
    base = tokenizer_run("b_l")
    run = tokenizer_run("b_l,dino_disc")
    assert (base.objective.discriminator, base.objective.disc_start) == ("patchgan", 20_000)
    objective = dataclasses.replace(base.objective, discriminator="dino", disc_start=80_000)
    assert run == dataclasses.replace(base, objective=objective)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("b_xl", "'b_xl': no such tokenizer; known: .*b_l"),
        ("b_l,relaesed", "'relaesed': no such variant; known: released"),
        ("b_l,", "'': no such variant"),
    ],
)
def test_misspelt_names_list_the_known_ones(argument, message):
    with pytest.raises(UserError, match=f"^{message}"):
        tokenizer_run(argument)


def override(argument, **fields):
    """What `--config=configs/tokenizer.py:ARGUMENT --config.FIELD=VALUE` gives."""
    mapping = config.to_config_dict(tokenizer_run(argument))
    mapping.update_from_flattened_dict(fields)
    return from_mapping(TokenizerRun, mapping.to_dict())


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("model.latents", 100, "config.model.latents: expected a power of two"),
        ("model.encoder.heads", 7, "config.model.encoder.width: expected a multiple of heads=7"),
        ("dtype", "float8", "config.dtype: expected 'auto', 'float32' or 'bfloat16', got 'float8'"),
        ("remat", "some", "config.remat: expected 'none', 'dots' or 'full'"),
        ("batch_size", 0, "config.batch_size: expected greater than 0, got 0"),
        ("objective.discriminator", "vit", "config.objective.discriminator: expected 'patchgan'"),
        ("model.semantic_dim", 0, "config.model.semantic_dim: expected a width"),
        ("steps", 5_000, "config.optimizer.warmup_steps: expected fewer than the run's 5000"),
    ],
)
def test_impossible_values_are_rejected_by_field(path, value, message):
    with pytest.raises(UserError, match=f"^{message}"):
        override("s_s", **{path: value})


NO_CODEBOOK = {
    "fsq": {"fsq_levels": (8, 8, 4), "code_dim": 3, "codebook_size": 256},
    "lfq": {"code_dim": 14},
    "bsq": {"code_dim": 14},
}


@pytest.mark.parametrize("recipe", ["b_l", "s_s,vanilla"])
@pytest.mark.parametrize("quantizer", NO_CODEBOOK)
def test_recipes_take_another_quantizer_but_no_weight_that_it_does_not_use(recipe, quantizer):
    changes = {"quantizer": quantizer} | NO_CODEBOOK[quantizer]
    changes = {f"model.{name}": value for name, value in changes.items()}
    assert override(recipe, **changes).model.quantizer == quantizer
    idle = {"codebook": 0.5} | ({"commitment": 2.0, "entropy": 0.1} if quantizer == "fsq" else {})
    for term, weight in idle.items():
        field = f"objective.{term}"
        message = (
            rf"^config\.{field}: expected 0 with model\.quantizer='{quantizer}', .* {weight:g}$"
        )
        with pytest.raises(UserError, match=message):
            override(recipe, **changes, **{field: weight})
        override(recipe, **changes, **{field: 0.0})


def test_dino_discriminator_needs_batches_that_it_can_group():
    with pytest.raises(UserError, match=r"^config\.batch_size: .* got 13$"):
        override("s_s,dino_disc", batch_size=13)


def test_warmup_follows_batch_size_and_epochs_in_every_config():
    for name, field in (("generator:b", None), ("probe", "generator"), ("probe:linear", None)):
        run = config.load(name)
        run = getattr(run, field) if field else run
        half = dataclasses.replace(run, batch_size=run.batch_size // 2)
        steps, more = (r.resolved_optimizer.warmup_steps for r in (run, half))
        assert more == pytest.approx(2 * steps, abs=1) and steps > 0
        mapping = config.to_config_dict(run)
        mapping.optimizer.warmup_steps = 7
        assert from_mapping(type(run), mapping.to_dict()).resolved_optimizer.warmup_steps == 7


def test_configs_are_found_by_short_names_and_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = config.load("tokenizer:b_l")
    assert config.load("configs/tokenizer.py:b_l") == expected
    (tmp_path / "tokenizer.py").write_text("def get_config(argument='x'):\n    return argument\n")
    assert config.load("tokenizer.py") == "x"  # one's own file comes first
    assert config.load(f"{tmp_path}/tokenizer.py:y") == "y"
    with pytest.raises(UserError, match=r"no such file; installed configs: demo, generator, probe"):
        config.load("nothing.py")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"notes\.txt: expected a Python file, got \.txt"):
        config.load("notes.txt")
