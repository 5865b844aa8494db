"""A report's page: what it is made of, and the one HTML file, needing no other, that shows it."""

import base64
from collections.abc import Callable, Mapping, Sequence
import io
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jinja2
import matplotlib
from matplotlib.figure import Figure
import numpy as np
from PIL import Image

from gigatok_jax.files import replacing

COLOURS = ("#2f6fde", "#d9622b", "#2a9d6f", "#8e5bd0", "#c23b6b", "#6b7280", "#b58a00", "#0f8ea8")
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3af",
    "axes.labelcolor": "#374151",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
    "font.size": 9,
    "svg.fonttype": "none",
}


class Row(NamedTuple):
    """A row of a table; `kind` is its CSS class."""

    cells: Sequence[str]
    kind: str = ""


class Table(NamedTuple):
    headings: Sequence[str]
    rows: Sequence[Row]


class Picture(NamedTuple):
    """A chart or a picture; `source` is a data URL."""

    title: str
    source: str
    caption: str = ""


class Group(NamedTuple):
    """Charts with something in common."""

    title: str
    charts: Sequence[Picture]


class Section(NamedTuple):
    """What there is of one run.

    Attributes:
      title: the run's label.
      charts, notes, pictures, values: in this order; values are the last ones of metrics.
      settings: heading to names and values; each is folded.
    """

    title: str
    charts: Sequence[Picture]
    notes: Sequence[str]
    pictures: Sequence[Picture]
    values: Mapping[str, str]
    settings: Mapping[str, Mapping[str, str]]


class Page(NamedTuple):
    """A report.

    Attributes:
      kind: of the runs.
      lead: what is seen here.
      table: of all runs.
      notes: on the table.
      groups: charts of all runs.
      sections: one a run.
      legend: whether the runs' colours are explained, because charts show several.
    """

    kind: str
    lead: str
    table: Table
    notes: Sequence[str]
    groups: Sequence[Group]
    sections: Sequence[Section]
    legend: bool = False


def write(page: Page, path: pathlib.Path) -> None:
    """Renders `report.html` into one file."""
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html")
    titles = [section.title for section in page.sections]
    html = template.render(
        page._asdict(),
        title=titles[0] if len(titles) == 1 else f"{len(titles)} side by side",
        differing=_differing(page.sections),
        colours=dict(zip(titles, colours(len(titles)), strict=True)) if page.legend else {},
    )
    with replacing(path) as aside:
        aside.write_text(html, encoding="utf-8")


def labels(workdirs: Sequence[pathlib.Path]) -> list[str]:
    """The shortest end of each path that none of the other folders' paths has."""
    paths = [workdir.resolve() for workdir in workdirs]

    def label(path: pathlib.Path) -> str:
        for length in range(1, len(path.parts)):
            end = path.parts[-length:]
            if all(other == path or other.parts[-length:] != end for other in paths):
                return "/".join(end)
        return str(path)

    return [label(path) for path in paths]


def settings(mapping: Mapping[str, Any]) -> dict[str, str]:
    """Nested fields as `a.b`, with their values as people read them."""
    leaves = jax.tree_util.tree_leaves_with_path(
        dict(mapping), is_leaf=lambda value: not isinstance(value, dict)
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): value
        if isinstance(value, str)
        else json.dumps(value)
        for path, value in leaves
    }


def _differing(sections: Sequence[Section]) -> Table | None:
    """Settings that are not the same in all sections, a section a column."""
    titles = [section.title for section in sections]
    rows = []
    for heading in dict.fromkeys(h for section in sections for h in section.settings):
        values = [section.settings.get(heading, {}) for section in sections]
        for name in dict.fromkeys(n for one in values for n in one):
            cells = [one.get(name, "-") for one in values]
            if len(set(cells)) > 1:
                rows.append(Row([f"{heading}: {name}", *cells]))
    return Table(["", *titles], rows) if rows else None


def picture(title: str, path: pathlib.Path, caption: str) -> Picture:
    """A PNG file; a large one is stored as JPEG."""
    content, kind = path.read_bytes(), "png"
    if len(content) > 2**20:
        buffer, kind = io.BytesIO(), "jpeg"
        Image.open(path).convert("RGB").save(buffer, "jpeg", quality=90)
        content = buffer.getvalue()
    return Picture(title, _data_url(f"image/{kind}", content), caption)


def chart(title: str, draw: Callable[[Any], None]) -> Picture:
    """An SVG of what `draw` makes of axes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Picture(title, _data_url("image/svg+xml", buffer.getvalue()))


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def colours(count: int) -> list[str]:
    """As many colours as there are runs, all different."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    wheel = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, count))
    return [matplotlib.colors.to_hex(colour) for colour in wheel]
