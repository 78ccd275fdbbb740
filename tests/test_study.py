"What tables ask for and what is made of it: rows, draws, stops, pulls, a teacher of its own, another distance."

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cmkd.core import Boxes, Frame, View
from cmkd.data.dataset import FrameSet
from cmkd.data.kitti import write_frame, write_split
from cmkd.data.sets import open_sets
from cmkd.distill.studies import TABLES, draw, rows
from cmkd.evaluate.metrics import METRICS, ap_record, kitti_ap, kitti_draws
from cmkd.layers.head_loss import detection_loss
from cmkd.ledger import runs as runs_room
from cmkd.ledger.claims import answered, beside, key_of, read_claims, terms
from cmkd.ledger.record import Run, run_name
from cmkd.ledger.statistics import Contrast, over_frames, verdict
from cmkd.ledger.study import study
from cmkd.methods import hash_of, recipe, role_of
from cmkd.train.loop import Leg, train
from cmkd.train.step import Learner, Stage, one_cycle

MINI = recipe(scale="mini")


# --- rows and draws ---


def test_each_row_changes_what_its_name_says():
    of = {(t, row): cfg for t in TABLES for row, cfg in rows(t, MINI, controls=True).items()}
    for (_, row), cfg in of.items():
        if "soft" in row or "+ Res" in row: assert cfg.distill.response == "soft", row
        if row.startswith("hard") or "hard labels" in row: assert cfg.distill.response == "hard", row
        if "stopped early" in row: assert cfg.teacher_stage.stop == 300 < cfg.teacher_stage.steps, row
        if not cfg.distill.feature: assert not cfg.student.adapt, f"{row}: no DA module without the feature loss"
        if row.startswith("train:"): assert not cfg.data.unlabelled, row
        if row.startswith("train +"): assert cfg.data.unlabelled == "unlabelled", row
    assert not of["t04", "base"].pretrain and of["t04", "Pre"].pretrain
    assert of["t04", "Pre + head"].load_head and not of["t04", "Pre"].load_head
    assert {cfg.full_stage.steps for cfg in rows("t04", MINI).values()} == {1000}, "equal steps, with and without Un"


def test_a_row_of_real_data_takes_the_schedule_of_its_frames():
    full = recipe(scale="full", unlabelled="eigen_clean")
    of = rows("t05", full)
    few, more = of["train: L_feat + DA"], of["train + unlabelled: L_feat + DA"]
    assert (few.feature_stage, few.full_stage) == (recipe(scale="full").feature_stage, recipe(scale="full").full_stage)
    assert (more.feature_stage.epochs, more.full_stage.epochs) == (22, 8)
    mine = rows("t05", full.override("feature_stage.epochs=7"))["train: L_feat + DA"]
    assert mine.feature_stage.epochs == 7, "what was set by hand stays"


def test_a_draw_shares_nothing_with_another():
    one, other = draw(MINI, 0), draw(MINI, 1)
    for role in ("teacher", "depth", "student"): assert hash_of(one, role) != hash_of(other, role)
    assert one.data.world != other.data.world and one.teacher.seed != other.teacher.seed and one.seed != other.seed


def test_a_field_that_comes_tomorrow_renames_no_run(monkeypatch):
    "What lies in a group at its default is in no name; what differs from it is."
    even = MINI.override("distill.losses.even=false")
    assert hash_of(even, "student") != hash_of(MINI, "student") and hash_of(even, "teacher") == hash_of(MINI, "teacher")
    from cmkd import config
    asked = config.unusual(even, role_of(even, "student").depends(even))
    assert "distill.losses.even" not in asked and asked["distill.feature_weight"] == 25


class Ask:
    "Stands in for training: what was asked for."

    def __init__(self): self.jobs = []

    def __call__(self, jobs, data=None, store=None, workers=0):
        self.jobs.append([(cfg.seed, cfg.teacher.seed, cfg.data.world, role) for cfg, role in jobs])
        return [Run(Path("x"), dict(seed=cfg.seed, config=cfg.flat())) for cfg, _ in jobs]


