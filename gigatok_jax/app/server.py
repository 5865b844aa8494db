"""Serves the page, within bounds for what visitors may send."""

from collections.abc import Sequence
import os
import pathlib
import signal
import tempfile

from PIL import Image

from gigatok_jax.app import explore, tabs
from gigatok_jax.app.components import CSS, gr, write_drawings
from gigatok_jax.errors import UserError, first_line
from gigatok_jax.files import Path, as_path

MAX_UPLOAD = 10 * 2**20  # bytes of a file
MAX_UPLOADS = 512 * 2**20  # bytes of all files that are kept at a time
MAX_PIXELS = 64_000_000  # of an image: a small file may decode to gigabytes
KEPT = 3600  # seconds for which an upload is kept
MAX_WAITING = 32  # calls in the queue


def serve(
    tokenizers: Sequence[str] = (),
    generators: Sequence[str] = (),
    reports: str | Path = "runs",
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
) -> None:
    """Loads networks and serves the page, until it is interrupted.

    Args:
      tokenizers, generators: names, see `explore.load`.
      reports: folder that is searched for reports.
      host: address of the network interface; by default, only this machine reaches the page.
      port: of the server.
      share: whether Gradio's servers make the page public.

    Raises:
      UserError: a network cannot be loaded, or the port is taken.
    """
    models = explore.load(tokenizers, generators)
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above it, and refuses twice as many
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which removes uploads
    with tempfile.TemporaryDirectory(prefix="gigatok-app-") as folder:
        blocks = build(models, as_path(reports), pathlib.Path(folder))
        print(launch(blocks, folder, host=host, port=port, share=share), flush=True)
        blocks.block_thread()


def build(models: explore.Models, reports: Path, folder: pathlib.Path) -> gr.Blocks:
    """The page; `folder` takes uploads and what is shown."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    session = tabs.Session(models, write_drawings(folder))
    with gr.Blocks(title="GigaTok", delete_cache=(KEPT // 6, KEPT)) as blocks:
        gr.Markdown(
            "# GigaTok\nA *tokenizer* turns an image into a few codes and back. A *generator* "
            "draws codes."
        )
        for title in ("Reconstruct", "Swap", "Sample", "Complete"):
            with gr.Tab(title):
                getattr(tabs, title.lower())(session)
        with gr.Tab("Probe"):
            tabs.probe(blocks, reports)
    return blocks.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def launch(blocks: gr.Blocks, folder: str, *, host: str, port: int, share: bool = False) -> str:
    """Starts to serve a page; returns its address."""
    try:
        _, address, public = blocks.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            max_file_size=MAX_UPLOAD,
            app_kwargs={"middleware": [_limit(folder)]},
            footer_links=["api"],
            run_history=False,
            ssr_mode=False,
            theme=gr.themes.Default(font="system-ui", font_mono="monospace"),
            css=CSS,
        )
    except OSError as error:
        raise UserError(f"--port: {first_line(error)}") from error
    return public or address


def _limit(folder: str):
    """Middleware that refuses what is larger than an upload may be, and one upload too many."""
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse

    class Limit:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            refusal = None
            if scope["type"] == "http" and scope["method"] == "POST":
                length = dict(scope["headers"]).get(b"content-length", b"")
                uploads = scope["path"].rstrip("/").endswith("/upload")
                if not length.isdigit():
                    refusal = "expected a Content-Length"
                elif int(length) > MAX_UPLOAD + 2**16:  # the file and the form around it
                    sizes = f"{MAX_UPLOAD >> 20} MB, got {int(length) >> 20} MB"
                    refusal = f"expected a file of at most {sizes}"
                elif uploads and _size(folder) + int(length) > MAX_UPLOADS:
                    refusal = "too many uploads at a time: try again later"
            if refusal:
                await PlainTextResponse(refusal, status_code=413)(scope, receive, send)
            else:
                await self.app(scope, receive, send)

    return Middleware(Limit)


def _size(folder: str) -> int:
    """Bytes of the files below a folder."""
    files = (os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)
    return sum(os.path.getsize(file) for file in files if os.path.exists(file))
