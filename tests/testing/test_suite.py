"""The conformance suite on ours, as its users run it, and what it says where it is misused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import muonkit_pytest
from muonkit.testing import LAWS, Subject, check, check_on_ranks, load
from muonkit.testing.rank_laws import on_this_rank
from tests.helpers import warm
from tests.helpers.paths import ROOT

OURS = ROOT / "benchmarks" / "conformance_subjects.py"


def suite(*arguments: str, cwd: Path) -> tuple[int, str]:
    """A run of the suite, as its page says."""
    done = warm.run(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "muonkit.testing.plugin",
         "--pyargs", "muonkit.testing", *arguments],
        cwd=cwd,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_ours_keeps_every_law(tmp_path: Path) -> None:
    """On ranks in test_on_ranks.py, where one group of processes has all cases."""
    file = tmp_path / "found.json"
    code, told = suite(
        "--optimizer", f"{OURS}:muon", "--conformance-json", str(file), "-k", "not ranks",
        cwd=tmp_path,
    )  # fmt: skip
    assert code == 0, told
    found = json.loads(file.read_text())
    assert [row["law"] for row in found["laws"]] == [
        name for name, law in LAWS.items() if not law.world_size
    ]
    assert {row["verdict"] for row in found["laws"]} == {"pass"}


def test_muonw_keeps_every_law() -> None:
    assert {finding.verdict for finding in check(load(f"{OURS}:muonw"))} == {"pass"}


def test_a_failing_law_says_on_what(tmp_path: Path) -> None:
    """With a class that needs no adapter: torch's own Muon, which breaks one."""
    file = tmp_path / "found.json"
    code, told = suite(
        "--optimizer", "torch.optim:Muon", "--conformance-json", str(file), cwd=tmp_path
    )
    assert code == 1
    assert "smallest input: a 2 × 3 gradient times 1e-12" in told
    assert LAWS["tiny_gradients_are_nothing"].states in told
    rows = {row["law"]: row for row in json.loads(file.read_text())["laws"]}
    assert [name for name, row in rows.items() if row["verdict"] == "fail"] == [
        "tiny_gradients_are_nothing",
        "huge_gradients_are_nothing",
    ]
    assert rows["a_convolution_is_a_matrix"]["verdict"] == "does not claim"


def test_without_an_optimizer_one_line_says_what_is_missing(tmp_path: Path) -> None:
    code, told = suite(cwd=tmp_path)
    assert code == 4
    (line,) = [line for line in told.splitlines() if line.strip()]
    assert "needs --optimizer mypackage.module:make" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--pyargs", "muonkit.testing", "--conformance-json", "no/f.json"), "no folder 'no'"),
        (("--pyargs", "muonkit.testing", "--conformance-json", "."), "expected a file"),
        (("muonkit.testing",), "put --pyargs before it"),
    ],
)
def test_a_wrong_command_is_refused_before_a_law_is_tried(
    arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    done = warm.run(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "muonkit.testing.plugin",
         *arguments, "--optimizer", "torch.optim:Muon"],
        cwd=tmp_path,
    )  # fmt: skip
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert done.returncode == 4
    assert words in line


