"""Ten kinds of drawn objects: a labeled image data set that needs no download.

A drawing depends only on (seed, split, index); its size is a matter of resolution. An object is a
stack of parts, which are outlines in a unit frame (x right, y down, within about [-1, 1]). Only
edges are supersampled. Light, texture and background are smooth and computed once per pixel, which
is fast and makes images that a small autoencoder can compress.
"""

from collections.abc import Callable
import colorsys
import functools
import math
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from gigatok_jax.config import configclass

SPLITS = ("train", "validation")
VERSION = 1  # increase when drawings change, so that stored results are not reused

Array = np.ndarray
Rng = np.random.Generator


class Drawing(NamedTuple):
    """One labeled picture."""

    image: Array  # uint8 [S, S, 3]
    label: int  # position in `CLASS_NAMES`
    mask: Array  # float32 [S, S], the object's coverage of each pixel in [0, 1]


class Part(NamedTuple):
    """The outlines of one paint, drawn over the preceding parts of an object."""

    paint: str  # key of the palette; "body" carries the drawing's texture
    outlines: tuple[Array, ...]  # closed polygons, each float [V, 2], filled together
    # Lies flat: clipped to, and lit like, the last part that is not a decal.
    decal: bool = False
    relief: float = 0.05  # width of the rounded edge, relative to the frame
    tint: float = 1.0  # brightness, for faces turned away from the light
    axes: Array = np.eye(2, dtype=np.float32)  # from object to texture coordinates


class Kind(NamedTuple):
    """How the drawings of a class vary.

    As in photos, each class has typical colors, some of which it shares with other classes.
    """

    parts: Callable[[Rng], list[Part]]
    turn: float  # maximum rotation, in degrees
    hues: tuple[float, float]  # range of the "body" paint; other hues are relative to it


def _box(x: float, y: float, rx: float, ry: float) -> Array:
    return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (rx, ry) + (x, y)


def _rotation(angle: float) -> Array:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s], [s, c]])


def _circle(radius: float | Array = 1.0, vertices: int = 97) -> Array:
    """Closed outline, clockwise from the top; `radius` may differ per vertex."""
    angle = np.linspace(0, 2 * np.pi, vertices)
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], -1)


def _ellipse(x: float, y: float, rx: float, ry: float, turn: float = 0.0) -> Array:
    return _circle(vertices=41) * (rx, ry) @ _rotation(turn).T + (x, y)


def _smooth(*points: tuple[float, float], steps: int = 12) -> Array:
    """Closed Catmull-Rom curve through `points` [P, 2] -> [P * steps, 2]."""
    p = np.array(points, np.float64)
    t = np.arange(steps)[:, None, None] / steps
    before, after, last = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
    slope, bend = after - before, 2 * before - 5 * p + 4 * after - last
    curve = p + 0.5 * t * (slope + t * (bend + t * (3 * (p - after) + last - before)))
    return curve.swapaxes(0, 1).reshape(-1, 2)


def _ball(rng: Rng) -> list[Part]:
    width = math.pi / rng.integers(3, 6)  # of a gore (a stripe of the ball), in longitude
    latitude = np.linspace(-np.pi / 2, np.pi / 2, 24)

    def meridian(longitude: float) -> Array:
        x = math.sin(min(max(longitude, -math.pi / 2), math.pi / 2))
        return 0.92 * np.stack([x * np.cos(latitude), np.sin(latitude)], -1)

    starts = np.arange(-math.pi / 2 - rng.uniform(0, 2) * width, math.pi / 2, 2 * width)
    gores = tuple(np.concatenate([meridian(a), meridian(a + width)[::-1]]) for a in starts)
    return [Part("accent", (_circle(0.92),), relief=0.12), Part("pale", gores, decal=True)]


def _boat(rng: Rng) -> list[Part]:
    top, jib, clew = rng.uniform(-1.0, -0.85), rng.uniform(0.55, 0.75), rng.uniform(0.65, 0.85)
    hull = _smooth((-0.98, 0.36), (0, 0.42), (0.98, 0.32), (0.7, 0.8), (0, 0.92), (-0.66, 0.82))
    main = np.array([(0.02, top), (0.65 * clew, -0.35), (clew, 0.2), (0.02, 0.2)])
    fore = np.array([(-0.12, top + 0.2), (-0.12, 0.2), (-jib, 0.2)])
    return [
        Part("wood", (_box(-0.04, 0.25 + 0.5 * top, 0.05, 0.25 - 0.5 * top),)),
        Part("pale", (main,), relief=0.07),
        Part("accent", (fore,), relief=0.07),
        Part("body", (hull,)),
    ]


