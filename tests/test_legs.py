"What every leg is given: frames, losses, seeds, thresholds, checks. Each field has its own value: a mix-up shows."

import json
import subprocess
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from cmkd.boxes import corners, rectangles
from cmkd.core import Boxes, Found, Frame, View
from cmkd.data import augment, sets as sets_room
from cmkd.data.kitti import Calibration, write_frame, write_image, write_points, write_split
from cmkd.data.sets import Data, open_sets
from cmkd.distill import cmkd as cmkd_room, roles as roles_room
from cmkd.distill.depth import boxes_in_views
from cmkd.geometry import DepthBins, Grid
from cmkd.layers.lift import voxel_texels
from cmkd.ledger import record as record_room, runs as runs_room
from cmkd.ledger.tables import dataset_name, traced
from cmkd.methods import recipe, role_of
from cmkd.train.loop import Progress
from cmkd.train.roles import Spent, Work, save_weights

POSE = [[0, -1, 0, 0], [0, 0, -1, -0.08], [1, 0, 0, -0.27], [0, 0, 0, 1]]
CAMERA = [[185.9, 0, 157, 11], [0, 185.9, 44, 0.06], [0, 0, 1, 0.003]]
ODD = (
    "data.kind=kitti", "data.world=0", "data.unlabelled=more", "seed=5", "teacher.seed=7",
    "data.flip=0.41", "data.mirror=-0.9", "data.photometric=0.19", "data.rotation=0.31", "data.scaling=0.06",
    "head.score=0.12", "head.nms=0.03", "head.pre_nms=411", "head.post_nms=47",
    "teacher.losses.cls=1.1", "teacher.losses.box=2.1", "teacher.losses.direction=0.21", "teacher.losses.gamma=2.1",
    "distill.losses.cls=1.2", "distill.losses.box=2.2", "distill.losses.direction=0.22", "distill.losses.gamma=2.2",
    "distill.score=0.23", "distill.feature_weight=1.3", "distill.depth_weight=0.7",
    "depth.weight=2.9", "depth.foreground=11", "depth.background=0.9",
    *(f"{s}_stage.{k}={v}" for i, s in enumerate(("teacher", "depth", "feature", "full"))
      for k, v in (("steps", 3 + i), ("batch", 2), ("lr", 0.001 * (i + 1)), ("clip", 8 + i))),
)  # fmt: skip


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    "Six labelled frames, two for val, two that nobody labelled."
    root, r = tmp_path_factory.mktemp("street"), np.random.default_rng(0)
    for i in range(8):
        points = np.c_[r.uniform([3, -8, -1.7], [26, 8, 0], (300, 3)), np.zeros(300)].astype(np.float32)
        view = View(CAMERA, POSE, r.integers(0, 255, (96, 320, 3), dtype=np.uint8))
        boxes = Boxes([[11 + 0.1 * i, 0, -0.9, 4, 1.6, 1.5, 0], [16, 3, -0.8, 0.8, 0.6, 1.7, 0]], ["Car", "Pedestrian"])
        write_frame(root, Frame(f"{i:06d}", (view,), points, boxes))
    for name, ids in (("train", range(4)), ("val", range(4, 6)), ("more", range(6, 8))):
        write_split(root, name, [f"{i:06d}" for i in ids])
    return root


@pytest.fixture
def cfg():
    return recipe(scale="smoke").override(*ODD)


@pytest.fixture
def work(cfg, street, tmp_path):
    def make(role):
        parents = {}
        for p in role_of(cfg, role).parents(cfg):
            parents[p] = tmp_path / f"{p}.safetensors"
            torch.manual_seed(1)
            save_weights(role_of(cfg, p).build(cfg), parents[p])
        return Work(f"{role}/0", open_sets(cfg.data, street), parents, device="cpu")

    return make


class Spy:
    "A function that goes on as it was and keeps what it was given."

    def __init__(self, monkeypatch, module, name):
        self.real, self.calls = getattr(module, name), []
        monkeypatch.setattr(module, name, self)

    def __call__(self, *args, **more):
        self.calls.append((args, more))
        return self.real(*args, **more)


def changed(change):
    "The function and the keywords of an augmentation."
    assert isinstance(change, partial)
    return change.func, change.keywords


