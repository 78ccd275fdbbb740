"Methods are tables of roles: what a run depends on, what a distiller owns, whose labels count, what a newcomer needs."

import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cmkd import config
from cmkd.config import flat, kinds, picked
from cmkd.core import Boxes, Frame, View
from cmkd.data.kitti import write_frame, write_split
from cmkd.data.sets import open_sets
from cmkd.distill.roles import MonoConfig, camera, lidar
from cmkd.ledger import runs
from cmkd.machine import seed_everything
from cmkd.methods import METHODS, config_from, hash_of, recipe, role_of
from cmkd.train import loop
from cmkd.train.roles import Work, fit
from cmkd.train.step import total

POSE = [[0, -1, 0, 0], [0, 0, -1, -0.08], [1, 0, 0, -0.27], [0, 0, 0, 1]]
CAMERA = [[185.9, 0, 157, 11], [0, 185.9, 44, 0.06], [0, 0, 1, 0.003]]
SHORT = (
    "data.kind=kitti",
    "data.world=0",
    *(f"{s}_stage.{k}=2" for s in ("teacher", "depth", "full") for k in ("steps", "batch")),
    "checkpoint_seconds=0",
)


@pytest.fixture(scope="module")
def street(tmp_path_factory) -> Path:
    "Eight frames of a car and a pedestrian; the last two are nobody's to label."
    root, r = tmp_path_factory.mktemp("street"), np.random.default_rng(0)
    for i in range(8):
        road, car = r.uniform([3, -8, -1.7], [26, 8, -1.6], (300, 3)), r.uniform([9, -1, -1.6], [13, 1, 0], (200, 3))
        points = np.concatenate([road, car])
        points = np.c_[points, points[:, :1] * 0].astype(np.float32)
        boxes = [[11, 0, -0.9, 4, 1.6, 1.5, 0], [16, 3, -0.8, 0.8, 0.6, 1.7, 0]]
        known = dict(
            boxes2d=[[140, 40, 180, 70], [100, 30, 110, 60]], truncation=[0, 0], occlusion=[0, 0], alpha=[0, 0]
        )
        view = View(CAMERA, POSE, r.integers(0, 255, (96, 320, 3), dtype=np.uint8))
        write_frame(root, Frame(f"{i:06d}", (view,), points, Boxes(boxes, ["Car", "Pedestrian"], **known)))
    for name, ids in (("train", range(4)), ("val", range(4, 6)), ("unlabelled", range(6, 8))):
        write_split(root, name, [f"{i:06d}" for i in ids])
    return root


def small(method="cmkd", *changes):
    return recipe(method, scale="smoke").override(*SHORT, *changes)


def work(cfg, role, street, parents=None, **more) -> Work:
    return Work(f"{role}/0", open_sets(cfg.data, street), parents or {}, device="cpu", **more)


@pytest.fixture(scope="module")
def parents(street, tmp_path_factory) -> dict[str, Path]:
    "A teacher and a depth run, for the students of every method."
    cfg, out = small(), {}
    for role in ("teacher", "depth"):
        folder = tmp_path_factory.mktemp(role)
        fit(role_of(cfg, role), cfg, work(cfg, role, street), folder, progress=False)
        out[role] = folder / "weights.safetensors"
    return out


# --- a distiller's own parameters ---


def test_an_adapter_trains_resumes_and_is_no_part_of_the_student(street, parents, tmp_path, monkeypatch):
    cfg = small("hint", "full_stage.steps=4")
    role, job = role_of(cfg, "student"), work(cfg, "student", street, parents)
    plan = role.plan(cfg, job)
    before = {k: v.clone() for k, v in plan.learner.distiller.state_dict().items()}
    assert set(before) == {"adapter.weight", "adapter.bias"}
    loop.train(plan.learner, plan.legs, tmp_path, job.run, 0.0, False, "cpu")
    after = plan.learner.distiller.state_dict()
    assert all(not torch.equal(v, after[k]) for k, v in before.items()), "the adapter learns"

    fit(role, cfg, job, tmp_path / "whole", 0.0, False)
    weights = load_file(tmp_path / "whole" / "weights.safetensors")
    assert set(weights) == set(camera(cfg).state_dict()) and not any("adapter" in k for k in weights)

    kept, saved = loop.save_checkpoint, []

    def dies(path, at, learner, adam):
        kept(path, at, learner, adam)
        saved.append({k: v.clone() for k, v in learner.distiller.state_dict().items()})
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", dies)
    with pytest.raises(KeyboardInterrupt):
        fit(role, cfg, job, tmp_path / "cut", 0.0, False)
    state = loop.load_checkpoint(tmp_path / "cut" / loop.CHECKPOINT).learner
    assert torch.equal(state["distiller.adapter.weight"], saved[-1]["adapter.weight"]), "the adapter is checkpointed"
    monkeypatch.setattr(loop, "save_checkpoint", kept)
    fit(role, cfg, job, tmp_path / "cut", 0.0, False)
    for name in ("weights.safetensors", "metrics.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    "method, losses", [("hint", {"hint", "cls", "box", "direction"}), ("logits", {"cls", "box", "direction"})]
)
def test_tenants_train(street, parents, tmp_path, method, losses):
    cfg = small(method)
    spent = fit(role_of(cfg, "student"), cfg, work(cfg, "student", street, parents), tmp_path, 60.0, False)
    logged = set(spent.progress.rows[-1]) - {"leg", "step", "lr", "loss", "grad_norm"}
    assert logged == losses | {f"pull_{name}" for name in losses}
    for tap in ("bev2d",) * (method == "hint"):
        other = cfg.override(f"distill.tap={tap}")
        fit(role_of(other, "student"), other, work(other, "student", street, parents), tmp_path / tap, 60.0, False)


