"The notebooks as files: small, clean, of one style, and in step with the package."
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALL = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
LIBRARY = [p for p in ALL if re.match(r"\d_", p.parent.name)]
TABLES = [p for p in ALL if p.parent.name == "tables"]
BIN = Path(sys.executable).parent


def cells(path: Path, kind: str="code") -> list[dict]:
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def source(cell: dict) -> str: return "".join(cell["source"])


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_size(path):
    for c in cells(path):
        if re.search(r"^#\|\s*export", source(c), re.M):
            told = f"{path.name}: an export cell has over 60 lines, split it:\n{source(c)[:200]}"
            assert source(c).count("\n") < 60, told
    assert len(cells(path)) <= 60, f"{path.name} has {len(cells(path))} code cells, 60 is the most"
    assert path.stat().st_size <= 400e3, f"{path.name} is {path.stat().st_size/1e3:.0f} kB, 400 is the most"


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_clean(path):
    nb = json.loads(path.read_text())
    assert nb["metadata"]["kernelspec"]["name"] == "python3", f"{path.name}: papermill needs a kernelspec"
    assert all(c["execution_count"] is None for c in cells(path)), f"{path.name}: run nbdev_clean"
    ids = [c["id"] for c in nb["cells"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_anatomy(path):
    "A title and one line on what it is; what you have and what you get."
    text = [source(c) for c in cells(path, "markdown")]
    assert re.match(r"# \S.*\n\n> \S", text[0]), f"{path.name} begins with '# title', an empty line, '> one line'"
    told = "\n".join(text)
    assert "**You have**" in told or "**You get**" in told, f"{path.name}: say what you have and what you get"


@pytest.mark.parametrize("path, after", list(pairwise(LIBRARY)), ids=lambda p: p.stem)
def test_the_last_line_leads_on(path, after):
    "A reader who follows the last lines walks through the house in its order."
    last = source(cells(path, "markdown")[-1])
    links = [(path.parent/link).resolve() for link in re.findall(r"\]\(([^)]+)\)", last)]
    assert after in links, f"{path.name} ends without a link to {after.name}, which comes next"


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_links_lead_somewhere(path):
    "A link to another notebook is a relative path to one that is there."
    for text in map(source, cells(path, "markdown")):
        for link in re.findall(r"\]\((?!http)([^)#]+\.ipynb)", text):
            assert (path.parent/link).is_file(), f"{path.name} links to {link}, which is not there"


MAKERS = {"Figure", "make_subplots", "imshow"} | {          # names of what returns a Plotly figure
    node.name for p in (ROOT/"cmkd").rglob("*.py") for node in ast.walk(ast.parse(p.read_text()))
    if isinstance(node, ast.FunctionDef) and node.returns and "go.Figure" in ast.unparse(node.returns)}


def is_figure(node: ast.expr, made: set[str]) -> bool:
    "Is this expression a figure, as far as the names of what makes one tell?"
    if isinstance(node, ast.Name): return node.id in made
    if not isinstance(node, ast.Call): return False
    called = ast.unparse(node.func).split(".")[-1]
    chained = isinstance(node.func, ast.Attribute) and re.match("(update|add)_", called)
    return called in MAKERS or bool(chained and is_figure(node.func.value, made))


def bare_figures(sources: list[str]) -> list[str]:
    "What a notebook displays as a bare figure: at the end of a cell, or given to display()."
    made, bare = set(), []
    for tree in map(ast.parse, sources):
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                to, of = node.targets[0], node.value
                several = isinstance(to, ast.Tuple) and isinstance(of, ast.Tuple)
                pairs = zip(to.elts, of.elts, strict=False) if several else [(to, of)]
                made |= {a.id for a, b in pairs if isinstance(a, ast.Name) and is_figure(b, made)}
            if isinstance(node, ast.FunctionDef) and any(
                    isinstance(n, ast.Return) and n.value and is_figure(n.value, made) for n in ast.walk(node)):
                made.add(node.name)
        shown = [node.args for node in ast.walk(tree)
                 if isinstance(node, ast.Call) and ast.unparse(node.func) == "display"]
        if tree.body and isinstance(tree.body[-1], ast.Expr): shown.append([tree.body[-1].value])
        bare += [ast.unparse(n) for n in sum(shown, []) if is_figure(n, made)
                 or isinstance(n, ast.Call) and ast.unparse(n.func) in made]
    return bare


BELOW = {"06_geometry", "07_boxes"}    # `draw`, where `show` comes from, stands on them


@pytest.mark.parametrize("path", [p for p in ALL if p.stem not in BELOW], ids=lambda p: p.stem)
def test_every_figure_is_shown_with_words(path):
    bare = bare_figures([source(c) for c in cells(path) if not source(c).startswith("%")])
    assert not bare, f"{path.name} displays {bare}; write draw.show(figure, 'what is to be seen')"


@pytest.mark.parametrize("code, count", [
    ("fig = go.Figure()\nfig", 1), ("draw.draw_bev(points)", 1), ("fig = px.imshow(a)\nfig.update_xaxes(title=1)", 1),
    ("fig, n = go.Figure(), 2\nfig", 1),
    ("fig = bars(a, b, 'c')\ndisplay(table, fig)", 1), ("def shown(a): return go.Figure(a)\n\nshown(1)", 1),
    ("fig = go.Figure()\nshow(fig, 'a line')", 0), ("fig = go.Figure()\nlen(fig.data)", 0)])
def test_a_bare_figure_is_noticed(code, count):
    assert len(bare_figures([code])) == count


def ruff(*words: str) -> subprocess.CompletedProcess:
    ask = [BIN/"ruff", "check", "--no-cache", "--output-format=concise", "--config", ROOT/"pyproject.toml", *words]
    return subprocess.run(ask, cwd=ROOT, capture_output=True, text=True)


def test_style():
    "120 columns, one statement a line, imports in order, no likely bug: `ruff check nbs tests`."
    done = ruff("nbs", "tests")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("code, rule", [
    ("a = 1; b = 2", "E702"), (f"a = '{'x'*120}'", "E501"), ("import sys\nimport os\nos, sys", "I001"),
    ("a = nothing", "F821"), ("list(zip('a', 'b'))", "B905")])
def test_the_style_test_notices(tmp_path, code, rule):
    nb = dict(cells=[dict(cell_type="code", id="a", metadata={}, source=code, outputs=[], execution_count=None)],
              metadata=dict(language_info=dict(name="python")), nbformat=4, nbformat_minor=5)
    (tmp_path/"a.ipynb").write_text(json.dumps(nb))
    assert rule in ruff(str(tmp_path)).stdout


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_table_parameters(path):
    "Exactly one cell is tagged; names and types can be read."
    from cmkd.ledger.notebooks import declared
    assert {"scale", "recipe"} <= set(declared(path))


def tree(folder: Path) -> dict[str, str]:
    every = [p for top in ("nbs", "cmkd") for p in sorted((folder/top).rglob("*")) if p.is_file()]
    kept = [p for p in every if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    "The notebooks and the package, where a test may change them."
    to, left = tmp_path_factory.mktemp("copy"), shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("nbs", "cmkd"): shutil.copytree(ROOT/name, to/name, ignore=left)
    for name in ("settings.ini", "pyproject.toml", "README.md"): shutil.copy(ROOT/name, to/name)
    return to


def nbdev(folder: Path, command: str) -> None:
    env = os.environ | dict(PYTHONPATH=str(folder))
    done = subprocess.run([BIN/f"nbdev_{command}"], cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_notebooks_and_package_in_step(copy):
    "nbdev_export and nbdev_clean change nothing."
    before = tree(ROOT)
    nbdev(copy, "export")
    nbdev(copy, "clean")
    after = tree(copy)
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    assert not changed, f"run nbdev_export && nbdev_clean: {changed}"


def test_the_sync_test_notices(copy):
    "A hand-edited module, a notebook that was not exported, dirty metadata: the two commands put each of them right."
    nbdev(copy, "export")
    nbdev(copy, "clean")
    good, module, book = tree(copy), copy/"cmkd"/"core.py", copy/"nbs"/"0_ground"/"05_config.ipynb"
    module.write_text(module.read_text() + "\n# by hand\n")
    nb = json.loads(book.read_text())
    nb["cells"][1]["metadata"]["dirty"] = True
    book.write_text(json.dumps(nb))
    bad = tree(copy)
    nbdev(copy, "export")
    nbdev(copy, "clean")
    assert bad != good and tree(copy) == good


def test_the_parameters_tag_survives_cleaning(copy):
    tagged = dict(cell_type="code", id="a", metadata=dict(tags=["parameters"], other=1), source="scale = 'smoke'",
                  outputs=[], execution_count=3)
    kernel = dict(name="python3", display_name="python3", language="python")
    nb = dict(cells=[tagged], metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    path = copy/"nbs"/"zz_tagged.ipynb"
    path.write_text(json.dumps(nb))
    nbdev(copy, "clean")
    kept = cells(path)[0]
    path.unlink()
    assert kept["metadata"] == dict(tags=["parameters"]) and kept["execution_count"] is None


def test_readme_is_the_front_door():
    "README.md is index.ipynb as text."
    from cmkd.ledger.notebooks import as_markdown
    assert (ROOT/"README.md").read_text() == as_markdown(ROOT/"nbs"/"index.ipynb"), "make readme"
