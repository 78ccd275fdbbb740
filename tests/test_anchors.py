"Anchors, assignment, head losses and decoding against the numbers of the released code (goldens e, f)."

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden.det import det

from cmkd.boxes import encode, iou_3d, iou_nearest, nms
from cmkd.core import Found
from cmkd.layers.anchors import Head, anchor_class, assign, make_anchors
from cmkd.layers.head import AnchorHead, HeadMaps, decode_boxes, decode_with_direction, detections
from cmkd.layers.head_loss import Losses, dense_response_loss, detection_loss, quality_targets
from cmkd.layers.losses import focal_loss, quality_focal_loss
from cmkd.methods import recipe

HEAD = Head()
ANCHORS = make_anchors(HEAD, (2.0, -30.08, -3.0), (46.8, 30.08, 1.0), (188, 140))
FLAT = ANCHORS.reshape(-1, 7)
TEACHER = Losses(cls=8, targets="all", normalise="sum")


@pytest.fixture(scope="module")
def e(golden):
    return np.load(golden / "e_anchors_targets.npz")


@pytest.fixture(scope="module")
def f(golden):
    return np.load(golden / "f_losses.npz")


def targets_of(boxes, labels, scores=None) -> list[Found]:
    "Labels, or soft labels where there are scores, as something found."
    if scores is None:
        scores = [b.new_ones(len(b)) for b in boxes]
    return [Found(*frame) for frame in zip(boxes, scores, labels, strict=True)]


def alone(anchors, head, boxes, labels):
    "Labels and box rows of one frame, (Y, X, A) each."
    t = assign(anchors, head, [boxes], [labels])
    return t.labels[0], t.box_index[0]


def truth(gt):
    gt = [g[g[:, 3] > 0] for g in torch.tensor(gt)]
    return [g[:, :7] for g in gt], [g[:, 7].long() - 1 for g in gt]


def predictions(key, bias=-3, box=1.0):
    "The released head's maps, made from names; (B, Y, X, channels) there."
    put = lambda t: t.permute(0, 3, 1, 2).contiguous().requires_grad_()
    return HeadMaps(
        put(det(key + ".cls", (2, 188, 140, 18), 1, bias)),
        put(det(key + ".box", (2, 188, 140, 42), 0.3) * box),
        put(det(key + ".dir", (2, 188, 140, 12))),
    )


def check(losses, maps, f, name, rtol=1e-5):
    np.testing.assert_allclose(
        [losses.cls.item(), losses.box.item(), losses.direction.item()],
        [f[f"{name}_{k}"] for k in ("cls", "loc", "dir")],
        rtol=rtol,
    )
    np.testing.assert_allclose(losses.total().item(), f[f"{name}_loss"], rtol=rtol)
    losses.total().backward()
    for t, want in zip((maps.cls, maps.box, maps.dir), f[f"{name}_grad_stats"], strict=True):
        g = t.grad.double()
        np.testing.assert_allclose([g.mean(), g.std(), g.abs().sum(), g.min(), g.max()], want, rtol=3e-5, atol=1e-11)


def test_anchors_to_the_bit(e):
    assert np.array_equal(FLAT[::997].numpy(), e["anchors_sub"])
    assert len(FLAT) == 157920 and anchor_class(HEAD).tolist() == [0, 0, 1, 1, 2, 2]


def test_assignment_is_exact(e):
    for b, (boxes, labels) in enumerate(zip(*truth(e["gt_boxes"]), strict=True)):
        label, index = (t.flatten() for t in alone(ANCHORS, HEAD, boxes, labels))
        assert np.array_equal(label.numpy(), e["labels"][b])
        assert [(label > 0).sum(), (label == 0).sum(), (label < 0).sum()] == [
            e["n_pos"][b],
            e["n_neg"][b],
            e["n_ignore"][b],
        ]
        mine = e["pos_index"][:, 0] == b
        rows = e["pos_index"][mine, 1]
        np.testing.assert_allclose(encode(boxes[index[rows]], FLAT[rows]), e["pos_reg_targets"][mine], atol=1e-6)
        assert ((index >= 0) == (label > 0)).all() and (labels[index[rows]] + 1 == label[rows]).all()