def test_a_study_asks_for_each_row_and_draw_once(monkeypatch):
    ask = Ask()
    monkeypatch.setattr("cmkd.ledger.study.fit_all", ask)
    monkeypatch.setattr("cmkd.ledger.study.stands", lambda place, name, weights: False)
    made = study("t04", MINI, draws=3)
    assert list(made.runs) == list(rows("t04", MINI)) and all(len(v) == 3 for v in made.runs.values())
    students, teachers = ask.jobs
    assert len(students) == 18 and {s[:3] for s in students} == {(0, 0, 1), (1, 1, 101), (2, 2, 201)}
    assert [t[1:] for t in teachers] == [(0, 1, "teacher"), (1, 101, "teacher"), (2, 201, "teacher")]
    monkeypatch.setattr("cmkd.ledger.study.stands", lambda place, name, weights: name == run_name(MINI, "student"))
    there = study("t04", MINI, draws=3, as_is=True)
    assert [len(v) for v in there.runs.values()] == [0, 0, 0, 0, 0, 1] and there.teachers == [], "the rest is dashes"
    control = rows("t04", MINI, controls=True)["Pre + head"]
    monkeypatch.setattr("cmkd.ledger.study.stands", lambda place, name, weights: name == run_name(control, "student"))
    ask.jobs.clear()
    shown = study("t04", MINI, draws=1)
    assert list(shown.runs) == [*rows("t04", MINI), "Pre + head"], "a control is shown where it is, and not made"
    assert len(ask.jobs[0]) == 7 and len(study("t04", MINI, draws=1, controls=True).runs) == 18
    few = study("t04", MINI.override("data.unlabelled="), draws=1)
    assert few.runs["Pre + Feat + Res + Un"] == [] and len(few.runs["Pre + Feat + Res"]) == 1


# --- training ---


def toy(folder, stage, steps=40, meet=None):
    "A small training; its rates and log."
    torch.manual_seed(0)
    net, seen = torch.nn.Linear(2, 3), []

    def losses(net, batch):
        seen.append(net(torch.ones(1, 2)))
        return dict(near=(seen[-1]*torch.tensor([3., 0, 4])).sum(), far=net.weight.square().sum())

    leg = Leg("first", stage, steps, lambda e, s: iter([Frames.batch()]*steps), steps, losses,
              meet=(lambda: seen[-1]) if meet else (lambda: None))
    return train(Learner(net), [leg], folder, "run", 0., False, "cpu").rows, net


class Frames:
    @staticmethod
    def batch():
        from cmkd.core import Batch
        return Batch(["0"], torch.ones(1, 1, 3, 2, 2), *[torch.zeros(1)]*5, [None], [None])


def test_a_stage_that_is_broken_off_goes_by_the_whole_schedule(tmp_path):
    "A real stop: the rate is where the long schedule has it, not at its end."
    stage = Stage(lr=1e-2, stop=12)
    log, _ = toy(tmp_path/"a", stage)
    assert log[-1]["step"] == 12 and log[-1]["lr"] == one_cycle(11, 40, stage)[0] > 5e-3
    whole, _ = toy(tmp_path/"b", replace(stage, stop=0))
    assert whole[-1]["step"] == 40 and [r["loss"] for r in whole[:12]] == [r["loss"] for r in log]
    assert toy(tmp_path/"c", replace(stage, stop=99))[0][-1]["step"] == 40


def test_pulls_are_logged_and_change_no_bit(tmp_path):
    log, net = toy(tmp_path/"a", Stage(lr=1e-2), meet=True)
    plain, same = toy(tmp_path/"b", Stage(lr=1e-2))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), same.parameters(), strict=True))
    told = [r for r in log if "pull_near" in r]
    assert [r["step"] for r in told] == [10, 20, 30, 40] and not any("pull_near" in r for r in plain)
    assert all(r["pull_near"] == pytest.approx(5) and r["pull_far"] == 0 for r in told)


# --- a teacher with frames of its own ---

POSE = [[0, -1, 0, 0], [0, 0, -1, -.08], [1, 0, 0, -.27], [0, 0, 0, 1]]
CAMERA = [[185.9, 0, 157, 11], [0, 185.9, 44, .06], [0, 0, 1, .003]]
SHORT = ("data.kind=kitti", "data.world=0", "teacher_stage.steps=1", "teacher_stage.batch=2", "data.unlabelled=")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, r = tmp_path_factory.mktemp("frames"), np.random.default_rng(0)
    for i in range(6):
        points = r.uniform([3, -8, -1.7], [26, 8, 0], (400, 3))
        points = np.c_[points, points[:, :1]*0].astype(np.float32)
        view = View(CAMERA, POSE, r.integers(0, 255, (96, 320, 3), dtype=np.uint8))
        known = dict(boxes2d=[[140, 40, 180, 70]], truncation=[0], occlusion=[0], alpha=[0])
        write_frame(root, Frame(f"{i:06d}", (view,), points, Boxes([[11, 0, -.9, 4, 1.6, 1.5, 0]], ["Car"], **known)))
    for name, ids in (("train", (0, 1)), ("val", (2, 3)), ("trainval", (0, 1, 2, 3)), ("other", (4, 5))):
        write_split(root, name, [f"{i:06d}" for i in ids])
    return root


