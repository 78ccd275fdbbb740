"Edges that a broken sign or a wrong inequality would move: found by changing the code and seeing that no test noticed."

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from cmkd.boxes import points_in_boxes
from cmkd.core import Boxes, Frame
from cmkd.data import augment
from cmkd.data.dataset import collate, prepare
from cmkd.data.kitti import Calibration, Objects
from cmkd.evaluate.curves import precision_recall, score_thresholds
from cmkd.evaluate.matching import ABSENT, COUNTS, IGNORED, det_status, gt_status
from cmkd.machine import rng
from cmkd.methods import recipe

CLASSES = ("Car", "Pedestrian", "Cyclist")
RIG = Calibration(
    [[185.9, 0, 157, 11], [0, 185.9, 44, 0.06], [0, 0, 1, 0.003]],
    np.eye(3),
    [[0, -1, 0, 0], [0, 0, -1, -0.08], [1, 0, 0, -0.27]],
)


# --- augmentation ---


def turned_car():
    "A long box, turned, filled with points that a wrong heading would leave outside."
    t = np.random.default_rng(0).uniform(-0.49, 0.49, (300, 3)) * [4.2, 1.6, 1.5]
    a = 0.6
    points = np.c_[
        np.cos(a) * t[:, 0] - np.sin(a) * t[:, 1] + 14,
        np.sin(a) * t[:, 0] + np.cos(a) * t[:, 1] + 2,
        t[:, 2] - 0.8,
        0 * t[:, 0],
    ].astype(np.float32)
    image = np.full((96, 320, 3), 255, np.uint8)
    image[:, :100] = 0
    return prepare(Frame("0", (RIG.view(image),), points, Boxes([[14, 2, -0.8, 4.2, 1.6, 1.5, a]], ["Car"])), CLASSES)


@pytest.mark.parametrize(
    "change",
    [
        partial(augment.teacher, flip=1.0, rotation=0.0, scaling=0.0),
        partial(augment.teacher, flip=0.0, rotation=0.7, scaling=0.0),
        partial(augment.teacher, flip=1.0, rotation=0.5, scaling=0.1),
        partial(augment.student, flip=1.0),
    ],
    ids=["flip", "turn", "all", "student"],
)
def test_every_point_stays_in_its_box(change):
    s = turned_car()
    inside = lambda s: points_in_boxes(s.points, s.boxes)[:, 0].float().mean()
    assert inside(s) == 1
    for seed in range(4):
        t = change(s, rng(seed))
        assert inside(t) > 0.99 and not torch.allclose(t.boxes, s.boxes)


def test_chances_are_chances():
    s = turned_car()
    moved = lambda f, p: sum(not torch.equal(f(s, rng(i), flip=p).points, s.points) for i in range(200))
    for f in (augment.student, partial(augment.teacher, rotation=0.0, scaling=0.0)):
        assert moved(f, 0.0) == 0 and moved(f, 1.0) == 200 and 20 < moved(f, 0.2) < 65


def test_pictures_of_two_sizes():
    "The smaller one stands in the upper left corner; zeros fill the rest."
    big = turned_car()
    H, W = big.sizes[0].tolist()
    h, w = H // 2, W // 3
    small = replace(
        big, images=big.images[:, :, :h, :w] | 1, depth=big.depth[:, :h, :w] + 1, sizes=torch.tensor([[h, w]])
    )
    batch = collate([small, big])
    assert batch.sizes[:, 0].tolist() == [[h, w], [H, W]]
    assert torch.equal(batch.images[1], big.images / 255) and torch.equal(batch.depth[1], big.depth)
    assert torch.allclose(batch.images[0, ..., :h, :w], small.images / 255) and torch.equal(
        batch.depth[0, :, :h, :w], small.depth
    )
    assert (batch.images[0].sum(1) > 0).sum() == (batch.depth[0] > 0).sum() == h * w


def test_light_changes_little_and_keeps_the_order():
    "No strength, no change; with some, dark stays dark, and a brighter pixel stays no darker than another."
    image = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[:, None]
    assert torch.equal(augment.relight(image, rng(0), 0.0), image)
    for seed in range(5):
        lit = augment.relight(image, rng(seed), 0.2).int()
        assert (lit.diff(dim=2) >= 0).all() and (lit - image.int()).abs().max() < 100 and lit.max() > 150


def test_white_is_one():
    image = collate([turned_car()]).images
    assert image.max() == 1 and image.min() == 0 and image.dtype == torch.float32


# --- evaluator ---


