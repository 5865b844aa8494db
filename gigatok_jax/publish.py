"""Uploads bundles to the Hugging Face Hub, with a model card of what was measured."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import jax

from gigatok_jax import bundles, locate
from gigatok_jax.errors import UserError
from gigatok_jax.files import Path, as_path, local_copy, read_json
from gigatok_jax.models import families
from gigatok_jax.training.telemetry import read_metrics
from gigatok_jax.training.trackers import is_evaluation
from gigatok_jax.weights import hub

CARD = "README.md"
MARK = f"library_name: {hub.LIBRARY}"  # in every card that this module writes
LOADERS = {"tokenizer": "load_tokenizer", "generator": "load_generator"}
MEANINGS = {
    "images": "evaluation images",
    "rfid": "FID between images and their reconstructions",
    "psnr": "of reconstructions, dB",
    "ssim": "of reconstructions",
    "lpips": "of reconstructions",
    "codebook_usage": "share of the codebook that the evaluation images use",
    "gfid": "FID between samples and real images",
    "sfid": "FID of spatial features of samples",
    "inception_score": "of samples",
    "guidance": "scale of classifier-free guidance of the samples",
    "loss": "cross entropy of held-out codes, nats per code",
    "linear_accuracy": "of a linear probe of the generator's features",
}


def push(
    name: str, address: str, *, private: bool, license: str, metrics: Sequence[Path]
) -> hub.Address:
    """Uploads a bundle in one commit, and creates the repository if it does not exist.

    Replaces an earlier bundle and its card; other files of the repository stay as they are.

    Args:
      name: any name that `locate.find` takes, usually a bundle or workdir.
      address: see `hub.parse`; the revision is a branch.
      private: whether a new repository is private.
      license: for the card; "" if unknown.
      metrics: JSON files with numbers for the card; if empty, those found beside the model.

    Returns:
      The address of the new commit.

    Raises:
      UserError: the bundle is damaged, the record beside a file of metrics names another model, the
        Hub refuses, or the repository has another model or, with `private`, is public.
    """
    import huggingface_hub

    target = hub.parse(address)
    directory, record = bundles.read_record(name)
    kind = "tokenizer" if record["kind"] in families.KINDS else record["kind"]
    bundle = bundles.load(directory, record["kind"])  # rejects what is damaged before an upload
    folder = None if locate.is_name(name) else as_path(name)
    measured = _measured(folder, metrics, kind, bundle)
    card = _card(target, kind, bundle, license, measured)
    api = huggingface_hub.HfApi(library_name=hub.LIBRARY)
    with hub.one_line(str(target)):
        theirs = _open_repository(api, target, private)
        content: dict[str, Any] = {
            path.name: local_copy(path)
            for path in directory.iterdir()
            if bundles.FILES.fullmatch(path.name)
        }
        stale = {file for file in theirs if bundles.FILES.fullmatch(file)} - content.keys()
        content[CARD] = card.encode()
        commit = api.create_commit(
            target.repo,
            [
                *(
                    huggingface_hub.CommitOperationAdd(target.path(file), source)
                    for file, source in content.items()
                ),
                *(huggingface_hub.CommitOperationDelete(target.path(file)) for file in stale),
            ],
            commit_message=f"A {kind} of {hub.LIBRARY}",
            revision=target.revision,
        )
    return target._replace(revision=commit.oid)


def _open_repository(api: Any, target: hub.Address, private: bool) -> set[str]:
    """Names of the files in the folder of a repository, which is created if it does not exist."""
    from huggingface_hub import errors

    try:
        info = api.repo_info(target.repo, revision=target.revision)
    except errors.RepositoryNotFoundError:
        if target.revision:  # a new repository has no branches
            raise
        api.create_repo(target.repo, private=private or None)
        return set()
    if private and not info.private:
        raise UserError(f"{target}: --private: expected a private repository, this one is public")
    prefix = target.path("")
    files = {
        file.rfilename.removeprefix(prefix)
        for file in info.siblings
        if file.rfilename.startswith(prefix)
    }

    def get(file: str) -> pathlib.Path:
        return hub.download_file(target.repo, target.path(file), info.sha)

    found = sorted(file for file in files if bundles.FILES.fullmatch(file))
    if found and not (
        "config.json" in files and bundles.is_record(read_json(get("config.json"), "a bundle"))
    ):
        raise UserError(f"{target}: expected no model or a bundle to replace, found {found[0]}")
    if CARD in files and MARK not in get(CARD).read_text(errors="replace"):
        raise UserError(
            f"{target}: expected no {CARD}, or one of an earlier push, found another; remove it "
            "there to have it replaced"
        )
    return files


def _measured(
    folder: Path | None, files: Sequence[Path], kind: str, bundle: bundles.Bundle
) -> dict[str, dict[str, float]]:
    """Measured numbers, by where they come from; `folder` is the model's, if it has one."""
    probe = folder and folder.parent / "results.json"  # of the probe that trained this generator
    if not files and kind == "generator" and probe and probe.exists():
        files = [probe]
    result = {}
    for file in files:
        _check_measured(file, kind, bundle)
        result[f"{file.parent.name}/{file.name}"] = _numbers(read_json(file, "metrics"))
    log = folder and folder / "metrics.jsonl"
    if not files and log and log.exists():
        rows = [row for row in read_metrics(log) if is_evaluation(row)]
        if rows:
            result[f"held-out images in training, step {rows[-1]['step']}"] = _numbers(rows[-1])
    return {source: numbers for source, numbers in result.items() if numbers}


