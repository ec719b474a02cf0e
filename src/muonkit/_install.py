"""How muonkit is installed, for messages: nothing else in the code says it.

The package is on no index. Its repository's address is the one that `[project.urls]` in
pyproject.toml has under `Repository`; until the owner fills that in, a checkout is what there is.
"""

from __future__ import annotations

__all__ = ["install_line"]


def install_line(extra: str) -> str:
    """The command that installs muonkit with an extra, and where it is given if that matters."""
    address = _repository()
    if address:
        return f'pip install "muonkit[{extra}] @ git+{address}"'
    return f'pip install ".[{extra}]" in a checkout of muonkit'


def _repository() -> str | None:
    # Here, because only an error has to know.
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        urls = metadata("muonkit").get_all("Project-URL") or []
    except PackageNotFoundError:  # imported from a folder of sources
        return None
    named = dict(url.split(", ", 1) for url in urls if ", " in url)
    return named.get("Repository")
