"""Everything that is checked before a version is published; `make release-check` calls this.

It builds the source distribution, and from that the wheel, into `dist/`; nothing is uploaded.
With `--tag v0.1.0` it also asks for what only the commit of a release has: a dated heading in
CHANGELOG.md, `Repository` in `[project.urls]`, and no uncommitted change.

Run by the Python of an environment that has torch; `--tools` is that of one with build, hatchling
and twine.
"""

from __future__ import annotations

import argparse
import datetime
import email.message
import email.parser
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")  # mkdocs checks those under docs/

_LINK = re.compile(r"\]\(([^)\s]+)\)")

# Runs in the new environment: nothing but the wheel, torch and what torch requires.
TRIAL = """
import torch
from torch import nn
import muonkit
from muonkit import MuonW, orthogonalize, route

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 64))
optimizer = MuonW(model, lr=2e-2)
ids = torch.arange(64)
losses = []
for _ in range(20):
    loss = nn.functional.cross_entropy(model(ids), ids)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0] / 2, losses
optimizer.load_state_dict(optimizer.state_dict())
assert "muon" in str(route(model))
O = orthogonalize(torch.randn(8, 16))
assert torch.linalg.svdvals(O).max() < 1.5
print(muonkit.__version__, torch.__version__, muonkit.__file__)
"""


class Problem(Exception):
    """What has to be mended before a version is published."""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """What the command printed.

    Raises:
        Problem: it failed; with its output.
    """
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Problem(f"{' '.join(words[:4])} … failed:\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout


# ---- version, changelog, tag


def version() -> str:
    text = (ROOT / "src/muonkit/__init__.py").read_text(encoding="utf-8")
    (found,) = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return found


def newest_heading(changelog: str) -> tuple[str, str]:
    """Version and date (or "unreleased") of the first heading below "Unreleased".

    Raises:
        Problem: there is none of this form.
    """
    for heading in re.findall(r"^## (.+)$", changelog, re.MULTILINE):
        if heading != "[Unreleased]":
            found = re.fullmatch(r"\[(\d+\.\d+\.\d+\S*)\] - (\S+)", heading)
            if found is None:
                raise Problem(f"CHANGELOG.md: got {heading!r}, expected '[X.Y.Z] - YYYY-MM-DD'")
            return found[1], found[2]
    raise Problem("CHANGELOG.md names no version")


def check_version(tag: str | None) -> str:
    found = version()
    named, date = newest_heading((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    if named != found:
        raise Problem(f"__version__ is {found}, the newest heading of CHANGELOG.md is {named}")
    if tag is not None and tag != f"v{found}":
        raise Problem(f"the tag of version {found} is v{found}, got {tag}")
    if date != "unreleased" or tag is not None:
        try:
            datetime.date.fromisoformat(date)
        except ValueError:
            raise Problem(f"CHANGELOG.md: {named} has {date!r} where its date belongs") from None
    return f"version {found}, CHANGELOG.md: {named} - {date}"


def check_commit(tag: str | None) -> str:
    """No tag of this version on another commit; with `tag`, nothing uncommitted either."""
    own = f"v{version()}"
    if own in run("git", "tag", "--list", own).split():
        tagged, head = (run("git", "rev-parse", f"{name}^{{commit}}") for name in (own, "HEAD"))
        if tagged != head:
            raise Problem(f"{own} is the tag of another commit: raise __version__")
    if tag is not None and (changed := run("git", "status", "--porcelain")):
        raise Problem(f"uncommitted changes:\n{changed.rstrip()}")
    return f"commit {run('git', 'rev-parse', '--short', 'HEAD').strip()}"


def check_urls(tag: str | None) -> str:
    with (ROOT / "pyproject.toml").open("rb") as file:
        urls = tomllib.load(file)["project"].get("urls", {})
    if "Repository" not in urls:
        if tag is not None:
            raise Problem("pyproject.toml: [project.urls] has no Repository")
        return "no Repository in [project.urls] yet: the description has texts for links"
    return f"links of the description lead to {urls['Repository']}"


# ---- links


def anchors(markdown: str) -> set[str]:
    """The anchors that GitHub and mkdocs give a page's headings."""
    titles = re.findall(r"^#+ (.+?)(?:\s*\{#.*\})?$", markdown, re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title)) for title in plain}


def dead_links(page: str) -> Iterator[str]:
    """Links of a page of the repository to files or headings that it has not."""
    for target in _LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists():
            yield f"{page}: there is no {path}"
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            yield f"{page}: {path or page} has no heading #{anchor}"


def check_links() -> str:
    dead = [line for page in PAGES for line in dead_links(page)]
    if dead:
        raise Problem("\n".join(dead))
    return f"links of {', '.join(PAGES)} lead to files and headings"


# ---- the distributions


def build(tools: Path) -> tuple[Path, Path]:
    """Source distribution and wheel; the wheel is made from the former."""
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    run(tools, "-m", "build", "--no-isolation", "--outdir", "dist", ".")
    (sdist,), (wheel,) = ((ROOT / "dist").glob(form) for form in ("*.tar.gz", "*.whl"))
    run(tools, "-m", "twine", "check", "--strict", sdist, wheel)
    return sdist, wheel


def tracked(folder: str) -> set[str]:
    return set(run("git", "ls-files", folder).splitlines())


def check_contents(sdist: Path, wheel: Path) -> str:
    """The wheel has the package's files and no other; neither has what git does not know."""
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {name.removeprefix("src/") for name in tracked("src")}
    for what, names in (("lacks", package - inside), ("has besides", inside - package)):
        if names:
            raise Problem(f"the wheel {what} {sorted(names)}")
    if "muonkit/py.typed" not in inside:
        raise Problem("the wheel lacks muonkit/py.typed")
    with tarfile.open(sdist) as archive:
        files = [member.name for member in archive.getmembers() if member.isfile()]
    besides = {name.partition("/")[2] for name in files} - tracked(".") - {"PKG-INFO"}
    if besides:
        raise Problem(f"the source distribution has {sorted(besides)}, which git does not know")
    sizes = ", ".join(
        f"{path.name} {path.stat().st_size / 2**20:.1f} MiB" for path in (sdist, wheel)
    )
    return f"{sizes}; {len(inside)} files in the wheel, all of src, py.typed among them"


def check_metadata(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.parser.Parser().parsestr(archive.read(name).decode())
    if metadata["Version"] != version():
        raise Problem(f"the wheel says version {metadata['Version']}")
    core = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    if [Requirement(line).name for line in core] != ["torch"]:
        raise Problem(f"the wheel requires {core}, expected torch alone")
    return f"requires {core[0]}; {check_description(metadata)}"


def check_description(metadata: email.message.Message) -> str:
    links = _LINK.findall(str(metadata.get_payload()))
    if local := [target for target in links if not re.match(r"https?:|mailto:|#", target)]:
        raise Problem(f"the description links to files of the repository: {local}")
    return f"{len(links)} links in the description, none of them relative"


# ---- the wheel in use


def closure(name: str) -> set[str]:
    """The distribution and all that it requires here, without extras."""
    found, todo = set[str](), [name]
    while todo:
        each = todo.pop()
        if each in found:
            continue
        found.add(each)
        for line in importlib.metadata.requires(each) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return found


def lend(name: str, site_packages: Path) -> None:
    """Link an installed distribution, and all that it requires, into another environment."""
    for each in closure(name):
        distribution = importlib.metadata.distribution(each)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            link = site_packages / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))))


