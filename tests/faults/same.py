"""Same config, seed and machine: the same bits, whatever goes on around.

    python -m tests.faults.same

A student with its parents, every leg, and a table: again, beside another one, with more threads, with one worker
instead of two. (Cut off and gone on with: see tests/faults/kills.py.) Writes results/trust/same.csv.
"""

import csv
import sys
import tempfile
from pathlib import Path

from tests.faults.kills import begun, fresh, made
from tests.faults.mutate import ROOT

STUDENT, TABLE = "a student, every leg", "a table, two workers"


def main() -> int:
    rows, wanted = [], {}
    with tempfile.TemporaryDirectory() as temp:
        cases = (
            (STUDENT, "alone", 1, {}, 2), (STUDENT, "again", 1, {}, 2), (STUDENT, "two at once", 2, {}, 2),
            (STUDENT, "two threads a process", 1, dict(OMP_NUM_THREADS="2", MKL_NUM_THREADS="2"), 2),
            (TABLE, "two workers", 1, {}, 2), (TABLE, "again", 1, {}, 2), (TABLE, "one worker", 1, {}, 1),
        )  # fmt: skip
        for n, (name, how, several, env, workers) in enumerate(cases):
            (here := Path(temp) / str(n)).mkdir()
            trees = [fresh(here / str(k), name) for k in range(several)]
            works = [begun(tree, name, **env, CMKD_WORKERS=str(workers)) for tree in trees]
            codes = [w.wait() for w in works]
            for tree, code in zip(trees, codes, strict=True):
                got, litter = made(tree, name)
                whole = wanted.setdefault(name, got)
                other = sorted(k for k in whole.keys() | got.keys() if whole.get(k) != got.get(k))
                problem = "; ".join([*(["failed"] if code else []), *(f"other: {k}" for k in other[:3]), *litter[:3]])
                rows.append(dict(work=name.split(",")[0], how=how, files=len(got), problem=problem))
                print(rows[-1], flush=True)
    bad = [r for r in rows if r["problem"]]
    print(f"{len(rows)} times, {len(bad)} problems")
    path = ROOT / "results" / "trust" / "same.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as f:
        out = csv.DictWriter(f, ("work", "how", "files", "problem"), lineterminator="\n")
        out.writeheader()
        out.writerows(rows)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