def test_a_teacher_may_see_val_only_by_name_and_says_so(folder, tmp_path):
    cfg = recipe(scale="smoke").override(*SHORT)
    wide = cfg.override("data.teacher=trainval")
    assert hash_of(cfg, "teacher") != hash_of(wide, "teacher") and hash_of(cfg, "depth") == hash_of(wide, "depth")
    assert hash_of(cfg, "student") != hash_of(wide, "student"), "by its parent"
    run = runs_room.fit_or_load(wide, "teacher", folder, tmp_path, progress=False)
    assert run.record["teacher_split"] == "trainval" and run.record["data"]["teacher"]["count"] == 4
    plain = runs_room.fit_or_load(cfg, "teacher", folder, tmp_path, progress=False)
    assert plain.record["teacher_split"] == "train" and set(plain.record["data"]) == {"train", "val"}
    for leak in ("data.train=trainval", "data.depth=trainval", "data.unlabelled=trainval"):
        with pytest.raises(ValueError, match="000002"): open_sets(cfg.override(leak).data, folder)
    depth = open_sets(cfg.override("data.depth=other").data, folder)
    assert depth.seen(("depth",)).ids == ("000004", "000005") and depth.seen().ids == ("000000", "000001")


def test_a_run_without_val_has_no_number(folder, tmp_path):
    cfg = recipe(scale="smoke").override(*SHORT, "data.train=trainval", "data.val=")
    run = runs_room.fit_or_load(cfg, "teacher", folder, tmp_path, progress=False)
    assert run.record["ap"] == {} == run.record["draws"] and set(run.record["data"]) == {"train"}
    assert runs_room.fit_or_load(cfg, "teacher", folder, tmp_path, progress=False).record == run.record


def test_a_street_is_known_by_its_number(folder, tmp_path, monkeypatch):
    "A record about it stands without its frames; one that is missing renders them; other data is asked for by folder."
    cfg = recipe(scale="smoke")
    asked = []
    monkeypatch.setattr(runs_room, "world", lambda scale, seed, **_: asked.append((scale, seed)) or folder)
    monkeypatch.setattr(runs_room, "open_sets", lambda data, root, progress: open_sets(cfg.override(*SHORT).data, root))
    short = cfg.override("teacher_stage.steps=1", "teacher_stage.batch=2")
    run = runs_room.fit_or_load(short, "teacher", store=tmp_path, progress=False)
    assert asked == [("smoke", 1)]
    again = runs_room.fit_or_load(short, "teacher", store=tmp_path, progress=False)
    assert asked == [("smoke", 1)] and again.record == run.record
    with pytest.raises(ValueError, match="name their folder"):
        runs_room.fit_or_load(cfg.override(*SHORT), "teacher", store=tmp_path/"other", progress=False)


# --- judging ---


def scattered(n=40, off=.5, seed=0):
    "Frames with three cars each, and detections that lie `off` metres beside; every tenth is turned and too large."
    r, frames, found = np.random.default_rng(seed), [], {}
    for i in range(n):
        boxes = np.array([[x, y, -.9, 4, 1.6, 1.5, 0] for x, y in ((8, -3), (14, 2), (20, -1))], np.float32)
        known = dict(boxes2d=[[140, 40, 180, 90]]*3, truncation=[0]*3, occlusion=[0]*3, alpha=[0]*3)
        view = View(CAMERA, POSE, np.zeros((96, 320, 3), np.uint8))
        frames.append(Frame(f"{i:06d}", (view,), np.zeros((0, 4), np.float32), Boxes(boxes, ["Car"]*3, **known)))
        turn = r.uniform(-np.pi, np.pi, 3)
        moved = boxes + np.c_[off*np.cos(turn), off*np.sin(turn), np.zeros((3, 5))].astype(np.float32)
        found[frames[-1].id] = Boxes(moved, ["Car"]*3, r.uniform(.2, 1, 3))

    class Held(FrameSet):
        name, split, labelled, height_scale = "held", "val", True, .1
        ids = tuple(f.id for f in frames)
        def frame(self, i): return frames[i]
    return Held(), found


def test_centres_are_judged_by_distance_alone():
    frames, found = scattered()
    number = lambda found, m, iou: ap_record(kitti_ap(found, frames, ("Car",)))[f"Car/{m}/R40/{iou}/hard"]
    assert number(found, "centre", 1) == number(found, "centre", 2) == 100
    far = scattered(off=1.5)[1]
    assert number(far, "centre", 1) == 0 and number(far, "centre", 2) == 100 and number(far, "3D", "0.5") < 100
    odd = {k: replace(b, boxes=b.boxes*[1, 1, 1, .4, .4, .4, 1] + [0, 0, 1.2, 0, 0, 0, 1]) for k, b in found.items()}
    assert number(odd, "centre", 1) == 100 and number(odd, "3D", "0.5") == 0, "size, height and heading are not asked"


