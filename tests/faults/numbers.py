"""Numbers that are none, put in on purpose: every one stops the run, says where, and keeps the batch that did it.

    python -m tests.faults.numbers

NaN and the two infinities in a loss, in a gradient, in the weights, in the moments that a checkpoint holds, in a batch,
in a sweep on disk and in settings. Writes results/trust/numbers.csv.
"""

import csv
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from cmkd.data.kitti import frame_path, read_points
from cmkd.data.sets import open_sets
from cmkd.methods import recipe, role_of
from cmkd.train.loop import STOPPED, train
from cmkd.train.roles import Plan, Work
from cmkd.world.rays import WorldConfig
from cmkd.world.write import write

ROOT = Path(__file__).resolve().parents[2]
VALUES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
STEP = 2  # of six


def plan_of(street: Path) -> Plan:
    short = ("depth_stage.steps=6", "depth_stage.batch=2", "data.unlabelled=", "data.world=0")
    cfg = recipe(scale="smoke").override(*short)
    role = role_of(cfg, "depth")
    return role.plan(cfg, Work("depth/0", open_sets(cfg.data, street), device="cpu"))


def spoilt(plan: Plan, what: str, value: float) -> Plan:
    "The plan of a training into which a number is put at its third step."
    (leg,), count = plan.legs, iter(range(100))
    real = leg.losses

    def losses(network, batch):
        now = next(count)
        weight = next(iter(network.parameters()))
        if now == STEP and what == "weights":
            with torch.no_grad(): weight[(0,) * weight.dim()] = value
        if now == STEP and what == "batch": batch.images[0, 0, 0, 0, 0] = value
        out = real(network, batch)
        if now == STEP and what == "loss": out["depth"] = out["depth"] * value
        if now == STEP and what == "gradient": weight.register_hook(lambda g: g.index_fill(0, torch.tensor([0]), value))
        return out

    object.__setattr__(leg, "losses", losses)
    return plan


def in_training(street: Path, folder: Path, what: str, value: float) -> dict:
    "What a training says, and whether the batch was kept."
    problem, error = [], ""
    plan = spoilt(plan_of(street), what, value)
    try: train(plan.learner, plan.legs, folder, "run", 1e9, False, "cpu")
    except FloatingPointError as e: error = str(e)
    else: problem.append("went on")
    for word in (f"step {STEP}", "depth", "frames "):
        if word not in error: problem.append(f"does not say {word.strip()}")
    kept = folder / STOPPED
    if not kept.exists(): problem.append("the batch is gone")
    else:
        with safe_open(kept, "pt") as f: ids = json.loads(f.metadata()["ids"])
        if any(i not in error for i in ids): problem.append("kept another batch")
    return dict(said=error.replace(str(folder), "")[:200], problem="; ".join(problem))


def in_a_sweep(street: Path, folder: Path, value: float) -> dict:
    copy = folder / "street"
    shutil.copytree(street, copy)
    path = frame_path(copy, "velodyne", "000001")
    points = read_points(path)
    points[5, 1] = value
    path.write_bytes(points.astype(np.float32).tobytes())
    return refused(lambda: plan_of(copy), "000001.bin", folder)


def in_a_setting(name: str, value: str) -> dict:
    return refused(lambda: recipe(scale="smoke").override(f"{name}={value}"), name, Path("/nowhere"))


def refused(call: Callable, word: str, folder: Path) -> dict:
    try: call()
    except (ValueError, TypeError) as e: error = str(e)
    else: return dict(said="", problem="went on")
    return dict(said=error.replace(str(folder), "")[:200], problem="" if word in error else f"does not say {word}")


def rows() -> Iterator[dict]:
    "One for each place and value."
    with tempfile.TemporaryDirectory() as temp:
        street = Path(temp) / "street"
        write(street, WorldConfig(), dict(train=4, val=2), progress=False)
        for name, value in VALUES.items():
            for what in ("loss", "gradient", "weights", "batch"):
                folder = Path(temp) / f"{what}{name}"
                folder.mkdir()
                yield dict(put_into=what, value=name) | in_training(street, folder, what, value)
            folder = Path(temp) / f"sweep{name}"
            folder.mkdir()
            yield dict(put_into="a sweep on disk", value=name) | in_a_sweep(street, folder, value)
            word = dict(nan="NaN", inf="Infinity").get(name, "-Infinity")
            for field in ("full_stage.lr", "space.low", "data.flip"):
                text = f"[{word}, 0, 0]" if field == "space.low" else word
                yield dict(put_into=f"the setting {field}", value=name) | in_a_setting(field, text)


def main() -> int:
    found = list(rows())
    bad = [r for r in found if r["problem"]]
    print(*found, sep="\n")
    print(f"{len(found)} numbers, {len(bad)} problems")
    path = ROOT / "results" / "trust" / "numbers.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as f:
        out = csv.DictWriter(f, ("put_into", "value", "said", "problem"), lineterminator="\n")
        out.writeheader()
        out.writerows(found)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