def _cube(rng: Rng) -> list[Part]:
    yaw, pitch = math.radians(rng.uniform(25, 65)), math.radians(rng.uniform(24, 40))
    # Orthographic projections of the three half-edges; a and b point at the viewer.
    a = 0.66 * np.array([math.cos(yaw), math.sin(yaw) * math.sin(pitch)])
    b = 0.66 * np.array([-math.sin(yaw), math.cos(yaw) * math.sin(pitch)])
    c = 0.66 * np.array([0.0, -math.cos(pitch)])

    def face(center: Array, u: Array, v: Array, tint: float) -> Part:
        outline = np.stack([center + u + v, center + u - v, center - u - v, center - u + v])
        edges = np.stack([u / np.linalg.norm(u), v / np.linalg.norm(v)], 1)
        return Part(
            "body", (outline,), decal=True, tint=tint, axes=np.linalg.inv(edges).astype(np.float32)
        )

    hull = np.stack([c - a - b, c + a - b, a - b - c, a + b - c, b - a - c, c + b - a])
    left, right = rng.permutation([0.62, 0.82])
    faces = [face(c, a, b, 1.08), face(a, b, c, right), face(b, a, c, left)]
    return [Part("body", (hull,), relief=0.03), *faces]


def _donut(rng: Rng) -> list[Part]:
    hole, waves, phase = rng.uniform(0.28, 0.38), rng.integers(5, 9), rng.uniform(0, 6)
    edge = 0.8 + 0.05 * np.sin(waves * np.linspace(0, 2 * np.pi, 97) + phase)
    # Even-odd filling makes the inner circle a hole.
    dough = np.concatenate([_circle(0.95), _circle(hole)])
    icing = np.concatenate([_circle(edge), _circle(hole + 0.07)])
    sprinkles = tuple(
        _ellipse(0.6 * math.cos(a), 0.6 * math.sin(a), 0.13, 0.055, rng.uniform(0, 3))
        for a in np.arange(7) * 2 * math.pi / 7 + phase
    )
    parts = [Part("dough", (dough,), relief=0.06), Part("body", (icing,), relief=0.04)]
    return [*parts, Part("pale", sprinkles, decal=True)] if rng.random() < 0.5 else parts


def _fish(rng: Rng) -> list[Part]:
    fat, fin = rng.uniform(0.46, 0.6), rng.uniform(0.75, 0.92)
    upper = np.array([(-0.95, 0.04), (-0.6, -0.7), (-0.1, -1), (0.35, -0.5), (0.62, -0.15)])
    body = _smooth(*upper * (1, fat), *upper[:0:-1] * (1, -fat))
    tail = _smooth((0.5, 0.0), (0.9, -0.5), (1.02, -0.46), (0.86, 0.0), (1.02, 0.46), (0.9, 0.5))
    back = _smooth((-0.4, -0.6 * fat), (-0.1, -fin), (0.3, -fin), (0.35, -0.4 * fat))
    side = _smooth((-0.15, 0.1), (0.22, 0.06), (0.28, 0.26), (0.08, 0.3))
    return [
        Part("accent", (tail, back)),
        Part("body", (body,), relief=0.07),
        Part("pale", (_ellipse(-0.58, -0.12, 0.15, 0.15),), decal=True),
        Part("dark", (_ellipse(-0.6, -0.12, 0.08, 0.08),), decal=True),
        Part("accent", (side,), relief=0.02),
    ]


def _flower(rng: Rng) -> list[Part]:
    petals, slim = int(rng.integers(5, 8)), rng.uniform(1.6, 2.1)

    def whorl(reach: float, turn: float) -> tuple[Array, ...]:
        petal = reach * _ellipse(0.54, 0, 0.46, slim / petals)
        turns = turn + np.arange(petals) * 2 * math.pi / petals
        return tuple(petal @ _rotation(angle).T for angle in turns)

    return [
        Part("body", whorl(1.0, 0.0), relief=0.04),
        Part("accent", whorl(0.6, math.pi / petals), relief=0.03),
        Part("gold", (_circle(rng.uniform(0.22, 0.3)),), relief=0.04),
    ]


