"Exact overlap, suppression and the residual coder against references, another clipper, and themselves moved about."

import math

import numpy as np
import pytest
import torch

from cmkd.boxes import (
    corners,
    corners_bev,
    decode,
    encode,
    intersection_bev,
    iou_3d,
    iou_bev,
    iou_nearest,
    nms,
    points_in_boxes,
    wrap,
)


@pytest.fixture(scope="module")
def iou(golden):
    with np.load(golden / "k_iou.npz") as z:
        return {k: torch.from_numpy(z[k]) for k in z.files}


def some_boxes(n, seed=0, spread=6.0):
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(n, 7, generator=g, dtype=torch.float64)
    low = torch.tensor([0, 0, -1, 0.3, 0.3, 0.5, -7.0])
    return low + u * (torch.tensor([spread, spread, 1, 5, 3, 2, 7.0]) - low)


def slow_area(a, b):
    "Half-plane clipping in plain floats, by signed distances to the four sides of `a`."
    x, y, _, l, w, _, t = a
    u, v = (math.cos(t), math.sin(t)), (-math.sin(t), math.cos(t))
    bx, by, _, bl, bw, _, bt = b
    poly = [
        (
            bx + p * bl / 2 * math.cos(bt) - q * bw / 2 * math.sin(bt),
            by + p * bl / 2 * math.sin(bt) + q * bw / 2 * math.cos(bt),
        )
        for p, q in ((1, 1), (-1, 1), (-1, -1), (1, -1))
    ]
    for (nx, ny), reach in ((u, l / 2), ((-u[0], -u[1]), l / 2), (v, w / 2), ((-v[0], -v[1]), w / 2)):
        room = [reach - nx * (p - x) - ny * (q - y) for p, q in poly]
        out = []
        for i in range(len(poly)):
            k = (i + 1) % len(poly)
            if room[i] >= 0:
                out.append(poly[i])
            if (room[i] >= 0) != (room[k] >= 0):
                s = room[i] / (room[i] - room[k])
                out.append(tuple(poly[i][d] + s * (poly[k][d] - poly[i][d]) for d in (0, 1)))
        poly = out
    return abs(sum(poly[i - 1][0] * poly[i][1] - poly[i - 1][1] * poly[i][0] for i in range(len(poly)))) / 2


def slow_iou(a, b):
    shared = slow_area(a, b)
    return shared / (a[3] * a[4] + b[3] * b[4] - shared)


def test_exact_reference(iou, golden):
    with np.load(golden / "k_iou_exact64.npz") as z:
        exact = z["iou_bev_exact"]
    assert np.abs(iou_bev(iou["A"].double(), iou["B"].double()).numpy() - exact).max() < 1e-9
    assert np.abs(iou_bev(iou["A"], iou["B"]).numpy() - exact).max() < 1e-6


def test_released_code_within_its_margin(iou):
    A, B, S = iou["A"], iou["B"], iou["special"]
    assert (iou_bev(A, B) - iou["iou_bev"]).abs().max() < 5e-3
    assert (iou_3d(A, B) - iou["iou3d"]).abs().max() < 5e-3
    assert (iou_bev(S, S) - iou["special_bev"]).abs().max() < 5e-3
    assert (iou_3d(S, S) - iou["special_3d"]).abs().max() < 5e-3


def test_nearest(iou):
    assert (iou_nearest(iou["A"], iou["B"]) - iou["nearest_bev"]).abs().max() < 1e-6


@pytest.mark.parametrize("threshold, key", [(0.01, "nms_001"), (0.5, "nms_05")])
def test_nms_keep_order(iou, threshold, key):
    assert nms(iou["A"], iou["scores"], threshold).tolist() == iou[key].tolist()