def test_each_run_writes_its_own_laws_beside_tests_of_ones_own(tmp_path: Path) -> None:
    """Two runs in one process; a test beside them has parameters of its own."""
    (tmp_path / "test_beside.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('name', ['zero_moves_nothing'])\n"
        "def test_beside(name): pass\n"
    )
    (tmp_path / "twice.py").write_text(
        "import sys\n"
        "import pytest\n"
        "for law in ('zero_moves_nothing', 'transpose_commutes'):\n"
        "    words = ['--pyargs', 'muonkit.testing', 'test_beside.py', '-k', law]\n"
        "    words += ['--optimizer', 'torch.optim:Muon', '--conformance-json', law]\n"
        "    words += ['-q', '-p', 'no:cacheprovider', '-p', 'muonkit.testing.plugin']\n"
        "    assert pytest.main(words) == 0\n"
    )
    done = warm.run(["twice.py"], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for law in ("zero_moves_nothing", "transpose_commutes"):
        found = json.loads((tmp_path / law).read_text())["laws"]
        assert [row["law"] for row in found] == [law]


ADAPTERS = """
import torch
from muonkit.testing import Subject

def make(params, *, lr, weight_decay):
    return torch.optim.Muon(params, lr=lr, weight_decay=weight_decay)

def forgot(params, *, lr, weight_decay):
    torch.optim.Muon(params, lr=lr)

def lost(params, *, lr, weight_decay):
    return torch.optim.Muon([torch.nn.Parameter(torch.ones(2, 3))], lr=lr)

def no_decay(params, lr):
    return torch.optim.Muon(params, lr=lr)

def made():
    return Subject(make, "made")

def with_defaults(params=None, lr=1.0, weight_decay=0.0):
    return make(params, lr=lr, weight_decay=weight_decay)

def no_gpu(params, *, lr, weight_decay):
    raise RuntimeError("no GPU here")

number = 3
"""


@pytest.mark.parametrize(
    ("spec", "kind", "words"),
    [
        ("nothing", ValueError, "a module and a name with a colon between them"),
        ("no.such.module:make", LookupError, "there is no 'no' on the path"),
        ("{folder}/none.py:make", LookupError, "there is none at"),
        ("{folder}/adapters.py:maek", LookupError, "did you mean 'make'"),
        ("{folder}/adapters.py:forgot", TypeError, "returned None.*end make.*return optimizer"),
        ("{folder}/adapters.py:lost", TypeError, r"without the parameters of shape \(2, 3\)"),
        ("{folder}/adapters.py:no_decay", TypeError, "unexpected keyword.*decay=False"),
        ("{folder}/adapters.py:number", TypeError, "is 3, expected a muonkit.testing.Subject"),
        ("{folder}/adapters.py:no_gpu", TypeError, r"no GPU here \(adapters.py:\d+\). Give a fun"),
        ("{folder}/broken.py:make", ImportError, r"import raised KeyError: 'x' \(broken.py:2\)"),
        ("{folder}/unread.py:make", ImportError, "import raised SyntaxError"),
        ("{folder}/script.py:make", ImportError, r"import raised SystemExit: 2 \(script.py:2\)"),
    ],
)
def test_a_wrong_adapter_is_told_the_remedy(
    spec: str, kind: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapters.py").write_text(ADAPTERS)
    (tmp_path / "broken.py").write_text("there = {}\nthere['x']\n")
    (tmp_path / "unread.py").write_text("def make(:\n")
    (tmp_path / "script.py").write_text("import argparse\nargparse.ArgumentParser().exit(2)\n")
    sys.modules.pop("conformance_of_adapters", None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(kind, match=words):
        load(spec.format(folder=tmp_path))


def test_what_an_optimizer_may_stand_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapters.py").write_text(ADAPTERS)
    sys.modules.pop("conformance_of_adapters", None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert load(f"{tmp_path}/adapters.py:with_defaults").claims("decay")
    assert load(f"{tmp_path}/adapters.py:make").claims("decay")
    assert load(f"{tmp_path}/adapters.py:made").name == "made"
    assert load("torch.optim:Muon").make is torch.optim.Muon


def test_a_file_may_import_what_stands_beside_it_and_warn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `python file.py` may; on a rank too, where warnings are errors."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_adapter.py").write_text("from torch.optim import Muon\n")
    warns = "import warnings; warnings.warn('old')\nfrom beside_adapter import Muon\n"
    (tmp_path / "warning_adapter.py").write_text(warns)
    found = on_this_rank(f"{tmp_path}/warning_adapter.py:Muon", "zero_moves_nothing")
    assert found.verdict == "pass", found


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("make", None, "expected a function"),
        ("scale", 0.2, "expected a function or None"),
        ("experts", torch.optim.Muon, "expected True or False"),
        ("momentum", "0.95", "momentum='0.95', expected the weight of the past"),
        ("products", "float32", "expected one of torch.float64"),
        ("deliberate", ("tiny_gradients_are_nothing", "eps"), r'expected pairs, \(\("the_law"'),
    ],
)
def test_a_subject_refuses_what_no_law_can_use(name: str, value: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        Subject(**{"make": torch.optim.Muon, name: value})


def test_the_reason_of_a_broken_law() -> None:
    """Of a law on ranks for every number of them; what is no law is refused."""
    subject = Subject(torch.optim.Muon, deliberate=(("fsdp2_equals_one_process", "own shards"),))
    assert subject.why("fsdp2_equals_one_process-on-4-ranks") == "own shards"
    wrong = Subject(torch.optim.Muon, deliberate=(("tiny_gradient_is_nothing", "eps"),))
    with pytest.raises(LookupError, match="did you mean 'tiny_gradients_are_nothing'"):
        check(wrong, [])


@pytest.mark.parametrize("returned", [{"norm": 3}, torch.ones(3), "a loss"])
def test_a_step_that_returns_no_loss_breaks_the_law_of_closures(returned: Any) -> None:
    class Other(torch.optim.Muon):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            return returned

    (found,) = check(Subject(Other), ["closures_are_called_once"])
    assert found.verdict == "fail"
    assert "step returned" in found.message
    assert "the loss is -0.635" in found.message


def test_a_crash_in_the_optimizer_is_a_failure_with_its_input() -> None:
    def make(params: list[nn.Parameter], *, lr: float, weight_decay: float) -> torch.optim.SGD:
        if params[0].shape == (8, 8):
            raise ZeroDivisionError("of theirs")
        return torch.optim.SGD(params, lr=lr, weight_decay=weight_decay)

    (found,) = check(Subject(make), ["scale_of_gradient_is_nothing"])
    assert found.verdict == "fail"
    (found,) = check(Subject(make), ["gradients_are_untouched"])
    assert (found.verdict, found.input) == ("fail", "a 8 × 8 gradient")
    line = make.__code__.co_firstlineno + 2
    assert found.message == f"ZeroDivisionError: of theirs (test_suite.py:{line})"


def test_unknown_laws_and_laws_on_ranks_are_refused() -> None:
    with pytest.raises(LookupError, match="did you mean 'zero_moves_nothing'"):
        check(Subject(torch.optim.Muon), ["zero_moves_nothin"])
    with pytest.raises(ValueError, match=r"check_on_ranks"):
        check(Subject(torch.optim.Muon), ["fsdp2_equals_one_process-on-2-ranks"])
    with pytest.raises(LookupError, match="did you mean 'fsdp2_equals_one_process-on-2-ranks'"):
        check_on_ranks("torch.optim:Muon", 2, ["fsdp2_equals_one_proces-on-2-ranks"])
    with pytest.raises(ValueError, match=r"-on-2-ranks is no law for 4 ranks"):
        check_on_ranks("torch.optim:Muon", 4, ["fsdp2_equals_one_process-on-2-ranks"])
    with pytest.raises(ValueError, match=r"laws for \[2, 4\] ranks, got world_size=3"):
        check_on_ranks("torch.optim:Muon", 3)


def test_pytest_finds_the_plugin_only_where_it_is_asked_for() -> None:
    brought: list[str] = []

    class Config:
        class pluginmanager:
            import_plugin = staticmethod(brought.append)

    muonkit_pytest.pytest_load_initial_conftests(Config, ["-q", "tests"])
    assert brought == []
    for suite in ("muonkit.testing", "muonkit.testing.test_laws::test_law[zero_moves_nothing]"):
        brought.clear()
        muonkit_pytest.pytest_load_initial_conftests(Config, ["--pyargs", suite])
        assert brought == ["muonkit.testing.plugin"]


def test_every_law_states_itself_in_a_sentence() -> None:
    for law in LAWS.values():
        assert law.states.endswith("."), law.name
        assert law.elsewhere, law.name


def test_decay_that_is_not_claimed_is_zero_where_it_can_be_said() -> None:
    """torch's Muon decays by 0.1 unless it is told otherwise."""

    def make(params: Any, *, lr: float, weight_decay: float = 0.1) -> torch.optim.Muon:
        return torch.optim.Muon(params, lr=lr, weight_decay=weight_decay)

    (finding,) = check(Subject(make, decay=False), ["zero_moves_nothing"])
    assert finding.verdict == "pass", finding