def test_decoded_boxes(f):
    np.testing.assert_allclose(
        decode_boxes(predictions("f.s"), ANCHORS, HEAD)[:, ::499].detach(), f["decoded_boxes_sub"], rtol=1e-5, atol=1e-5
    )


def test_released_teacher(f):
    maps = predictions("f.q", box=0.3)
    check(detection_loss(maps, ANCHORS, HEAD, TEACHER, targets_of(*truth(f["gt_boxes"]))), maps, f, "qfl")


@pytest.mark.parametrize("name, bias", [("v2", -6.5), ("v2b", -3)])
def test_released_dense_response(f, name, bias):
    student, teacher = predictions(f"f.{name}.student"), predictions(f"f.{name}.teacher", bias)
    check(dense_response_loss(student, teacher, Losses(cls=2, direction=0.4, normalise="sum")), student, f, name)
    assert teacher.cls.grad is None and teacher.box.grad is None
    said = teacher.flat()[0].sigmoid()
    assert ((said.sum(-1) > 0.1).sum(1) == torch.tensor(f[f"{name}_pos"])).all() and (
        (said > 0.1).sum(1) == torch.tensor(f[f"{name}_pos_cls"])
    ).all()


def test_plain_second(f):
    "SECOND's own class loss, put together from our parts; box and direction are the same as ours."
    maps = predictions("f.s")
    boxes, labels = truth(f["gt_boxes"])
    cls = maps.flat()[0]
    loss = detection_loss(maps, ANCHORS, HEAD, Losses(), targets_of(boxes, labels))
    label = assign(ANCHORS, HEAD, boxes, labels).labels.flatten(1)
    hot = torch.nn.functional.one_hot(label.clamp_min(0), 4)[..., 1:]
    focal = ((focal_loss(cls, hot) * (label >= 0)[..., None]).sum((1, 2)) / (label > 0).sum(1)).mean()
    np.testing.assert_allclose(
        [focal.item(), loss.box.item(), loss.direction.item()],
        [f["second_cls"], f["second_loc"], f["second_dir"]],
        rtol=1e-5,
    )


def test_early_released_response(f):
    "The first released student: soft boxes, weights 2 s on each anchor that overlaps one; direction unweighted."
    maps = predictions("f.v1", box=0.3)
    boxes, labels = truth(f["gt_boxes"])
    scores = [
        2 * torch.tensor(s)[torch.tensor(g[:, 3] > 0)] for s, g in zip(f["v1_scores"], f["gt_boxes"], strict=True)
    ]
    weighted = detection_loss(maps, ANCHORS, HEAD, Losses(), targets_of(boxes, labels, scores))
    plain = detection_loss(maps, ANCHORS, HEAD, Losses(), targets_of(boxes, labels))
    cls = maps.flat()[0]
    y, _, touching = quality_targets(decode_boxes(maps, ANCHORS, HEAD).detach(), cls.shape, boxes, labels, scores)
    w = torch.ones(cls.shape[:2])
    for b in range(2):
        for c in range(3):
            mine, rows = labels[b] == c, (anchor_class(HEAD) == c).repeat(188 * 140).nonzero()[:, 0]
            if mine.any():
                best, which = iou_nearest(FLAT[rows], boxes[b][mine]).max(1)
                w[b, rows] = torch.where(best > 0, scores[b][mine][which], 1.0)
    released = 4 * ((quality_focal_loss(cls, y).sum(-1) * w).sum(1) / touching.clamp_min(1)).sum()
    np.testing.assert_allclose(
        [released.item(), weighted.box.item(), plain.direction.item()],
        [f["v1_cls"], f["v1_loc"], f["v1_dir"]],
        rtol=2e-5,
    )


# One anchor, one box, every sign by hand: a flip anywhere below must turn one of these red.

ONE = Head(sizes=HEAD.sizes[:1], bottoms=(-1.78,), positive=(0.6,), negative=(0.45,), rotations=(0.0,), centred=True)
SPOT = make_anchors(ONE, (0.0, 0.0, -3.0), (8.0, 8.0, 1.0), (1, 1))


def one_map(box=(0,) * 7, cls=0.0, direction=(0.0, 0.0)):
    return HeadMaps(
        torch.tensor(cls).view(1, 1, 1, 1).clone().requires_grad_(),
        torch.tensor(box, dtype=torch.float32).view(1, 7, 1, 1).clone().requires_grad_(),
        torch.tensor(direction).view(1, 2, 1, 1).clone().requires_grad_(),
    )


