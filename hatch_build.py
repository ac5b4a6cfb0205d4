"""What the package's metadata says of the repository, whose address is LORALOOM_REPOSITORY.

With this environment variable, the package has project URLs, and the README's relative links and
images lead there. Without it, they become plain text: a package index has no such files.
"""

import os
import re
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")
_PAGES = {"Documentation": "docs/README.md", "Changelog": "CHANGELOG.md"}


class RepositoryMetadata(MetadataHookInterface):
    """Sets `readme` and `urls`; addresses of files are as on GitHub."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add both to what pyproject.toml has."""
        repository = _repository()
        tag = f"v{metadata['version']}"
        with open(f"{self.root}/README.md", encoding="utf-8") as file:
            text = _RELATIVE.sub(lambda link: _absolute(link, repository, tag), file.read())
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = {}
        if repository:
            pages = {name: f"{repository}/blob/{tag}/{path}" for name, path in _PAGES.items()}
            issues = f"{repository}/issues"
            metadata["urls"] = {"Repository": repository, **pages, "Issues": issues}


def _repository() -> str:
    repository = os.environ.get("LORALOOM_REPOSITORY", "").rstrip("/")
    if repository and not re.fullmatch(r"https://[^/\s]+/[^/\s]+/[^/\s]+", repository):
        raise ValueError(
            f"LORALOOM_REPOSITORY must be https://HOST/OWNER/NAME, got {repository!r}. Correct the "
            "address, or unset the variable to build without links."
        )
    return repository


def _absolute(link: re.Match[str], repository: str, tag: str) -> str:
    image, text, path = link.groups()
    if not repository:
        return f"*{text}*" if image else text
    return f"{image}[{text}]({repository}/{'raw' if image else 'blob'}/{tag}/{path})"
