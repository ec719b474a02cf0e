"""What is typed: every error is one line with its remedy, and nothing is half written."""

from __future__ import annotations

import json
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from torch import nn

import muonkit
from muonkit.lab import cli
from muonkit.lab.cli import main
from muonkit.lab.errors import LabError
from muonkit.lab.specs import load_model


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test in an empty folder; modules imported from there are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("own", "wrong", "broken", "mine", "script"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("compare", "Missing argument 'TASK': see muonkit compare --help"),
        (
            "compare dgits",
            "unknown task 'dgits': did you mean 'digits'? It is one of 'gpt', 'digits",
        ),
        ("compare digits --optimizers adamw,sdg", "unknown optimizer 'sdg': did you mean 'sgd'?"),
        ("compare digits --optimizers adamw,adamw", "name each optimizer once"),
        ("compare digits --optimizers ,", "unknown optimizer ''"),
        ("compare digits --lr fast", "'fast' is no positive number; write --lr 1e-3"),
        ("compare digits --lr adamw=-1", "'-1' is no positive number"),
        ("compare digits --lr adamw=1,adamw=2", "two values for adamw; write --lr 1e-3"),
        ("compare digits --lr 1e-3,2e-3", "two values for all optimizers"),
        ("compare digits --lr nan", "'nan' is no positive number"),
        ("compare digits --lr sgd=0.1", "--lr names 'sgd', which is not compared"),
        ("compare digits --weight-decay sgd=0.1", "--weight-decay names 'sgd', which is not"),
        ("compare digits --weight-decay -1", "'-1' is neither 0 nor a positive number"),
        ("compare digits --sweep-decay --weight-decay 0", "a grid around 0 is only 0"),
        ("compare digits --sweep --sweep-points 4", "give an odd number, 3 or more"),
        ("compare digits --jobs 0", "Invalid value for '--jobs'"),
        ("compare digits --steps 3 --epochs 2", "give one of them"),
        ("compare digits --steps 0", "Invalid value for '--steps'"),
        ("compare digits --seeds x", "Invalid value for '--seeds'"),
        ("compare digits --speed 3", "No such option: --speed"),
        ("compare digits --batch-size 5000", "batch size 5000 exceeds the 1438"),
        ("compare digits --out plain", "plain is a file: choose another folder with --out"),
        ("compare digits --out plain/below", "cannot write to plain/below: Not a directory"),
        ("compare digits --out full", "holds other files (mine.txt)"),
        ("compare mnist", "no train-images-idx3-ubyte.gz"),
        ("campare", "No such command 'campare'"),
        ("route", "Missing argument 'SPEC'"),
        ("route nowhere:build", "there is no module 'nowhere': run from the folder that has it"),
        ("route ovn:net", "there is no module 'ovn': did you mean 'own'? run from"),
        ("route below/deep.py:net", "below/deep.py has no 'net': it has nothing"),
        (
            "route own.py:bear",
            "own.py has no 'bear': did you mean 'bare'? it has Linear, bad, bare",
        ),
        (
            "route onw.py:net",
            "there is no file onw.py: did you mean 'own.py'? `muonkit new-task onw",
        ),
        ("route own:absent", "own has no 'absent': it has Linear, bad, bare"),
        ("route own:bear", "own has no 'bear': did you mean 'bare'? it has Linear, bad, bare"),
        ("route gtp2", "could not be had from the Hugging Face hub: did you mean 'gpt2'? use"),
        ("route own:number", "own:number is of type int: name a factory or a model"),
        ("route own:bad", "own:bad() failed (ValueError: two lines)"),
        ("route own:needs", "name a factory that takes no arguments"),
        ("route own:bare", "own:bare() returned dict, expected a torch.nn.Module"),
        ("route own:", "write both sides of the colon"),
        ("route broken:build", "broken needs no_such_package, which is not installed"),
        ("route wrong:build", "importing wrong failed: ZeroDivisionError"),
        ("route script:build", "importing script failed: SystemExit: 0"),
        ("route own:leaves", "own:leaves() failed (SystemExit: 3)"),
        ("plan --mesh dp=2 --model script:build", "importing script failed: SystemExit: 0"),
        ("route nobody/nothing", "is no model type, no file, and could not be had from the"),
        ("route own.py", "'own.py' has no factory: write own.py:bad"),
        ("route below/deep.py", "'below/deep.py' has no factory: write below/deep.py:model"),
        ("route onw.py", "there is no file onw.py: did you mean 'own.py'? `muonkit new-task onw"),
        ("route broken.txt", "broken.txt is no Hugging Face configuration"),
        ("route own:net --rule x", "--rule 'x': write PATTERN=adamw"),
        ("route own:net --rule nothing*=adamw", "matches no parameter"),
        ("route own:net --adjust-lr-fn huge", "unknown scale 'huge'"),
    ],
)
def test_an_error_is_one_line_with_its_remedy(
    words: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MUONKIT_DATA", str(tmp_path / "nowhere"))
    (tmp_path / "plain").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "own.py").write_text(
        "from torch.nn import Linear\n"
        "number = 3\n"
        "net = Linear(4, 2)\n"
        "def bad(): raise ValueError('two\\nlines')\n"
        "def needs(x): return x\n"
        "def bare(): return {}\n"
        "def leaves(): raise SystemExit(3)\n"
    )
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "deep.py").write_text("")
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    (tmp_path / "broken.txt").write_text("")
    (tmp_path / "wrong.py").write_text("1 / 0\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    before = sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts)
    assert main(words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    after = sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts)
    assert after == before, "something was half written"


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "dgits", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_failure_while_running_is_one_line_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "x.pt")

    monkeypatch.setattr("muonkit.lab.saved.write_with_sum", full)
    words = ["--steps", "5", "--checkpoint-every", "0", "--optimizers", "adamw"]
    assert main(["compare", "digits", *words]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: x.pt: No space left on device; --debug shows where"


def test_ctrl_c_outside_a_run_is_a_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("muonkit.lab.compare.compare", interrupted)
    assert main(["compare", "digits"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.whole
def test_the_default_folder_is_the_configurations_own(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "digits", "--optimizers", "adamw", "--steps"]
    for steps in ("2", "3", "3"):
        assert main([*words, steps]) == 0
    folders = sorted(Path("runs").iterdir())
    assert len(folders) == 2
    assert all(folder.name.startswith("digits-") for folder in folders)
    assert "was finished already" in capsys.readouterr().out


@pytest.mark.whole
def test_the_default_task_trains(tmp_path: Path) -> None:
    words = ["compare", "gpt", "--steps", "1", "--batch-size", "2", "--out", "o"]
    assert main(words) == 0
    results = [json.loads(path.read_text()) for path in Path("o").rglob("result.json")]
    assert {r["optimizer"] for r in results} == {"muonw", "adamw"}
    # One step from a start where every byte is about as likely as any other: ln 256 = 5.55.
    assert all(4.5 < r["val_loss"] < 5.6 for r in results)


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"muonkit {muonkit.__version__}\n"
    assert main([]) == 0
    assert "compare" in capsys.readouterr().out
    assert main(["compare", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("cifar10", "torch-muon", "MUONKIT_DATA", "Examples"))


# --- route ---


def test_route_prints_the_table_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Zoo:\n"
        "    @staticmethod\n"
        "    def net(): return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))\n"
    )
    assert main(["route", "mine:Zoo.net"]) == 0
    assert "hidden linear layer" in capsys.readouterr().out
    assert main(["route", "mine:Zoo.net", "--json", "--rule", "1.weight=adamw"]) == 0
    routes = json.loads(capsys.readouterr().out)["routes"]
    algorithms = {r["name"]: r["algorithm"] for r in routes}
    assert algorithms["0.weight"] == "muon"
    assert algorithms["1.weight"] == "adamw"
    assert main(["route", "mine:Zoo.net", "--rule", "0.weight=muon:split(rows=2)"]) == 0
    assert "split(rows=2)" in capsys.readouterr().out
    assert main(["route", "mine:Zoo.net", "--per-head"]) == 2
    assert "no attention was found in Sequential" in capsys.readouterr().err


def test_route_and_plan_take_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "of mine"
    folder.mkdir()
    (folder / "beside.py").write_text("WIDTH = 8\n")
    file = folder / "a_net.py"
    file.write_text(
        "from beside import WIDTH\n"
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Embedding(4, WIDTH), nn.Linear(WIDTH, WIDTH))\n"
        "def task(): return net, 1, 2, 3\n"
    )
    for spec in (f"{file}:net", "of mine/a_net.py:net"):
        assert main(["route", spec]) == 0
        assert "8×8" in capsys.readouterr().out
    assert main(["plan", "--model", f"{file}:net", "--mesh", "fsdp=2"]) == 0
    capsys.readouterr()
    assert main(["route", f"{file}:task"]) == 2
    assert "returned tuple, expected a torch.nn.Module: name the" in capsys.readouterr().err
    file.write_text("1 / 0\n")
    assert main(["route", f"{file}:net"]) == 2
    said = capsys.readouterr().err
    assert said.count("Traceback") == said.count('a_net.py", line 1') == 1
    assert "a_net.py failed (ZeroDivisionError: division by zero)" in said.splitlines()[-1]
    for name in ("a_net", "beside"):
        sys.modules.pop(name, None)


def test_route_folds_layers_that_repeat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def deep(): return nn.Sequential(*[nn.Linear(8, 8) for _ in range(9)], nn.Linear(8, 2))\n"
    )
    assert main(["route", "mine:deep"]) == 0
    folded = capsys.readouterr().out.splitlines()
    assert folded[2].split()[:3] == ["9×", "*.weight", "8×8"]
    assert len(folded) == 2 + 4 + 1
    assert main(["route", "mine:deep", "--all"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 20 + 1


def test_hugging_face_models_are_built_without_memory(tmp_path: Path) -> None:
    model = load_model("gpt2")
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert all(p.is_meta for p in model.parameters())
    small = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    small.architectures = ["BertForSequenceClassification"]
    small.save_pretrained(tmp_path / "bert")
    for spec in (tmp_path / "bert", tmp_path / "bert" / "config.json"):
        model = load_model(str(spec))
        assert type(model).__name__ == "BertForSequenceClassification"
        assert isinstance(model, nn.Module)


def test_without_transformers_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(LabError, match="pip install transformers"):
        load_model("gpt2")


def test_every_example_of_the_help_texts_parses() -> None:
    commands = cli.typer.main.get_command(cli.app).commands
    for text in (cli._COMPARE_HELP, cli._ROUTE_HELP):
        examples = [line.split("muonkit ")[1] for line in text.splitlines() if "  muonkit " in line]
        assert examples
        for example in examples:
            name, *words = shlex.split(example)
            with commands[name].make_context(name, [*words]) as context:
                assert context.params["task" if name == "compare" else "spec"] == words[0]


@pytest.mark.parametrize(("words", "status"), [(["--version"], 0), (["monitor", "absent"], 2)])
def test_the_package_is_the_command(
    words: list[str],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`python -m muonkit` prints what `muonkit` prints, and has its exit status."""
    assert main(words) == status
    expected = capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["muonkit", *words])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("muonkit", run_name="__main__")
    assert left.value.code == status
    assert capsys.readouterr() == expected