def one(leg, learner, learn=True):
    "The losses of a leg's first batch, and the batch."
    leg.begin()
    learner.losses, batch = leg.losses, next(leg.batches(0, 0))
    return learner.train(learn)(batch), batch


def epoch(leg):
    "The ids of one epoch."
    return sorted(i for b in leg.batches(0, 0) for i in b.ids)


TRAIN, MORE = [f"{i:06d}" for i in range(4)], [f"{i:06d}" for i in range(6, 8)]


def test_what_a_teacher_is_given(cfg, work, monkeypatch):
    fed, lost = Spy(monkeypatch, roles_room, "feed"), Spy(monkeypatch, roles_room, "detection_loss")
    plan = role_of(cfg, "teacher").plan(cfg, work("teacher"))
    (leg,) = plan.legs
    assert (leg.name, leg.steps, leg.stage, epoch(leg)) == ("teacher", 3, cfg.teacher_stage, TRAIN)
    ((frames, stage, run, data, space, change), _), = fed.calls
    assert (frames.split, stage, run, data, space) == ("train", cfg.teacher_stage, "teacher/0", cfg.data, cfg.space)
    assert changed(change) == (augment.teacher, dict(flip=0.41, rotation=0.31, scaling=0.06))
    losses, batch = one(leg, plan.learner)
    ((maps, anchors, head, weights, found), _), = lost.calls
    assert head == cfg.head and weights == cfg.teacher.losses and torch.equal(anchors, plan.learner.network.anchors)
    for f, boxes, labels in zip(found, batch.boxes, batch.labels, strict=True):
        assert torch.equal(f.boxes, boxes) and torch.equal(f.labels, labels) and (f.scores == 1).all()
    assert set(losses) == {"cls", "box", "direction"}


def test_what_depth_pre_training_is_given(cfg, work, monkeypatch):
    fed, lost = Spy(monkeypatch, roles_room, "feed"), Spy(monkeypatch, roles_room, "depth_term")
    plan = role_of(cfg, "depth").plan(cfg, work("depth"))
    (leg,) = plan.legs
    assert (leg.name, leg.steps, leg.stage, epoch(leg)) == ("depth", 4, cfg.depth_stage, TRAIN)
    ((frames, stage, run, data, space, change), _), = fed.calls
    assert (frames.split, stage, run, data, space) == ("train", cfg.depth_stage, "depth/0", cfg.data, cfg.space)
    assert changed(change) == (augment.student, dict(flip=0.41, mirror=-0.9, photometric=0.19))
    losses, batch = one(leg, plan.learner)
    ((_, seen, space, depth), _), = lost.calls
    assert seen is batch and space == cfg.space and depth == cfg.depth and set(losses) == {"depth"}


def test_what_a_student_is_given(cfg, work, monkeypatch):
    "Both legs see every frame, labelled or not; the second begins with the teacher's head; losses are the distiller's."
    fed, soft = Spy(monkeypatch, roles_room, "feed"), Spy(monkeypatch, roles_room, "Asked")
    feat, lost = Spy(monkeypatch, cmkd_room, "feature_loss"), Spy(monkeypatch, cmkd_room, "detection_loss")
    deep, job = Spy(monkeypatch, cmkd_room, "depth_term"), work("student")
    plan = role_of(cfg, "student").plan(cfg, job)
    feature, full = plan.legs
    told = [(leg.name, leg.steps, leg.stage) for leg in plan.legs]
    assert told == [("feature", 5, cfg.feature_stage), ("full", 6, cfg.full_stage)]
    assert epoch(feature) == epoch(full) == TRAIN + MORE
    for (frames, _stage, run, data, space, change), _ in fed.calls:
        assert list(frames.ids) == TRAIN + MORE and run == "student/0" and (data, space) == (cfg.data, cfg.space)
        assert changed(change) == (augment.student, dict(flip=0.41, mirror=-0.9, photometric=0.19))
    assert [c[0][1] for c in fed.calls] == [cfg.feature_stage, cfg.full_stage]
    ((teacher, taps, head, _), more), = soft.calls
    assert head == replace(cfg.head, score=0.23, per_class=False) and taps == ("bev", "soft") and more["frames"] == 12
    weights = roles_room.read_weights(job.parents["teacher"])
    assert all(torch.equal(v, weights[k]) for k, v in teacher.state_dict().items()) and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    for spy in (feat, lost, deep):
        spy.calls.clear()
    before = {k: v.clone() for k, v in plan.learner.network.state_dict().items()}
    losses, batch = one(feature, plan.learner)
    assert set(losses) == {"feature", "depth"} and not lost.calls, "no head yet"
    now = plan.learner.network.state_dict()
    assert all(torch.equal(before[k], now[k]) for k in before if k.startswith(("head", "bev2d")) and "num_b" not in k)
    ((student, goal, normalise), _), = feat.calls
    assert normalise == cfg.distill.feature_norm and torch.equal(goal, plan_teacher(cfg, job, batch).bev)
    assert losses["feature"] == 1.3 * feat.real(student, goal, normalise)
    ((_, seen, space, depth), _), = deep.calls
    assert seen is batch and (space, depth) == (cfg.space, cfg.depth)
    losses, batch = one(full, plan.learner)
    now = plan.learner.network.state_dict()
    taken = {k: v for k, v in weights.items() if k.startswith(("head.", "bev2d.")) and k.endswith(("weight", "bias"))}
    assert taken and all(torch.equal(now[k], v) for k, v in taken.items())
    ((_, anchors, head, weighed, boxes, quality, _), _), = lost.calls
    assert head == cfg.head and weighed == cfg.distill.losses and quality == cfg.distill.quality
    assert len(boxes) == 2 and all(isinstance(b, Found) and (b.scores >= 0.23).all() for b in boxes)
    assert set(losses) == {"feature", "depth", "cls", "box", "direction"}


