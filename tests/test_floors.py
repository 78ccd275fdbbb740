"The floors of the house: a notebook imports only from lower numbers, and some walls have no door."
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/"nbs"
LIBRARY = sorted(NBS.glob("[0-9]_*/[0-9][0-9]_*.ipynb"))
TABLES = sorted((NBS/"tables").glob("*.ipynb"))
LESSONS = sorted((NBS/"learn").glob("*.ipynb"))


def code(path: Path, exported: bool=False) -> list[str]:
    "The sources of a notebook's code cells, shell and magic lines left out."
    cells = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    if exported: cells = [c for c in cells if re.search(r"^#\|\s*exports?\b", c, re.M)]
    return ["\n".join(line for line in c.splitlines() if not re.match(r"\s*[%!]", line)) for c in cells]


def module(path: Path) -> str:
    "The module that a notebook exports, e.g. 'cmkd.data.kitti'."
    return "cmkd." + re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(code(path)), re.M)[1]


def floor(path: Path) -> tuple[str, int]:
    "A notebook's folder and its number within: the order of the house."
    return path.parent.name, int(path.name[:2])


FLOOR = {module(p): floor(p) for p in LIBRARY}


def imports(sources: list[str]) -> set[str]:
    "Every module that is imported, at the top or inside a function; for `from package import x` also package.x."
    out = set()
    for node in (n for s in sources for n in ast.walk(ast.parse(s))):
        if isinstance(node, ast.Import): out |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom): out |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return out


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_imports_come_from_lower_numbers(path):
    for name in imports(code(path)) & set(FLOOR):
        said = f"{path.name} imports {name} of {FLOOR[name]}; move the code down or the notebook up"
        assert FLOOR[name] < floor(path) or name == module(path), said


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_every_import_of_the_house_has_a_notebook(path):
    packages = {".".join(m.split(".")[:i]) for m in FLOOR for i in range(1, m.count(".") + 1)}
    for name in (n for n in imports(code(path)) if n.startswith("cmkd")):
        known = name in FLOOR or name in packages or name.rpartition(".")[0] in FLOOR
        assert known, f"{path.name} imports {name}, which no notebook exports"


# rooms whose work it is to build networks
BUILDERS = ("cmkd.distill.roles", "cmkd.distill.hint", "cmkd.distill.released", "cmkd.distill.paths")


@pytest.mark.parametrize("inside, never, but", [
    ("cmkd.layers.", "cmkd.data", ()),
    ("cmkd.models.", "cmkd.data", ()),
    ("cmkd.train.", "cmkd.models", ()),
    ("cmkd.evaluate.", "cmkd.models", ()),
    ("cmkd.evaluate.", "cmkd.train", ()),
    ("cmkd.distill.", "cmkd.models", BUILDERS),
])
def test_walls(inside, never, but):
    for path in (p for p in LIBRARY if module(p).startswith(inside) and module(p) not in but):
        through = {n for n in imports(code(path, exported=True)) if n.startswith(never)}
        assert not through, f"{path.name} imports {through}: {inside[:-1]} must not know {never}"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_exported_code_needs_no_workshop(path):
    tools = {n.split(".")[0] for n in imports(code(path, exported=True))} & {"fastcore", "nbdev", "pytest", "execnb"}
    if module(path) == "cmkd.doors.executed": tools -= {"execnb"}       # to run notebooks is what it is for
    assert not tools, f"{path.name} exports an import of {tools}: only tests may"


ASKS = {"os.environ", "os.getenv", "os.getcwd", "Path.cwd", "time.time", "datetime.now", "datetime.utcnow"}
ALLOWED = {"cmkd.files": {"Path.cwd", "time.time"},   # where the project is; how old litter is
           "cmkd.draw": {"os.environ"}}               # whether what runs now is kept


@pytest.mark.parametrize("path", [p for p in LIBRARY if p.parent.name < "6"], ids=lambda p: p.stem)
def test_no_module_asks_the_world_on_its_own(path):
    "Environment, working directory and calendar are for the ledger; `files.root` finds the project's folder."
    nodes = (n for s in code(path, exported=True) for n in ast.walk(ast.parse(s)))
    seen = {ast.unparse(n) for n in nodes if isinstance(n, ast.Attribute)}
    assert not seen & ASKS - ALLOWED.get(module(path), set())


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_tables_define_nothing(path):
    "A table notebook asks for runs and shows them; a model, a loss or a metric lives in the library."
    nodes = (n for s in code(path) for n in ast.walk(ast.parse(s)))
    made = [n.name for n in nodes if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    assert not made, f"{path.name} defines {made}: move it into the library"
    computing = {n.split(".")[0] for n in imports(code(path))} & {"torch", "spconv", "timm"}
    assert not computing, f"{path.name} must not compute with networks"


@pytest.mark.parametrize("path", TABLES + LESSONS, ids=lambda p: p.stem)
def test_tables_and_lessons_export_nothing(path):
    assert "#| export" not in "\n".join(code(path)) and "default_exp" not in "\n".join(code(path))


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_lessons_do_not_train(path):
    assert not imports(code(path)) & {"cmkd.train.loop", "cmkd.train.roles"}


def test_numbers_and_modules_are_unique():
    assert len(FLOOR) == len(LIBRARY) and len({floor(p) for p in LIBRARY}) == len(LIBRARY)


def test_a_number_begins_with_its_floor():
    for path in LIBRARY: assert path.name[0] == path.parent.name[0], f"{path.parent.name}/{path.name}"


def test_the_test_notices(tmp_path):
    "A notebook of floor 2 that imports floor 5 inside a function is seen."
    source = "#| default_exp layers.bad\n#| export\n%time 1\ndef f():\n    from cmkd.train.loop import train"
    bad = tmp_path/"20_layers.bad.ipynb"
    bad.write_text(json.dumps(dict(cells=[dict(cell_type="code", source=source)])))
    assert "cmkd.train.loop" in imports(code(bad, exported=True))
    assert module(bad) == "cmkd.layers.bad"