# --- one class, and one that is not there ---

CAR = (
    'data.classes=["Car"]',
    "head.sizes=[[3.9, 1.6, 1.56]]",
    "head.bottoms=[-1.73]",
    "head.positive=[0.5]",
    "head.negative=[0.35]",
)


def test_a_car_only_model_trains_and_detects(street, tmp_path):
    cfg, parents = small("cmkd", *CAR, "head.score=0"), {}
    for name in ("teacher", "depth", "student"):
        role = role_of(cfg, name)
        fit(role, cfg, work(cfg, name, street, parents), tmp_path / name, 60.0, False)
        parents[name] = tmp_path / name / "weights.safetensors"
    val = open_sets(cfg.data, street).val
    found = role_of(cfg, "student").detect(cfg, camera(cfg).eval(), val, progress=False, device="cpu")
    assert set(found) == set(val.ids) and {n for b in found.values() for n in b.names} == {"Car"}
    assert len(val.frame(0).objects) == 2, "the label file still has its pedestrian"


# --- labels belong to their frame ---


@pytest.mark.parametrize(
    "changes",
    [
        ("distill.response=hard",),
        ("distill.response=soft", 'distill.hard=["Pedestrian"]'),
        ("distill.response=soft",),
        ("distill.response=dense",),
        ("distill.response=hard", "distill.losses.normalise=sum"),
        ("distill.response=hard", "distill.losses.targets=all"),
    ],
    ids=lambda c: " ".join(c),
)
def test_a_mixed_batch_is_the_sum_of_its_frames(street, parents, changes):
    "Frames with and without labels side by side: every loss is the mean of what each frame alone would give."
    cfg = small(
        "cmkd",
        *changes,
        "full_stage.batch=6",
        "depth_stage.batch=4",
        "distill.depth_weight=1",
        "distill.losses.even=false",
        "depth.mask_invalid=false",
    )
    role = role_of(cfg, "student")
    plan = role.plan(cfg, work(cfg, "student", street, parents))
    batch = next(plan.legs[-1].batches(0, 0))
    assert {b is None for b in batch.boxes} == {True, False}
    net, losses = plan.learner.network.eval(), plan.legs[-1].losses
    with torch.no_grad():
        together = losses(net, batch)
        alone = [losses(net, batch.frame(b)) for b in range(len(batch))]
    summed = {"cls"} if cfg.distill.losses.normalise == "sum" else set()
    for name, value in together.items():
        each = torch.stack([a[name] for a in alone])
        torch.testing.assert_close(value, each.sum() if name in summed else each.mean(), rtol=2e-3, atol=1e-5, msg=name)
    if cfg.distill.response == "hard":
        quiet = [a["cls"].item() for a, boxes in zip(alone, batch.boxes, strict=True) if boxes is None]
        assert quiet and not any(quiet), "a frame that nobody labelled teaches no box and no background"


# --- the name of a run ---


