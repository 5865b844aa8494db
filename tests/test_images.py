"""Files of every kind load as RGB, and crops equal ADM's, written down in plain Pillow."""

import io
import math
import struct
import sys
import zlib

import numpy as np
from PIL import Image
import pytest

from gigatok_jax.data.crops import BadImage, center_crop, load, opencv, random_crop
from gigatok_jax.errors import UserError


def _photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise: not symmetric, so that shifts and flips show."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + rng.integers(-9, 10, smooth.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def _file(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_opaque_images_load_as_pillow_converts_them(kind, mode):
    photo = _photo(37, 23).convert(mode)
    if kind in ("JPEG", "WEBP") and mode in ("P", "1"):
        photo = photo.convert("L")
    data = _file(photo, kind)
    image = load(data)
    assert image.mode == "RGB" and image.size == (37, 23)
    np.testing.assert_array_equal(image, Image.open(io.BytesIO(data)).convert("RGB"))


def test_paths_load_as_their_content(tmp_path):
    path = tmp_path / "photo.png"
    _photo(20, 30).save(path)
    for name in (path, str(path)):
        np.testing.assert_array_equal(load(name), load(path.read_bytes()))


def test_cmyk_jpegs_keep_their_colours():
    photo = Image.new("RGB", (16, 16), (200, 40, 90))
    # Pillow writes CMYK the way Adobe does, inverted, with Adobe's marker.
    data = _file(photo.convert("CMYK"), "JPEG", quality=100)
    assert b"Adobe" in data[:40] and Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(np.asarray(load(data), np.int16) - (200, 40, 90)).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_transparent_pixels_lie_on_white_and_opaque_ones_stay(mode):
    photo = _photo(24, 16).convert("L" if mode == "LA" else "RGB")
    if mode in ("P", "PA"):
        indexed = np.asarray(photo.convert("P", palette=Image.Palette.ADAPTIVE, colors=4)).copy()
        indexed[:, :8] = 9
        image = Image.fromarray(indexed, "P")
        image.putpalette([50, 60, 70] * 10)
        data = _file(image, "PNG", transparency=9)
        opaque = np.full((16, 16, 3), (50, 60, 70))
    else:
        alpha = np.full((16, 24), 255, np.uint8)
        alpha[:, :8] = 0
        photo.putalpha(Image.fromarray(alpha))
        assert photo.mode == mode
        data = _file(photo, "PNG")
        opaque = np.asarray(photo.convert("RGB"))[:, 8:]
    image = np.asarray(load(data))
    assert image.shape == (16, 24, 3) and (image[:, :8] == 255).all()
    np.testing.assert_array_equal(image[:, 8:], opaque)


def test_half_transparent_pixels_mix_with_white():
    image = np.asarray(load(_file(Image.new("RGBA", (4, 4), (0, 100, 200, 128)), "PNG")), int)
    assert np.abs(image - (127, 177, 227)).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_upper_bits(kind):
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    image = np.asarray(load(_file(Image.fromarray(values), kind)))
    np.testing.assert_array_equal(image, np.repeat((values >> 8)[..., None], 3, -1))


def test_sixteen_bit_colour_keeps_its_upper_bits():
    values = np.linspace(0, 65535, 48, dtype=np.uint16).reshape(4, 4, 3)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body
        data += struct.pack(">I", zlib.crc32(name + body))
    np.testing.assert_array_equal(load(data), values >> 8)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "not an image"),
        (b"these are words", "not an image"),
        (_file(_photo(200, 200), "JPEG")[:-2000], "truncated"),
        (_file(_photo(200, 200), "PNG")[:5000], "."),
        (_file(Image.new("F", (4, 4)), "TIFF"), "range is undefined"),
        ("/no/such/file.png", "No such file"),
    ],
)
def test_what_cannot_be_read_says_why(data, reason):
    with pytest.raises(BadImage, match=reason) as caught:
        load(data)
    assert str(caught.value)
    assert "0x" not in str(caught.value)  # the same message at every visit


@pytest.mark.filterwarnings("ignore")
def test_corrupt_bytes_never_raise_anything_else():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"):
        good = np.frombuffer(_file(_photo(40, 30), kind), np.uint8)
        for _ in range(60):
            data = good.copy()
            data[rng.integers(0, len(data), 8)] = rng.integers(0, 256, 8)
            try:
                assert load(data.tobytes()).mode == "RGB"
            except BadImage as error:
                assert str(error)


def _adm_shrink(image: Image.Image, short_side: int) -> Image.Image:
    """guided-diffusion's resize, step by step."""
    width, height = image.size
    while min(width, height) >= 2 * short_side:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=Image.Resampling.BOX)
    scale = short_side / min(width, height)
    size = round(width * scale), round(height * scale)
    return image.resize(size, resample=Image.Resampling.BICUBIC)


SIZES = [(500, 375), (375, 500), (64, 64), (63, 200), (30, 41), (257, 129), (1031, 517), (128, 900)]


