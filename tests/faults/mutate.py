"""Does a test notice? Sixty one-line changes in methods, training, ledger and data, one at a time.

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
METHOD = ("test_legs.py", "test_methods.py", "test_distill.py", "test_loop.py", "test_losses.py", "test_models.py")
LEDGER = ("test_legs.py", "test_ledger.py", "test_tables.py", "test_cli.py")
DATA = ("test_legs.py", "test_data.py", "test_doctor.py", "test_ledger.py")
LAYER = ("test_legs.py", "test_layers.py", "test_anchors.py", "test_boxes.py", "test_geometry.py", "test_models.py")
JUDGE = ("test_evaluate.py",)


@dataclass(frozen=True)
class Change:
    "One line of a module, and what it becomes."

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


CHANGES = (
    # methods: what a leg is given
    Change("distill/roles.py", "pick_device(work.device), work.sets.seen()", "pick_device(work.device), work.sets.train", METHOD),
    Change("distill/roles.py", "cfg.head, cfg.teacher.losses, targets(batch)", "cfg.head, cfg.distill.losses, targets(batch)", METHOD),
    Change("distill/roles.py", "return cfg.teacher.seed", "return cfg.seed", METHOD),
    Change("distill/roles.py", "fed = feed(work.sets.train, stage, work.run, data,", "fed = feed(work.sets.seen(), stage, work.run, data,", METHOD),
    Change("distill/roles.py", "return model.eval().requires_grad_(False).to(device)", "return model.requires_grad_(False).to(device)", METHOD),
    Change("distill/roles.py", "flip=data.flip, mirror=data.mirror, photometric=data.photometric)", "flip=data.flip, mirror=data.mirror, photometric=0)", METHOD),
    Change("distill/roles.py", "flip=data.flip, rotation=data.rotation, scaling=data.scaling)", "flip=data.flip, rotation=data.rotation, scaling=data.rotation)", METHOD),
    Change("distill/roles.py", "return dict(depth=depth_term(logits, batch, cfg.space, cfg.depth))", "return dict(depth=depth_term(logits, batch, cfg.space, Depth()))", METHOD),
    Change("distill/roles.py", 'upto = "bev" if name == "feature" and distiller.bev_alone else "head"', 'upto = "head"', METHOD),
    Change("distill/roles.py", 'begin = (lambda: distiller.begin(model, teachers)) if name == "full" else (lambda: None)', 'begin = (lambda: None) if name == "full" else (lambda: None)', METHOD),
    Change("distill/roles.py", "return detect_set(network, frames, cfg.data, cfg.space, cfg.head, **options)", "return detect_set(network, frames, cfg.data, cfg.space, Head(), **options)", METHOD),
    Change("distill/roles.py", "frames=2 * frames)", "frames=frames)", METHOD),
    Change("distill/roles.py", 'return ("teacher",) * pupil.needs_teacher(cfg) + ("depth",) * cfg.pretrain', 'return ("teacher",) * pupil.needs_teacher(cfg)', METHOD),
    Change("distill/roles.py", 'model.lifted.image.load_state_dict(read_weights(work.parents["depth"]))', "pass", METHOD),
    Change("distill/roles.py", 'READ = ("data.kind", "data.world",', 'READ = ("data.kind",', METHOD),
    Change("distill/cmkd.py", 'replace(head, score=d.score) if d.response == "soft"', 'replace(head, score=d.score, nms=.5) if d.response == "soft"', METHOD),
    Change("distill/cmkd.py", 'replace(head, score=d.score) if d.response == "soft"', 'head if d.response == "soft"', METHOD),
    Change("distill/cmkd.py", 'out["feature"] = d.feature_weight*feature_loss(', 'out["feature"] = feature_loss(', METHOD),
    Change("distill/cmkd.py", 'out["depth"] = d.depth_weight*depth_term(', 'out["depth"] = depth_term(', METHOD),
    Change("distill/cmkd.py", 'quality = d.response == "hard" or d.quality', "quality = d.quality", METHOD),
    Change("distill/cmkd.py", "if not self.load_head: return", "return", METHOD),
    Change("distill/cmkd.py", "stay, come = soft[~torch.isin(soft.labels, kinds)]", "stay, come = soft", METHOD),
    Change("distill/hint.py", "hint = self.hint.weight*feature_loss(", "hint = feature_loss(", METHOD),
    Change("distill/logits.py", "self.logits.losses, self.logits.score, quality=False", "self.logits.losses, self.logits.score, quality=True", METHOD),
    Change("distill/teachers.py", "facts = [told, torch.__version__,", "facts = [torch.__version__,", METHOD),
    Change("distill/teachers.py", "keys = [frame_key(f, self.teacher.reads) for f in frames]", "keys = [f.ids[0].encode() for f in frames]", METHOD),
    Change("distill/teachers.py", 'self.upto = "bev" if set(names) <= BEFORE_HEAD else "head"', 'self.upto = "bev"', METHOD),
    Change("distill/depth.py", "if boxes is None or not len(boxes): out", "if True: out", METHOD),
    # layers that a figure stands on
    Change("layers/lift.py", "stride = [-(-image[1]//level[1]), -(-image[0]//level[0]), 1.]", "stride = [image[1]/level[1], image[0]/level[0], 1.]", LAYER),
    Change("boxes.py", "    near: float=.1,   # edges are cut at this depth, m", "    near: float=2.,   # edges are cut at this depth, m", LAYER),
    # training
    Change("train/step.py", "low, climbs = stage.lr / stage.div, at <= top", "low, climbs = stage.lr / stage.final_div, at <= top", METHOD),
    Change("train/step.py", "return self.steps or self.epochs * per_epoch", "return self.steps or self.epochs", METHOD),
    Change("train/step.py", "accelerator.clip_grad_norm_(learner.parameters(), stage.clip)", "accelerator.clip_grad_norm_(learner.parameters(), 1e9)", METHOD),
    Change("train/step.py", "lr=stage.lr, betas=(0.95, 0.999), weight_decay=stage.weight_decay, fused=True", "lr=stage.lr, betas=(0.95, 0.999), weight_decay=0.01, fused=True", METHOD),
    Change("train/loop.py", "seed_everything(run, leg.name)", "seed_everything(run)", METHOD),
    Change("train/loop.py", "if last: finite(learner, at.step)", "pass", METHOD),
    Change("train/loop.py", "state = {i: {k: like(every[i], t) for k, t in s.items()}", "state = {i: {k: t for k, t in s.items()}", METHOD),
    Change("train/loop.py", 'if checksum(tensors, about["told"]) != about["sha256"]:', "if False:", METHOD),
    Change("train/loop.py", "torch.set_rng_state(saved.torch_rng)", "pass", METHOD),
    Change("train/feed.py", "image_size=data.image_size, grid=whole(space), cache=keep", "grid=whole(space), cache=keep", METHOD),
    # ledger
    Change("ledger/runs.py", 'Work(f"{name}/{role.seed(cfg)}", sets,', 'Work(f"{name}/{cfg.seed}", sets,', LEDGER),
    Change("ledger/runs.py", 'if role.detect: ap = judge(cfg, role, folder/"weights.safetensors", sets.val, progress)', 'if role.detect: ap = judge(cfg, role, folder/"weights.safetensors", sets.train, progress)', LEDGER),
    Change("ledger/runs.py", "return same_parents(same_data(run, here), store)", "return same_data(run, here)", LEDGER),
    Change("ledger/runs.py", "return same_parents(same_data(run, here), store)", "return same_parents(run, store)", LEDGER),
    Change("ledger/runs.py", 'return {k: v for k, v in data.items() if k != "val"}', "return data", LEDGER),
    Change("ledger/runs.py", 'if made == named or new.record["weights_sha256"] != old.record["weights_sha256"]: return new', "if made == named: return new", LEDGER),
    Change("ledger/runs.py", "if {k: kept.get(k) for k in sources} != sources:", "if False:", LEDGER),
    Change("ledger/record.py", "if named != run.record[\"name\"]: raise", "if False: raise", LEDGER),
    Change("ledger/record.py", 'if weights.exists() and sha256(weights) != run.record["weights_sha256"]:', "if False:", LEDGER),
    Change("ledger/record.py", 'dirty=bool(git("status", "--porcelain", "--", ".", ":(exclude)results"))', "dirty=False", LEDGER),
    Change("ledger/tables.py", '("+" if r["git"]["dirty"] else "")', '""', LEDGER),
    Change("ledger/tables.py", 'return "world" if record["config"]["data.kind"] == "world" else "KITTI (your folder)"', 'return "world"', LEDGER),
    Change("reading.py", "if seal != _seal(value): raise", "if False: raise", LEDGER),
    # data
    Change("data/sets.py", "refuse_overlap(frames.ids, val.ids, object_to_raw(mapping))", "object_to_raw(mapping)", DATA),
    Change("data/sets.py", 'no_copies((sets.val, found["val"])', 'no_copies((sets.val, found["val"][:0])', DATA),
    Change("data/sets.py", 'refuse_nonsense(sets.train, found["train"], data.classes)', "pass", DATA),
    Change("data/sets.py", "KINDS[data.kind](root, data.unlabelled, False, data.world)", "KINDS[data.kind](root, data.unlabelled, True, data.world)", DATA),
    Change("data/facts.py", "s.st_size, s.st_mtime_ns, s.st_ctime_ns] for s in stats]", "s.st_size, s.st_mtime_ns] for s in stats]", DATA),
    Change("data/kitti.py", 'for k in ("image_2", "velodyne", "calib", "label_2")[:3 + self.labelled])', 'for k in ("image_2", "velodyne", "calib", "label_2")[:3])', DATA),
    Change("data/kitti.py", "return np.clip(boxes2d, 0, [size[1] - 1, size[0] - 1]*2)", "return np.clip(boxes2d, 0, [size[1], size[0]]*2)", DATA),
    Change("data/kitti_raw.py", "where = same if i in frames else near if", "where = same if i in frames else clean if", DATA),
    Change("data/dataset.py", "keep = ((xy >= xy.new_tensor(grid.low[:2])) & (xy < xy.new_tensor(grid.high[:2]))).all(1)", "keep = (xy < xy.new_tensor(grid.high[:2])).all(1)", DATA),
    Change("evaluate/matching.py", "(gt.truncation > _TRUNCATION[k])", "(gt.truncation > 1)", JUDGE),
    Change("evaluate/curves.py", "if metric == \"2D\":", "if False:", JUDGE),
)  # fmt: skip


def tried(change: Change, tree: Path) -> tuple[str, float]:
    "The first test that notices a change made in `tree`, '' for a survivor, and seconds."
    path, begin = tree / "cmkd" / change.file, time.perf_counter()
    source = path.read_text()
    if source.count(change.old) != 1:
        raise SystemExit(f"{change.file}: {source.count(change.old)} times {change.old!r}, it must be there once")
    path.write_text(source.replace(change.old, change.new))
    try:
        tests = [f"tests/{t}" for t in change.tests]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", *tests]
        more = dict(PYTHONPATH=str(tree), OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
        done = subprocess.run(command, cwd=tree, env=os.environ | more, capture_output=True, text=True)
    finally:
        path.write_text(source)
    failed = re.search(r"^FAILED (\S+)|^ERROR (\S+)", done.stdout, re.M)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{change.file}: {change.new!r} breaks the import\n{done.stdout[-2000:]}")
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
                print(f"{n:3} {change.file}: {'noticed by ' + by if by else 'SURVIVES ' + change.new}", flush=True)
                out.append((n, change.file, change.old.strip(), change.new.strip(), by, f"{seconds:.0f}"))
            return out

        with ThreadPoolExecutor(args.workers) as pool:
            rows = sorted(r for part in pool.map(share, range(args.workers)) for r in part)
    survivors = [r for r in rows if not r[4]]
    print(f"{len(rows)} changes, {len(survivors)} survivors")
    if not args.only:
        path = ROOT / "results" / "trust" / "mutations.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as f:
            csv.writer(f, lineterminator="\n").writerows([("n", "module", "line", "becomes", "noticed by", "seconds"), *rows])
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