def check_use(wheel: Path) -> str:
    """Install the wheel where only torch and its own requirements are, and train with it."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "environment")
        venv.create(home, with_pip=False, symlinks=True)
        (site_packages,) = home.glob("lib/python*/site-packages")
        lend("torch", site_packages)
        python = home / "bin/python"
        # Without an index, pip itself says whether what is there satisfies what the wheel requires.
        run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index",
            "--disable-pip-version-check", wheel)  # fmt: skip
        said = run(python, "-I", "-W", "ignore", "-c", TRIAL, cwd=home)
        ours, torch, file = said.split()
        if ours != version() or not Path(file).is_relative_to(home):
            raise Problem(f"got muonkit {ours} from {file}")
        command = subprocess.run(
            [home / "bin/muonkit"], capture_output=True, text=True, check=False
        )
        if 'pip install "muonkit[lab]"' not in command.stderr:
            raise Problem(f"`muonkit` without its extra should name it, got:\n{command.stderr}")
    return f"installed beside torch {torch} alone, it trains, and `muonkit` names its extra"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", type=Path, default=Path(sys.executable))
    parser.add_argument("--tag", help="the tag that is about to be made, such as v0.1.0")
    options = parser.parse_args()
    tag, tools = options.tag or None, options.tools.absolute()
    failed = False
    for check in (lambda: check_version(tag), lambda: check_commit(tag), lambda: check_urls(tag),
                  check_links, lambda: check_distributions(tools)):  # fmt: skip
        try:
            print(f"ok: {check()}", flush=True)
        except Problem as problem:
            failed = True
            print(f"NOT OK: {problem}", flush=True)
    return int(failed)


def check_distributions(tools: Path) -> str:
    sdist, wheel = build(tools)
    said = [check_contents(sdist, wheel), check_metadata(wheel), check_use(wheel)]
    return "\nok: ".join(["dist/ is built, and `twine check --strict` passes", *said])


if __name__ == "__main__":
    sys.exit(main())
