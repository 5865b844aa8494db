"""Hooks of `mkdocs build`: pages that are not in docs/, and links that work on a code host too.

The site shows Markdown files of the rest of the repository too, and the generated reference of
config fields. Files link to each other by their places in the repository; `on_page_markdown` turns
these into places on the site. A link to a file that does not exist fails the build.
"""

import logging
import os
import pathlib
import re

import config_reference  # MkDocs looks for it beside this file
from mkdocs.structure.files import File

logger = logging.getLogger("mkdocs.hooks")  # its warnings fail a strict build

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Pages that docs/ does not have: what a link to them names in the repository, and on the site.
CONFIGURATION = "configuration.md"
PAGES = {
    "tools/config_reference.py": CONFIGURATION,
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "benchmarks/README.md": "benchmarks.md",
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")
BLOCK = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)


def on_files(files, config):
    """Adds the pages that docs/ does not have."""
    for source, name in PAGES.items():
        reference = name == CONFIGURATION
        text = config_reference.page() if reference else (ROOT / source).read_text()
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites the links of a page; blocks of code stay as they are."""
    name = page.file.src_uri
    source = next((path for path, shown in PAGES.items() if shown == name), f"docs/{name}")
    parts = BLOCK.split(markdown)
    parts[::2] = [LINK.sub(lambda link: rewrite(link, source), part) for part in parts[::2]]
    return "".join(parts)


def rewrite(link: re.Match, source: str) -> str:
    """A link of the file `source`, as the site needs it.

    The site lacks most files of the repository: a link to one becomes its text.
    """
    text, target, anchor = link[1], link[2], link[3] or ""
    if not target or re.match(r"[a-z]+:", target):
        return link[0]
    path = os.path.normpath(os.path.join(os.path.dirname(source), target))
    if path in PAGES:
        return f"[{text}]({PAGES[path]}{anchor})"
    if not (ROOT / path).exists():
        logger.warning("%s: a link to %s, which does not exist", source, target)
    if path.startswith("docs/"):
        return f"[{text}]({path.removeprefix('docs/')}{anchor})"
    return text
