"""Foreign bytes in every file that is read, foreign words in every setting.

    python -m tests.faults.fuzz [--inputs 60000] [--seed 0]

A reader may give a value or one error that names the file (or the field) and a remedy. Anything else is counted:
*uncaught* (another kind of error), *vague* (an error that names nothing), *silently wrong* (a file with a checksum that
reads as something else), *slow* (over 5 s). Writes results/trust/fuzz.csv; the peak of memory is that of the process.
"""

import argparse
import csv
import io
import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cmkd.config import kinds
from cmkd.cost.measure import peak_memory_mb
from cmkd.data.facts import Memory, facts
from cmkd.data.kitti import Kitti, read_calib, read_detections, read_image, read_label, read_points, read_split
from cmkd.data.kitti_raw import object_to_raw, read_raw_calib, read_raw_list
from cmkd.data.sets import street_made
from cmkd.distill.released import convert, load_converted
from cmkd.distill.store import TapStore
from cmkd.ledger.notebooks import declared, printed
from cmkd.ledger.record import load
from cmkd.ledger.tables import paper_rows
from cmkd.methods import METHODS, recipe, role_of
from cmkd.reading import read_sealed, sha256, write_sealed
from cmkd.train.loop import CHECKPOINT, Leg, cut_off, train
from cmkd.train.roles import load_network, save_weights
from cmkd.train.step import Learner, Stage
from cmkd.world.rays import WorldConfig
from cmkd.world.write import write

ROOT = Path(__file__).resolve().parents[2]
GOOD = (ValueError, TypeError, KeyError, OSError)  # what a door turns into one line
WORDS = [
    *("nan", "inf", "-inf", "1e999", "-1", "0", "1e-320", "", "é", "\x00", "9" * 400, "0x10", "null", "true", "None"),
    *("[]", "{}", '"', "'", "[" * 2000, "../x", "/etc/passwd", "~", "$HOME", "%s", "{0}", "-0", "1_0", " "),
]


def bent(data: bytes, dice: random.Random, text: bool) -> bytes:
    "The bytes with one to four changes."
    data = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        at, n = dice.randrange(len(data) + 1), dice.choice((1, 1, 2, 8, 64))
        how = dice.randrange(9)
        if how == 0: del data[at:]
        elif how == 1: del data[at : at + n]
        elif how == 2: data[at:at] = dice.randbytes(n)
        elif how == 3 and data: data[min(at, len(data) - 1)] ^= 1 << dice.randrange(8)
        elif how == 4: data[at : at + n] = dice.randbytes(n)
        elif how == 5: data[at:at] = data[at : at + 256]
        elif how == 6: data = bytearray(dice.randbytes(n))
        elif how == 7 and text and data:
            words = bytes(data).split(b" ")
            words[dice.randrange(len(words))] = dice.choice(WORDS).encode()
            data = bytearray(b" ".join(words))
        elif how == 8 and text and data:
            lines = bytes(data).split(b"\n")
            dice.shuffle(lines)
            data = bytearray(b"\n".join(lines[: dice.randrange(1, len(lines) + 1)]))
    return bytes(data)


@dataclass
class Target:
    "A file and how it is read."

    name: str
    path: Path
    read: Callable[[], object]
    text: bool = True
    sealed: bool = False  # a changed byte must never pass for something else
    quiet: bool = False  # it may not fail at all: what is kept only to save time
    same: Callable[[object], object] = lambda v: v

    def __post_init__(self):
        self.sound = self.path.read_bytes()
        self.value = self.same(self.read())

    def once(self, dice: random.Random) -> str:
        "What came of one bent file."
        bad = bent(self.sound, dice, self.text)
        self.path.write_bytes(bad)
        begin = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = self.same(self.read())
        except GOOD as e: found = "refused" if self.told(str(e)) else f"vague: {type(e).__name__}: {str(e)[:200]}"
        except Exception as e: found = f"uncaught: {type(e).__name__}: {str(e)[:200]}"
        else:
            equal = value == self.value
            found = "read, the same" if equal else "read, other"
            if self.sealed and not equal or self.quiet and not equal: found = "silently wrong"
        if self.quiet and found == "refused": found = "uncaught: it may not fail"
        if time.perf_counter() - begin > 5: found = "slow"
        for p in self.path.parent.glob(f"{self.path.name}-*"): p.unlink()  # of SQLite
        self.path.write_bytes(self.sound)
        return found

    def told(self, text: str) -> bool:
        "Does an error name the file, and say what to do?"
        named = self.path.name in text or self.path.parent.name in text
        return named and ";" in text