@pytest.mark.parametrize("size", SIZES)
def test_center_crop_equals_adm(size):
    photo = _photo(*size)
    pixels = np.asarray(_adm_shrink(photo, 64))
    top, left = (pixels.shape[0] - 64) // 2, (pixels.shape[1] - 64) // 2
    crop = center_crop(photo, 64)
    assert crop.dtype == np.uint8 and crop.shape == (64, 64, 3)
    np.testing.assert_array_equal(crop, pixels[top : top + 64, left : left + 64])
    np.testing.assert_array_equal(crop, center_crop(np.asarray(photo), 64))


def test_center_crop_keeps_an_image_of_its_size():
    photo = _photo(64, 64)
    np.testing.assert_array_equal(center_crop(photo, 64), photo)


@pytest.mark.parametrize("size", SIZES[:4])
def test_random_crops_are_pieces_of_adm_resizes(size):
    photo = _photo(*size)
    resized = [np.asarray(_adm_shrink(photo, short)) for short in range(64, 81)]
    for seed in range(8):
        crop = random_crop(photo, 64, np.random.default_rng(seed))
        assert crop.dtype == np.uint8 and crop.shape == (64, 64, 3)
        flips = (crop, crop[:, ::-1])
        assert min(_distance(pixels, c) for pixels in resized for c in flips) < 0.5  # others: 4


def _distance(pixels: np.ndarray, crop: np.ndarray) -> float:
    """Mean difference of a crop from the piece of `pixels` that is nearest to it."""
    windows = np.lib.stride_tricks.sliding_window_view(pixels, crop.shape)[:, :, 0]
    some = (..., slice(None, None, 4), slice(None, None, 4), 1)  # enough of the pixels to tell
    return np.abs(windows[some].astype(np.int16) - crop[some]).mean((-1, -2)).min()


def test_random_crops_cover_scales_places_and_both_orientations_evenly():
    y, x = np.mgrid[0:80, 0:80]
    # Position as colour: a crop's corner values tell its zoom, place and orientation.
    chart = np.stack([3 * x, 3 * y, 0 * x], -1).astype(np.uint8)
    crops = np.stack(
        [random_crop(chart, 64, np.random.default_rng([1, i])) for i in range(2000)]
    ).astype(int)
    across = crops[:, 32, -1, 0] - crops[:, 32, 0, 0]
    assert abs((across < 0).mean() - 0.5) < 3.5 * 0.5 / math.sqrt(2000)
    zoom = 3 * 63 / np.abs(across)
    short = np.round(zoom * 80)
    assert abs(short.mean() - 72) < 0.5 and short.min() <= 65 and short.max() >= 79
    top, bottom = crops[:, 0, 32, 1], 237 - crops[:, -1, 32, 1]
    assert abs((top - bottom).mean()) < 1 and top.max() > 35 and bottom.max() > 35


@pytest.mark.parametrize("size", SIZES[:4])
def test_a_linear_resize_shows_the_same_crop(size):
    photo = Image.fromarray(np.asarray(_photo(30, 20))).resize(size, Image.Resampling.BICUBIC)
    crops = [
        [random_crop(photo, 64, np.random.default_rng(seed), resize) for seed in range(8)]
        for resize in ("bicubic", "linear")
    ]
    bicubic, linear = np.array(crops, int)
    assert linear.shape == (8, 64, 64, 3) and np.abs(bicubic - linear).mean((1, 2, 3)).max() < 2.5
    assert np.abs(bicubic - np.roll(linear, 1, axis=0)).mean((1, 2, 3)).min() > 5


def test_linear_resize_without_opencv_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    opencv.cache_clear()
    with pytest.raises(UserError, match=r"eval_resize=linear need OpenCV: pip install"):
        random_crop(_photo(64, 64), 64, np.random.default_rng(0), "linear")


def test_random_crop_depends_on_the_generator_alone():
    photo = _photo(100, 80)
    first, again, other = (random_crop(photo, 64, np.random.default_rng(s)) for s in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_bicubic_crops_equal_torchvision():
    image = np.random.default_rng(0).integers(0, 256, (334, 500, 3), np.uint8)
    # Resize rounds the long side down, CenterCrop its half-way margin of 63.5 to an even number.
    whole = np.asarray(Image.fromarray(image).resize((383, 256), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(center_crop(image, 256, "bicubic"), whole[:, 64:320])


def test_linear_crops_equal_albumentations():
    cv2 = pytest.importorskip("cv2")
    image = np.random.default_rng(0).integers(0, 256, (334, 500, 3), np.uint8)
    whole = cv2.resize(image, (383, 256), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(center_crop(image, 256, "linear"), whole[:, 63:319])


def test_thin_images_are_cropped_without_resizing_them_whole():
    image = np.broadcast_to(np.arange(40_000, dtype=np.uint8)[None, :, None], (2, 40_000, 3))
    pytest.importorskip("cv2")
    for resize in ("adm", "bicubic", "linear"):
        assert center_crop(image, 32, resize).shape == (32, 32, 3)