def loss_of(maps, moved, weights=None, losses=None):
    found = targets_of([SPOT.view(1, 7) + torch.tensor(moved)], [torch.tensor([0])], weights)
    return detection_loss(maps, SPOT, ONE, losses or Losses(), found)


def test_z_is_bottom_plus_half_height():
    assert SPOT.flatten()[2].item() == pytest.approx(-1.78 + 0.78)


@pytest.mark.parametrize("axis, unit", [(0, math.hypot(3.9, 1.6)), (1, math.hypot(3.9, 1.6)), (2, 1.56)])
@pytest.mark.parametrize("way", [1, -1])
def test_descent_moves_the_box_towards_the_truth(axis, unit, way):
    moved = [0.0] * 7
    moved[axis] = way * 0.1
    maps = one_map()
    loss = loss_of(maps, moved)
    loss.box.backward()
    assert loss.box.item() == pytest.approx(2 * (0.1 / unit) ** 2 * 4.5, rel=1e-4)
    assert maps.box.grad.flatten()[axis].sign().item() == -way
    exact = [0.0] * 7
    exact[axis] = way * 0.1 / unit
    assert loss_of(one_map(exact), moved).box.item() == pytest.approx(0, abs=1e-9)
    assert loss_of(one_map([-v for v in exact]), moved).box.item() > loss.box.item()


@pytest.mark.parametrize(
    "heading, turned_bin", [(0.1, 1), (-0.1, 1), (0.1 + math.pi, 0), (-0.1 + math.pi, 0), (1.2, 0), (-1.2, 1)]
)
def test_heading_and_direction(heading, turned_bin):
    moved = [0.0] * 6 + [heading]
    maps = one_map()
    loss_of(maps, moved).total().backward()
    small = math.remainder(heading, math.pi)  # all that a code can tell
    assert maps.box.grad.flatten()[6].item() * small < 0
    assert maps.dir.grad.flatten()[turned_bin] < 0 < maps.dir.grad.flatten()[1 - turned_bin]
    said = [0.0, 0.0]
    said[turned_bin] = 1.0
    box = decode_with_direction(torch.tensor([0.0] * 6 + [small]), torch.tensor(said), SPOT.flatten(), ONE)
    assert math.remainder(box[6].item() - heading, 2 * math.pi) == pytest.approx(0, abs=1e-5)
    wrong = decode_with_direction(torch.tensor([0.0] * 6 + [small]), torch.tensor(said[::-1]), SPOT.flatten(), ONE)
    assert abs(math.remainder(wrong[6].item() - heading, 2 * math.pi)) == pytest.approx(math.pi, abs=1e-5)


def test_assignment_by_hand():
    "A car on the spot, a box out of reach, and classes in the order that the frame gives them."
    out = SPOT.view(1, 7) + torch.tensor([100.0, 0, 0, 0, 0, 0, 0])
    label, index = alone(SPOT, ONE, torch.cat([out, SPOT.view(1, 7)]), torch.tensor([0, 0]))
    assert label.item() == 1 and index.item() == 1
    assert alone(SPOT, ONE, out, torch.tensor([0]))[0].item() == 0  # overlaps nothing, forces nothing
    grid = make_anchors(Head(centred=True), (0.0, 0.0, -3.0), (8.0, 8.0, 1.0), (1, 1))
    boxes = grid[0, 0, [4, 0, 2]]
    label, index = alone(grid, HEAD, boxes, torch.tensor([2, 0, 1]))
    assert label.flatten()[::2].tolist() == [1, 2, 3] and index.flatten()[::2].tolist() == [1, 2, 0]
    assert label.flatten()[1].item() == 0  # a car across: 2.56 of 9.92 m2