def _house(rng: Rng) -> list[Part]:
    wide, ridge, door = rng.uniform(0.62, 0.78), rng.uniform(0.05, 0.35), rng.uniform(-0.35, 0.35)
    panes = tuple(_box(x, 0.38, 0.13, 0.15) for x in (-0.4, 0.0, 0.4) if abs(x - door) > 0.3)
    roof = np.array([(-wide - 0.2, 0), (-ridge, -0.88), (ridge, -0.88), (wide + 0.2, 0)])
    return [
        Part("wood", (_box(0.45 * wide + 0.1, -0.62, 0.12, 0.34),), relief=0.03),
        Part("body", (_box(0, 0.4, wide, 0.5),)),
        Part("dark", (_box(door, 0.63, 0.14, 0.27),), decal=True),
        Part("gold", panes, decal=True),
        Part("accent", (roof,)),
    ]


def _mushroom(rng: Rng) -> list[Part]:
    foot, brim, spot = rng.uniform(0.26, 0.4), rng.uniform(0.05, 0.2), rng.uniform(0.14, 0.19)
    stem = np.array([(0.2, -0.1), (0.22, 0.4), (foot, 0.86)])
    cap = np.array([(0.4, -0.84), (0.8, -0.42), (0.95, brim), (0.5, brim + 0.16)])
    mirror = (-1, 1)
    dots = ((-0.5, -0.3), (0.05, -0.6), (0.52, -0.25), (0.0, -0.08))
    parts = [
        Part("pale", (_smooth(*stem, *stem[::-1] * mirror),)),
        Part("body", (_smooth((0, -0.94), *cap, *cap[::-1] * mirror),), relief=0.08),
    ]
    spots = Part("pale", tuple(_ellipse(x, y, spot, 0.85 * spot) for x, y in dots), decal=True)
    return [*parts, spots] if rng.random() < 0.7 else parts


def _star(rng: Rng) -> list[Part]:
    star = _circle(np.where(np.arange(11) % 2, rng.uniform(0.46, 0.58), 1.04), vertices=11)
    parts = [Part("body", (star,), relief=0.06)]
    return [*parts, Part("accent", (0.5 * star,), relief=0.03)] if rng.random() < 0.4 else parts


def _tree(rng: Rng) -> list[Part]:
    droop, slim = rng.uniform(0.0, 0.1), rng.uniform(0.95, 1.2)

    def tier(top: float, foot: float, half: float) -> Part:
        return Part("body", (np.array([(0, top), (half, foot), (0, foot + droop), (-half, foot)]),))

    trunk = Part("wood", (_box(0, 0.75, 0.15, 0.25),), relief=0.03)
    tiers = ((-0.3, 0.66, 0.78), (-0.66, 0.2, 0.62), (-1.0, -0.24, 0.45))
    return [trunk, *(tier(top, foot, slim * half) for top, foot, half in tiers)]


KINDS = {
    "ball": Kind(_ball, 180, hues=(0.85, 1.25)),
    "boat": Kind(_boat, 20, hues=(0.5, 0.9)),
    "cube": Kind(_cube, 20, hues=(0.05, 0.45)),
    "donut": Kind(_donut, 180, hues=(0.7, 1.1)),
    "fish": Kind(_fish, 25, hues=(0.4, 0.8)),
    "flower": Kind(_flower, 180, hues=(0.65, 1.05)),
    "house": Kind(_house, 20, hues=(-0.05, 0.35)),
    "mushroom": Kind(_mushroom, 25, hues=(-0.15, 0.2)),
    "star": Kind(_star, 180, hues=(0.1, 0.5)),
    "tree": Kind(_tree, 20, hues=(0.3, 0.56)),
}
CLASS_NAMES = tuple(KINDS)  # label = position


def _hsv(hue: float, saturation: float, value: float) -> Array:
    """RGB in [0, 1], float32 [3]; spaces hues perceptually, because HSV has too much green."""
    hue = np.interp(hue % 1.0, (0, 0.3, 0.5, 0.75, 1), (0, 0.16, 0.42, 0.68, 1))
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)


