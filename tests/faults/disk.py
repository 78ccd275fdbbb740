"""A disk that is full, or may not be written, at every write: a clear error, nothing half-written, the same bits after.

    python -m tests.faults.disk          (as root: it mounts small file systems in memory)

Every piece of work is done on a tmpfs of its own whose size is lowered step by step below what is needed, so that each
write is the one that fails once; then the disk grows and the same call is made again. Then the same with a file system
that is read-only. Writes results/trust/disk.csv.
"""

import csv
import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from cmkd.data.facts import Memory, facts
from cmkd.data.kitti import Kitti, write_image, write_points
from cmkd.distill.store import TapStore
from cmkd.draw import save
from cmkd.files import write_json
from cmkd.ledger import runs
from cmkd.ledger.runs import fit_or_load
from cmkd.methods import recipe
from cmkd.reading import write_sealed
from cmkd.train.roles import save_weights
from cmkd.world.rays import WorldConfig
from cmkd.world.write import world, write

ROOT = Path(__file__).resolve().parents[2]


def picture(folder: Path) -> None:
    write_image(folder / "a.png", np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8))


def sweep(folder: Path) -> None: write_points(folder / "a.bin", np.random.default_rng(0).uniform(0, 1, (9000, 4)))


def street(folder: Path) -> None: write(folder / "s", WorldConfig(), dict(train=2, val=1), progress=False)


def note(folder: Path) -> None: write_json(folder / "a.json", list(range(30_000)))


def sealed(folder: Path) -> None: write_sealed(folder / "a.json", dict(a=list(range(30_000))))


def weights(folder: Path) -> None:
    torch.manual_seed(0)
    save_weights(torch.nn.Linear(200, 200), folder / "w.safetensors")


def figure(folder: Path) -> None:
    import pandas as pd
    import plotly.graph_objects as go

    save(go.Figure(go.Scatter(y=list(range(5000)))), folder / "f", pd.DataFrame(dict(y=range(5000))))


def training(folder: Path) -> None:
    cfg = recipe(scale="smoke").override("checkpoint_seconds=0", "depth_stage.steps=6")
    fit_or_load(cfg, "depth", DATA, folder / "runs", progress=False)


def remembered(folder: Path) -> None:
    "What is kept to save time: no error at all, and the same facts."
    frames = Kitti(DATA, "train")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = facts(frames, Memory(folder / "facts.sqlite"))
        TapStore(folder / "taps.sqlite").put(b"T", {(b"1", "bev"): b"x" * 200_000})
    assert found == WANTED, "other facts"


WORK: tuple[Callable[[Path], None], ...] = (picture, sweep, street, note, sealed, weights, figure, training, remembered)
QUIET = {"remembered"}
DATA, WANTED = Path(), []


def files(folder: Path) -> dict[str, str]:
    "What is there: names and hashes; a lock and a database of time saved do not count."
    out = {}
    for p in sorted(folder.rglob("*")):
        if not p.is_file() or p.name == "lock" or ".sqlite" in p.name: continue
        text = p.read_bytes()
        out[str(p.relative_to(folder))] = "" if p.name == "record.json" else hashlib.sha256(text).hexdigest()
    return out


def mount(folder: Path, kib: int, *options: str) -> None:
    "A file system in memory of so many KiB."
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join((f"size={kib}k", *options)), "none", folder], check=True)


def remount(folder: Path, *options: str) -> None:
    subprocess.run(["mount", "-o", ",".join(("remount", *options)), folder], check=True)


def used(folder: Path) -> int:
    "KiB in use."
    s = os.statvfs(folder)
    return (s.f_blocks - s.f_bfree) * s.f_frsize // 1024


def half_written(folder: Path, whole: dict[str, str]) -> list[str]:
    "Files that are neither whole nor wanted: temporary ones, or such with other bytes than in the end."
    mid = {"checkpoint.safetensors", "begun_from.json"}  # a run on its way
    got = files(folder)
    return [k for k, v in got.items() if Path(k).name not in mid and (k not in whole or whole[k] and v != whole[k])]


def told(error: Exception | None, folder: Path) -> bool:
    "Does the error say that the disk is the matter, and where?"
    text = str(error)
    return isinstance(error, OSError) and str(folder) in text and any(w in text for w in ("No space left", "Read-only"))


def tried(work: Callable, disk: Path) -> Exception | None:
    try: work(disk)
    except Exception as e: return e
    return None


def full(work: Callable, temp: Path, steps: int = 12) -> list[dict]:
    "Rows of one piece of work on ever smaller disks."
    disk, rows = temp / work.__name__, []
    mount(disk, 200_000)
    assert (e := tried(work, disk)) is None, (work.__name__, e)
    need, whole = used(disk), files(disk)
    subprocess.run(["umount", disk], check=True)
    for part in np.linspace(0.02, 0.98, steps):
        mount(disk, max(4, int(part * need)))
        error, problem = tried(work, disk), []
        if work.__name__ in QUIET:
            if error: problem.append(f"failed: {error}")
        elif error is None and files(disk) != whole: problem.append("no error")
        elif error and not told(error, disk): problem.append(f"vague: {type(error).__name__}: {str(error)[:120]}")
        problem += [f"half-written: {p}" for p in half_written(disk, whole)[:3]]
        remount(disk, "size=200000k")
        if again := tried(work, disk): problem.append(f"not made after: {again}")
        if files(disk).keys() != whole.keys() or half_written(disk, whole): problem.append("other bits after")
        subprocess.run(["umount", disk], check=True)
        said = str(error).replace(str(temp), "")[:160] if error else ""
        rows.append(dict(work=work.__name__, disk=f"full at {part:.0%}", said=said, problem="; ".join(problem)))
    return rows


def read_only(work: Callable, temp: Path) -> dict:
    "The row of one piece of work where nothing may be written."
    disk, problem = temp / f"{work.__name__}-ro", []
    mount(disk, 200_000, "ro")
    error = tried(work, disk)
    if work.__name__ in QUIET:
        if error: problem.append(f"failed: {error}")
    elif not told(error, disk): problem.append(f"vague: {type(error).__name__}: {str(error)[:120]}")
    remount(disk, "rw")
    if again := tried(work, disk): problem.append(f"not made after: {again}")
    subprocess.run(["umount", disk], check=True)
    said = str(error).replace(str(temp), "")[:160] if error else ""
    return dict(work=work.__name__, disk="read-only", said=said, problem="; ".join(problem))


def main() -> int:
    global DATA, WANTED
    rows = []
    with tempfile.TemporaryDirectory() as temp:
        DATA = world("smoke", Path(temp) / "data", progress=False)
        WANTED = facts(Kitti(DATA, "train"), Memory(Path(temp) / "facts.sqlite"))
        runs.open_sets(recipe(scale="smoke").data, DATA)
        for work in WORK:
            try: rows += [*full(work, Path(temp)), read_only(work, Path(temp))]
            finally:
                for p in Path(temp).glob(f"{work.__name__}*"):
                    while subprocess.run(["umount", p], capture_output=True).returncode == 0: pass
            print(*(r for r in rows if r["work"] == work.__name__), sep="\n", flush=True)
    bad = [r for r in rows if r["problem"]]
    print(f"{len(rows)} disks, {len(bad)} problems")
    path = ROOT / "results" / "trust" / "disk.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as f:
        out = csv.DictWriter(f, ("work", "disk", "said", "problem"), lineterminator="\n")
        out.writeheader()
        out.writerows(rows)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
