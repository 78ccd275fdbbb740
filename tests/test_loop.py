"The loop and the roles: the same bits after every kill, the released schedule, errors with a remedy, legs in order."

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cmkd.core import Batch, Boxes, Frame
from cmkd.data.kitti import Calibration, write_frame, write_split
from cmkd.data.sets import first, open_sets
from cmkd.distill import cmkd
from cmkd.distill.roles import camera, student_change
from cmkd.machine import cast, seed_everything
from cmkd.methods import METHODS, recipe, role_of
from cmkd.train import loop
from cmkd.train.feed import feed
from cmkd.train.loop import (
    CHECKPOINT,
    Leg,
    Progress,
    cut_off,
    restore_optimiser,
    save_checkpoint,
    train,
)
from cmkd.train.roles import Work, fit, refuse_broken_convolutions
from cmkd.train.step import Learner, Stage, one_cycle, optimiser, total

RIG = Calibration(
    [[185.9, 0, 157, 11], [0, 185.9, 44, 0.06], [0, 0, 1, 0.003]],
    np.eye(3),
    [[0, -1, 0, 0], [0, 0, -1, -0.08], [1, 0, 0, -0.27]],
)


def some_batch(images, id="0") -> Batch:
    "A batch of which only the pictures matter."
    return Batch([id], images, *[torch.zeros(1)] * 5, [None], [None])


# --- killed, and the same ---


class Toy:
    "Two legs of a small net with dropout; the second begins by a change of weights, as the student's does."

    def __init__(self, folder, kill_at=None, every=0.0, nan_at=None):
        seed_everything("toy")
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
        self.net.eval()  # whoever checked the model before may have left it so
        self.count, self.seen, self.kill_at, self.nan_at, self.begun = 0, [], kill_at, nan_at, []
        legs = [
            Leg("first", Stage(lr=0.1), 4, self.batches, 3, self.step),
            Leg("second", Stage(lr=0.05), 5, self.batches, 3, self.step, self.begin),
        ]
        self.at = train(Learner(self.net), legs, folder, "toy", every=every, progress=False, device="cpu")

    def batches(self, epoch, skip):
        for i in range(skip, 3):
            yield some_batch(
                torch.full((2, 1, 3, 2, 2), epoch + i / 10) + torch.arange(2.0)[:, None, None, None, None],
                f"{epoch}/{i}",
            )

    def begin(self):
        self.begun.append(self.count)
        with torch.no_grad():
            self.net[3].weight.add_(1)

    def step(self, net, batch):
        self.count += 1
        assert net.training
        if self.count == self.kill_at:
            raise KeyboardInterrupt
        self.seen.append(batch.ids[0])
        return dict(
            box=(net(batch.images[:, 0, 0].flatten(1)) - 1).square().mean()
            * (float("nan") if self.count == self.nan_at else 1)
        )


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    folder = tmp_path_factory.mktemp("through")
    return folder, Toy(folder)


@pytest.mark.parametrize("every", [0.0, 1e9], ids=["every step", "only at the end of a leg"])
@pytest.mark.parametrize("kill_at", range(1, 10))
def test_killed_at_any_step(through, tmp_path, kill_at, every):
    folder, whole = through
    with pytest.raises(KeyboardInterrupt):
        Toy(tmp_path, kill_at, every)
    saved = kill_at - 1 if not every else 0 if kill_at <= 4 else 4
    again = Toy(tmp_path, every=every)
    for (k, a), b in zip(whole.net.state_dict().items(), again.net.state_dict().values(), strict=True):
        assert torch.equal(a, b), k
    assert again.seen == whole.seen[saved:], "the data go on where they were"
    assert (tmp_path / "metrics.csv").read_text() == (folder / "metrics.csv").read_text()
    assert whole.begun == [4] and again.begun == ([4 - saved] if saved <= 4 else [])
    assert again.at.cpu_seconds > 0 and (again.at.leg, again.at.step) == (2, 0)


