"""A hundred kills at random moments: what is made in the end has the same bits, and nothing is left lying about.

    python -m tests.faults.kills [--kills 100] [--seed 0] [--only WORK]

Three pieces of work, each done once undisturbed and then under fire: a street being rendered by two processes; a
student with its teacher and depth network, through every leg, a checkpoint after every step; and a table, whose
kernel trains with two workers. What is killed is the process itself, or one of those it has started. Writes
results/trust/kills.csv.
"""

import argparse
import csv
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.mutate import ROOT, copied

SMALL = ["checkpoint_seconds=0", "teacher_stage.steps=10", "depth_stage.steps=8", "feature_stage.steps=8",
         "feature_stage.batch=4", "full_stage.steps=8"]  # fmt: skip
WORK = {
    "a street, two processes": """
from cmkd.world.write import STREET, write
if __name__ == "__main__": write("made/street", STREET, dict(train=60, val=20), progress=False, workers=2)
""",
    "a student, every leg": f"""
from cmkd.ledger.runs import fit_or_load
from cmkd.methods import recipe
if __name__ == "__main__":
    fit_or_load(recipe(scale="smoke").override(*{SMALL}), "student", "data/world-smoke", "made/runs", progress=False)
""",
    "a table, two workers": """
import os, sys
from cmkd.cli import main
workers = os.environ.get("CMKD_WORKERS", "2")
if __name__ == "__main__": sys.exit(main(["table", "cmkd_t04", "--scale", "smoke", "--workers", workers]))
""",
}
MADE = {"a street, two processes": ("made/street",), "a student, every leg": ("made/runs",),
        "a table, two workers": ("results/runs", "results/tables", "results/figures", "results/executed")}  # fmt: skip
SHARE = {"a street, two processes": 0.5, "a student, every leg": 0.42, "a table, two workers": 0.08}
VOLATILE = {"cost", "started", "finished", "seal", "git", "hardware"}  # of a record: when, where and at what price
LITTER = re.compile(r"\.tmp|checkpoint|begun_from|stopped_at|failed|running")


def begun(tree: Path, name: str, **env: str) -> subprocess.Popen:
    "The work, started in a process of its own."
    script = tree / "work.py"
    script.write_text(WORK[name])
    more = dict(PYTHONPATH=str(tree), OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CMKD_WORK=str(tree)) | env
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, script], cwd=tree, env=os.environ | more, **quiet)


def below(pid: int) -> list[int]:
    "The processes that a process has started, and theirs."
    out, todo = [], [pid]
    while todo:
        now = todo.pop()
        for file in Path(f"/proc/{now}/task").glob("*/children"):
            try: todo += (new := [int(p) for p in file.read_text().split()])
            except OSError: continue
            out += new
    return out


def alive(tree: Path) -> list[int]:
    "Processes that were started for the work in this tree."
    mark, out = f"CMKD_WORK={tree}".encode(), []
    for p in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in p.read_bytes() and "Z" not in (p.parent / "stat").read_text().rsplit(")", 1)[1][:3]:
                out.append(int(p.parent.name))
        except OSError: continue
    return out


def content(path: Path) -> str:
    "A hash of what counts in a file: of a record without its price and its clock."
    if path.name in ("record.json",) or path.name.startswith("ap-"):
        return json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in VOLATILE}, sort_keys=True)
    if path.suffix == ".ipynb" or path.name.endswith(".key.json"): return "made"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def made(tree: Path, name: str) -> tuple[dict[str, str], list[str]]:
    "What the work has made, and what is left beside it."
    files = [p for folder in MADE[name] for p in (tree / folder).rglob("*") if p.is_file() and p.name != "lock"]
    litter = [str(p.relative_to(tree)) for p in files if LITTER.search(p.name)]
    return {str(p.relative_to(tree)): content(p) for p in files if not LITTER.search(p.name)}, litter


