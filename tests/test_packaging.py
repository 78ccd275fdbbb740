"settings.ini, pyproject.toml, environment.yml and the lock say the same, and what is imported is declared."
import ast
import configparser
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, packages_distributions, requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

ROOT = Path(__file__).resolve().parent.parent
INI = configparser.ConfigParser(delimiters=["="], interpolation=None)
INI.read(ROOT/"settings.ini")
INI = INI["DEFAULT"]
TOML = tomllib.loads((ROOT/"pyproject.toml").read_text())
ENV = yaml.safe_load((ROOT/"environment.yml").read_text())
LINES = [line for line in (ROOT/"requirements.lock").read_text().splitlines() if line.strip() and line[0] != "#"]
LOCK = {canonical(r.name): r for r in map(Requirement, LINES)}


def spec(text: str) -> tuple[str, str]:
    r = Requirement(text)
    return canonical(r.name), ",".join(sorted(map(str, r.specifier)))


def test_settings_and_pyproject():
    project = TOML["project"]
    assert INI["version"] == project["version"] and INI["description"] == project["description"]
    assert INI["lib_name"] == INI["repo"] == project["name"] == INI["lib_path"]
    assert project["requires-python"] == f">={INI['min_python']}"
    assert sorted(map(spec, INI["requirements"].split())) == sorted(map(spec, project["dependencies"]))
    extra = project["optional-dependencies"]["dev"]
    assert sorted(map(spec, INI["dev_requirements"].split())) == sorted(map(spec, extra))
    assert dict([INI["console_scripts"].split("=")]) == project["scripts"]


def test_version_in_package():
    import cmkd
    assert cmkd.__version__ == INI["version"] == version("cmkd")


def test_installed_as_declared():
    "What pip knows of the installed package is what pyproject.toml says now."
    installed = [r for r in requires("cmkd") if "extra ==" not in r]
    declared = sorted(map(spec, TOML["project"]["dependencies"]))
    assert sorted(map(spec, installed)) == declared, "pyproject.toml changed since the install: make env"


# what comes with another package, which cannot be without it; and what a user may add
CARRIED = {"nbconvert": "jupyterlab", "nbformat": "papermill", "torchvision": "timm"}
OPTIONAL = {"kaleido", "latex2mathml", "onnx", "onnxruntime"}


def test_what_is_imported_is_declared():
    "Every package that the library imports, at the top or inside a function, is a dependency of its own."
    seen = set()
    for path in (ROOT/"cmkd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import): seen |= {a.name.split(".")[0] for a in node.names}
            if isinstance(node, ast.ImportFrom) and not node.level: seen.add(node.module.split(".")[0])
    of, declared = packages_distributions(), {spec(text)[0] for text in TOML["project"]["dependencies"]}
    for name in seen - set(sys.stdlib_module_names) - {"cmkd"} - OPTIONAL:
        dists = {canonical(d) for d in of[CARRIED.get(name, name)]}
        assert dists & declared, f"the library imports {name}, but pyproject.toml does not declare it"


def test_environment():
    conda = [d for d in ENV["dependencies"] if isinstance(d, str)]
    pip = next(d["pip"] for d in ENV["dependencies"] if isinstance(d, dict))
    assert f"python={INI['min_python']}" in conda and "pip" in conda
    assert pip == ["-c requirements.lock", "-e .[dev]"], "the requirements themselves live in pyproject.toml"


@pytest.mark.parametrize("text", TOML["project"]["dependencies"] + TOML["project"]["optional-dependencies"]["dev"])
def test_lock_satisfies(text):
    wanted = Requirement(text)
    pinned = LOCK[canonical(wanted.name)]
    told = f"{pinned}: a lock pins, and carries no local version such as +cpu"
    assert re.fullmatch(r"==[\w.]+", str(pinned.specifier)), told
    assert wanted.specifier.contains(str(pinned.specifier)[2:]), f"{pinned} does not satisfy {text}"


def test_lock_pins_all():
    assert all(re.fullmatch(r"==[\w.]+", str(r.specifier)) and r.url is None for r in LOCK.values())
    assert str(LOCK["torch"].specifier) == "==2.13.0"
    assert not {"spconv", "cmkd"} & set(LOCK), "spconv and spconv-cu118 share a folder: never both"
    names = [line.split("==")[0].lower() for line in LINES]
    assert names == sorted(set(names)), "requirements.lock: one line a package, by name"


def test_torch_stays_out_of_the_build():
    assert not any("torch" in r for r in TOML["build-system"]["requires"])


def test_settings_keep_what_we_rely_on():
    "The parameters tag survives cleaning, the pyproject stays ours, and no hook is written into the user's home."
    assert INI["allowed_cell_metadata_keys"].split() == ["tags"]
    assert INI["update_pyproject"] == "False" and INI["jupyter_hooks"] == "False"


def test_entry_point():
    assert [e.value for e in entry_points(group="console_scripts") if e.name == "cmkd"] == ["cmkd.cli:main"]


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT/".git").exists(), reason="not a git clone")
def test_git_ignores_no_source():
    "A pattern such as 'data/' would leave cmkd/data out of every clone."
    every = [p for top in ("cmkd", "nbs", "tests", "results/paper") for p in (ROOT/top).rglob("*") if p.is_file()]
    made = {"__pycache__", ".ipynb_checkpoints"}
    files = "\n".join(str(p.relative_to(ROOT)) for p in every if not made & set(p.parts))
    ask = ["git", "check-ignore", "--no-index", "--stdin"]
    ignored = subprocess.run(ask, input=files, cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert not ignored, f".gitignore hides {ignored[:5]}"


def test_make_has_its_targets():
    text = (ROOT/"Makefile").read_text()
    assert all(re.search(rf"^{t}:", text, re.M) for t in ("run", "test", "env", "clean"))
    assert "OMP_NUM_THREADS := 1" in text
    assert "make test" in (ROOT/".ci"/"run").read_text()


def test_no_package_host_is_named():
    "A lock pins versions; where they come from is the reader's business."
    for name in ("Makefile", "requirements.lock", "environment.yml", ".ci/run", "pyproject.toml"):
        assert not re.search(r"https?://|index-url|find-links", (ROOT/name).read_text()), name