def test_killed_twice_and_called_again(through, tmp_path):
    folder, whole = through
    for k in (3, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            Toy(tmp_path, k)
    last = Toy(tmp_path)
    done = Toy(tmp_path)
    for a, b, c in zip(*(t.net.state_dict().values() for t in (whole, last, done)), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert done.count == 0 and (tmp_path / "metrics.csv").read_text() == (folder / "metrics.csv").read_text()


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="checkpoint.safetensors: .*delete it to start this run again"):
        Toy(tmp_path)


@pytest.mark.parametrize("at", range(0, 40))
def test_a_changed_byte_of_a_checkpoint_is_noticed(tmp_path, at):
    with pytest.raises(KeyboardInterrupt):
        Toy(tmp_path, 6, 0.0)
    path = tmp_path / "checkpoint.safetensors"
    data = bytearray(path.read_bytes())
    data[int(len(data) * at / 40)] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(ValueError, match="checkpoint.safetensors: .*delete it to start this run again"):
        Toy(tmp_path)


def test_a_checkpoint_of_the_last_version_goes_on(through, golden, tmp_path):
    "Written by version 1 after five of nine steps of this very run."
    folder, whole = through
    shutil.copy(golden / "form1" / "checkpoint.pt", tmp_path)
    again = Toy(tmp_path, every=0.0)
    assert again.seen == whole.seen[5:]
    saved = cut_off(with_form1(tmp_path / "read", golden))
    told = torch.load(golden / "form1" / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(v, told["learner"][k]) for k, v in saved.learner.items()) and len(told["learner"]) > 4
    learner = Learner(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1)))
    learner.load_state_dict(saved.learner)
    adam = optimiser(learner, Stage(lr=0.05))
    restore_optimiser(adam, saved)
    (tmp_path / "form2").mkdir()
    save_checkpoint(tmp_path / "form2" / CHECKPOINT, saved.progress, learner, adam)
    other = Toy(tmp_path / "form2", every=0.0)
    for (k, a), b in zip(again.net.state_dict().items(), other.net.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{k}: as the same state in today's form goes on, bit by bit"
    losses = [[r["loss"] for r in t.at.rows] for t in (whole, again)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2), "and, from another machine's bits, as this run"


def with_form1(folder, golden):
    "A folder with the checkpoint of version 1."
    folder.mkdir()
    shutil.copy(golden / "form1" / "checkpoint.pt", folder)
    return folder


def test_moments_lie_as_their_parameters_do(tmp_path):
    "A fused step goes through memory as it lies; a file keeps no strides."
    make = lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    learner = Learner(make())
    adam = optimiser(learner, Stage())
    take = lambda net, adam: (net(torch.ones(1, 3, 5, 5)).square().sum().backward(), adam.step(), adam.zero_grad())
    take(learner.network, adam)
    save_checkpoint(tmp_path / CHECKPOINT, Progress(), learner, adam)
    other = Learner(make())
    saved = cut_off(tmp_path)
    other.load_state_dict(saved.learner)
    again = optimiser(other, Stage())
    restore_optimiser(again, saved)
    for l, a in ((learner, adam), (other, again)):
        take(l.network, a)
    for a, b in zip(learner.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_log(through):
    rows = pd.read_csv(through[0] / "metrics.csv")
    assert rows.leg.tolist() == ["first"] * 4 + ["second"] * 5 and rows.step.tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 5]
    assert (rows.loss == rows.box).all() and (rows.grad_norm > 0).all()
    for name, stage, steps in (("first", Stage(lr=0.1), 4), ("second", Stage(lr=0.05), 5)):
        np.testing.assert_allclose(
            rows.lr[rows.leg == name], [one_cycle(k, steps, stage)[0] for k in range(steps)], rtol=1e-9
        )
    assert through[1].seen == ["0/0", "0/1", "0/2", "1/0"] + ["0/0", "0/1", "0/2", "1/0", "1/1"]


def test_nan_ends_the_run_before_it_spoils_the_weights(tmp_path):
    told = "first step 2: box is nan; lower the stage's lr.*; frames 0/2, kept in .*stopped_at"
    with pytest.raises(FloatingPointError, match=told):
        Toy(tmp_path, nan_at=3)
    again = Toy(tmp_path)
    assert all(v.isfinite().all() for v in again.net.state_dict().values())


def test_a_last_step_that_spoils_the_weights_is_no_finished_run(tmp_path):
    "No loss is computed after it that could show it."
    net = nn.Linear(1, 1, bias=False)
    one = lambda e, s: iter([some_batch(torch.zeros(1, 1, 3, 1, 1))])
    losses = lambda net, batch: dict(box=net.weight.square().sum())
    wild = Leg("wild", Stage(lr=3e38, weight_decay=3e38), 1, one, 1, losses)
    with pytest.raises(FloatingPointError, match="wild step 0: 1 tensors are not finite, first network.weight"):
        train(Learner(net), [wild], tmp_path, "run", progress=False, device="cpu")
    assert not (tmp_path / "checkpoint.safetensors").exists() and not (tmp_path / "metrics.csv").exists()


def test_a_gradient_that_is_no_number_ends_it_too(tmp_path):
    "The square root of zero is fine, its slope is not."
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    one = lambda e, s: iter([some_batch(torch.zeros(1, 1, 3, 1, 1))])
    with pytest.raises(FloatingPointError, match="root step 0: the losses are finite, their gradient is"):
        train(
            Learner(net),
            [
                Leg(
                    "root",
                    Stage(),
                    3,
                    one,
                    1,
                    lambda net, batch: dict(box=net.weight.square().sum().sqrt() * 0 + net.weight.abs().sqrt().sum()),
                )
            ],
            tmp_path,
            "x",
            progress=False,
            device="cpu",
        )
    assert net.weight.item() == 0


def test_gradients_are_clipped(tmp_path):
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    moved = []

    def step(net, batch):
        moved.append(net.weight.item())
        return dict(box=net.weight.sum() * 1e6)

    one = lambda e, s: iter([some_batch(torch.zeros(1, 1, 3, 1, 1))])
    grads = []
    net.weight.register_post_accumulate_grad_hook(lambda p: grads.append(p))
    at = train(
        Learner(net), [Leg("x", Stage(lr=0.1, clip=2.0), 3, one, 1, step)], tmp_path, "x", progress=False, device="cpu"
    )
    assert abs(at.rows[0]["grad_norm"] - 1e6) < 1 and abs(grads[0].grad.item() - 2) < 1e-3 and moved[1] < moved[0]


# --- the schedule ---


@pytest.mark.parametrize(
    "key, stage, steps",
    [
        ("cmkd_bev_60ep", "feature_stage", 3000),
        ("cmkd_V2_20ep", "full_stage", 1000),
        ("teacher_adam_onecycle_80ep", "teacher_stage", 4000),
    ],
)
def test_released_schedule(golden, key, stage, steps):
    "Rate, momentum and weight decay of every seventh step (golden n)."
    stage, want = getattr(recipe(name="release"), stage), np.load(golden / "n_lr_schedules.npz")[key]
    rows = np.array([one_cycle(k, steps, stage) for k in range(steps)])
    got = rows[::7]
    assert len(got) == len(want)
    np.testing.assert_allclose(got[:, 0], want[:, 0], rtol=1e-5, atol=1e-5 * 1e-3 * stage.lr)
    np.testing.assert_allclose(got[:, 1], want[:, 1], rtol=1e-5)
    if want.shape[1] == 3:
        assert (optimiser(nn.Linear(1, 1), stage).param_groups[0]["weight_decay"] == want[:, 2]).all()
    assert rows[:, 0].argmax() == 0.4 * steps and abs(rows[:, 1].min() - 0.85) < 1e-6


def test_shortest_schedules():
    for late in (True, False):
        for steps in (1, 2, 3):
            for k in range(steps):
                lr, beta1 = one_cycle(k, steps, Stage(lr=1e-3, late=late))
                assert 0 < lr <= 1e-3 and 0.85 <= beta1 <= 0.95


# --- what must not be trained ---


def test_broken_convolutions_are_refused():
    bf16, cpu = Stage(precision="bf16"), torch.device("cpu")
    bad = nn.Sequential(nn.Conv2d(56, 64, 3, dilation=2))
    with pytest.raises(ValueError, match="no multiple of 16: 0;"):
        refuse_broken_convolutions(bad, bf16, cpu)
    with pytest.raises(ValueError):
        refuse_broken_convolutions(nn.Sequential(nn.Conv2d(64, 56, 3, dilation=(1, 2))), bf16, cpu)
    refuse_broken_convolutions(bad, Stage(), cpu)
    refuse_broken_convolutions(bad, bf16, torch.device("cuda"))
    refuse_broken_convolutions(nn.Sequential(nn.Conv2d(56, 64, 3), nn.Conv2d(64, 32, 3, dilation=2)), bf16, cpu)
    for scale in ("smoke", "mini"):
        with torch.device("meta"):
            refuse_broken_convolutions(camera(recipe(scale=scale)), recipe(scale=scale).full_stage, cpu)


def test_precision():
    with cast("bf16", torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with cast("no", torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with pytest.raises(ValueError, match="precision must be one of"):
        cast("fp16", torch.device("cpu"))


# --- the stages, on a street of eight frames ---

CFG = recipe(scale="smoke").override(
    "data.kind=kitti",
    "data.world=0",
    *(f"{s}_stage.{k}=2" for s in ("teacher", "depth", "feature", "full") for k in ("steps", "batch")),
    "full_stage.steps=3",
    "checkpoint_seconds=0",
)


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    root, r = tmp_path_factory.mktemp("street"), np.random.default_rng(0)
    for i in range(8):
        points = np.concatenate(
            [r.uniform([3, -8, -1.7], [26, 8, -1.6], (300, 3)), r.uniform([9, -1, -1.6], [13, 1, 0], (200, 3))]
        ).astype(np.float32)
        objects = Boxes(
            [[11, 0, -0.9, 4, 1.6, 1.5, 0]],
            ["Car"],
            boxes2d=[[140, 40, 180, 70]],
            truncation=[0],
            occlusion=[0],
            alpha=[0],
        )
        view = RIG.view(r.integers(0, 255, (96, 320, 3), dtype=np.uint8))
        write_frame(root, Frame(f"{i:06d}", (view,), np.c_[points, points[:, :1] * 0], objects), RIG)
    for name, ids in (("train", range(4)), ("val", range(4, 6)), ("unlabelled", range(6, 8))):
        write_split(root, name, [f"{i:06d}" for i in ids])
    return root


def train_role(cfg, role, sets, folder, parents=None):
    "`fit` of a role on the CPU."
    return fit(
        role_of(cfg, role),
        cfg,
        Work(f"{role}/0", sets, parents or {}, device="cpu"),
        folder,
        cfg.checkpoint_seconds,
        False,
    )


def planned(cfg, sets, parents, role="student"):
    "The network of a role, its distiller and its legs, before the first step."
    plan = role_of(cfg, role).plan(cfg, Work("x", sets, parents, device="cpu"))
    return plan.learner.network, plan.learner.distiller, plan.legs


def fed(cfg, frames, stage, change=None):
    "What `feed` gives for a student."
    return feed(frames, stage, "x", cfg.data, cfg.space, change or student_change(cfg.data))


@pytest.fixture(scope="module")
def runs(street, tmp_path_factory):
    "A teacher and a depth run of two steps each."
    sets, out = open_sets(CFG.data, street), {}
    for role in ("teacher", "depth"):
        out[role] = tmp_path_factory.mktemp(role) / "weights.safetensors"
        train_role(CFG, role, sets, out[role].parent)
    return sets, out


def test_sets_and_lengths(street):
    sets = open_sets(CFG.data, street)
    assert (len(sets.train), len(sets.val), len(sets.unlabelled), len(sets.seen())) == (
        4,
        2,
        2,
        6,
    ) and not sets.seen().labelled
    assert (
        sets.unlabelled.frame(0).objects is None and len(first(sets.train, 3)) == 3 and len(first(sets.train, 0)) == 4
    )
    with pytest.raises(ValueError, match="the config asks for 9"):
        first(sets.train, 9)
    with pytest.raises(ValueError, match="fewer than one batch of 7"):
        fed(CFG, sets.seen(), Stage(batch=7))
    assert Stage(epochs=3).length(10) == 30 and Stage(epochs=3, steps=7).length(10) == 7 and Stage().length(10) == 0
    got = fed(CFG, sets.seen(), Stage(batch=2))
    batches = got.batches
    assert got.per_epoch == 3
    ids = [b.ids for b in batches(0, 0)]
    assert [b.ids for b in batches(0, 1)] == ids[1:] and [b.ids for b in batches(1, 0)] != ids


def test_what_each_role_is_fed(street):
    "The teacher alone is turned and stretched; the student is mirrored by `data.mirror`; both are cut to the space."
    cfg = CFG.override("data.flip=1", "data.rotation=0.5", "data.scaling=0.1", "data.photometric=0")
    sets = open_sets(cfg.data, street)

    def one(cfg, role):
        if role == "teacher":
            cfg = cfg.override("teacher_stage.batch=4")
            return next(planned(cfg, sets, {}, "teacher")[2][0].batches(0, 0))
        return next(fed(cfg, sets.train, Stage(batch=4)).batches(0, 0))

    plain, student, teacher = one(cfg.override("data.flip=0"), "student"), one(cfg, "student"), one(cfg, "teacher")
    assert plain.ids == student.ids == teacher.ids
    assert torch.equal(teacher.images, plain.images) and torch.equal(student.images, plain.images.flip(4))
    size = lambda b: torch.stack(b.boxes)[:, 0, 3:6]
    assert (
        torch.equal(size(student), size(plain))
        and (size(teacher) / size(plain) - 1).abs().max() > 0.01
        and (torch.stack(teacher.boxes)[:, 0, 6].abs() > 0.05).any()
    )
    x = plain.boxes[0][0]
    u = RIG.pinhole.lidar_to_img @ [*x[:3].tolist(), 1]
    u = u[0] / u[2]
    for mirror, tol in ((-1, 1e-3), (9, 1e-3)):
        y = one(cfg.override(f"data.mirror={mirror}"), "student").boxes[0][0]
        v = RIG.pinhole.lidar_to_img @ [*y[:3].tolist(), 1]
        assert abs(v[0] / v[2] - (320 + mirror - u)) < tol
    low, high = cfg.space.low, cfg.space.high
    for b in (
        plain,
        student,
        teacher,
        one(cfg.override("space.low=[4, -6.4, -3]", "space.high=[10.4, 6.4, 1]"), "student"),
    ):
        if b is not plain and b is not student and b is not teacher:
            low, high = (4, -6.4, -3), (10.4, 6.4, 1)
        p = b.points[:, 1:4]
        assert (p >= torch.tensor(low) - 1e-5).all() and (p < torch.tensor(high) + 1e-5).all()
    assert len(b.points) < len(plain.points) and all(len(x) == 0 for x in b.boxes), "the car at 11 m lies outside"


def test_the_teacher_never_changes_and_its_head_moves_over(runs, monkeypatch):
    sets, paths = runs
    taught = load_file(paths["teacher"])
    teachers = []
    monkeypatch.setattr(
        cmkd.CMKD,
        "begin",
        lambda self, student, given, begin=cmkd.CMKD.begin: (
            teachers.append(given["teacher"]),
            begin(self, student, given),
        ),
    )
    model, _, legs = planned(CFG, sets, paths)
    assert [leg.name for leg in legs] == ["feature", "full"] and [leg.stage for leg in legs] == [
        CFG.feature_stage,
        CFG.full_stage,
    ]
    depth = load_file(paths["depth"])
    assert all(torch.equal(v, depth[k]) for k, v in model.lifted.image.state_dict().items()), (
        "depth pre-training is loaded"
    )
    mine = {k: v.clone() for k, v in model.state_dict().items()}
    assert not torch.equal(mine["head.conv_cls.weight"], taught["head.conv_cls.weight"])
    model.train()
    terms = legs[0].losses(model, next(legs[0].batches(0, 0)))
    assert set(terms) == {"feature"}
    total(terms).backward()
    assert model.head.conv_cls.weight.grad is None and next(model.adapt.parameters()).grad.abs().sum() > 0
    legs[0].begin()
    assert torch.equal(model.state_dict()["head.conv_cls.weight"], mine["head.conv_cls.weight"])
    legs[1].begin()
    [teacher] = teachers
    for k, v in model.state_dict().items():
        if k.startswith(("bev2d.", "head.")):
            assert torch.equal(v, taught[k]), f"{k} comes from the teacher"
    terms = legs[1].losses(model, next(legs[1].batches(0, 0)))
    total(terms).backward()
    assert {"feature", "cls", "box", "direction"} == set(terms) and model.head.conv_cls.weight.grad is not None
    adam = optimiser(model, legs[1].stage)
    adam.step()
    assert not torch.equal(model.head.conv_cls.weight, taught["head.conv_cls.weight"]), "the student's copy learns"
    for k, v in teacher.state_dict().items():
        assert torch.equal(v, taught[k]), f"{k} of the teacher moved"
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())


def test_a_student_from_scratch_keeps_its_own_head(runs):
    sets, paths = runs
    cfg = CFG.override("load_head=false", "pretrain=false")
    model, _, legs = planned(cfg, sets, dict(teacher=paths["teacher"]))
    mine = model.head.conv_cls.weight.clone()
    legs[1].begin()
    assert torch.equal(model.head.conv_cls.weight, mine)


def test_stages_can_be_left_out(runs):
    sets, paths = runs
    for change, names in (("feature_stage.steps=0", ["full"]), ("full_stage.steps=0", ["feature"])):
        _, _, legs = planned(CFG.override(change), sets, paths)
        assert [leg.name for leg in legs] == names
    model, _, legs = planned(CFG.override("distill.feature=false"), sets, paths)
    assert set(legs[0].losses(model, next(legs[0].batches(0, 0)))) == {"cls", "box", "direction"}


def test_joint_depth_loss_is_added_with_its_weight(runs):
    sets, paths = runs
    out = []
    for w in (0.5, 1.0):
        cfg = CFG.override(f"distill.depth_weight={w}")
        model, _, legs = planned(cfg, sets, paths)
        with torch.no_grad():
            out.append(legs[1].losses(model.eval(), next(legs[1].batches(0, 0)))["depth"])
    torch.testing.assert_close(out[1], 2 * out[0])


def test_a_student_killed_in_each_leg_ends_with_the_same_bits(runs, tmp_path, monkeypatch):
    "The real thing: flips, bf16, batch norm, the teacher's head in between."
    sets, paths = runs
    before = paths["teacher"].read_bytes()
    train_role(CFG, "student", sets, tmp_path / "a", paths)
    whole, save = loop.save_checkpoint, []
    for n in (1, 4):  # within 'feature', within 'full'

        def dies(*a, n=n, **k):
            whole(*a, **k)
            save.append(0)
            if len(save) == n:
                raise KeyboardInterrupt

        save.clear()
        monkeypatch.setattr(loop, "save_checkpoint", dies)
        folder = tmp_path / f"b{n}"
        with pytest.raises(KeyboardInterrupt):
            train_role(CFG, "student", sets, folder, paths)
        monkeypatch.setattr(loop, "save_checkpoint", whole)
        assert not (folder / "weights.safetensors").exists()
        train_role(CFG, "student", sets, folder, paths)
        assert (folder / "weights.safetensors").read_bytes() == (tmp_path / "a/weights.safetensors").read_bytes()
        assert (folder / "metrics.csv").read_text() == (tmp_path / "a/metrics.csv").read_text()
    assert paths["teacher"].read_bytes() == before
    rows = pd.read_csv(tmp_path / "a/metrics.csv")
    assert rows.leg.tolist() == ["feature"] * 2 + ["full"] * 3 and rows.loss.notna().all() and rows.cls[:2].isna().all()


def test_the_teacher_learns_from_labels_only(runs):
    sets, paths = runs
    model, _, (leg,) = planned(CFG, sets, {}, "teacher")
    assert leg.per_epoch == 2
    terms = leg.losses(model.train(), next(leg.batches(0, 0)))
    assert set(terms) == {"cls", "box", "direction"}
    total(terms).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_cannot_work_is_refused_at_once(runs):
    sets, paths = runs
    with pytest.raises(ValueError, match="only float32"):
        CFG.override("teacher_stage.precision=bf16")
    with pytest.raises(ValueError, match="no steps"):
        planned(CFG.override("feature_stage.steps=0", "full_stage.steps=0"), sets, paths)


def test_roles_and_parents_are_asked_for(runs, tmp_path):
    sets, paths = runs
    for role, kw, says in (
        ("pupil", {}, "role is 'pupil'; it must be one of 'teacher', 'depth', 'student'"),
        ("student", {}, "needs a teacher"),
        ("student", dict(teacher=paths["teacher"]), "needs a depth"),
    ):
        with pytest.raises(ValueError, match=says):
            train_role(CFG, role, sets, tmp_path, kw)
    assert set(METHODS["cmkd"].roles) == {"teacher", "depth", "student"}
    with pytest.raises(ValueError, match="begins with the weights coco.pth"):
        train_role(CFG.override("student.initial=coco.pth"), "depth", sets, tmp_path)