class Watched:
    "Sees which fields of a config are read, by watching every group that belongs to it."

    def __init__(self, cfg, monkeypatch):
        self.read, self.names, self.paused = set(), {}, False

        def unwatched(cfg, whole=config.Config.flat):
            "To write all of a config down is not to depend on it."
            self.paused = True
            try:
                return whole(cfg)
            finally:
                self.paused = False

        monkeypatch.setattr(config.Config, "flat", unwatched)
        self.walk(cfg, "")
        for kind in {type(node) for node in self.kept}:
            monkeypatch.setattr(kind, "__getattribute__", self.spy(kind), raising=False)

    def walk(self, node, prefix):
        if not prefix:
            self.kept = []
        self.kept.append(node)  # so that no other object gets its id
        self.names[id(node)] = {
            f.name: prefix + f.name for f in fields(node) if not is_dataclass(getattr(node, f.name))
        }
        for f in fields(node):
            if is_dataclass(value := getattr(node, f.name)):
                self.walk(value, f"{prefix}{f.name}.")

    def spy(self, kind):
        before = kind.__getattribute__

        def look(node, name):
            known = None if self.paused else self.names.get(id(node))
            if known and name in known:
                self.read.add(known[name])
            if known and name == "__dict__":
                self.read.update(known.values())
            return before(node, name)

        return look


def fresh(cfg):
    "A copy of which no group is shared: equal groups of a config may be one object."
    return type(cfg)(**{f.name: fresh(v) if is_dataclass(v := getattr(cfg, f.name)) else v for f in fields(cfg)})


OFF = ("distill.feature=false", "load_head=false", "pretrain=false", "distill.response=hard")
CASES = [
    ("cmkd", "teacher", ()),
    ("cmkd", "depth", ()),
    ("cmkd", "student", ()),
    ("cmkd", "student", OFF),
    ("cmkd", "student", ("data.unlabelled=",)),
    ("cmkd", "student", ("distill.response=dense", "distill.depth_weight=0.5")),
    ("cmkd", "student", ("distill.response=none",)),
    ("cmkd", "student", ('distill.hard=["Pedestrian"]',)),
    ("cmkd", "student", ("feature_stage.epochs=1", "feature_stage.batch=2", "student.adapt=false")),
    ("hint", "student", ()),
    ("logits", "student", ()),
]
# read to open and to judge, not in the training itself; and what names the generators
BESIDE = {
    "seed",
    "teacher.seed",
    "data.kind",
    "data.world",
    "data.train",
    "data.train_frames",
    "data.val",
    "data.val_frames",
    "data.unlabelled",
    "data.unlabelled_frames",
    "data.teacher",
    "data.depth",
}
# read, and of no effect: the method finds the role, checkpoints change no number, weights to begin with are not read
# where there are none, and a teacher's pictures are resized although it never looks at them
ALSO = {"method", "checkpoint_seconds", "student.initial"}
UNSEEN = {"teacher": {"data.image_size"}}


@pytest.mark.parametrize("method, role, changes", CASES, ids=lambda c: c if isinstance(c, str) else " ".join(c) or "-")
def test_a_run_is_named_by_what_its_training_reads(street, parents, tmp_path, method, role, changes, monkeypatch):
    "Field by field: what is read is in the hash, and what is in the hash is read."
    cfg = fresh(small(method, *changes))
    told, sets = set(picked(cfg, role_of(cfg, role).depends(cfg))), open_sets(cfg.data, street)
    job = Work(f"{role}/0", sets, {p: parents[p] for p in role_of(cfg, role).parents(cfg)}, device="cpu")
    with monkeypatch.context() as m:
        watched = Watched(cfg, m)
        fit(role_of(cfg, role), cfg, job, tmp_path, 60.0, False)
        network = role_of(cfg, role).build(cfg)
        if role_of(cfg, role).detect:
            role_of(cfg, role).detect(cfg, network.eval(), sets.val, progress=False, device="cpu")
    of_parents = set()
    for p in role_of(cfg, role).parents(cfg):
        of_parents |= set(picked(cfg, role_of(cfg, p).depends(cfg)))
    unnamed, unread = watched.read - told - of_parents - ALSO - UNSEEN.get(role, set()), told - watched.read - BESIDE
    assert (sorted(unnamed), sorted(unread)) == ([], []), "read, and in no hash; in the hash, and never read"


@pytest.mark.parametrize("name", METHODS)
def test_every_number_has_a_range(name):
    "Beside its field, as part of its type; and no start of a recipe lies outside."
    for field, kind in kinds(METHODS[name].config).items():
        limits = [l for l in getattr(kind, "__metadata__", ()) if isinstance(l, config.Range)]
        assert len(limits) == (said_number(kind)), f"{name}: {field} has no range; write e.g. number(0, 1)"
    for told in METHODS[name].recipes:
        for scale in config.SCALES:
            recipe(name, told, scale)


def said_number(kind) -> bool:
    return any(word in config.said(kind) for word in ("int", "float"))


