"""Parts of the page: places for photos, images side by side, and functions that answer.

Everything that a visitor sends is checked here, or by Gradio.
"""

import base64
from collections.abc import Callable, Sequence
import functools
import html
import inspect
import io
import logging
import os
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from gigatok_jax.data.sources import DataConfig, open_source
from gigatok_jax.errors import UserError, first_line

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # or Gradio tells its makers that it is imported
try:
    import gradio as gr
    from gradio.utils import get_upload_folder
except ImportError as error:
    raise UserError("the app needs Gradio: pip install 'gigatok_jax[app]'") from error

logger = logging.getLogger(__name__)

VISIBLE = 256  # pixels; smaller images are enlarged, so that the browser does not blur them
EXAMPLES = 12

CSS = """
.figures { display: flex; flex-wrap: wrap; gap: 14px; margin: 2px 0 18px; }
.figures figure { margin: 0; width: min(200px, 23%); }
.figures img { width: 100%; image-rendering: pixelated; border-radius: 4px; }
.figures figcaption { font-size: 0.85em; opacity: 0.8; margin-top: 2px; }
.figures h4 { flex-basis: 100%; margin: 0; }
.report { width: 100%; height: 78vh; border: 1px solid #8884; background: white; }
"""


def answer(
    triggers: Any, function: Callable, inputs: Sequence[Any], outputs: Sequence[Any], **options: Any
):
    """Calls `function` when something happens; what goes wrong is one line in the page.

    The networks serve one call at a time.

    Args:
      triggers: an event, such as `slider.change`, or a list of them; the event `then` of an earlier
        answer sees what that answer has set.
      function: receives the values of `inputs`, and returns or yields those of `outputs`.
      **options: of Gradio's events.

    Returns:
      Gradio's event, which others can follow or cancel.
    """

    def shown(error: Exception) -> gr.Error:
        if isinstance(error, gr.Error):
            return error
        if isinstance(error, UserError | ValueError):
            text = first_line(error)
        else:
            logger.exception("%s", function.__name__)
            text = "the program failed; its terminal shows why"
        return gr.Error(html.escape(text), title="Error", print_exception=False)

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def call(*args):
            try:
                yield from function(*args)
            except Exception as error:
                raise shown(error) from error

    else:

        @functools.wraps(function)
        def call(*args):
            try:
                return function(*args)
            except Exception as error:
                raise shown(error) from error

    listen = functools.partial(gr.on, triggers) if isinstance(triggers, list) else triggers
    return listen(call, inputs, outputs, concurrency_id="networks", **options)


def photo(label: str) -> gr.Image:
    """A place for a photo; functions receive the path of the upload, or None."""
    place = gr.Image(type="filepath", label=label, height=240, buttons=[])

    def check(payload: Any) -> str | None:
        if payload is None:
            return None
        uploads = pathlib.Path(get_upload_folder()).resolve()
        path = pathlib.Path(payload.path or "").resolve()
        # Gradio's own check passes over requests that do not say that they hold a file.
        if not path.is_relative_to(uploads):
            raise gr.Error("expected an uploaded image, got another path", print_exception=False)
        return str(path)

    async def move(path: str | None) -> str | None:
        if path and "://" in path:  # would be downloaded
            raise gr.Error("expected an uploaded image, got an address", print_exception=False)
        return await gr.Image.async_move_resource_to_block_cache(place, path)

    # Gradio's own opens the file, and tells a visitor what is wrong in Python's words.
    place.preprocess = check
    place.async_move_resource_to_block_cache = move
    return place


def write_drawings(folder: pathlib.Path) -> list[str]:
    """Drawings to try the page with; returns their paths."""
    drawings = open_source(
        DataConfig(source="embedded", length=1, eval_length=EXAMPLES),
        train=False,
        image_size=VISIBLE,
    )
    paths = [str(folder / f"drawing-{i}.png") for i in range(len(drawings))]
    for i, path in enumerate(paths):
        Image.fromarray(drawings[i]["image"]).save(path)
    return paths


def examples(photos: Sequence[gr.Image], paths: Sequence[str]) -> None:
    """Rows of images that fill `photos` when they are clicked."""
    rows = np.reshape(paths, (-1, len(photos))).tolist()
    page = EXAMPLES // 2 // len(photos)
    gr.Examples(rows, list(photos), label="Drawings to try", examples_per_page=page)


def figures(heading: str, images: Sequence[tuple[np.ndarray, str]]) -> str:
    """Images `[H, W, 3]` with captions side by side, as HTML."""
    parts = "".join(
        f'<figure><img src="{_data_url(image)}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for image, caption in images
    )
    return f'<div class="figures"><h4>{html.escape(heading)}</h4>{parts}</div>'


def _data_url(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def enlarge(image: np.ndarray) -> np.ndarray:
    scale = max(1, VISIBLE // len(image))
    return image.repeat(scale, 0).repeat(scale, 1)


def choice(names: Sequence[str], label: str) -> gr.Dropdown:
    """A choice of a network, which is not shown if there is only one."""
    names = list(names)
    return gr.Dropdown(names, value=names[0], label=label, visible=len(names) > 1)