def _palette(rng: Rng, hues: tuple[float, float]) -> dict[str, Array]:
    """A main hue, a nearby accent, a muted ground far from both, and natural paints."""
    hue, saturation, value = rng.uniform(*hues), rng.uniform(0.55, 0.8), rng.uniform(0.78, 0.95)
    side = rng.choice([-1.0, 1.0])
    beside, ground = hue + side * rng.uniform(0.12, 0.3), hue - side * rng.uniform(0.3, 0.5)
    muted, bright = rng.uniform(0.15, 0.42), rng.uniform(0.5, 0.98)
    return {
        "body": _hsv(hue, saturation, value),
        "pattern": _hsv(hue + rng.uniform(-0.07, 0.07), 0.65 * saturation, min(1, 1.08 * value)),
        "accent": _hsv(beside, rng.uniform(0.5, 0.75), rng.uniform(0.7, 0.95)),
        "pale": _hsv(rng.uniform(0.15, 0.3), rng.uniform(0.05, 0.18), 0.96),
        "gold": _hsv(rng.uniform(0.2, 0.28), rng.uniform(0.5, 0.75), 0.96),
        "dough": _hsv(rng.uniform(0.14, 0.18), rng.uniform(0.45, 0.6), rng.uniform(0.7, 0.85)),
        "wood": _hsv(rng.uniform(0.06, 0.16), rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.6)),
        "dark": _hsv(beside, 0.45, 0.25),
        "ground": _hsv(ground, muted, bright),
        "sky": _hsv(ground + rng.uniform(-0.12, 0.12), 0.8 * muted, bright + rng.uniform(-0.2, 0)),
    }


def _background(rng: Rng, x: Array) -> Array:
    """Gradient, soft horizon or blobs: share of ground color [S, S] at coordinates x [S]."""
    y = x[:, None]
    match rng.integers(3):
        case 0:
            angle = rng.uniform(0, 2 * math.pi)
            share = 0.5 + 0.7 * (math.cos(angle) * (x - 0.5) + math.sin(angle) * (y - 0.5))
        case 1:
            level, soft = rng.uniform(0.5, 0.8), rng.uniform(0.02, 0.06)
            share = 0.5 + 0.5 * np.tanh((y - level) / soft) + 0 * x
        case _:
            spots = rng.uniform(0, 1, (3, 2)).tolist()
            share = sum(np.exp(-10 * (x - a) ** 2) * np.exp(-10 * (y - b) ** 2) for a, b in spots)
    return np.clip(share, 0, 1)


# Probability and wave. Busy textures are rarer, because a small codebook blurs them.
TEXTURES = (
    (0.12, lambda u, v: np.sin(u)),  # stripes
    (0.12, lambda u, v: np.cos(u) + np.cos(v) - 0.7),  # dots
    (0.12, lambda u, v: 1.5 * np.sin(0.7 * u) * np.sin(0.7 * v)),  # checks
    (0.3, lambda u, v: 0.08 * u),  # gradient
    (0.34, lambda u, v: np.full_like(u, -9)),  # plain
)


def _texture(rng: Rng) -> Callable[[Array], Array]:
    """Function from object coordinates [2, S, S] to the share of pattern color [S, S]."""
    shares, waves = zip(*TEXTURES, strict=True)
    wave = waves[rng.choice(len(waves), p=shares)]
    turn = _rotation(rng.integers(4) * math.pi / 4)
    k = 2 * math.pi / rng.uniform(0.18, 0.28)  # a small tokenizer cannot reproduce finer periods
    axes = (k * turn).astype(np.float32)
    return lambda at: 0.5 + 0.5 * np.tanh(2 * wave(*np.tensordot(axes, at, 1)))


def _coverage(outlines: list[Array], size: int) -> Array:
    """Fills polygons in image units, antialiased -> float32 [S, S] in [0, 1]."""
    fine = 4 if size <= 64 else 3 if size <= 128 else 2
    canvas = Image.new("L", (size * fine, size * fine))
    pen = ImageDraw.Draw(canvas)
    for outline in outlines:
        pen.polygon((outline * (size * fine) - 0.5).ravel().tolist(), fill=255)
    return np.asarray(canvas.reduce(fine), np.float32) / 255


@functools.lru_cache(maxsize=128)
def _gaussian(size: int, sigma: float, shift: float = 0.0, slope: bool = False) -> Array:
    """[S, S] matrix that blurs and shifts a column (`slope`: sigma times the derivative)."""
    at = (np.arange(size) + 0.5) / size
    z = (at[:, None] - at - shift) / sigma
    kernel = np.exp(-0.5 * z * z) / (size * sigma * math.sqrt(2 * math.pi))
    return (-z * kernel if slope else kernel).astype(np.float32)


def _light(cover: Array, relief: float, lx: float, ly: float) -> tuple[Array, Array]:
    """Diffuse factor and highlight, [S, S] each, of a pillow that rises from the edges."""
    blur, slope = _gaussian(len(cover), relief), _gaussian(len(cover), relief, slope=True)
    gx, gy = blur @ cover @ slope.T, slope @ cover @ blur.T
    shine = np.exp(-60 * ((gx + 0.16 * lx) ** 2 + (gy + 0.16 * ly) ** 2))
    return 1 - 0.9 * (lx * gx + ly * gy), 0.22 * shine