def test_resampled_numbers_are_those_of_the_resampled_frames():
    frames, found = scattered(off=.9)
    kept = kitti_draws(found, frames, ("Car",), draws=40)
    ap = ap_record(METRICS["kitti"].score(found, frames, ("Car",)))
    for key, values in kept.items():
        assert len(values) == 40 and min(values) - 1e-6 <= ap[key] + 15 and abs(np.mean(values) - ap[key]) < 6, key
    assert kept == kitti_draws(found, frames, ("Car",), draws=40), "the same draws for whoever is judged"


def test_what_frames_would_do_to_a_difference():
    key, told = "k", lambda seed, v: Run(Path("x"), dict(seed=seed, draws={"k": " ".join(f"{x:.2f}" for x in v)}))
    a, b = np.random.default_rng(0).normal(30, 2, (2, 100)).round(2)
    runs = dict(a=[told(0, a)], b=[told(0, b)])
    assert over_frames(runs, dict(a=1, b=-1), key) == pytest.approx(1.96*(a - b).std(ddof=1))
    same = dict(a=[told(0, a), told(1, b)], b=[told(0, b), told(1, a)])
    assert over_frames(same, dict(a=1, b=-1), key) == pytest.approx(0, abs=1e-9)
    assert np.isnan(over_frames(dict(a=[], b=[told(0, b)]), dict(a=1, b=-1), key))


# --- claims ---


def heights(**by_row):
    "One run a draw of each row, with APs by hand."
    def run(seed, ap):
        aps = {key_of(n, "moderate"): ap for c in ("Car", "Pedestrian") for n in beside(c).values()}
        return Run(Path("x"), dict(seed=seed, ap=aps))
    return {row: [run(s, v) for s, v in enumerate(values)] for row, values in by_row.items()}


def test_a_claim_of_four_rows_is_a_difference_of_differences():
    claim = read_claims("t07").loc["t07-turn"]
    many, few = (claim.row, claim.against), (claim.less_row, claim.less_against)
    runs = heights(**dict(zip((*many, *few), ([9, 9.1, 9], [4, 4, 4.2], [3, 3.1, 3], [5, 5, 5.1]), strict=True)))
    found = answered(read_claims("t07").loc[["t07-turn"]], runs, "mini")
    assert found.ours["t07-turn"] == pytest.approx((9.0333 - 4.0667) - (3.0333 - 5.0333), abs=1e-3)
    assert found.verdict["t07-turn"] == "reproduced" and terms(claim)[claim.less_against] == 1


def test_a_claim_of_less_is_reproduced_below_zero():
    early = "teacher stopped early"
    runs = heights(**{"hard labels": [9, 9.2, 9.1], "soft labels": [9, 9, 9.2], f"hard labels, {early}": [8, 8.1, 8],
                      f"soft labels, {early}": [3, 3, 3.2], f"pedestrians hard, {early}": [7, 7.2, 7]})
    found = answered(read_claims("t10"), runs, "mini")
    assert found.verdict.to_dict() == {"t10-car": "excluded", "t10-pedestrian": "reproduced",
                                       "t10-car-early": "reproduced", "t10-remedy": "reproduced"}


def test_many_claims_of_one_table_answer_for_one_another():
    "A p of 0.03 alone is a side; among nine questions it is luck."
    c = Contrast(2., 1.9, .03, 3, 2., 1.)
    assert verdict("more", c, .03, 1.) == "reproduced" and verdict("more", c, .27, 1.) == "undecided"


def test_even_confidences_move_weight_and_take_none_away():
    from cmkd.core import Found
    from cmkd.layers.anchors import Head, make_anchors
    from cmkd.layers.head import HeadMaps
    from cmkd.layers.head_loss import Losses
    one = dict(sizes=((3.9, 1.6, 1.56),), bottoms=(-1.78,), positive=(.6,), negative=(.45,), rotations=(0.,))
    head = Head(**one, centred=True)
    anchors = make_anchors(head, (0., 0.), (40., 40.), (10, 10))
    box = anchors[[2, 7], [2, 7], 0] + torch.tensor([.3, 0, 0, 0, 0, 0, 0.])
    maps = HeadMaps(torch.zeros(1, 1, 10, 10), torch.zeros(1, 7, 10, 10), torch.zeros(1, 2, 10, 10))
    maps.box[0, 0, 2, 2] = 2.
    lost = lambda even, *scores: detection_loss(
        maps, anchors, head, Losses(even=even), [Found(box, torch.tensor(scores), torch.tensor([0, 0]))]).box.item()
    assert lost(True, .3, .3) == pytest.approx(lost(False, 1., 1.), rel=1e-5)
    assert lost(True, .1, .3) == pytest.approx(lost(False, .5, 1.5), rel=1e-5) != pytest.approx(lost(True, .3, .3))
