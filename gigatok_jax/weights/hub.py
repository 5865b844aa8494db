"""The Hugging Face Hub: bundles by address, and files of published weights.

`huggingface_hub` keeps what it downloads in its own cache, and takes mirrors (HF_ENDPOINT), tokens
(HF_TOKEN) and HF_HUB_OFFLINE from the environment.
"""

from collections.abc import Iterator
import contextlib
import pathlib
import re
from typing import NamedTuple

from gigatok_jax.errors import UserError, first_line
from gigatok_jax.files import INDEX, read_index

SCHEME = "hf://"
FORM = "hf://OWNER/REPO[/FOLDER][@REVISION]"
LIBRARY = "gigatok_jax"


class Address(NamedTuple):
    """A folder of a repository of the Hub."""

    repo: str  # OWNER/REPO
    folder: str  # "": the whole repository
    revision: str | None  # branch, tag or commit; None: the main branch

    def __str__(self):
        folder = f"/{self.folder}" if self.folder else ""
        return f"{SCHEME}{self.repo}{folder}" + (f"@{self.revision}" if self.revision else "")

    def path(self, name: str) -> str:
        """The path in the repository of a file of the folder."""
        return f"{self.folder}/{name}" if self.folder else name


def parse(text: str, where: str = "") -> Address:
    """Splits hf://OWNER/REPO[/FOLDER][@REVISION]; `where` holds it, for messages.

    Raises:
      UserError: `text` is no such address.
    """
    path, at, revision = text.removeprefix(SCHEME).partition("@")
    owner, *rest = path.rstrip("/").split("/")
    parts = [owner, *rest]
    whole = len(parts) > 1 and all(re.fullmatch(r"(?!\.+$)[\w. -]+", part) for part in parts)
    if not text.startswith(SCHEME) or not whole or (at and not revision):
        culprit = f"{where}: {text!r}" if where else repr(text)
        raise UserError(f"{culprit}: expected {FORM}")
    return Address("/".join(parts[:2]), "/".join(parts[2:]), revision or None)


def download(text: str, *, weights: bool = True) -> pathlib.Path:
    """The local folder of a bundle on the Hub, after downloading what is not in the Hub's cache.

    All files are those of one commit, even if the repository changes meanwhile.

    Args:
      text: see `parse`.
      weights: False downloads only `config.json`.

    Raises:
      UserError: the repository, the revision or the bundle does not exist, or cannot be reached.
    """
    from huggingface_hub import errors

    address = parse(text)
    with one_line(text, "not a bundle: it has no config.json, or no model.safetensors"):
        config = download_file(address.repo, address.path("config.json"), address.revision)
        commit = config.parents[address.path("").count("/")].name  # snapshots/COMMIT/FOLDER
        if weights:
            try:
                download_file(address.repo, address.path("model.safetensors"), commit)
            except errors.EntryNotFoundError:
                index = download_file(address.repo, address.path(INDEX), commit)
                for file in sorted(set(read_index(index).values())):
                    download_file(address.repo, address.path(file.name), commit)
    return config.parent


def download_file(repo: str, path: str, revision: str | None) -> pathlib.Path:
    """The local path of one file; raises errors of `huggingface_hub`."""
    import huggingface_hub

    return pathlib.Path(
        huggingface_hub.hf_hub_download(repo, path, revision=revision, library_name=LIBRARY)
    )


def discard(path: pathlib.Path) -> None:
    """Removes a file from the Hub's cache."""
    content = path.resolve()  # the entry of a file is a link to its content
    path.unlink()
    content.unlink(missing_ok=True)


@contextlib.contextmanager
def one_line(where: str, missing: str = "no such file in the repository") -> Iterator[None]:
    """Turns errors of the Hub into UserErrors.

    Args:
      where: names the repository or the file.
      missing: what it means if the repository lacks a file.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of the Hub, the connection, or the check of a name
        raise UserError(f"{where}: {_reason(error, missing)}") from error


def _reason(error: Exception, missing: str) -> str:
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        if constants.HF_HUB_OFFLINE:
            return "not in the Hub's cache, and HF_HUB_OFFLINE forbids connections"
        return f"no connection to {constants.ENDPOINT} ({first_line(error.__cause__ or error)})"
    if "Connect" in type(error).__name__:
        return f"no connection to {constants.ENDPOINT} ({first_line(error)})"
    if isinstance(error, errors.GatedRepoError):
        return "its authors must grant access; ask for it on the page of the repository"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no such repository on {constants.ENDPOINT}, or a private one, which needs a token "
            "(HF_TOKEN, or `hf auth login`)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such revision"
    if isinstance(error, errors.EntryNotFoundError):
        return missing
    if status in (401, 403):
        return f"access refused (HTTP {status}); check the token (HF_TOKEN, or `hf auth login`)"
    return first_line(error)
