"Faults on purpose, in the short form: the long ones are in tests/faults, and nbs/tables/trust.ipynb shows them."

import csv
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest

from cmkd import files
from cmkd.cli import home, main
from cmkd.doors.networks import its_own
from cmkd.files import locked
from cmkd.ledger.notebooks import folder_key, run_notebook
from cmkd.reading import write_sealed
from cmkd.world.rays import WorldConfig
from cmkd.world.write import write
from tests.faults import disk, numbers
from tests.faults.mutate import AREAS, CHANGES

ROOT = Path(__file__).resolve().parent.parent
QUIET = dict(progress=False)


def test_two_thousand_foreign_inputs():
    "In a process of its own, whose memory is measured."
    words = [sys.executable, "-m", "tests.faults.fuzz", "--inputs", "2000", "--no-write"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr


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


def test_a_second_renderer_waits(tmp_path, capsys):
    with locked(tmp_path / "w"):
        other = threading.Thread(target=write, args=(tmp_path / "w", WorldConfig(), dict(train=2)), kwargs=QUIET)
        other.start()
        other.join(1.0)
        assert other.is_alive() and not (tmp_path / "w" / "training").exists()
    other.join(60)
    assert "another process is at work here; waiting" in capsys.readouterr().err
    assert len(list((tmp_path / "w/training/image_2").iterdir())) == 2


def test_a_pool_ends_with_its_parent(tmp_path):
    "Killed without warning, a process leaves no helper behind."
    script = (
        "import time\nfrom cmkd.machine import pool\n"
        "if __name__ == '__main__':\n"
        "    with pool(2) as helpers:\n"
        "        running = [helpers.submit(time.sleep, 100) for _ in range(2)]\n"
        "        time.sleep(1)\n"
        "        print(*helpers._processes, flush=True)\n"
        "        time.sleep(100)\n"
    )
    (tmp_path / "a.py").write_text(script)
    parent = subprocess.Popen([sys.executable, tmp_path / "a.py"], stdout=subprocess.PIPE, text=True)
    helpers = [int(p) for p in parent.stdout.readline().split()]
    assert len(helpers) == 2
    parent.kill()
    parent.wait()
    deadline = time.time() + 20
    while any(Path(f"/proc/{p}").exists() for p in helpers) and time.time() < deadline: time.sleep(0.1)
    assert not any(Path(f"/proc/{p}").exists() for p in helpers)


def test_a_process_that_nobody_has_reaped_is_dead():
    child = subprocess.Popen(["sleep", "100"])
    began = files._started(child.pid)
    assert files._lives(child.pid, began) and not files._lives(child.pid, str(int(began) + 1))
    child.kill()
    deadline = time.time() + 10
    while files._lives(child.pid, began) and time.time() < deadline: time.sleep(0.05)
    assert not files._lives(child.pid, began)
    child.wait()


def test_a_kernel_that_is_killed_is_named(tmp_path):
    book = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name="python3", language="python", display_name="")))
    cell = nbformat.v4.new_code_cell("scale = 'smoke'  # words", metadata=dict(tags=["parameters"]))
    book.cells = [cell, nbformat.v4.new_code_cell("import os\nos.kill(os.getpid(), 9)")]
    nbformat.write(book, tmp_path / "book.ipynb")
    with pytest.raises(RuntimeError, match="book.ipynb: its kernel was killed.*--workers 1.*failed.ipynb"):
        run_notebook(tmp_path / "book.ipynb", out=tmp_path / "out" / "book.ipynb")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["book.failed.ipynb"]


HOMES = [("~/a", "{}/a"), ("--data=~/a", "--data={}/a"), ("--set=a=~", "--set=a=~"), ("a~b", "a~b"), ("--a", "--a")]


@pytest.mark.parametrize("word, meant", HOMES)
def test_a_tilde_is_a_home(word, meant):
    assert home(word) == meant.format(Path.home())


NOTHING = (
    "table cmkd_t04 --draws -1",
    "table cmkd_t04 --workers -1",
    "world a --frames 0",
    "world a --workers 0",
    "bench lift --repeats 0",
    "evaluate --labels a --detections a --height-scale 0",
)


@pytest.mark.parametrize("words", NOTHING)
def test_counts_that_count_nothing_are_refused(words, capsys):
    assert main(words.split()) == 2 and "Must be" in capsys.readouterr().err


def test_two_pictures_of_one_name_share_no_output(tmp_path):
    note, first = tmp_path / "000008.from.json", dict(image="/a/000008.png", weights="/w")
    write_sealed(note, its_own(note, first))
    assert its_own(note, first) == first
    with pytest.raises(ValueError, match="000008 there was made from another image /a/000008.png; give another --out"):
        its_own(note, first | dict(image="/b/000008.png"))


def test_a_change_behind_a_link_is_seen(tmp_path):
    "KITTI is usually set up with training as a link."
    (tmp_path / "real" / "label_2").mkdir(parents=True)
    (tmp_path / "real" / "label_2" / "000000.txt").write_text("Car")
    (tmp_path / "kitti").mkdir()
    (tmp_path / "kitti" / "training").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "round").symlink_to(tmp_path / "kitti")
    was = folder_key(tmp_path / "kitti")
    assert folder_key(tmp_path / "kitti") == was
    (tmp_path / "real" / "label_2" / "000000.txt").write_text("Van")
    assert folder_key(tmp_path / "kitti") != was


def test_every_change_is_still_a_line_of_its_module():
    "Else the mutation run would stop half-way."
    for c in CHANGES:
        assert (ROOT / "cmkd" / c.module).read_text().count(c.line) == 1, c
        assert c.area in AREAS and c.line != c.becomes


@pytest.mark.parametrize("name", ["mutations", "kills", "disk", "same", "numbers", "fuzz"])
def test_what_is_published_has_no_problem(name):
    with open(ROOT / "results" / "trust" / f"{name}.csv", newline="") as f: rows = list(csv.DictReader(f))
    if name == "mutations": assert len(rows) >= 60 and all(r["noticed by"] for r in rows)
    elif name == "fuzz":
        assert not any(int(r[k]) for r in rows for k in ("uncaught", "vague", "silently wrong", "slow"))
        assert sum(int(r["inputs"]) for r in rows[:-1]) >= 60_000 and int(rows[-1]["inputs"]) < 1024
    else: assert rows and not any(r["problem"] for r in rows)
    if name == "kills": assert sum(int(r["kills"]) for r in rows) >= 100