def plan_teacher(cfg, job, batch):
    "What the teacher of a job shows of a batch, frame by frame."
    teacher = roles_room.frozen(cfg, job.parents["teacher"], torch.device("cpu"))
    taps = [teacher(batch.frame(b), "head") for b in range(len(batch))]
    return replace(taps[0], bev=torch.cat([t.bev for t in taps]))


def test_what_the_controls_are_given(street, tmp_path, monkeypatch):
    "A hint weighs its map and learns from labels; copied logits doubt nothing."
    from cmkd.distill import hint, logits

    spies = dict(hint=Spy(monkeypatch, hint, "detection_loss"), logits=Spy(monkeypatch, logits, "dense_response_loss"))
    mapped = Spy(monkeypatch, hint, "feature_loss")
    changes = dict(
        hint=("distill.weight=1.7", "distill.labels.cls=1.4"), logits=("distill.score=0.17", "distill.losses.cls=1.4")
    )
    given = {}
    for name in ("hint", "logits"):
        cfg = recipe(name, scale="smoke").override(*(c for c in ODD if not c.startswith("distill.")), *changes[name])
        parents = {p: tmp_path / f"{name}-{p}.safetensors" for p in ("teacher", "depth")}
        for p, path in parents.items():
            save_weights(role_of(cfg, p).build(cfg), path)
        plan = role_of(cfg, "student").plan(cfg, Work("student/0", open_sets(cfg.data, street), parents, device="cpu"))
        spies[name].calls.clear()
        mapped.calls.clear()
        given[name] = (cfg, *one(plan.legs[-1], plan.learner), spies[name].calls[0])
    cfg, losses, batch, ((_, _, head, weights, found), _) = given["hint"]
    assert head == cfg.head and weights == cfg.distill.labels and len(found) == len(batch)
    cfg, losses, batch, ((_, _, weights, score), more) = given["logits"]
    assert weights == cfg.distill.losses and score == 0.17 and more == dict(quality=False)


def test_soft_boxes_keep_the_heads_own_threshold_of_overlap(cfg, work, monkeypatch):
    found = Spy(monkeypatch, roles_room, "Asked")
    role_of(cfg, "student").plan(cfg, work("student"))
    head = found.calls[0][0][2]
    assert (head.nms, head.pre_nms, head.post_nms, head.score) == (0.03, 411, 47, 0.23)


def test_what_detection_is_given(cfg, monkeypatch):
    "Of a config: its data, space and head, and nothing in their place."
    given = {}
    monkeypatch.setattr(roles_room, "detect_set", lambda *args, **more: given.update(args=args, more=more))
    roles_room.detect(cfg, "network", "frames", progress=False)
    assert given == dict(args=("network", "frames", cfg.data, cfg.space, cfg.head), more=dict(progress=False))