def objects(n, names="Pedestrian", boxes2d=((0, 0, 60, 100),), truncation=0.0, occlusion=0, scores=None):
    return Objects(
        np.array([names] * n),
        np.full(n, truncation, float),
        np.full(n, occlusion, int),
        np.zeros(n),
        np.array(boxes2d, float).reshape(-1, 4).repeat(n // len(boxes2d), 0),
        np.tile([1.7, 0.6, 0.8], (n, 1)),
        np.tile([0.0, 1.6, 12.0], (n, 1)),
        np.zeros(n),
        scores,
    )


@pytest.mark.parametrize(
    "difficulty, height, occlusion, truncation",
    [("easy", 40, 0, 0.15), ("moderate", 25, 1, 0.30), ("hard", 25, 2, 0.50)],
)
def test_difficulties_by_the_devkit(difficulty, height, occlusion, truncation):
    "Taller than the minimum, occluded and truncated up to the maximum, which is allowed."
    status = lambda h, o, t: gt_status(
        objects(1, boxes2d=((0, 0, 50, h),), occlusion=o, truncation=t), "Pedestrian", difficulty
    )[0]
    assert status(height + 0.01, occlusion, truncation) == COUNTS
    assert (
        status(height, occlusion, truncation)
        == status(height + 1, occlusion + 1, truncation)
        == status(height + 1, occlusion, truncation + 0.01)
        == IGNORED
    )
    small = lambda h, name="Pedestrian": det_status(objects(1, name, ((0, 0, 50, h),)), "Pedestrian", difficulty)[0]
    assert (
        small(height) == COUNTS
        and small(height - 0.01) == IGNORED
        and small(height, "Car") == ABSENT
        and small(height - 1, "Car") == IGNORED
    )


def test_neighbour_classes_are_ignored():
    for cls, like in (("Car", "Van"), ("Pedestrian", "Person_sitting")):
        assert [gt_status(objects(1, name), cls, "easy")[0] for name in (cls, like, "Cyclist")] == [
            COUNTS,
            IGNORED,
            ABSENT,
        ]


def test_an_overlap_of_exactly_the_threshold_is_no_match():
    gt, score = objects(1, boxes2d=((0, 0, 60, 100),)), np.array([0.9])
    best = lambda box: precision_recall(
        [gt], [objects(1, boxes2d=(box,), scores=score)], "Pedestrian", "2D", "easy", 0.5
    ).precision.max(initial=0)
    assert best((0, 0, 60, 50)) == 0 and best((0, 0, 60, 51)) == 1


def test_thresholds_at_a_tie_take_the_lower_recall():
    "Recall .3 lies just between 4/15 and 5/15: the devkit's loop, written out, stays at the fourth score."
    for n in range(1, 80):
        kept, goal = [], 0.0
        for i in range(n):
            left, right = (i + 1) / n, (i + 2) / n if i < n - 1 else (i + 1) / n
            if not (right - goal < goal - left and i < n - 1):
                kept.append(n - i)
                goal += 1 / 40
        assert score_thresholds(np.arange(n, 0.0, -1), n).tolist() == kept, n


# --- recipes ---


def test_recipes_in_numbers():
    "What the paper says and what the released code does, number by number; neither may drift."
    paper, release = recipe(), recipe(name="release")
    both = {
        "space.low": (2.0, -30.08, -3.0),
        "space.high": (46.8, 30.08, 1.0),
        "space.lidar_voxel": (0.04, 0.04, 0.1),
        "space.bev_cell": 0.32,
        "space.depth": (2.0, 46.8),
        "space.max_points": 5,
        "head.sizes": ((3.9, 1.6, 1.56), (0.8, 0.6, 1.73), (1.76, 0.6, 1.73)),
        "head.bottoms": (-1.78, -0.6, -0.6),
        "head.positive": (0.6, 0.5, 0.5),
        "head.negative": (0.45, 0.35, 0.35),
        "head.rotations": (0.0, 1.57),
        "head.direction_offset": 0.78539,
        "head.score": 0.1,
        "head.nms": 0.01,
        "head.pre_nms": 4096,
        "head.post_nms": 500,
        "head.centred": False,
        "bev.layers": (5, 5),
        "bev.filters": (128, 256),
        "bev.up_filters": (256, 256),
        "distill.score": 0.1,
        "distill.losses.box": 2.0,
        "student.reduced": 64,
        "student.rates": (12, 24, 36),
        "student.dropout": 0.5,
        "depth.alpha": 0.25,
        "depth.gamma": 2.0,
        "data.flip": 0.5,
        "full_stage.weight_decay": 0.01,
        "full_stage.clip": 10.0,
        "full_stage.warm": 0.4,
        "full_stage.div": 10.0,
        "full_stage.final_div": 1000.0,
        "feature_stage.epochs": 60,
        "full_stage.epochs": 20,
        "feature_stage.lr": 2e-3,
        "full_stage.lr": 1e-4,
    }
    differ = {
        "space.depth_bins": (80, 120),
        "space.image_voxel": ((0.16,) * 3, (0.32, 0.32, 0.4)),
        "student.backbone": ("resnet101", "resnet50"),
        "student.feature_level": (1, 3),
        "student.collapse": (64, 128),
        "student.align": (True, False),
        "student.blocks": (5, 4),
        "student.block": ("figure", "released"),
        "student.align_corners": (True, False),
        "distill.response": ("soft", "dense"),
        "distill.feature_weight": (1.0, 32.0),
        "distill.losses.cls": (1.0, 2.0),
        "distill.losses.direction": (0.2, 0.4),
        "distill.depth_weight": (0.0, 0.5),
        "depth.mask_invalid": (True, False),
        "pretrain": (True, False),
        "data.mirror": (-1.0, 0.0),
        "teacher.encoder": ("plain", "residual"),
        "teacher.losses.cls": (1.0, 8.0),
        "teacher.losses.targets": ("assigned", "all"),
        "teacher.losses.normalise": ("positives", "sum"),
        "distill.losses.normalise": ("positives", "sum"),
        "depth.pool": ("min", "mean"),
        "depth.weight": (3.0, 1.0),
        "depth.foreground": (13.0, 1.0),
    }
    a, b = paper.flat(), release.flat()
    for k, v in both.items():
        assert a[k] == b[k] == v, k
    for k, v in differ.items():
        assert (a[k], b[k]) == v, k
