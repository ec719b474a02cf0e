"""The `muonkit` command without the lab: says what is missing instead of a traceback."""

from __future__ import annotations

import sys

from muonkit._install import install_line

__all__ = ["main"]


def main() -> int | None:
    """Run the command line of `muonkit.lab`.

    Returns:
        The exit status for `sys.exit`; 2 when a package of the `lab` extra is not installed.

    Raises:
        ModuleNotFoundError: a module of muonkit itself or of Python's is missing, which
            installing the extra would not mend.
    """
    try:
        from muonkit.lab.cli import main as lab_main
    except ModuleNotFoundError as error:
        missing = (error.name or "muonkit").partition(".")[0]
        if missing == "muonkit" or missing in sys.stdlib_module_names:
            raise
        print(
            f"error: the muonkit command needs {missing}, which is not installed: "
            f"{install_line('lab')}",
            file=sys.stderr,
        )
        return 2
    return lab_main()
