"""A Markdown extension for links from docs/ to files next to it, such as `../src/loraloom`.

In the repository they lead to the file. The site has no such file: there they lead to the version's
file in the repository at LORALOOM_REPOSITORY, and become plain text where that is not set.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from xml.etree.ElementTree import Element

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor

ROOT = Path(__file__).parent.parent


class SourceLinks(Treeprocessor):
    def run(self, root: Element) -> None:
        address = files_address()
        for link in root.iter("a"):
            _, above, path = link.get("href", "").rpartition("../")
            if not above or not (ROOT / path).exists() or (ROOT / "docs" / path).exists():
                continue
            if address:
                link.set("href", f"{address}/{path}")
            else:
                link.tag = "span"
                del link.attrib["href"]


def files_address() -> str:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    repository = os.environ.get("LORALOOM_REPOSITORY", "")
    version = settings["project"]["version"]
    return f"{repository.rstrip('/')}/blob/v{version}" if repository else ""


class SourceLinksExtension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        md.treeprocessors.register(SourceLinks(md), "source_links", 15)  # before links are resolved


def makeExtension() -> Extension:  # noqa: N802
    return SourceLinksExtension()
