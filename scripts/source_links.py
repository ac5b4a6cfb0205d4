"""A Markdown extension for links from docs/ to files next to it, such as `../src/loraloom`.

In the repository they lead to the file. The site has no such file: there they lead to its page in
the repository, if mkdocs.yml sets this extension's `repository`, and else become plain text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor

ROOT = Path(__file__).parent.parent


class SourceLinks(Treeprocessor):
    def __init__(self, md: Markdown, repository: str):
        super().__init__(md)
        self._repository = repository

    def run(self, root: Element) -> None:
        for link in root.iter("a"):
            _, above, path = link.get("href", "").rpartition("../")
            if not above or not (ROOT / path).exists() or (ROOT / "docs" / path).exists():
                continue
            if self._repository:
                link.set("href", f"{self._repository}/{path}")
            else:
                link.tag = "span"
                del link.attrib["href"]


class SourceLinksExtension(Extension):
    def __init__(self, **settings: Any):
        self.config = {"repository": ["", "Address of the repository's files."]}
        super().__init__(**settings)

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        links = SourceLinks(md, self.getConfig("repository").rstrip("/"))
        md.treeprocessors.register(links, "source_links", 15)  # before links are resolved


def makeExtension(**settings: Any) -> Extension:  # noqa: N802
    return SourceLinksExtension(**settings)
