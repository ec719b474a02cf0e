"""What pytest finds of an installed muonkit: the way to its conformance suite, and nothing else.

It stands outside of the package, whose import is torch's: pytest imports this in every run of every
project, and only a run of `muonkit.testing` has the suite's options.
"""

from typing import Any

SUITE = ("muonkit.testing", "muonkit.testing.test_laws")


def pytest_load_initial_conftests(early_config: Any, args: list[str]) -> None:
    if any(arg.partition("::")[0] in SUITE for arg in args):
        early_config.pluginmanager.import_plugin("muonkit.testing.plugin")