class Settings:
    "Overrides of every method's config."

    name = "settings"

    def __init__(self): self.starts = [recipe(m, scale="mini") for m in METHODS]

    def once(self, dice: random.Random) -> str:
        cfg = dice.choice(self.starts)
        field = dice.choice(list(kinds(type(cfg))))
        some = lambda: (dice.uniform(-2, 2), dice.randint(-5, 10**9), 10.0 ** dice.randint(-300, 300))
        number = lambda: repr(dice.choice(some()))
        several = "[" + ", ".join(number() for _ in range(dice.randrange(5))) + "]"
        word = dice.choice((dice.choice(WORDS), number(), several, dice.randbytes(8).decode("latin1")))
        begin = time.perf_counter()
        try: new = cfg.override(f"{field}={word}")
        except GOOD as e:
            text = str(e)
            group = field.rsplit(".", 1)[-1]
            found = "refused" if group in text else f"vague: {field}={word[:40]}: {text[:200]}"
        except Exception as e: found = f"uncaught: {field}={word[:40]}: {type(e).__name__}: {str(e)[:200]}"
        else: found = "read, the same" if new == cfg else "read, other"
        return "slow" if time.perf_counter() - begin > 5 else found


def targets(folder: Path) -> list:
    "Every reader, with a file of its own."
    write(folder / "street", WorldConfig(), dict(train=2, val=1), progress=False)
    street = folder / "street"
    training = street / "training"
    label = max((training / "label_2").glob("*.txt"), key=lambda p: p.stat().st_size)
    arrays = lambda o: [np.asarray(v).tolist() for v in vars(o).values() if v is not None]
    at = lambda kind, end: training / kind / f"000000{end}"
    rig, points, image, split = at("calib", ".txt"), at("velodyne", ".bin"), at("image_2", ".png"), street / "ImageSets"
    out = [
        Target("label", label, lambda: read_label(label), same=arrays),
        Target("calibration", rig, lambda: read_calib(rig), same=arrays),
        Target("sweep", points, lambda: read_points(points), False, same=np.ndarray.tobytes),
        Target("picture", image, lambda: read_image(image), False, same=np.ndarray.tobytes),
        Target("split", split / "train.txt", lambda: read_split(street, "train")),
        Target("world.json", street / "world.json", lambda: street_made(street)),
    ]
    file = folder / "detections" / "000000.txt"
    file.parent.mkdir()
    file.write_text("Car -1 -1 1.5 10 20 60 70 1.5 1.6 4 1 1.7 12 0.3 0.9\n" * 3)
    out.append(Target("detections", file, lambda: read_detections(file.parent, "000000"), same=arrays))
    listed = folder / "raw.txt"
    listed.write_text("".join(f"2011_09_26_drive_0005_sync/{i:010d}\n" for i in range(5)))
    out.append(Target("raw list", listed, lambda: read_raw_list(listed)))
    mapping = folder / "mapping.json"
    raw = lambda i: ["2011_09_26", "2011_09_26_drive_0005_sync", f"{i:010d}"]
    mapping.write_text(json.dumps({f"{i:06d}": raw(i) for i in range(9)}))
    out.append(Target("mapping", mapping, lambda: object_to_raw(mapping)))
    day = folder / "2011_09_26"
    day.mkdir()
    camera = "P_rect_02: 700 0 600 0 0 700 180 0 0 0 1 0\nR_rect_00: 1 0 0 0 1 0 0 0 1\n"
    (day / "calib_cam_to_cam.txt").write_text(camera)
    (day / "calib_velo_to_cam.txt").write_text("R: 0 -1 0 0 0 -1 1 0 0\nT: 0 0 0\n")
    out.append(Target("raw calibration", day / "calib_cam_to_cam.txt", lambda: read_raw_calib(day), same=arrays))
    # of results
    published = ROOT / "results" / "runs"
    source = next(p.parent for p in sorted(published.glob("mini-teacher-*/weights.safetensors")))
    run = folder / source.name
    shutil.copytree(source, run)
    out.append(Target("record", run / "record.json", lambda: load(run).record, sealed=True))
    ap, record = run / "ap-other.json", load(run).record
    write_sealed(ap, {k: record[k] for k in ("ap", "objects", "draws")} | dict(split="other"))
    out.append(Target("ap", ap, lambda: read_sealed(ap, "delete it"), sealed=True))
    cfg = load(run).config
    role = role_of(cfg, "teacher")
    out.append(Target("weights of a run", run / "weights.safetensors", lambda: load(run) and 0, False, sealed=True))
    loose = folder / "loose.safetensors"
    shutil.copyfile(run / "weights.safetensors", loose)
    weights = lambda: {k: v.numpy().tobytes() for k, v in load_network(role, cfg, loose).state_dict().items()}
    out.append(Target("weights alone", loose, weights, False))
    key = folder / "table.key.json"
    write_sealed(key, dict(key={}, text="a table", files={}))
    out.append(Target("key of a table", key, lambda: printed(folder / "table.ipynb"), sealed=True))
    paper = folder / "paper" / "cmkd_t04.csv"
    paper.parent.mkdir()
    shutil.copyfile(ROOT / "results/paper/cmkd_t04.csv", paper)
    out.append(Target("table of the paper", paper, lambda: paper_rows("t04", folder=paper.parent).to_csv()))
    book = folder / "book.ipynb"
    shutil.copyfile(ROOT / "nbs/tables/cmkd_t08_backbones.ipynb", book)
    out.append(Target("notebook", book, lambda: declared(book)))
    cut = folder / "cut"
    cut.mkdir()
    stopped(cut)
    out.append(Target("checkpoint", cut / CHECKPOINT, lambda: flat_state(cut), False, sealed=True))
    converted = folder / "converted"
    converted.mkdir()
    save_weights(role.build(cfg), converted / "weights.safetensors")
    about = dict(role="teacher", config=cfg.flat(), weights_sha256=sha256(converted / "weights.safetensors"))
    write_sealed(converted / "config.json", about)
    out.append(Target("converted", converted / "config.json", lambda: load_converted(converted)[1], sealed=True))
    released = folder / "released.pth"
    torch.save({"model_state": {k: v for k, v in role.build(cfg).state_dict().items()}}, released)
    out.append(Released("released checkpoint", released, folder / "out"))
    # what is kept only to save time
    frames, facts_file = Kitti(street, "train"), folder / "facts.sqlite"
    facts(frames, Memory(facts_file))
    out.append(Target("facts.sqlite", facts_file, lambda: facts(frames, Memory(facts_file)), False, quiet=True))
    taps = folder / "taps.sqlite"
    TapStore(taps).put(b"T", {(b"1", "bev"): b"x" * 5000})
    asked = lambda: {v for v in TapStore(taps).get(b"T", [b"1"], ("bev",)).values()} <= {b"x" * 5000}
    out.append(Target("taps.sqlite", taps, asked, False, quiet=True))
    return [*out, Settings()]