def test_frames_do_not_meet():
    "Frames assigned together are assigned as each would be alone: some crowded, some without a class, one empty."
    g = torch.Generator().manual_seed(0)
    anchors = make_anchors(Head(centred=True), (0.0, -8.0, -3.0), (16.0, 8.0, 1.0), (16, 16))
    kinds = torch.tensor([[*size, 0.0] for size in HEAD.sizes])
    boxes, labels = [], []
    for n, some in ((9, (0, 1, 2)), (0, (0,)), (5, (1,)), (7, (0, 2)), (1, (2,))):
        label = torch.tensor(some)[torch.randint(len(some), (n,), generator=g)]
        boxes.append(torch.cat([torch.rand(n, 3, generator=g) * 16 - torch.tensor([0.0, 8, 8]), kinds[label]], 1))
        labels.append(label)
    t = assign(anchors, HEAD, boxes, labels)
    for b in range(5):
        label, index = alone(anchors, HEAD, boxes[b], labels[b])
        assert torch.equal(t.labels[b], label) and torch.equal(t.box_index[b], index)
        on = label > 0
        assert len(index[on].unique()) >= len(boxes[b]) / 2 and (labels[b][index[on]] == label[on] - 1).all()


@pytest.mark.parametrize("overlap, label", [(0.61, 1), (0.59, -1), (0.46, -1), (0.44, 0)])
def test_thresholds(overlap, label):
    row = SPOT.repeat(1, 2, 1, 1)
    shift = 3.9 * (1 - overlap) / (1 + overlap)  # (3.9 - d)/(3.9 + d) = overlap
    row[0, 1, 0, 0] += shift  # the first anchor fits and is forced
    assert alone(row, ONE, SPOT.view(1, 7), torch.tensor([0]))[0].flatten().tolist() == [1, label]


def test_dense_response_by_hand():
    "Two anchors, two classes, two frames: who counts, and by what it is divided."
    z = torch.zeros
    student = HeadMaps(z(2, 4, 1, 1), z(2, 14, 1, 1), z(2, 4, 1, 1))
    teacher = HeadMaps(
        torch.tensor([[0.6, 0.3, 0.01, 0.02], [0.01, 0.02, 0.01, 0.02]]).logit().view(2, 4, 1, 1),
        z(2, 14, 1, 1),
        z(2, 4, 1, 1),
    )
    teacher.box[0, 0], teacher.box[0, 7], teacher.dir[0, 1] = 1.0, 1.0, 3.0
    got = dense_response_loss(student, teacher, Losses(cls=1.0, box=1.0, direction=1.0, normalise="sum"))
    qfl = sum((p - 0.5) ** 2 * math.log(2) for p in (0.6, 0.3, 0.01, 0.02, 0.01, 0.02, 0.01, 0.02))
    assert got.cls.item() == pytest.approx(qfl, rel=1e-5)
    assert got.box.item() == pytest.approx(0.9 * (17 / 18) / 2, rel=1e-5) and got.direction.item() == pytest.approx(
        0.9 * math.log(2) / 2, rel=1e-5
    )
    mean = dense_response_loss(student, teacher, Losses(cls=1.0, box=1.0, direction=1.0))
    assert mean.cls.item() == pytest.approx(qfl / 2, rel=1e-5) and mean.box.item() == pytest.approx(got.box.item())


def test_quality_target_is_iou_of_the_decoded_box():
    moved, code = [0.3, 0.0, 0, 0, 0, 0, 0], [0.15, 0.05, 0, 0.1, 0, 0, 0.2]
    box = decode_with_direction(torch.tensor(code), torch.tensor([0.0, 1.0]), SPOT.flatten(), ONE)
    q = iou_3d(box[None], SPOT.view(1, 7) + torch.tensor(moved)).item()
    maps = one_map(code, 1.2, (0.0, 1.0))
    want = quality_focal_loss(torch.tensor(1.2), torch.tensor(q)).item()
    assert 0.3 < q < 0.95 and loss_of(maps, moved).cls.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("targets", ["assigned", "all"])
def test_quality_weighs_every_term(targets):
    maps, moved, losses = one_map([0.02] * 7, 0.5, (0.3, -0.2)), [0.3, 0.0, 0, 0, 0, 0, 0.1], Losses(targets=targets)
    full, part = loss_of(maps, moved, losses=losses), loss_of(maps, moved, [torch.tensor([0.25])], losses)
    for a, b in ((full.cls, part.cls), (full.box, part.box), (full.direction, part.direction)):
        assert b.item() == pytest.approx(a.item() / 4) and a > 0


