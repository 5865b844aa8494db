"""Configurations: there and back, what is refused, and every name of configs/tokenizer.py."""

import dataclasses
import importlib.util
import json
import pathlib

import pytest

from gigatok_jax import recipes
from gigatok_jax.config import from_mapping, to_config_dict
from gigatok_jax.errors import UserError
from gigatok_jax.training.tokenizer_run import TokenizerRun

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
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


@dataclasses.dataclass(frozen=True)
class Inner:
    b: int = 1
    rate: float = 0.5
    on: bool = False
    sizes: tuple[int, ...] = (1, 2)
    maybe: int | None = None

    def __post_init__(self):
        if self.b < 0:
            raise ValueError(f"b must not be negative, got {self.b}")


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    a: Inner = dataclasses.field(default_factory=Inner)


def tokenizer_config(argument):
    spec = importlib.util.spec_from_file_location("tokenizer_config", CONFIGS / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)


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
        ({"name": "x", "a": {"c": 1}}, "config.a.c: no such field; known: b, maybe, on, "),
        ({"name": 1}, "config.name: expected str, got 1"),
        ({"name": "x", "a": 3}, "config.a: expected Inner, got 3"),
        ({"name": "x", "a": {"b": 1.5}}, "config.a.b: expected int, got 1.5"),
        ({"name": "x", "a": {"b": True}}, "config.a.b: expected int, got True"),
        ({"name": "x", "a": {"rate": True}}, "config.a.rate: expected float, got True"),
        ({"name": "x", "a": {"rate": "1"}}, "config.a.rate: expected float, got '1'"),
        ({"name": "x", "a": {"on": 1}}, "config.a.on: expected bool, got 1"),
        ({"name": "x", "a": {"sizes": 3}}, "config.a.sizes: expected tuple, got 3"),
        ({"name": "x", "a": {"sizes": [1, "2"]}}, "config.a.sizes: expected int, got '2'"),
        ({"name": "x", "a": {"maybe": "3"}}, "config.a.maybe: expected int, got '3'"),
        ({"name": "x", "a": {"b": -1}}, "config.a.b must not be negative, got -1"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_path(mapping, message):
    with pytest.raises(UserError) as error:
        from_mapping(Outer, mapping)
    assert str(error.value).startswith(message)


def test_path_may_be_a_files():
    with pytest.raises(UserError, match=r"^DIR/config.json: model.b: expected int"):
        from_mapping(Inner, {"b": "1"}, "DIR/config.json: model")


def test_every_recipe_is_the_papers():
    assert recipes.TOKENIZERS.keys() == TOKENIZERS.keys()
    for name, (encoder, decoder, batch_size, epochs) in TOKENIZERS.items():
        run = from_mapping(TokenizerRun, tokenizer_config(name).to_dict())
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
    run = from_mapping(TokenizerRun, tokenizer_config(f"{name},released").to_dict())
    assert run.model == recipes.tokenizer_model(f"{name},released")
    assert run.model.gradient == "rotation"
    assert (run.optimizer.warmup_steps, run.objective.entropy) == (0, 0.0)
    assert run.objective.auxiliary_steps == 15_000


def test_released_xl_xxl_has_the_newer_recipe():
    run = from_mapping(TokenizerRun, tokenizer_config("xl_xxl,released").to_dict())
    assert run.model.gradient == "rotation"
    assert (run.optimizer.warmup_steps, run.objective.entropy) == (5_000, 0.005)
    assert run.objective.auxiliary_steps == 0


def test_vanilla_variant_has_no_teacher():
    for argument in ("s_s,vanilla", "s_s,released,vanilla", "s_s,vanilla,released"):
        run = from_mapping(TokenizerRun, tokenizer_config(argument).to_dict())
        assert run.model.semantic_dim == run.objective.semantic == 0
        assert (run.model.gradient == "rotation") == ("released" in argument)


def test_dino_disc_variant_has_another_discriminator_that_starts_later():
    base = from_mapping(TokenizerRun, tokenizer_config("b_l").to_dict())
    run = from_mapping(TokenizerRun, tokenizer_config("b_l,dino_disc").to_dict())
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
def test_misspelt_names_are_refused(argument, message):
    with pytest.raises(UserError, match=f"^{message}"):
        tokenizer_config(argument)


def test_batch_that_the_dino_discriminator_cannot_group_is_refused():
    config = tokenizer_config("s_s,dino_disc")
    config.batch_size = 13
    with pytest.raises(UserError, match=r"^config\.batch_size must split .* got 13"):
        from_mapping(TokenizerRun, config.to_dict())


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("model.latents", 100, "config.model.latents must be a power of two"),
        ("model.encoder.heads", 7, "config.model.encoder: .* heads must divide width"),
        ("dtype", "float8", "config.dtype must be one of"),
        ("remat", "some", "config.remat must be one of"),
        ("batch_size", 0, "config.batch_size must be positive"),
        ("objective.discriminator", "vit", "config.objective.discriminator must be one of"),
        ("model.semantic_dim", 0, "config.objective.semantic is positive"),
        ("steps", 5_000, "config.optimizer.warmup_steps must be fewer than the run's 5000"),
    ],
)
def test_impossible_run_is_refused_by_its_field(path, value, message):
    config = tokenizer_config("s_s")
    config.update_from_flattened_dict({path: value})
    with pytest.raises(UserError, match=f"^{message}"):
        from_mapping(TokenizerRun, config.to_dict())