def test_coder(golden):
    with np.load(golden / "d_residual_coder.npz") as z:
        d = {k: torch.from_numpy(z[k]) for k in z.files}
    torch.testing.assert_close(encode(d["boxes"], d["anchors"]), d["encoded"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decode(d["enc_in"], d["anchors"]), d["decoded"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        decode(encode(d["boxes"], d["anchors"]), d["anchors"]), d["roundtrip"], rtol=1e-5, atol=1e-5
    )
    boxes = some_boxes(50).requires_grad_()
    encode(boxes, some_boxes(50, 1)).sum().backward()
    assert torch.isfinite(boxes.grad).all()


def test_agrees_with_the_slow_clipper():
    A, B = some_boxes(60, 1), some_boxes(50, 2)
    slow = np.array([[slow_iou(a, b) for b in B.tolist()] for a in A.tolist()])
    assert (slow > 0).mean() > 0.2
    assert np.abs(iou_bev(A, B).numpy() - slow).max() < 1e-9
    low, high = A[:, None, 2] - A[:, None, 5] / 2, A[:, None, 2] + A[:, None, 5] / 2
    z = (
        (torch.minimum(high, (B[:, 2] + B[:, 5] / 2)[None]) - torch.maximum(low, (B[:, 2] - B[:, 5] / 2)[None]))
        .clamp_min(0)
        .numpy()
    )
    area = slow * (A[:, 3:5].prod(1).numpy()[:, None] + B[:, 3:5].prod(1).numpy()) / (1 + slow)
    volume = A[:, 3:6].prod(1).numpy()[:, None] + B[:, 3:6].prod(1).numpy()
    assert np.abs(iou_3d(A, B).numpy() - area * z / (volume - area * z)).max() < 1e-9


def test_paired_is_the_diagonal():
    A, B = some_boxes(40, 3), some_boxes(40, 4)
    for f in (iou_bev, iou_3d):
        torch.testing.assert_close(f(A, B, paired=True), f(A, B).diagonal(), rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="as many boxes"):
        iou_bev(A, B[:3], paired=True)


def test_apart_is_zero():
    A, B = some_boxes(300, 13, spread=40.0), some_boxes(300, 14, spread=40.0)
    slow = np.array([slow_area(a, b) for a, b in zip(A.tolist(), B.tolist(), strict=True)])
    ours = intersection_bev(A, B).numpy()
    assert ((ours > 0) == (slow > 1e-12)).all()


def moved(boxes, turn, shift):
    out = boxes.clone()
    c, s = math.cos(turn), math.sin(turn)
    out[:, 0], out[:, 1] = c * boxes[:, 0] - s * boxes[:, 1] + shift[0], s * boxes[:, 0] + c * boxes[:, 1] + shift[1]
    out[:, 2] += shift[2]
    out[:, 6] += turn
    return out


@pytest.mark.parametrize("f", [iou_bev, iou_3d])
def test_invariance(f):
    A, B = some_boxes(40, 5), some_boxes(30, 6)
    base = f(A, B)
    torch.testing.assert_close(f(B, A).T, base, rtol=0, atol=1e-12)
    for turn, shift in ((0.3, (0, 0, 0)), (math.pi / 2, (50, -20, 1)), (-2.7, (1000, 1000, 5))):
        torch.testing.assert_close(f(moved(A, turn, shift), moved(B, turn, shift)), base, rtol=0, atol=1e-10)
    half = B.clone()
    half[:, 6] += math.pi
    torch.testing.assert_close(f(A, half), base, rtol=0, atol=1e-12)
    quarter = B.clone()
    quarter[:, 6] += math.pi / 2
    quarter[:, [3, 4]] = B[:, [4, 3]]
    torch.testing.assert_close(f(A, quarter), base, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        f(A * torch.tensor([1e-4] * 6 + [1.0]), B * torch.tensor([1e-4] * 6 + [1.0])), base, rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("heading", [0.0, 1e-9, 0.1, math.pi / 4, math.pi / 2, 1.57, math.pi, -3.0])
def test_degenerate(heading):
    c, s = math.cos(heading), math.sin(heading)
    at = lambda x, y, dx=4.0, dy=2.0: torch.tensor(
        [[x * c - y * s + 30, x * s + y * c - 7, 0, dx, dy, 1.5, heading]], dtype=torch.float64
    )
    a = at(0, 0)
    one = lambda b: iou_bev(a, b).item()
    assert one(a) == pytest.approx(1, abs=1e-12)
    assert (
        one(at(4 + 1e-12, 0)) == one(at(0, 2 + 1e-12)) == one(at(4 + 1e-12, 2)) == 0
    )  # side by side, corner to corner
    assert (
        max(one(at(4, 0)), one(at(0, 2)), one(at(4, 2))) < 1e-12
    )  # touching: 30 m away a lidar coordinate is only so exact
    assert one(at(1, 0, 2, 2)) == pytest.approx(0.5, abs=1e-12)  # three shared edges
    assert one(at(0, 0, 2, 1)) == pytest.approx(0.25, abs=1e-12)  # one inside the other
    assert one(at(0, 0, 1e-6, 1e-6)) == pytest.approx(1e-12 / 8, rel=1e-6)  # tiny
    assert one(at(0, 0, 8, 1)) == pytest.approx(4 / (8 + 8 - 4), abs=1e-12)  # a cross
    for dx, dy in ((0, 2), (4, 0), (0, 0), (-4, 2), (-4, -2)):
        assert one(at(0, 0, dx, dy)) == 0
    assert iou_3d(a, at(0, 0, 0, 0)).item() == 0


def test_identical_boxes_of_all_turns():
    A = some_boxes(500, 8, spread=70.0)
    assert (iou_bev(A, A, paired=True) - 1).abs().max() < 1e-12
    assert (iou_3d(A.float(), A.float(), paired=True) - 1).abs().max() < 1e-6
    near = A.clone()
    near[:, 6] += 1e-7
    assert (iou_bev(A, near, paired=True) - 1).abs().max() < 1e-5


def test_nothing_in_nothing_out():
    none, some = torch.zeros(0, 7), some_boxes(3).float()
    assert (
        iou_bev(none, some).shape == (0, 3)
        and iou_3d(some, none).shape == (3, 0)
        and iou_nearest(none, none).shape == (0, 0)
    )
    assert iou_bev(none, none, paired=True).shape == (0,) and nms(none, torch.zeros(0), 0.5).shape == (0,)
    assert corners(none).shape == (0, 8, 3) and points_in_boxes(torch.zeros(4, 3), none).shape == (4, 0)
    assert not torch.isnan(iou_bev(torch.full((1, 7), float("nan")), some)).any()


def test_nms_is_greedy_and_blocks_change_nothing():
    boxes, g = some_boxes(400, 9, spread=25.0), torch.Generator().manual_seed(3)
    scores = torch.rand(400, generator=g).round(decimals=2)  # with ties
    overlap = iou_bev(boxes, boxes)
    order = sorted(range(400), key=lambda i: (-scores[i].item(), i))
    for threshold in (0.01, 0.3, 0.7):
        kept = []
        for i in order:
            if all(overlap[k, i] <= threshold for k in kept):
                kept.append(i)
        assert nms(boxes, scores, threshold).tolist() == kept
        assert nms(boxes, scores, threshold, post_max=7).tolist() == kept[:7]
        assert nms(boxes, scores, threshold, pre_max=1).tolist() == kept[:1]


def test_points_and_corners_agree():
    boxes = some_boxes(20, 10)
    inner = boxes[:, None, :3] + (corners(boxes) - boxes[:, None, :3]) * 0.999
    outer = boxes[:, None, :3] + (corners(boxes) - boxes[:, None, :3]) * 1.001
    for i in range(20):
        assert (
            points_in_boxes(inner[i], boxes[i : i + 1]).all() and not points_in_boxes(outer[i], boxes[i : i + 1]).any()
        )
    p = corners_bev(boxes)
    q = p.roll(-1, 1)
    torch.testing.assert_close((p[..., 0] * q[..., 1] - q[..., 0] * p[..., 1]).sum(1) / 2, boxes[:, 3] * boxes[:, 4])


def test_wrap_ranges():
    x = torch.linspace(-20, 20, 999, dtype=torch.float64)
    for period, offset in ((2 * math.pi, 0.5), (math.pi, 0.5), (2 * math.pi, 0.0)):
        y = wrap(x, period, offset)
        assert (y >= -offset * period - 1e-12).all() and (y < (1 - offset) * period).all()
        torch.testing.assert_close(((x - y) / period).round() * period, x - y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_says_the_same():
    A, B, s = some_boxes(80, 11), some_boxes(60, 12), torch.rand(80)
    for f in (iou_bev, iou_3d, iou_nearest):
        torch.testing.assert_close(f(A.cuda(), B.cuda()).cpu(), f(A, B), rtol=0, atol=1e-12)
    assert nms(A.cuda(), s.cuda(), 0.1).tolist() == nms(A, s, 0.1).tolist()
