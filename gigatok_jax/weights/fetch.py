"""Downloading published weights into a cache, or finding there what was put by hand."""

import dataclasses
import hashlib
import http.client
import pathlib
import ssl
import sys
import time
import urllib.error
import urllib.request

from tqdm import tqdm

from gigatok_jax.errors import UserError
from gigatok_jax.files import cache_dir

CHUNK = 2**20  # bytes read at a time
TIMEOUT = 60  # seconds without a byte
PAUSES = (1, 4, 15)  # seconds before each new attempt; one that made progress starts over
TRANSIENT_STATUSES = (408, 425, 429, 500, 502, 503, 504)
TRANSIENT_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)


@dataclasses.dataclass(frozen=True)
class File:
    """One published file.

    Attributes:
      url: where it is published.
      name: its name in the cache.
      sha256: of its content, or the digits it begins with, or None where no trustworthy record of
        it was found: the first file seen is then recorded beside it (`NAME.sha256`), and one that
        differs later is refused.
    """

    url: str
    name: str
    sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class Published:
    """Weights that the program can use.

    Attributes:
      kind: the KIND of `gigatok convert` that reads them.
      architecture: the model's name among those of its kind; "" where there is only one.
      files: the tensors of all files together are the checkpoint.
    """

    kind: str
    architecture: str
    files: tuple[File, ...]


def _dinov2(name: str, sha256: str) -> Published:
    file = f"{name}_pretrain.pth"
    url = f"https://dl.fbaipublicfiles.com/dinov2/{name}/{file}"
    return Published("dinov2", name, (File(url, file, sha256),))


def _gigatok(architecture: str, file: str) -> Published:
    url = f"https://huggingface.co/YuuTennYi/GigaTok/resolve/main/{file}"
    return Published("tokenizer", architecture, (File(url, file),))


PUBLISHED = {
    "dinov2_vits14": _dinov2(
        "dinov2_vits14", "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"
    ),
    "dinov2_vitb14": _dinov2(
        "dinov2_vitb14", "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"
    ),
    "dinov2_vitl14": _dinov2(
        "dinov2_vitl14", "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"
    ),
    "clip_dfn_vitl14": Published(
        "clip",
        "clip_dfn_vitl14",
        (
            File(
                "https://huggingface.co/apple/DFN2B-CLIP-ViT-L-14/resolve/main/"
                "open_clip_pytorch_model.bin",
                "DFN2B-CLIP-ViT-L-14.bin",
                "c02c84198ede77ad80df0803224022f1e9e95ce42551baa91a1b5d87e229e2bb",
            ),
        ),
    ),
    "siglip_so400m14": Published(
        "siglip",
        "siglip_so400m14",
        (
            File(
                "https://huggingface.co/google/siglip-so400m-patch14-224/resolve/main/"
                "model.safetensors",
                "siglip-so400m-patch14-224.safetensors",
            ),
        ),
    ),
    # Its authors publish no hash.
    "dino_vits16": Published(
        "dino",
        "dino_vits16",
        (
            File(
                "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/"
                "dino_deitsmall16_pretrain.pth",
                "dino_deitsmall16_pretrain.pth",
            ),
        ),
    ),
    "lpips_vgg16": Published(
        "lpips",
        "",
        (
            File(
                "https://download.pytorch.org/models/vgg16-397923af.pth",
                "vgg16-397923af.pth",
                "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
            ),
            File(
                "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/"
                "lpips/weights/v0.1/vgg.pth",
                "lpips_vgg_v0.1.pth",
                "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
            ),
        ),
    ),
    "inception_fid": Published(
        "inception",
        "",
        (
            File(
                "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                "pt_inception-2015-12-05-6726825d.pth",
                "pt_inception-2015-12-05-6726825d.pth",
                "6726825d",
            ),
        ),
    ),
    # The authors publish no hashes of these.
    "gigatok_s_s": _gigatok("s_s,released", "VQ_SS256_e100.pt"),
    "gigatok_s_b": _gigatok("s_b,released", "VQ_SB256_e200.pt"),
    "gigatok_b_l": _gigatok("b_l,released", "VQ_BL256_e200.pt"),
    "gigatok_b_l_dino_disc": _gigatok("b_l,released", "VQ_BL256_dino_disc.pt"),
    "gigatok_xl_xxl": _gigatok("xl_xxl,released", "VQ_XLXXL256_e300.pt"),
}


def find(name: str) -> Published:
    """Raises UserError for a name that there is not."""
    if name not in PUBLISHED:
        raise UserError(f"weights {name!r}: expected one of {', '.join(PUBLISHED)}")
    return PUBLISHED[name]