def scene(frames, seed=0):
    "Maps and boxes of a mini head, for frames with the given numbers of boxes."
    cfg = recipe(scale="mini")
    head, g = cfg.head, torch.Generator().manual_seed(seed)
    anchors = make_anchors(head, cfg.space.low, cfg.space.high, (40, 40))
    n = len(frames)
    rand = lambda *s: torch.rand(*s, generator=g)
    labels = [torch.randint(0, 3, (m,), generator=g) for m in frames]
    boxes = [
        torch.cat(
            [
                rand(len(l), 2) * 20 + torch.tensor([4.0, -10]),
                -torch.ones(len(l), 1),
                torch.tensor(head.sizes)[l],
                rand(len(l), 1) * 6.28,
            ],
            1,
        )
        for l in labels
    ]
    maps = HeadMaps(
        torch.randn(n, 18, 40, 40, generator=g) - 3,
        0.1 * torch.randn(n, 42, 40, 40, generator=g),
        torch.randn(n, 12, 40, 40, generator=g),
    )
    return maps, anchors, head, boxes, labels, [rand(len(l)) for l in labels]


def pick(maps, b):
    return HeadMaps(maps.cls[b : b + 1], maps.box[b : b + 1], maps.dir[b : b + 1])


@pytest.mark.parametrize("targets", ["assigned", "all"])
def test_a_batch_is_the_mean_of_its_frames(targets):
    maps, anchors, head, boxes, labels, weights = scene([5, 0, 9, 1])
    losses = Losses(targets=targets)
    found = targets_of(boxes, labels, weights)
    whole = detection_loss(maps, anchors, head, losses, found)
    parts = [detection_loss(pick(maps, b), anchors, head, losses, found[b : b + 1]) for b in range(4)]
    for k in ("cls", "box", "direction"):
        assert getattr(whole, k).item() == pytest.approx(sum(getattr(p, k).item() for p in parts) / 4, rel=1e-5)
    added = detection_loss(maps, anchors, head, Losses(targets=targets, normalise="sum"), found)
    assert added.cls.item() == pytest.approx(4 * whole.cls.item(), rel=1e-5) and added.box.item() == pytest.approx(
        whole.box.item(), rel=1e-6
    )


@pytest.mark.parametrize("normalise", ["positives", "sum"])
@pytest.mark.parametrize("targets", ["assigned", "label", "all"])
def test_a_frame_that_nobody_labelled_adds_nothing(targets, normalise):
    "Not to a value, not to a gradient; the others give what they give beside a frame without objects."
    maps, anchors, head, boxes, labels, weights = scene([5, 3, 9])
    losses, found = Losses(targets=targets, normalise=normalise), targets_of(boxes, labels, weights)
    whole = replace(maps, cls=maps.cls.clone().requires_grad_(), box=maps.box.clone().requires_grad_())
    mixed = detection_loss(whole, anchors, head, losses, [found[0], None, found[2]])
    mixed.total().backward()
    assert not whole.cls.grad[1].any() and not whole.box.grad[1].any() and whole.cls.grad[0].any()
    alone = [detection_loss(pick(maps, b), anchors, head, losses, [found[b]]) for b in (0, 2)]
    B = {"cls": 1 if normalise == "sum" else 3, "box": 3, "direction": 3}
    for k, n in B.items():
        assert getattr(mixed, k).item() == pytest.approx(sum(getattr(a, k).item() for a in alone) / n, rel=1e-5)
    none = detection_loss(whole, anchors, head, losses, [None] * 3)
    assert none.total().item() == 0 and none.total().requires_grad


def test_plain_loop_agrees():
    "The slow twin: anchor by anchor, straight from Eq. 4 and 5."
    maps, anchors, head, boxes, labels, weights = scene([4, 6], seed=3)
    got = detection_loss(maps, anchors, head, Losses(), targets_of(boxes, labels, weights))
    cls, codes, _ = maps.flat()
    flat = anchors.reshape(-1, 7)
    decoded = decode_boxes(maps, anchors, head)
    reg = sco = 0.0
    for b in range(2):
        label, index = (t.flatten() for t in alone(anchors, head, boxes[b], labels[b]))
        n = (label > 0).sum().item()
        for i in (label > 0).nonzero()[:, 0].tolist():
            box, s = boxes[b][index[i]], weights[b][index[i]].item()
            d = codes[b, i] - encode(box, flat[i])
            d[6] = math.sin(d[6])
            d = d.abs()
            reg += s * torch.where(d < 1 / 9, d * d * 4.5, d - 1 / 18).sum().item() / n / 2
            y = torch.zeros(3)
            y[label[i] - 1] = iou_3d(decoded[b, i : i + 1], box[None]).item()
            sco += s * quality_focal_loss(cls[b, i], y).sum().item() / n / 2
        back = cls[b][label == 0]
        sco += quality_focal_loss(back, torch.zeros_like(back)).sum().item() / n / 2
    assert got.box.item() == pytest.approx(2 * reg, rel=1e-4) and got.cls.item() == pytest.approx(sco, rel=1e-4)