def test_every_leg_sees_pictures_of_the_size_asked_for(cfg, work):
    small = cfg.override("data.image_size=[48, 160]")
    for role in ("teacher", "depth"):
        (leg,) = role_of(small, role).plan(small, work(role)).legs
        assert next(leg.batches(0, 0)).images.shape[-2:] == (48, 160)


def test_what_a_run_is_given(cfg, street, tmp_path, monkeypatch):
    "Every role by its own seed, its parents' weights, the store of taps; and it is judged on val."
    jobs, judged = {}, []

    def fit(role, cfg, work, folder, every, progress=True):
        jobs[role.name] = (work, every)
        save_weights(torch.nn.Linear(1, 1), folder / "weights.safetensors")
        return Spent(Progress(cpu_seconds=1.0, wall_seconds=1.0), {})

    def judge(cfg, role, weights, val, *more):
        judged.append((role.name, weights.parent.name, val.split))
        return dict(ap={"Car/3D/R40/0.7/moderate": 1.0}, objects={}, draws={})

    monkeypatch.setattr(runs_room, "fit", fit)
    monkeypatch.setattr(runs_room, "judge", judge)
    run = runs_room.fit_or_load(cfg, "student", street, tmp_path, progress=False)
    assert {k: w.run for k, (w, _) in jobs.items()} == dict(teacher="teacher/7", depth="depth/5", student="student/5")
    assert all(every == cfg.checkpoint_seconds for _, every in jobs.values())
    for name, (job, _) in jobs.items():
        assert {k: s.split for k, s in job.sets.named().items()} == dict(train="train", val="val", unlabelled="more")
        assert job.memory.name == "teacher_taps.sqlite" and job.initial is None
        above = {p: tmp_path / record_room.run_name(cfg, p) / "weights.safetensors" for p in job.parents}
        assert job.parents == above and set(above) == set(role_of(cfg, name).parents(cfg))
    assert judged == [(r, record_room.run_name(cfg, r), "val") for r in ("teacher", "student")]
    assert run.record["seed"] == 5 and run.record["seeds"] == {"seed": 5, "teacher.seed": 7}
    assert set(run.record["data"]) == {"train", "val", "unlabelled"}
    assert set(runs_room.load(tmp_path / record_room.run_name(cfg, "depth")).record["data"]) == {"train", "val"}


def test_raw_drives_are_checked_against_val(tmp_path):
    "A raw frame of a drive that val comes from."
    root, drive = tmp_path / "kitti", "2011_09_26_drive_0005_sync"
    r = np.random.default_rng(0)
    for i in range(3):
        view = View(CAMERA, POSE, r.integers(0, 255, (96, 320, 3), dtype=np.uint8))
        points = r.uniform(0, 1, (40, 4)).astype(np.float32)
        write_frame(root, Frame(f"{i:06d}", (view,), points, Boxes([[11, 0, -0.9, 4, 1.6, 1.5, 0]], ["Car"])))
    write_split(root, "train", ["000000", "000001"])
    write_split(root, "val", ["000002"])
    day = tmp_path / "kitti_raw" / "2011_09_26"
    write_image(day / drive / "image_02/data/0000000050.png", r.integers(0, 255, (96, 320, 3), dtype=np.uint8))
    write_points(day / drive / "velodyne_points/data/0000000050.bin", r.uniform(0, 1, (40, 4)))
    (day / "calib_cam_to_cam.txt").write_text(
        f"P_rect_02: {' '.join(map(str, np.ravel(CAMERA)))}\nR_rect_00: 1 0 0 0 1 0 0 0 1\n"
    )
    (day / "calib_velo_to_cam.txt").write_text("R: 0 -1 0 0 0 -1 1 0 0\nT: 0 0 0\n")
    mapping, asked = tmp_path / "splits" / "kitti_object_to_raw.json", Data(unlabelled="raw")
    mapping.parent.mkdir()
    say = lambda d: mapping.write_text(json.dumps({"000002": ["2011_09_26", d, "0000000007"]}))
    say("2011_09_26_drive_0001_sync")
    assert open_sets(asked, root).unlabelled.ids == (f"{drive}/0000000050",)
    say(drive)
    with pytest.raises(ValueError, match="1 more come from validation drives"):
        open_sets(asked, root)
    mapping.unlink()
    with pytest.raises(FileNotFoundError, match="kitti_object_to_raw.json is missing"):
        open_sets(asked, root)