def _check_measured(file: Path, kind: str, bundle: bundles.Bundle) -> None:
    """Raises UserError if the record beside a file of metrics does not name this model.

    A file without a record is taken as it is.
    """
    for name in ("probe.json", "evaluation.json"):
        if not file.with_name(name).exists():
            continue
        found, culprit = read_json(file.with_name(name), "what was measured"), "it"
        named, ours = [found.get(kind)], bundle.fingerprint
        if kind == "generator" and name == "probe.json":  # older than the probe's generator
            named = [found.get("tokenizer"), found.get("codes_of")]
            ours, culprit = bundle.made_by.get("tokenizer"), "its tokenizer"
        if not ours or ours not in named:
            raise UserError(
                f"{file}: expected metrics of this model, but {name} beside it does not name "
                f"{culprit}"
            )


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        key.removeprefix("held_out/"): value
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "step"
    }


def _card(
    target: hub.Address,
    kind: str,
    bundle: bundles.Bundle,
    license: str,
    measured: Mapping[str, Mapping[str, float]],
) -> str:
    import huggingface_hub

    names = dict.fromkeys(name for numbers in measured.values() for name in numbers)
    data = huggingface_hub.ModelCardData(
        library_name=hub.LIBRARY,
        license=license or None,
        tags=["gigatok", "jax", kind],
        metrics=list(names) or None,
    )
    title = target.path("").rstrip("/").rpartition("/")[2] or target.repo.rpartition("/")[2]
    count = sum(leaf.size for leaf in jax.tree.leaves(bundle.weights["params"]))
    lines = ["---", data.to_yaml(), "---", "", f"# {title}", ""]
    lines += [f"A {kind} of {hub.LIBRARY} with {count:,} parameters.", ""]
    if kind in LOADERS:
        load = f'model = gt.{LOADERS[kind]}("{target._replace(revision=None)}")'
        lines += ["```python", "import gigatok_jax as gt", "", load, "```", ""]
    for source, numbers in measured.items():
        lines += [f"## Measured: {source}", "", "| metric | value | |", "| --- | --- | --- |"]
        lines += [f"| {key} | {_text(x)} | {MEANINGS.get(key, '')} |" for key, x in numbers.items()]
        lines += [""]
    return "\n".join(lines)


def _text(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
