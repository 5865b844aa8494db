"""Verbs about stored models: weights, convert, push."""

import contextlib

from absl import flags

from gigatok_jax.commands.verbs import (
    flag,
    required,
    verb,
)
from gigatok_jax.errors import UserError
from gigatok_jax.files import as_path


@verb("list published weights, or download and convert them", positional="words")
def weights(words: list[str]) -> None:
    """gigatok weights list, or gigatok weights fetch NAME

    Lists published weights: kind, parameters, size as a bundle, the authors' rFID or gFID, and the
    folder if they are in the cache (GIGATOK_CACHE); and the models that come with the program. Or
    downloads published weights into the cache, checks and converts them, and prints the folder of
    the bundle. Commands fetch what they name by themselves.
    """
    import jax

    from gigatok_jax import bundles, locate
    from gigatok_jax.weights import convert as converters
    from gigatok_jax.weights import fetch

    def row(name, kind, count, figure, where):
        params = f"{count / 1e6:>6,.{0 if count > 1e7 else 1}f}M"
        size = f"{4 * count / 1e9:>5.2f} GB"  # float32
        print(f"{name:<28} {kind:<10} {params} {size}  {figure:<12} {where}")

    match words:
        case ["list"]:
            print(
                f"{'name':<28} {'kind':<10} {'params':>7} {'size':>8}  {'as published':<12} folder"
            )
            for name, published in fetch.PUBLISHED.items():
                count = converters.parameter_count(published.kind, published.model)
                folder = fetch.bundle_path(name) if fetch.is_there(name) else "not fetched"
                row(name, published.kind, count, published.figure, folder)
            for name, (kind, folder) in locate.INCLUDED.items():
                weights = bundles.load(folder, kind).weights["params"]
                row(name, kind, sum(x.size for x in jax.tree.leaves(weights)), "", "included")
        case ["fetch", name] if name in locate.INCLUDED:
            print(locate.INCLUDED[name][1])
        case ["fetch", name]:
            print(converters.fetch_bundle(name))
        case _:
            known = ", ".join(fetch.PUBLISHED)
            raise UserError(f"expected: weights list, or weights fetch NAME, with NAME of {known}")


@verb(
    "convert the reference's checkpoints to bundles and back",
    flag("multi_string", "from", None, "checkpoint or bundle to read", required=True),
    required("out", "bundle or checkpoint to write"),
    flag(
        "string",
        "model",
        "",
        "architecture, such as b_l or dinov2_vitb14, or a bundle that has it",
    ),
    flag("string", "weights", "auto", "weights to take from the checkpoint: model, ema or auto"),
    flag("boolean", "to_torch", False, "convert a bundle to a checkpoint"),
    lambda flag_values: flags.DEFINE_alias("to-torch", "to_torch", flag_values=flag_values),
    positional="kind",
)
def convert(kind: list[str], to_torch: bool, model: str, weights: str, out: str, **values) -> None:
    """gigatok convert KIND --from=FILE --out=DIR, or --to-torch --from=DIR --out=FILE

    Converts a published checkpoint (.pt, .safetensors) to a bundle, or back. KIND is tokenizer,
    generator, vqgan, titok, dino, dinov2, clip, siglip, lpips or inception. For a checkpoint in
    several files, repeat --from.
    """
    from gigatok_jax import locks
    from gigatok_jax.weights import convert as converters

    sources = values["from"]
    if len(kind) != 1:
        raise UserError(f"expected one KIND of {', '.join(converters.KINDS)}, got {kind}")
    if to_torch:
        if len(sources) != 1:
            raise UserError(f"--from: expected one bundle, got {sources}")
        converters.to_file(kind[0], sources[0], as_path(out))
    else:
        folder = as_path(out)
        # A new folder appears with its weights; until then, there is nothing to lock.
        with locks.hold(folder) if folder.is_dir() else contextlib.nullcontext():
            converters.to_bundle(kind[0], sources, folder, model=model, weights=weights)
    print(out)


@verb(
    "upload a model to the Hugging Face Hub",
    flag("boolean", "private", False, "create a private repository"),
    flag("string", "license", "", "license of the weights for the model card, such as apache-2.0"),
    flag(
        "multi_string",
        "metrics",
        [],
        "metrics.json of `evaluate` or results.json of `probe` for the model card; default: those "
        "beside the model",
    ),
    positional="places",
    devices=False,
)
def push(places: list[str], private: bool, license: str, metrics: list[str]) -> None:
    """gigatok push DIR hf://OWNER/REPO[/FOLDER][@BRANCH] [--private] [--metrics=FILE]

    Uploads a bundle, or the bundle of a workdir, in one commit: config.json, model.safetensors, and
    README.md, a model card with the metrics that were measured. Creates the repository if it does
    not exist, and leaves other files in it alone. The token is that of HF_TOKEN or `hf auth login`.
    The address then names the model, as in --tokenizer=hf://OWNER/REPO.
    """
    from gigatok_jax import publish

    if len(places) != 2:
        raise UserError(f"expected DIR and hf://OWNER/REPO, got {places}")
    files = [as_path(file) for file in metrics]
    print(publish.push(*places, private=private, license=license, metrics=files))