def fresh(temp: Path, name: str) -> Path:
    "A tree in which nothing of this has been made, as it stood at the first call; the smoke scale's street is there."
    kept = temp.parent.parent / "tree"
    if not kept.exists():
        kept.mkdir()
        copied(kept)
    tree = Path(shutil.copytree(kept, temp))
    if name != "a street, two processes":
        script = 'from cmkd.world.write import world\nif __name__ == "__main__": world("smoke", progress=False)'
        here = os.environ | dict(PYTHONPATH=str(tree))
        subprocess.run([sys.executable, "-c", script], cwd=tree, env=here, check=True)
    return tree


def shot(work: subprocess.Popen, after: float, at_child: bool, dice: random.Random) -> str:
    "Kill a process after so many seconds: what was hit, '' if the work was done before."
    try: work.wait(after)
    except subprocess.TimeoutExpired: pass
    else: return ""
    children = below(work.pid)
    victim = dice.choice(children) if at_child and children else work.pid
    try: os.kill(victim, signal.SIGKILL)
    except ProcessLookupError: return ""
    return "itself" if victim == work.pid else "one it started"


def under_fire(name: str, kills: int, temp: Path, dice: random.Random) -> list[dict]:
    "Rows of one piece of work."
    tree, begin = fresh(temp / "whole", name), time.perf_counter()
    assert not begun(tree, name).wait(), name
    length, (wanted, litter) = time.perf_counter() - begin, made(tree, name)
    assert not litter, litter
    rows, hit, round_ = [], 0, 0
    while hit < kills:
        round_ += 1
        tree, here = fresh(temp / str(round_), name), []
        while True:                                      # three kills a round, then it may end
            work = begun(tree, name)
            after = dice.uniform(0.25, 0.95) * length if len(here) < 3 and hit + len(here) < kills else 600
            what = shot(work, after, dice.random() < 0.5, dice)
            if what: here.append((what, after))
            code = work.wait() if what == "itself" else ended(work)
            deadline = time.time() + 20
            while (orphans := alive(tree)) and time.time() < deadline: time.sleep(0.1)
            for pid in orphans: os.kill(pid, signal.SIGKILL)
            if orphans: rows.append(dict(work=name, round=round_, problem=f"{len(orphans)} processes went on alone"))
            if code == 0: break
        got, litter = made(tree, name)
        other = sorted(k for k in wanted.keys() | got.keys() if wanted.get(k) != got.get(k))
        told = "; ".join(f"{what} after {after:.1f} of {length:.1f} s" for what, after in here)
        problem = "; ".join((*(f"other: {k}" for k in other[:3]), *(f"left: {p}" for p in litter[:3])))
        rows.append(dict(work=name, round=round_, kills=len(here), killed=told, problem=problem))
        hit += len(here)
        print(rows[-1], flush=True)
    return rows


def ended(work: subprocess.Popen) -> int:
    "The exit status of work one of whose processes was killed: it ends by itself, or has hung."
    try: return work.wait(300)
    except subprocess.TimeoutExpired:
        work.kill()
        return -1


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--kills", type=int, default=100)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--only", choices=tuple(WORK), help="tried anew; the rows of the others stay as they are")
    args, rows = asked.parse_args(), []
    with tempfile.TemporaryDirectory() as temp:
        for i, (name, share) in enumerate(SHARE.items()):
            if args.only not in (None, name): continue
            folder = Path(temp) / str(i)
            folder.mkdir()
            rows += under_fire(name, round(share * args.kills), folder, random.Random(f"{args.seed} {name}"))
    bad = [r for r in rows if r["problem"]]
    print(f"{sum(r.get('kills', 0) for r in rows)} kills, {len(bad)} problems")
    path = ROOT / "results" / "trust" / "kills.csv"
    if args.only and path.exists():
        with open(path, newline="") as f: others = [r for r in csv.DictReader(f) if r["work"] != args.only]
        rows = sorted(others + rows, key=lambda r: list(WORK).index(r["work"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as f:
        out = csv.DictWriter(f, ("work", "round", "kills", "killed", "problem"), lineterminator="\n")
        out.writeheader()
        out.writerows(rows)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
