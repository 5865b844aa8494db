"""Downloads published weights to a cache, where users may also put files by hand.

Those of the Hugging Face Hub are downloaded to its own cache, see `weights.hub`.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import http.client
import pathlib
import re
import shutil
import sys
import time
from typing import Any
import urllib.error
import urllib.request

from tqdm import tqdm

from gigatok_jax import imagenet
from gigatok_jax.errors import UserError, first_line, lookup
from gigatok_jax.files import Path, cache_dir, local_cache_dir
from gigatok_jax.weights import hub

# Why a figure cannot be verified.
RESIZED = "it is of images that were resized from 384 to 256 pixels"
UNKNOWN = "its authors do not say how they resized images"

CHUNK = 2**20  # bytes read at a time
TIMEOUT = 60  # seconds without a byte
PAUSES = (1, 4, 15)  # seconds before each new attempt; progress resets them
TRANSIENT_STATUSES = (408, 425, 429, 500, 502, 503, 504)


@dataclasses.dataclass(frozen=True)
class File:
    """One published file."""

    url: str
    # The hash, or its first digits. None if the authors publish none: NAME.sha256 then records the
    # hash of the first download, and later files must match it.
    sha256: str | None = None
    saved_as: str = ""  # set if the last part of the URL is not unique

    @property
    def name(self) -> str:
        """File name in the cache."""
        return self.saved_as or self.url.rpartition("/")[2]


@dataclasses.dataclass(frozen=True)
class Published:
    """Weights that the program can use."""

    kind: str  # the KIND of `gigatok convert` that reads them
    model: str  # name of the architecture; "" if the kind has only one
    files: tuple[File, ...]  # together they hold the tensors
    figure: str = ""  # the authors' rFID or gFID
    crop: str = "adm"  # how the images of an rFID were resized, see `crops.center_crop`
    not_verifiable: str = ""  # why the figure cannot be measured with this program
    searched: bool = False  # of a generator: the figure is the lowest of a search for guidance
    tokenizer: str = ""  # of a generator: the name of the tokenizer whose codes it models
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of a generator
    class_names: tuple[str, ...] = ()  # of a generator


def _one(kind: str, model: str, url: str, sha256: str | None = None, **name: str) -> Published:
    return Published(kind, model, (File(url, sha256, **name),))


def _tokenizer(model: str, file: str, rfid: str) -> Published:
    return Published("tokenizer", f"{model},released", (File(f"{GIGATOK}/{file}"),), f"rFID {rfid}")


def _vqgan(model: str, repo: str, file: str, rfid: str) -> Published:
    url = f"https://huggingface.co/{repo}/resolve/main/{file}"
    crop = "linear" if repo.startswith(TENCENT) else "adm"
    why = RESIZED if model.endswith("_384") else UNKNOWN if model == "maskgit_vqgan" else ""
    return Published("vqgan", model, (File(url),), f"rFID {rfid}", crop=crop, not_verifiable=why)


def _titok(model: str, rfid: str) -> Published:
    repo = f"tokenizer_{model}_imagenet"
    url = f"https://huggingface.co/yucornetto/{repo}/resolve/main/model.safetensors"
    files = (File(url, saved_as=f"{repo}.safetensors"),)
    return Published("titok", model, files, f"rFID {rfid}", crop="bicubic")


def _generator(
    model: str, tokenizer: str, url: str, gfid: str, **sampling: float | str
) -> Published:
    return Published(
        "generator",
        model,
        (File(url),),
        figure=f"gFID {gfid}",
        tokenizer=tokenizer,
        sampling=sampling,
        class_names=tuple(imagenet.classes()),
        not_verifiable=RESIZED if model.endswith(",384") else "",
        searched=url.startswith(GIGATOK),
    )


def _gigatok_gpt(
    model: str, tokenizer: str, file: str, gfid: str, guidance: float = 1.0
) -> Published:
    schedule = {"schedule": "step", "schedule_start": 0.18} if guidance > 1 else {}
    return _generator(model, tokenizer, f"{GIGATOK}/{file}", gfid, guidance=guidance, **schedule)


def _llamagen_gpt(model: str, file: str, gfid: str, guidance: float) -> Published:
    tokenizer = "llamagen_vq16_384" if model.endswith(",384") else "llamagen_vq16"
    url = f"https://huggingface.co/{LLAMAGEN}/resolve/main/{file}"
    return _generator(model, tokenizer, url, gfid, guidance=guidance)


DINOV2 = {
    "dinov2_vits14": "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    "dinov2_vitb14": "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    "dinov2_vitl14": "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
}
DINOV2_HOST = "https://dl.fbaipublicfiles.com/dinov2"
GIGATOK = "https://huggingface.co/YuuTennYi/GigaTok/resolve/main"
HUB_URL = re.compile(
    r"https://huggingface\.co/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)"
)

# By model, from their authors: repository on the Hub, file, and rFID at 256 pixels, or at 128 for
# open_magvit2_128.
LLAMAGEN, TENCENT = "FoundationVision/LlamaGen", "TencentARC"
VQGANS = {
    "llamagen_vq16": (LLAMAGEN, "vq_ds16_c2i.pt", "2.19"),
    "llamagen_vq16_384": (LLAMAGEN, "vq_ds16_c2i.pt", "0.94"),
    "llamagen_vq8": (LLAMAGEN, "vq_ds8_c2i.pt", "0.59"),
    "maskgit_vqgan": ("fun-research/TiTok", "maskgit-vqgan-imagenet-f16-256.bin", "2.28"),
    "open_magvit2_256": (
        f"{TENCENT}/Open-MAGVIT2-Tokenizer-256-resolution",
        "imagenet_256_L.ckpt",
        "1.17",
    ),
    "open_magvit2_128": (
        f"{TENCENT}/Open-MAGVIT2-Tokenizer-128-resolution",
        "imagenet_128_L.ckpt",
        "1.18",
    ),
    "ibq_1024": (f"{TENCENT}/IBQ-Tokenizer-1024", "imagenet256_1024.ckpt", "2.24"),
    "ibq_8192": (f"{TENCENT}/IBQ-Tokenizer-8192", "imagenet256_8192.ckpt", "1.87"),
    "ibq_16384": (f"{TENCENT}/IBQ-Tokenizer-16384", "imagenet256_16384.ckpt", "1.37"),
    "ibq_262144": (f"{TENCENT}/IBQ-Tokenizer-262144", "imagenet256_262144.ckpt", "1.00"),
}

# rFID of each TiTok.
TITOKS = {
    "titok_l32": "2.21",
    "titok_b64": "1.70",
    "titok_s128": "1.71",
    "titok_bl64_vq8k": "2.06",
    "titok_bl128_vq8k": "1.49",
    "titok_sl256_vq8k": "1.03",
}

# By LlamaGen's authors: model, file, gFID at 256 pixels, and the guidance of that figure, without a
# schedule (their paper, Tables 8 to 10). Images of 384 pixels were resized to 256 for it.
LLAMAGEN_GPTS = {
    "llamagen_gpt_b": ("b,2d", "c2i_B_256.pt", "5.46", 2.0),
    "llamagen_gpt_b_384": ("b,2d,384", "c2i_B_384.pt", "6.09", 2.25),
    "llamagen_gpt_l": ("l,2d", "c2i_L_256.pt", "3.80", 1.75),
    "llamagen_gpt_l_384": ("l,2d,384", "c2i_L_384.pt", "3.07", 2.0),
    "llamagen_gpt_xl_384": ("xl,2d,384", "c2i_XL_384.pt", "2.62", 1.75),
    "llamagen_gpt_xxl_384": ("xxl,2d,384", "c2i_XXL_384.pt", "2.34", 1.75),
    "llamagen_gpt_3b_384": ("3b,2d,384", "c2i_3B_384.pt", "2.18", 1.65),
}

# The authors of SigLIP, DINO, GigaTok, TiTok, LlamaGen and the VQGANs publish no hashes.
PUBLISHED = {
    **{
        name: _one("dinov2", name, f"{DINOV2_HOST}/{name}/{name}_pretrain.pth", sha256)
        for name, sha256 in DINOV2.items()
    },
    "clip_dfn_vitl14": _one(
        "clip",
        "clip_dfn_vitl14",
        "https://huggingface.co/apple/DFN2B-CLIP-ViT-L-14/resolve/main/open_clip_pytorch_model.bin",
        "c02c84198ede77ad80df0803224022f1e9e95ce42551baa91a1b5d87e229e2bb",
        saved_as="DFN2B-CLIP-ViT-L-14.bin",
    ),
    "siglip_so400m14": _one(
        "siglip",
        "siglip_so400m14",
        "https://huggingface.co/google/siglip-so400m-patch14-224/resolve/main/model.safetensors",
        saved_as="siglip-so400m-patch14-224.safetensors",
    ),
    "dino_vits16": _one(
        "dino",
        "dino_vits16",
        "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/"
        "dino_deitsmall16_pretrain.pth",
    ),
    "lpips_vgg16": Published(
        "lpips",
        "",
        (
            File(
                "https://download.pytorch.org/models/vgg16-397923af.pth",
                "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
            ),
            File(
                "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/"
                "lpips/weights/v0.1/vgg.pth",
                "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
                saved_as="lpips_vgg_v0.1.pth",
            ),
        ),
    ),
    "inception_fid": _one(
        "inception",
        "",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        "6726825d",
    ),
    # Figures: the authors' README.
    "gigatok_s_s": _tokenizer("s_s", "VQ_SS256_e100.pt", "1.01"),
    "gigatok_s_b": _tokenizer("s_b", "VQ_SB256_e200.pt", "0.89"),
    "gigatok_b_l": _tokenizer("b_l", "VQ_BL256_e200.pt", "0.81"),
    "gigatok_b_l_dino_disc": _tokenizer("b_l", "VQ_BL256_dino_disc.pt", "0.51"),
    "gigatok_xl_xxl": _tokenizer("xl_xxl", "VQ_XLXXL256_e300.pt", "0.79"),
    # For gFID the authors search for the best guidance, with the schedule "step" from 18 % of the
    # codes (paper, appendix B), and XXL is best without any (appendix D). They publish one scale,
    # 1.75 for XL-XXL (Detailed_instructions.md); the others are those that their search starts
    # from, which it calls empirically best (sample_c2i_cfg_search.py).
    "gigatok_gpt_b_s_s": _gigatok_gpt("b", "gigatok_s_s", "GPT_B256_e300_VQ_SS.pt", "4.05", 2.5),
    "gigatok_gpt_b_s_b": _gigatok_gpt("b", "gigatok_s_b", "GPT_B256_e300_VQ_SB.pt", "3.83", 2.5),
    "gigatok_gpt_b_b_l": _gigatok_gpt("b", "gigatok_b_l", "GPT_B256_e300_VQ_BL.pt", "3.26", 2.5),
    "gigatok_gpt_b_b_l_dino_disc": _gigatok_gpt(
        "b", "gigatok_b_l_dino_disc", "GPT_B256_e300_VQ_BL_dino_disc.pt", "3.33", 2.5
    ),
    "gigatok_gpt_b_xl_xxl": _gigatok_gpt(
        "b", "gigatok_xl_xxl", "GPT_B256_e300_VQ_XLXXL.pt", "3.15", 1.75
    ),
    "gigatok_gpt_xl_b_l": _gigatok_gpt(
        "xl", "gigatok_b_l", "GPT_XL256_e300_VQ_BL.pt", "2.13", 1.25
    ),
    "gigatok_gpt_xxl_b_l": _gigatok_gpt("xxl", "gigatok_b_l", "GPT_XXL256_e300_VQ_BL.pt", "2.03"),
    "gigatok_gpt_xxl_xl_xxl": _gigatok_gpt(
        "xxl", "gigatok_xl_xxl", "GPT_XXL256_e300_VQ_XLXXL.pt", "1.98"
    ),
    **{model: _vqgan(model, *where) for model, where in VQGANS.items()},
    **{model: _titok(model, rfid) for model, rfid in TITOKS.items()},
    **{name: _llamagen_gpt(*entry) for name, entry in LLAMAGEN_GPTS.items()},
}


def bundle_path(name: str) -> Path:
    """Where the bundle of published weights is, once they are fetched."""
    return cache_dir() / "bundles" / name


def is_there(name: str) -> bool:
    """Whether published weights are fetched."""
    # In a bucket, this file is the last to be uploaded.
    return (bundle_path(name) / "config.json").exists()


def download(name: str, *, cache: str | pathlib.Path | None = None) -> list[pathlib.Path]:
    """Returns the files of published weights, after downloading those missing from the cache.

    Files in the cache (`local_cache_dir()` by default), downloaded or put there by hand, need no
    connection, but their hash is checked. Interrupted downloads are resumed. Files of the Hugging
    Face Hub that are not there are looked for in its own cache, and downloaded to it.

    Raises:
      UserError: the name is unknown, a download fails (the message says which file to put where),
        or a hash does not match.
    """
    files = lookup(name, PUBLISHED, "weights").files
    directory = local_cache_dir() if cache is None else pathlib.Path(cache)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return [_find_or_download(file, directory / file.name) for file in files]
    except OSError as error:  # from the disk; `_download` handles those of the connection
        raise UserError(f"weights {name!r}: cannot be stored in {directory} ({error})") from error


def _find_or_download(file: File, path: pathlib.Path) -> pathlib.Path:
    if path.is_file():
        if fault := _wrong_hash(path, path, file):
            raise UserError(f"{path}: {fault}; remove it to download {file.url}")
        return path
    if on_hub := HUB_URL.fullmatch(file.url):
        return _find_on_hub(file, path, **on_hub.groupdict())
    partial = path.with_name(f"{path.name}.partial")
    _download(file, partial, path)
    if fault := _wrong_hash(partial, path, file):
        partial.unlink()  # otherwise the next attempt would resume it
        raise UserError(f"{file.url}: {fault}; discarded the download")
    return partial.replace(path)


def _find_on_hub(
    file: File, path: pathlib.Path, repo: str, revision: str, name: str
) -> pathlib.Path:
    try:
        with hub.one_line(file.url):
            found = hub.download_file(repo, name, revision)
    except UserError as error:
        raise UserError(f"{error}; download it elsewhere and put it at {path}") from error
    if fault := _wrong_hash(found, path, file):
        hub.discard(found)  # otherwise the next attempt would find it
        raise UserError(f"{file.url}: {fault}; discarded the download")
    return found


def _wrong_hash(content: pathlib.Path, path: pathlib.Path, file: File) -> str | None:
    """Describes a wrong hash of `content`; records the hash beside `path` if none is known."""
    with content.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    record = path.with_name(f"{path.name}.sha256")
    expected = file.sha256
    if expected is None and record.is_file():
        expected = record.read_text().split()[0]
    if expected is None:
        record.write_text(f"{found}  {path.name}\n")  # in the format of sha256sum
        tqdm.write(f"{path}: SHA-256 {found}, recorded in {record.name}", file=sys.stderr)
    elif not found.startswith(expected):
        return f"SHA-256 is {found}, expected {expected}"
    return None


def _download(file: File, partial: pathlib.Path, path: pathlib.Path) -> None:
    """Downloads to `partial`, with a few retries."""
    pauses, answered = iter(PAUSES), False
    while True:
        before = _size(partial)
        try:
            return _receive(file, partial)
        except (OSError, http.client.HTTPException) as error:
            if _size(partial) > before:
                pauses = iter(PAUSES)
            answered |= type(error) is not urllib.error.URLError
            transient = getattr(error, "code", None) in (None, *TRANSIENT_STATUSES)
            transient &= answered  # a machine without a connection should say so at once
            pause = next(pauses, None) if transient else None
            if pause is None:
                raise UserError(
                    f"{file.url}: cannot be downloaded ({first_line(error)}); download it "
                    f"elsewhere and put it at {path}"
                ) from error
            message = f"{file.name}: {first_line(error)}; retrying in {pause} s"
            tqdm.write(message, file=sys.stderr)
            time.sleep(pause)


def _receive(file: File, partial: pathlib.Path) -> None:
    """One attempt: resumes `partial` if the server still has the same file, else starts over."""
    # Holds the ETag or Last-Modified of the file that `partial` is the beginning of.
    version = partial.with_name(f"{partial.name}.version")
    start = _size(partial) if version.is_file() else 0
    headers = {"User-Agent": "gigatok_jax"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": version.read_text()}
    request = urllib.request.Request(file.url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # range not satisfiable: complete, or another file
            raise
        version.unlink()
        if error.headers.get("Content-Range") == f"bytes */{start}":
            return
        raise ConnectionError("the server has another file now, starting over") from error
    if response.status != 206:  # the whole file
        start = 0
        version.unlink(missing_ok=True)
        mark = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if mark and not mark.startswith("W/"):  # weak ETags do not promise the same bytes
            version.write_text(mark)
    length = response.headers.get("Content-Length")
    total = start + int(length) if length else None
    bar = tqdm.wrapattr(response, "read", total=total, initial=start, desc=file.name)
    with response, bar as body, partial.open("ab" if start else "wb") as output:
        shutil.copyfileobj(body, output, CHUNK)
    if total is not None and _size(partial) < total:
        raise ConnectionError(f"connection lost at byte {_size(partial)} of {total}")
    version.unlink(missing_ok=True)


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.is_file() else 0