NONSENSE = (
    "full_stage.steps=-1",
    "data.train_frames=-3",
    "space.max_voxels=0",
    "full_stage.clip=0",
    "full_stage.lr=1e400",
    "data.flip=1.5",
    "student.rates=[]",
    "head.sizes=[[1, 2], [1, 2, 3], [1, 2, 3]]",
    "space.low=[99, -12.8, -3]",
    "space.lidar_voxel=[1e-5, 1e-5, 1e-5]",
    "data.image_size=[99]",
    "student.backbone_args=[1]",
    "full_stage.batch=100000",
)


@pytest.mark.parametrize("change", NONSENSE)
def test_nonsense_is_refused_by_name(change):
    field = change.split("=")[0]
    with pytest.raises(ValueError, match=re.escape(field)):
        recipe(scale="mini").override(change)


def test_a_config_made_by_hand_is_checked_too():
    cfg = recipe(scale="mini")
    with pytest.raises(ValueError, match="data.train_frames is -3; it must be from 0"):
        replace(cfg, data=replace(cfg.data, train_frames=-3))


@pytest.mark.parametrize("net", ["hrnet_w18", "swin_tiny_patch4_window7_224", "no_such_network"])
def test_a_backbone_that_cannot_be_built_is_told_before_anything_trains(street, tmp_path, monkeypatch, net):
    cfg = small("cmkd", f"student.backbone={net}", "student.backbone_args={}")
    monkeypatch.setattr(runs, "made", lambda *_: pytest.fail("something was trained"))
    with pytest.raises(ValueError, match=f"student.backbone='{net}' does not go with .*such as a ResNet"):
        runs.fit_or_load(cfg, "student", street, tmp_path, progress=False)
    with pytest.raises(ValueError, match=f"student.backbone='{net}'"):
        runs.fit_all([(cfg, "student")], street, tmp_path, progress=False)


def test_labels_are_in_no_hash():
    cfg = recipe(scale="mini")
    for role in METHODS["cmkd"].roles:
        assert hash_of(cfg, role) == hash_of(replace(cfg, recipe="release", scale="full", checkpoint_seconds=1.0), role)


def test_a_second_street_is_other_data():
    cfg = recipe(scale="mini")
    for role in METHODS["cmkd"].roles:
        assert hash_of(cfg, role) != hash_of(cfg.override("data.world=2"), role)


def test_a_row_without_a_teacher_does_not_depend_on_one():
    base = recipe(scale="mini").override("distill.feature=false", "load_head=false", "distill.response=hard")
    for change in (
        "teacher.seed=1",
        "teacher.losses.cls=2",
        "teacher_stage.steps=5",
        "data.rotation=0",
        "distill.quality=false",
        "distill.score=0.3",
    ):
        assert hash_of(base, "student") == hash_of(base.override(change), "student"), change
    assert hash_of(base, "student") != hash_of(base.override("seed=1"), "student")


def test_a_student_depends_on_what_its_parents_depend_on():
    "Fields that only a parent reads name the student, too: another teacher, other depth pre-training."
    cfg = recipe(scale="mini")
    for change in ("teacher.seed=1", "teacher.losses.cls=2", "teacher_stage.steps=5", "data.rotation=0"):
        assert hash_of(cfg, "student") != hash_of(cfg.override(change), "student"), change
        assert hash_of(cfg, "depth") == hash_of(cfg.override(change), "depth"), change
    assert hash_of(cfg, "student") != hash_of(cfg.override("depth_stage.steps=5"), "student")


def test_methods_share_teacher_and_depth():
    for role, count in (("teacher", 1), ("depth", 1), ("student", len(METHODS))):
        assert len({hash_of(recipe(name, scale="mini"), role) for name in METHODS}) == count


def test_every_config_reads_back():
    for name, method in METHODS.items():
        for told in method.recipes:
            cfg = recipe(name, told)
            assert config_from(flat(cfg)) == cfg and isinstance(cfg, MonoConfig)


def test_building_draws_the_same_network_for_the_same_seed():
    cfg = recipe(scale="smoke")
    for build in (camera, lidar):
        seed_everything("x")
        a = build(cfg).state_dict()
        seed_everything("x")
        b = build(cfg).state_dict()
        assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_losses_add_up_in_their_order():
    with pytest.raises(ValueError, match="no loss"):
        total({})
    assert total({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}) == 3


@pytest.mark.parametrize("name", [k for k, kind in kinds(type(recipe("cmkd"))).items() if kind is float])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_no_field_takes_a_number_that_is_none(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*; it must be a finite number"):
        recipe("cmkd").override(f"{name}={value}")
