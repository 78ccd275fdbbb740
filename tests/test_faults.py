"Faults on purpose, in the short form: the long ones are in tests/faults, and nbs/tables/trust.ipynb shows them."

import csv
import os
from pathlib import Path

import pytest

from tests.faults import disk, fuzz, numbers
from tests.faults.mutate import AREAS, CHANGES

ROOT = Path(__file__).resolve().parent.parent


def test_two_thousand_foreign_inputs(capsys):
    code = fuzz.main(["--inputs", "2000", "--no-write"])
    assert not code, capsys.readouterr().out


def test_numbers_that_are_none():
    assert not [r for r in numbers.rows() if r["problem"]]


@pytest.mark.parametrize("work", disk.WORK[:3] + disk.WORK[5:6], ids=lambda w: w.__name__)
def test_a_disk_that_is_full_or_read_only(work, tmp_path):
    if os.geteuid(): pytest.skip("only root may mount a file system in memory")
    try:
        (tmp_path / "probe").mkdir()
        disk.mount(tmp_path / "probe", 64)
    except Exception as e: pytest.skip(f"no file system in memory here: {e}")
    disk.subprocess.run(["umount", tmp_path / "probe"], check=True)
    rows = [*disk.full(work, tmp_path, 3), disk.read_only(work, tmp_path)]
    assert not [r for r in rows if r["problem"]], rows


def test_every_change_is_still_a_line_of_its_module():
    "Else the mutation run would stop half-way."
    for c in CHANGES:
        assert (ROOT / "cmkd" / c.module).read_text().count(c.line) == 1, c
        assert c.area in AREAS and c.line != c.becomes


@pytest.mark.parametrize("name, problem", [("mutations", "noticed by"), ("kills", "problem"), ("disk", "problem"),
                                           ("numbers", "problem"), ("fuzz", "uncaught")])  # fmt: skip
def test_what_is_published_has_no_problem(name, problem):
    with open(ROOT / "results" / "trust" / f"{name}.csv", newline="") as f: rows = list(csv.DictReader(f))
    if name == "mutations": assert len(rows) >= 60 and all(r[problem] for r in rows)
    elif name == "fuzz":
        assert not any(int(r[k]) for r in rows for k in ("uncaught", "vague", "silently wrong", "slow"))
        assert sum(int(r["inputs"]) for r in rows[:-1]) >= 60_000 and int(rows[-1]["inputs"]) < 1024
    else: assert rows and not any(r[problem] for r in rows)
    if name == "kills": assert sum(int(r["kills"]) for r in rows) >= 100
