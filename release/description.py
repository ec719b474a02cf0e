"""A hook of hatchling's: the package's description is README.md with links that work elsewhere.

A package index shows the text alone, where a link to a file of the repository would lead nowhere.
With a `Repository` in `[project.urls]`, such links become absolute ones into the tag of this
version, in the form that GitHub and GitLab both have. Without it, a link becomes its text, and a
picture its description.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# Code comes first, so that what looks like a link in it is left as it is.
_CODE_OR_LINK = re.compile(r"```.*?```|`[^`\n]*`|(!?)\[([^\]]*)\]\(([^)\s]+)\)", re.DOTALL)


def is_local(target: str) -> bool:
    """Whether the target of a link is a file of the repository."""
    return not re.match(r"[a-z]+:|#|//", target)


def outside(readme: str, repository: str | None, version: str) -> str:
    """The README as it reads outside of the repository, whose address is `repository`."""

    def replaced(found: re.Match[str]) -> str:
        picture, text, target = found.groups()
        if target is None or not is_local(target):
            return found[0]
        if repository is None:
            return f"*({text})*" if picture else text
        kind = "raw" if picture else "blob"
        return f"{picture}[{text}]({repository.rstrip('/')}/{kind}/v{version}/{target})"

    return _CODE_OR_LINK.sub(replaced, readme)


class Description(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        """Set `readme`; hatchling has set the version before."""
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        repository = metadata.get("urls", {}).get("Repository")
        text = outside(readme, repository, metadata["version"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