def test_a_texel_of_a_width_that_four_does_not_divide():
    "1,242 px make 311 columns; a texel is four pixels wide there too, and not 1242/311 of one."
    grid = Grid((20.0, -0.5, -1.0), (21.0, 0.5, 0.0), (1.0, 1.0, 1.0))
    bins, camera = DepthBins(2.0, 46.8, 80), torch.tensor([[720.0, 0, 0, 0], [0, 720, 0, 0], [0, 0, 1, 0]]).double()
    pose = torch.tensor(POSE).double()
    for u in (0.0, 620.5, 1200.0):
        camera[0, 2], camera[1, 2] = u, 187.0
        centre = pose @ torch.tensor([20.5, 0.0, -0.5, 1]).double()
        pixel = (camera @ centre)[:2] / (camera @ centre)[2]
        texel = voxel_texels(grid, pose, camera, bins, (375, 1242), (94, 311))[0, :2].double()
        torch.testing.assert_close(texel, pixel / 4, atol=1e-4, rtol=0)


def test_a_dirty_commit_has_a_plus(tmp_path):
    git = lambda *words: subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True)
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a")
    assert record_room.git_state(tmp_path)["dirty"] is False
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a").write_text("1")
    assert record_room.git_state(tmp_path)["dirty"] is False, "what a run writes does not make the code dirty"
    (tmp_path / "a").write_text("2")
    assert record_room.git_state(tmp_path)["dirty"] is True


COMMITS = [("abcdef1234", False, "abcdef12"), ("abcdef1234", True, "abcdef12+"), (None, None, "no git")]


@pytest.mark.parametrize("commit, dirty, shown", COMMITS)
def test_a_table_says_whether_the_code_was_committed(golden, commit, dirty, shown):
    run = record_room.load(golden / "form1" / "mini-teacher-fa30ab64f1")
    run.record["git"] = dict(commit=commit, dirty=dirty)
    assert traced(run)["commit"] == shown


@pytest.mark.parametrize("kind, name", [("world", "world"), ("kitti", "KITTI (your folder)")])
def test_a_table_names_the_data(kind, name):
    assert dataset_name(dict(config={"data.kind": kind})) == name


def test_a_box_beside_the_camera_is_cut_close_to_it():
    "A projected 2D box is cut where it passes 0.1 m in front of the camera, not further out."
    camera = torch.tensor([[100.0, 0, 50, 0], [0, 100, 20, 0], [0, 0, 1, 0]])
    box = torch.tensor([[1.0, 0, 0, 2.2, 1, 1, 0]])  # its near end lies behind the camera
    lidar_to_cam = torch.tensor([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    cam = corners(box).float() @ lidar_to_cam[:3, :3].T
    left, top, right, bottom = rectangles(cam, camera)[0].tolist()
    assert (left, right) == pytest.approx((50 - 100 * 0.5 / 0.1, 50 + 100 * 0.5 / 0.1), rel=1e-4)


def test_depth_pre_training_sees_the_boxes_in_the_picture(cfg, street):
    from cmkd.data.dataset import collate, prepare

    sets = open_sets(cfg.data, street)
    batch = collate([prepare(sets.train.frame(i), cfg.data.classes) for i in range(2)])
    rigs = zip(boxes_in_views(batch), batch.boxes, batch.lidar_to_cam, batch.camera, strict=True)
    for found, boxes, pose, camera in rigs:
        cam = corners(boxes).float() @ pose[0, :3, :3].T + pose[0, :3, 3]
        torch.testing.assert_close(found, rectangles(cam, camera[0]))


def test_a_rig_of_kitti_is_read_as_it_stands():
    calib = Calibration(CAMERA, np.eye(3), np.array(POSE)[:3])
    assert np.allclose(calib.pinhole.lidar_to_cam, POSE) and np.allclose(calib.pinhole.camera, CAMERA)


def test_sets_are_opened_by_their_kind(street, monkeypatch):
    spy = Spy(monkeypatch, sets_room, "Kitti")
    open_sets(Data(unlabelled="more"), street)
    assert [c[0][1:] for c in spy.calls] == [("train", True), ("val", True), ("more", False)]