def _paint(
    image: Array,
    parts: list[Part],
    covers: list[Array],
    colors: dict[str, Array],
    texture: Callable[[Array], Array],
    at: Array,
    light: float,
) -> Array:
    """Paints the object and its shadow into `image` [S, S, 3]; returns its mask [S, S].

    `covers` is the coverage [S, S] of each part, `at` the object coordinates [2, S, S] of the
    pixels, and `light` the direction to the light (radians, clockwise from the right).
    """
    size, lx, ly = len(image), math.cos(light), math.sin(light)
    solid = [cover for part, cover in zip(parts, covers, strict=True) if not part.decal]
    mask = functools.reduce(np.maximum, solid)
    down, across = (_gaussian(size, 0.035, -0.05 * towards) for towards in (ly, lx))
    image *= 1 - 0.45 * (down @ mask @ across.T)[..., None]
    contact, below = _gaussian(size, 0.02), mask
    for part, cover in zip(parts, covers, strict=True):
        if part.decal:
            cover = cover * below
        else:
            shade, shine = _light(cover, part.relief, lx, ly)
            image *= 1 - 0.25 * (mask * (contact @ cover @ contact.T))[..., None]
            below = cover
        color = colors[part.paint]
        if part.paint == "body":
            share = texture(np.tensordot(part.axes, at, 1))[..., None]
            color = color + share * (colors["pattern"] - color)
        lit = (part.tint * shade)[..., None] * color + shine[..., None]
        image += cover[..., None] * (lit - image)
    return mask


def draw(index: int, *, image_size: int = 64, seed: int = 0, split: str = "train") -> Drawing:
    """Draws one example; equal arguments give equal pictures.

    Args:
      index: position in the split, >= 0; the label is `index % 10`.
      image_size: side S in pixels; the scene does not depend on it.
      seed: of the whole data set, >= 0.
      split: one of `SPLITS`; no drawing is in both.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    label = index % len(CLASS_NAMES)
    kind = KINDS[CLASS_NAMES[label]]
    parts, colors, texture = kind.parts(rng), _palette(rng, kind.hues), _texture(rng)

    scale, stretch = rng.uniform(0.27, 0.33), rng.choice([-1, 1]) * rng.uniform(0.92, 1.08)
    pose = _rotation(math.radians(rng.uniform(-kind.turn, kind.turn))) * (stretch, 1)
    center = 0.5 + 0.5 * (0.48 - scale) * rng.uniform(-1, 1, 2)
    # From above, in steps of 5 degrees so that `_gaussian` caches the matrices of shadows.
    light = math.radians(5 * int(rng.integers(-26, -9)))

    x = ((np.arange(image_size) + 0.5) / image_size).astype(np.float32)
    image = colors["sky"] + _background(rng, x)[..., None] * (colors["ground"] - colors["sky"])
    at = np.stack(np.meshgrid(*(x - c for c in center.tolist())))  # [2, S, S]: x, y
    at = np.tensordot(np.linalg.inv(pose).astype(np.float32), at, 1)
    placed = [[scale * outline @ pose.T + center for outline in p.outlines] for p in parts]
    covers = [_coverage(outlines, image_size) for outlines in placed]
    mask = _paint(image, parts, covers, colors, texture, at, light)
    return Drawing((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), label, mask)


def _draw(index: int, image_size: int, seed: int, split: str) -> Array:
    image = draw(index, image_size=image_size, seed=seed, split=split).image
    image.flags.writeable = False  # epochs share it
    return image


# Drawing costs about ten times a crop. 20,000 drawings of 80 pixels, from which crops of 64 are
# taken, need 400 MB.
_remembered = functools.lru_cache(maxsize=20_000)(_draw)


@configclass
class EmbeddedSource:
    """Drawings as a data source; classes alternate."""

    length: int
    image_size: int = 64  # side S in pixels
    split: Literal["train", "validation"] = "train"
    seed: int = 0  # of the whole data set

    class_names = CLASS_NAMES
    codes = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": uint8 [S, S, 3], "label": int, "key": str}."""
        index = range(self.length)[index]
        make = _remembered if self.image_size <= 80 else _draw
        image = make(index, self.image_size, self.seed, self.split)
        key = f"{self.split}/{index:08d}"
        return {"image": image, "label": self.label(index), "key": key}

    def label(self, index: int) -> int:
        return index % len(CLASS_NAMES)

    def version(self) -> str:
        return f"drawings {VERSION}: {self}"