def test_empty_and_broken_frames():
    maps, anchors, head, boxes, labels, _ = scene([0, 0])
    maps.box.requires_grad_()
    for losses in (Losses(), TEACHER):
        L = detection_loss(maps, anchors, head, losses, targets_of(boxes, labels))
        assert L.box.item() == 0 and L.direction.item() == 0 and L.cls.item() > 0
        L.total().backward()
        assert maps.box.grad.isfinite().all()
    maps, anchors, head, boxes, labels, _ = scene([3])
    maps.box[:, 3] = 200.0  # exp overflows: the target is 0, the loss is a number
    found = targets_of(boxes, labels)
    assert detection_loss(maps, anchors, head, Losses(), found).cls.isfinite()
    assert all(f.boxes.isfinite().all() for f in detections(maps, anchors, head))
    with pytest.raises(ValueError):
        detection_loss(maps, anchors, head, Losses(), found * 2)


def test_detections_agree_with_the_long_way():
    maps, anchors, head, *_ = scene([0, 0], seed=5)
    head = replace(head, per_class=False)
    boxes, scores = decode_boxes(maps, anchors, head), maps.flat()[0].sigmoid()
    for b, found in enumerate(detections(maps, anchors, head)):
        got, score, label = found.boxes, found.scores, found.labels
        best, which = scores[b].max(1)
        rows = (best >= head.score).nonzero()[:, 0]
        keep = rows[nms(boxes[b, rows], best[rows], head.nms, head.pre_nms, head.post_nms)]
        assert len(keep) > 10 and got.equal(boxes[b, keep]) and score.equal(best[keep]) and label.equal(which[keep])
        assert (score.diff() <= 0).all() and score.min() >= head.score


def test_head_keys_and_bf16():
    net = AnchorHead(512, HEAD)
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == {
        "conv_cls.weight": (18, 512, 1, 1),
        "conv_cls.bias": (18,),
        "conv_box.weight": (42, 512, 1, 1),
        "conv_box.bias": (42,),
        "conv_dir_cls.weight": (12, 512, 1, 1),
        "conv_dir_cls.bias": (12,),
    }
    maps, anchors, head, boxes, labels, _ = scene([3])
    half = HeadMaps(maps.cls.bfloat16(), maps.box.bfloat16(), maps.dir.bfloat16())
    found = targets_of(boxes, labels)
    loss = detection_loss(half, anchors, head, Losses(), found)
    assert loss.cls.dtype == loss.box.dtype == torch.float32
    again = HeadMaps(
        half.cls.float(), half.box.float(), half.dir.float()
    )  # the same numbers: what follows the head counts in float32
    want = detection_loss(again, anchors, head, Losses(), found)
    assert all(torch.equal(getattr(loss, k), getattr(want, k)) for k in ("cls", "box", "direction"))
    assert torch.equal(decode_boxes(half, anchors, head), decode_boxes(again, anchors, head))


def test_an_overlap_at_the_threshold():
    "An anchor whose IoU is exactly the threshold is positive; at the lower one it is ignored, no background."
    anchors = torch.tensor([[0.0, 0, 0, 3, 1, 1, 0], [1, 0, 0, 3, 1, 1, 0]]).view(
        1, 2, 1, 7
    )  # IoU 1 and 2/4 with the first
    head = Head(sizes=((3.0, 1.0, 1.0),), bottoms=(0.0,), positive=(0.5,), negative=(0.25,), rotations=(0.0,))
    at = lambda head: alone(anchors, head, anchors[0, 0], torch.tensor([0]))[0].flatten().tolist()
    assert at(head) == [1, 1] and at(replace(head, positive=(0.6,), negative=(0.5,))) == [1, -1]
