"""Does a test notice? The one-line changes of changes.csv in methods, training, ledger and data, one at a time.

    python -m tests.faults.mutate [--workers 2] [--only N ...]

Each is made in a copy of the tree, and the tests of its area are run until one fails. What no test notices is a
survivor, and the script ends with 1. Writes results/trust/mutations.csv.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AREAS = dict(
    method=("legs", "methods", "distill", "loop", "losses", "models"),
    layer=("legs", "layers", "anchors", "boxes", "geometry", "models"),
    ledger=("legs", "ledger", "tables", "cli"),
    data=("legs", "data", "doctor", "ledger"),
    judge=("evaluate",),
    study=("study", "tables", "legs"),
)  # which of tests/test_*.py should notice


@dataclass(frozen=True)
class Change:
    "A piece of one line of a module, what it becomes, and whose tests should notice."

    module: str
    line: str
    becomes: str
    area: str


with open(Path(__file__).with_name("changes.csv"), newline="") as f:
    CHANGES = [Change(**row) for row in csv.DictReader(f)]


def tried(change: Change, tree: Path) -> tuple[str, float]:
    "The first test that notices a change made in `tree`, '' for a survivor, and seconds."
    path, begin = tree / "cmkd" / change.module, time.perf_counter()
    source = path.read_text()
    if source.count(change.line) != 1:
        raise SystemExit(f"{change.module}: {source.count(change.line)} times {change.line!r}, it must be there once")
    path.write_text(source.replace(change.line, change.becomes))
    try:
        tests = [f"tests/test_{t}.py" for t in AREAS[change.area]]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", *tests]
        more = dict(PYTHONPATH=str(tree), OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
        done = subprocess.run(command, cwd=tree, env=os.environ | more, capture_output=True, text=True)
    finally:
        path.write_text(source)
    failed = re.search(r"^FAILED (\S+)|^ERROR (\S+)", done.stdout, re.M)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{change.module}: {change.becomes!r} breaks the import\n{done.stdout[-2000:]}")
    return (failed[1] or failed[2]) if failed else "", time.perf_counter() - begin


def copied(folder: Path) -> Path:
    "A copy of what git knows of the tree."
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        if not (ROOT / name).exists():
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--workers", type=int, default=2)
    asked.add_argument("--only", type=int, nargs="*")
    args = asked.parse_args()
    os.environ.setdefault("CMKD_SHARED", str(ROOT.parent / "shared"))
    numbers = args.only or range(1, len(CHANGES) + 1)
    with tempfile.TemporaryDirectory() as temp:
        trees = [copied(Path(temp) / str(w)) for w in range(args.workers)]

        def share(w: int) -> list[tuple]:
            out = []
            for n in list(numbers)[w :: args.workers]:
                change = CHANGES[n - 1]
                by, seconds = tried(change, trees[w])
                told = f"noticed by {by}" if by else f"SURVIVES {change.becomes}"
                print(f"{n:3} {change.module}: {told}", flush=True)
                out.append((n, change.module, change.line, change.becomes, by, f"{seconds:.0f}"))
            return out

        with ThreadPoolExecutor(args.workers) as pool:
            rows = sorted(r for part in pool.map(share, range(args.workers)) for r in part)
    survivors = [r for r in rows if not r[4]]
    print(f"{len(rows)} changes, {len(survivors)} survivors")
    path = ROOT / "results" / "trust" / "mutations.csv"
    if args.only and path.exists():                                  # the others stay as they were found
        with open(path, newline="") as f: rest = [tuple(r) for r in csv.reader(f)][1:]
        rows = sorted([r for r in rest if int(r[0]) not in args.only] + rows, key=lambda r: int(r[0]))
    if path.exists() or not args.only:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as f:
            out = csv.writer(f, lineterminator="\n")
            out.writerows([("n", "module", "line", "becomes", "noticed by", "seconds"), *rows])
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