def fetch(name: str, *, cache: str | pathlib.Path | None = None) -> list[pathlib.Path]:
    """Returns the files of published weights, downloading those that the cache lacks.

    A file under its name in the cache, downloaded or put there by hand, is used after its hash is
    checked, without a connection.  A download that was cut off is taken up where it stopped.

    Args:
      name: a key of `PUBLISHED`.
      cache: a directory, created if need be; `cache_dir()` if None.

    Returns:
      Paths in the order of the entry's files.

    Raises:
      UserError: an unknown name, no connection (the message says which file to put where), or a
        file with another hash than the published one's.
    """
    files = find(name).files
    directory = cache_dir() if cache is None else pathlib.Path(cache)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return [_fetch_file(file, directory) for file in files]
    except OSError as error:  # the disk's; the connection's are dealt with where they arise
        raise UserError(f"weights {name!r}: cannot be stored in {directory} ({error})") from error


def _fetch_file(file: File, directory: pathlib.Path) -> pathlib.Path:
    path = directory / file.name
    if path.is_file():
        if other := _other_hash(path, path, file):
            raise UserError(f"{path}: {other}; move it away to have {file.url} downloaded")
        return path
    partial = directory / f"{file.name}.partial"
    _download(file, partial, path)
    if other := _other_hash(partial, path, file):
        partial.unlink()  # it would be resumed otherwise
        raise UserError(f"{file.url}: {other}; nothing was kept")
    partial.replace(path)
    return path


def _other_hash(content: pathlib.Path, path: pathlib.Path, file: File) -> str | None:
    """Says how the hash of `content` is wrong, or None; records it where nothing is known of it."""
    found = _sha256(content)
    record = path.with_name(f"{path.name}.sha256")
    expected = file.sha256
    if expected is None and record.is_file():
        expected = record.read_text().split()[0]
    if expected is None:
        record.write_text(f"{found}  {path.name}\n")  # as sha256sum reads it
        tqdm.write(f"{path}: SHA-256 {found}, recorded in {record.name}", file=sys.stderr)
        return None
    return None if found.startswith(expected) else f"SHA-256 is {found}, expected {expected}"


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _download(file: File, partial: pathlib.Path, path: pathlib.Path) -> None:
    """Fills `partial` with the file's content, with a few attempts."""
    pauses = iter(PAUSES)
    while True:
        before = _size(partial)
        try:
            return _receive(file, partial)
        except TRANSIENT_ERRORS as error:
            if isinstance(error, urllib.error.HTTPError):
                reason = f"HTTP {error.code} {error.reason}"
                pause = next(pauses, None) if error.code in TRANSIENT_STATUSES else None
            else:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
                if _size(partial) > before:
                    pauses = iter(PAUSES)
                pause = next(pauses, None)
            if pause is None:
                raise UserError(
                    f"{file.url}: cannot be downloaded ({reason}); download it elsewhere and put "
                    f"it at {path}"
                ) from error
            tqdm.write(f"{file.name}: {reason}; trying again in {pause} s", file=sys.stderr)
            time.sleep(pause)


def _receive(file: File, partial: pathlib.Path) -> None:
    """One attempt: continues `partial` if the server still has the same file, or starts over."""
    # The server's own mark of the version that `partial` began with.
    version = partial.with_name(f"{partial.name}.version")
    start = _size(partial) if version.is_file() else 0
    headers = {"User-Agent": "gigatok_jax"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": version.read_text()}
    request = urllib.request.Request(file.url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # range not satisfiable: nothing is missing, or it is another file
            raise
        version.unlink()
        if error.headers.get("Content-Range") == f"bytes */{start}":
            return
        raise ConnectionError("the partial file does not fit, starting over") from error
    with response:
        if response.status == 206:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                version.unlink()
                raise ConnectionError("the server sent another part than asked for")
        else:
            start = 0
            mark = response.headers.get("ETag") or response.headers.get("Last-Modified")
            if mark and not mark.startswith("W/"):  # weak marks do not promise the same bytes
                version.write_text(mark)
            else:
                version.unlink(missing_ok=True)
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        bar = tqdm(
            desc=file.name, initial=start, total=total, unit="B", unit_scale=True, unit_divisor=1024
        )
        with bar, partial.open("ab" if start else "wb") as output:
            while chunk := response.read(CHUNK):
                output.write(chunk)
                bar.update(len(chunk))
    if total is not None and _size(partial) < total:
        raise ConnectionError(f"the connection ended at byte {_size(partial)} of {total}")
    version.unlink(missing_ok=True)


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.is_file() else 0