class Released(Target):
    "A checkpoint of somebody else's: what is in it may be anything."

    def __init__(self, name: str, path: Path, out: Path):
        self.out = out
        data = io.BytesIO()
        torch.save({"model_state": {"a.weight": torch.zeros(3)}}, data)
        path.write_bytes(data.getvalue())
        self.name, self.path, self.text, self.sealed, self.quiet = name, path, False, False, False
        self.sound, self.value, self.same = path.read_bytes(), None, lambda v: v
        self.read = lambda: convert(path, out) and None


def flat_state(folder: Path) -> list:
    "Everything that a checkpoint says."
    s = cut_off(folder)
    moments = {f"{i}/{k}": v.numpy().tobytes() for i, m in s.adam.items() for k, v in m.items()}
    return [vars(s.progress), {k: v.numpy().tobytes() for k, v in s.learner.items()}, moments, s.groups]


def stopped(folder: Path) -> None:
    "A small training that was cut off."
    from cmkd.core import Batch

    batch = Batch(["0"], torch.ones(1, 1, 3, 2, 2), *[torch.zeros(1)] * 5, [None], [None])
    net, count = torch.nn.Linear(12, 2), Counter()

    def losses(net, batch):
        count["steps"] += 1
        if count["steps"] == 4: raise KeyboardInterrupt
        return dict(box=net(batch.images.flatten(1)).square().mean())

    leg = Leg("first", Stage(), 8, lambda e, s: iter([batch] * 8), 8, losses)
    try: train(Learner(net), [leg], folder, "run", 0.0, False, "cpu")
    except KeyboardInterrupt: pass


def main(words: list[str] | None = None) -> int:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--inputs", type=int, default=60_000)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--write", action=argparse.BooleanOptionalAction, default=True)
    args, rows, wrong = asked.parse_args(words), [], []
    Image.init()
    with tempfile.TemporaryDirectory() as temp:
        several = targets(Path(temp))
        each = -(-args.inputs // len(several))
        for target in several:
            dice, begin = random.Random(f"{args.seed} {target.name}"), time.perf_counter()
            found = Counter()
            for _ in range(each):
                what = target.once(dice)
                if what.startswith(("vague", "uncaught", "silently", "slow")): wrong.append(f"{target.name}: {what}")
                found[what.split(":")[0]] += 1
            spent = time.perf_counter() - begin
            rows.append(dict(file=target.name, inputs=each, seconds=round(spent), **found))
            print(rows[-1], flush=True)
    for line, n in Counter(wrong).most_common(60): print(f"{n} x {line}")
    peak = peak_memory_mb()
    print(f"{sum(r['inputs'] for r in rows)} inputs, {len(wrong)} wrong, peak {peak:.0f} MiB")
    if args.write:
        path = ROOT / "results" / "trust" / "fuzz.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        names = ("file", "inputs", "refused", "read, the same", "read, other", "vague", "uncaught", "silently wrong",
                 "slow", "seconds")  # fmt: skip
        with open(path, "w", newline="") as f:
            out = csv.DictWriter(f, names, restval=0, lineterminator="\n")
            out.writeheader()
            out.writerows([*rows, dict(file="peak of memory, MiB", inputs=round(peak))])
    return bool(wrong) or peak > 1024


if __name__ == "__main__":
    sys.exit(main())
