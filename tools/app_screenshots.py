"""Drives `gigatok app` in Chromium, and writes its pictures: `python -m tools.app_screenshots`.

Needs the extra `app`, `pip install playwright`, and an installed Chromium. Every tab of the page is
used as a visitor would; the pictures are those of docs/app.md.
"""

import contextlib
import pathlib
import shutil
import socket
import subprocess
import sys
import time

from playwright.sync_api import Page, sync_playwright

IMAGES = pathlib.Path(__file__).parents[1] / "docs" / "images"
SIZE = {"width": 1280, "height": 860}
TIMEOUT = 180_000  # milliseconds; the first call of a network compiles


@contextlib.contextmanager
def served(*flags: str):
    """The address of a page that is served in the meantime."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gigatok_jax", "app", f"--port={port}", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def visit(page: Page, out: pathlib.Path) -> None:
    """Uses every tab, and writes a picture of each."""

    def tab(name):
        page.get_by_role("tab", name=name).click()

    def save(name):
        time.sleep(1)  # for the last image to fade in
        page.screenshot(path=out / f"app-{name}.png", full_page=True)

    def shown(count):
        page.wait_for_function(
            "n => [...document.querySelectorAll('.figures img')]"
            ".filter(image => image.checkVisibility()).length >= n",
            arg=count,
            timeout=TIMEOUT,
        )

    page.locator("button.gallery-item:visible").nth(4).click()
    shown(3)
    codes = page.locator("div.block:has(label:has-text('Codes')) img").last
    codes.wait_for(timeout=TIMEOUT)
    codes.scroll_into_view_if_needed()
    box = codes.bounding_box()
    page.mouse.click(box["x"] + 0.44 * box["width"], box["y"] + 0.44 * box["height"])
    page.get_by_text("Code 27 is").wait_for(timeout=TIMEOUT)
    save("reconstruct")

    tab("Swap")
    page.locator("tbody tr:visible").nth(2).click()
    shown(5)
    kept = page.locator("input[type=number]:visible").nth(2)
    kept.fill("40")
    kept.press("Enter")
    page.get_by_text("the first 40").wait_for(timeout=TIMEOUT)
    page.get_by_label("codes that the generator draws").check()
    time.sleep(25)  # until the generator has drawn
    save("swap")

    tab("Sample")
    page.get_by_role("button", name="Sample", exact=True).click()
    page.get_by_text("8 of 8 images").wait_for(timeout=TIMEOUT)
    save("sample")

    tab("Complete")
    page.locator("button.gallery-item:visible").nth(1).click()
    page.get_by_role("button", name="Complete", exact=True).click()
    page.get_by_text("completion 4").wait_for(timeout=TIMEOUT)
    save("complete")

    tab("Probe")
    page.frame_locator("iframe.report").locator("h1").wait_for(timeout=TIMEOUT)
    save("probe")


def main(flags: list[str]) -> None:
    if not (browser := shutil.which("chromium") or shutil.which("google-chrome")):
        sys.exit("expected Chromium or Chrome on the path")
    with served(*flags) as address, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport=SIZE)
        page.goto(address)
        visit(page, IMAGES)
        chromium.close()


if __name__ == "__main__":
    main(sys.argv[1:])
