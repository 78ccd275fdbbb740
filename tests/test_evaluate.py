"KITTI AP against both reference evaluators, against a literal per-frame loop, and against damaged input."

import hashlib
import json
import math
import re
import tarfile
import time
from dataclasses import fields, replace

import numpy as np
import pytest

from cmkd.cost.evaluator import by_the_book, evaluator
from cmkd.cost.measure import measure
from cmkd.data.kitti import Objects, read_detections, read_label
from cmkd.evaluate.curves import Contest, average_precision, curve_of, precision_recall, score_thresholds
from cmkd.evaluate.errors import by_distance, confusion, confusion_table, distance_table
from cmkd.evaluate.folders import evaluate_folders, read_folders
from cmkd.evaluate.kitti import LOOSE, STRICT, evaluate, interval, reasons, table
from cmkd.evaluate.overlaps import overlaps
from cmkd.evaluate.streets import bench_detections, bench_labels, joined, placed

DIFFICULTIES = ("easy", "moderate", "hard")


@pytest.fixture(scope="module")
def reference(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("m_eval")
    with tarfile.open(golden / "m_eval_A.tar.gz") as t:
        t.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def frames(reference):
    ids = sorted(p.stem for p in (reference / "label_2").iterdir())
    return [read_label(reference / f"label_2/{i}.txt") for i in ids], [
        read_detections(reference / "det", i) for i in ids
    ]


def values(results, cls, metric, recall="R40", strict=True):
    rows = results[
        (results["class"] == cls)
        & (results["metric"] == metric)
        & (results["recall"] == recall)
        & (results["strict"] == strict)
    ]
    assert rows["difficulty"].tolist() == list(DIFFICULTIES)
    return rows["value"].tolist()


# ---- the reference evaluators -------------------------------------------------------------------------------------


def test_agrees_with_the_cpp_devkit(reference):
    results = evaluate_folders(reference / "label_2", reference / "det")
    cpp = json.loads((reference / "cpp.json").read_text())
    names = {"2D": "detection", "AOS": "orientation", "BEV": "detection_ground", "3D": "detection_3d"}
    worst, checked = 0, 0
    for recall in ("R11", "R40"):
        for cls in ("Car", "Pedestrian", "Cyclist"):
            for metric, name in names.items():
                ours = np.array(values(results, cls, metric, recall), float)
                worst = max(worst, np.abs(ours - cpp[recall][f"{cls.lower()}_{name}"]).max())
                checked += len(ours)
    assert checked == 72 and worst < 1e-4


def test_agrees_with_the_python_evaluator_strict_and_loose(reference):
    results, lines = (
        evaluate_folders(reference / "label_2", reference / "det"),
        (reference / "python_result.txt").read_text().splitlines(),
    )
    checked = 0
    for head, *rows in (lines[i : i + 5] for i in range(0, len(lines), 5)):
        cls, recall = head.split()[0], "R40" if "R40" in head else "R11"
        strict = head.split("@")[1].split(",")[1].strip() == ("0.70" if cls == "Car" else "0.50")
        for row in rows:
            name, numbers = row.split(" AP:") if " AP:" in row else row.split("AP:")
            metric = {"bbox": "2D", "bev": "BEV", "3d": "3D", "aos": "AOS"}[name.strip()]
            expected = [float(v) for v in numbers.split(",")]
            assert np.abs(np.array(values(results, cls, metric, recall, strict), float) - expected).max() < (
                0.0051 if metric == "AOS" else 1e-3
            ), head + row
            checked += 1
    assert checked == 48


# ---- a literal evaluator, one frame and one ground truth at a time ------------------------------------------------


def area(poly):
    return sum(p[0] * q[1] - q[0] * p[1] for p, q in zip(poly, poly[1:] + poly[:1], strict=True)) / 2


def footprint(o, i):
    (_, w, l), (x, _, z), r = o.dimensions[i], o.locations[i], o.rotation_y[i]
    ring = [
        (math.cos(r) * a + math.sin(r) * b + x, -math.sin(r) * a + math.cos(r) * b + z)
        for a, b in ((l / 2, w / 2), (-l / 2, w / 2), (-l / 2, -w / 2), (l / 2, -w / 2))
    ]
    return ring if area(ring) > 0 else ring[::-1]


def shared_area(p, q):
    for (ax, ay), (bx, by) in zip(q, q[1:] + q[:1], strict=True):
        side = [(bx - ax) * (y - ay) - (by - ay) * (x - ax) for x, y in p]
        out = []
        for i in range(len(p)):
            j = (i + 1) % len(p)
            if side[i] >= 0:
                out.append(p[i])
            if side[i] * side[j] < 0:
                s = side[i] / (side[i] - side[j])
                out.append((p[i][0] + s * (p[j][0] - p[i][0]), p[i][1] + s * (p[j][1] - p[i][1])))
        p = out
    return max(area(p), 0)


def overlap(a, i, b, j, metric, over_first=False):
    "IoU of row i of a with row j of b."
    if metric == "2D":
        p, q = a.boxes2d[i], b.boxes2d[j]
        w, h = min(p[2], q[2]) - max(p[0], q[0]), min(p[3], q[3]) - max(p[1], q[1])
        if w <= 0 or h <= 0:
            return 0
        first, second = ((r[2] - r[0]) * (r[3] - r[1]) for r in (p, q))
        return w * h / (first if over_first else first + second - w * h)
    inter = shared_area(footprint(a, i), footprint(b, j))
    (ha, wa, la), (hb, wb, lb) = a.dimensions[i], b.dimensions[j]
    if metric == "BEV":
        return inter / (la * wa + lb * wb - inter)
    ya, yb = a.locations[i, 1], b.locations[j, 1]
    inter *= max(0, min(ya, yb) - max(ya - ha, yb - hb))
    return inter / (ha * la * wa + hb * lb * wb - inter)


def literal(labels, detections, cls, metric, iou, difficulty):
    "(AP R40, AP R11, AOS R40), or None without ground truth."
    k = DIFFICULTIES.index(difficulty)
    low, occ, cut = (40, 25, 25)[k], (0, 1, 2)[k], (0.15, 0.3, 0.5)[k]
    jobs = []
    for gt, det in zip(labels, detections, strict=True):
        gs, ds = [], []
        for n, b, o, t in zip(gt.names, gt.boxes2d, gt.occlusion, gt.truncation, strict=True):
            bad = o > occ or t > cut or b[3] - b[1] <= low
            same, alike = n == cls, n == {"Car": "Van", "Pedestrian": "Person_sitting"}.get(cls)
            gs.append(0 if same and not bad else 1 if same or alike else -1)
        for n, b in zip(det.names, det.boxes2d, strict=True):
            ds.append(1 if abs(b[3] - b[1]) < low else 0 if n == cls else -1)
        table = {
            (i, j): overlap(gt, i, det, j, metric)
            for i in range(len(gt))
            if gs[i] >= 0
            for j in range(len(det))
            if ds[j] >= 0
        }
        dc = [i for i in range(len(gt)) if gt.names[i] == "DontCare"] if metric == "2D" else []
        stuff = [any(overlap(det, j, gt, i, "2D", over_first=True) > iou for i in dc) for j in range(len(det))]
        jobs.append((gt, det, gs, ds, table, stuff))
    n_gt = sum(gs.count(0) for _, _, gs, *_ in jobs)
    if n_gt == 0:
        return None
    found = []
    for _, det, gs, ds, table, _ in jobs:
        used = set()
        for i, a in enumerate(gs):
            best, score = None, -1e7
            for j, b in enumerate(ds):
                if a >= 0 and b >= 0 and j not in used and table[i, j] > iou and det.scores[j] > score:
                    best, score = j, det.scores[j]
            if best is None:
                continue
            used.add(best)
            if a == 0 and ds[best] == 0:
                found.append(score)
    found.sort(reverse=True)
    thresholds, current = [], 0.0
    for i, s in enumerate(found):
        left = (i + 1) / n_gt
        right = (i + 2) / n_gt if i < len(found) - 1 else left
        if right - current < current - left and i < len(found) - 1:
            continue
        thresholds.append(s)
        current += 1 / 40
    precision, similarity = [0.0] * 41, [0.0] * 41
    for t, threshold in enumerate(thresholds):
        tp = fp = 0
        like = 0.0
        for gt, det, gs, ds, table, stuff in jobs:
            used = set()
            there = [b >= 0 and s >= threshold for b, s in zip(ds, det.scores, strict=True)]
            for i, a in enumerate(gs):
                if a < 0:
                    continue
                best, most, second_rate = None, 0.0, False
                for j, b in enumerate(ds):
                    if not there[j] or j in used or not table[i, j] > iou:
                        continue
                    if b == 0 and (table[i, j] > most or second_rate):
                        best, most, second_rate = j, table[i, j], False
                    elif b == 1 and best is None:
                        best, second_rate = j, True
                if best is None:
                    continue
                used.add(best)
                if a == 0 and ds[best] == 0:
                    tp += 1
                    like += (1 + math.cos(gt.alpha[i] - det.alpha[best])) / 2
            fp += sum(there[j] and ds[j] == 0 and j not in used and not stuff[j] for j in range(len(ds)))
        if tp + fp:
            precision[t], similarity[t] = tp / (tp + fp), like / (tp + fp)
    precision, similarity = ([max(v[i:]) for i in range(41)] for v in (precision, similarity))
    return 100 * sum(precision[1:]) / 40, 100 * sum(precision[::4]) / 11, 100 * sum(similarity[1:]) / 40


def crowded(seed, frames=120):
    "Frames in which boxes crowd, scores tie, boxes repeat, sizes straddle the minimum heights and classes mix."
    g = np.random.default_rng(seed)
    labels, detections = [], []
    for _ in range(frames):
        n = int(g.integers(0, 9))
        spot = g.uniform(size=(n, 2)) * [6, 8] + [-3, 20]
        height = g.choice([20.0, 25.0, 26.0, 39.5, 40.0, 41.0, 80.0], n)
        u = g.integers(100, 160, n).astype(float)
        names = g.choice(
            ["Car", "Car", "Van", "Pedestrian", "Pedestrian", "Person_sitting", "Cyclist", "DontCare", "Truck"], n
        )
        size = np.column_stack([g.uniform(1.4, 1.8, n), g.uniform(1.2, 1.8, n), g.uniform(1.5, 4, n)])
        gt = Objects(
            names,
            g.choice([0.0, 0.15, 0.2, 0.3, 0.5, 0.6], n),
            g.integers(0, 4, n),
            g.uniform(-3, 3, n),
            np.column_stack([u, np.full(n, 100.0), u + 60, 100 + height]),
            size,
            np.column_stack([spot[:, 0], g.uniform(1.5, 1.8, n), spot[:, 1]]),
            g.uniform(-3, 3, n),
        )
        k = g.integers(0, max(n, 1), int(g.integers(0, 14)) if n else 0)
        m = len(k)
        jitter = np.where(g.uniform(size=(m, 1)) < 0.3, 0, g.normal(size=(m, 3)) * [0.25, 0.05, 0.3])
        shift = g.choice([0.0, 0, 2, -3, 8], (m, 1))
        det = Objects(
            np.where(
                np.isin(names[k], ["Car", "Pedestrian", "Cyclist"]) & (g.uniform(size=m) < 0.85),
                names[k],
                g.choice(["Car", "Pedestrian", "Cyclist"], m),
            ),
            -np.ones(m),
            -np.ones(m, int),
            gt.alpha[k] + g.normal(size=m),
            gt.boxes2d[k] + shift * [1, 0, 1, g.choice([0, 1])],
            gt.dimensions[k] * g.choice([1, 1.1], (m, 1)),
            gt.locations[k] + jitter,
            gt.rotation_y[k] + g.choice([0, 0.1, 3.14], m),
            g.integers(1, 20, m) / 20,
        )
        dc = np.flatnonzero(gt.names == "DontCare")
        gt.dimensions[dc], gt.locations[dc] = -1, -1000
        det = det[det.dimensions[:, 0] > 0]
        labels.append(gt)
        detections.append(det)
    return labels, detections


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_the_literal_loop(seed):
    labels, detections = crowded(seed)
    results = evaluate(labels, detections)
    seen = set()
    for strict in (True, False):
        for cls in ("Car", "Pedestrian", "Cyclist"):
            for metric in ("2D", "BEV", "3D"):
                loose = not strict and metric != "2D"
                iou = (0.5 if loose else 0.7) if cls == "Car" else (0.25 if loose else 0.5)
                for k, difficulty in enumerate(DIFFICULTIES):
                    expected = literal(labels, detections, cls, metric, iou, difficulty)
                    ours = [
                        values(results, cls, metric, "R40", strict)[k],
                        values(results, cls, metric, "R11", strict)[k],
                    ]
                    if expected is None:
                        assert ours == [None, None]
                        continue
                    assert ours == pytest.approx(expected[:2], abs=1e-9), (cls, metric, iou, difficulty)
                    if metric == "2D":
                        assert values(results, cls, "AOS", "R40", strict)[k] == pytest.approx(expected[2], abs=1e-9)
                    seen.add(round(expected[0], 6))
    assert len(seen) > 20  # the check has teeth: many different numbers


# ---- properties ---------------------------------------------------------------------------------------------------


def as_detections(o):
    o = o[o.names != "DontCare"]
    return Objects(*(getattr(o, f.name) for f in fields(Objects)[:-1]), np.ones(len(o)))


def one(name="Car", x=0.0, z=20.0, box=(100, 100, 200, 150), occlusion=0, truncation=0.0, alpha=0.1, score=None, **_):
    "One row: a box of 1.5 x 2 x 4 m along z."
    return Objects(
        np.array([name]),
        np.array([truncation]),
        np.array([occlusion]),
        np.array([alpha]),
        np.array([box], float),
        np.array([[1.5, 2, 4]]),
        np.array([[x, 1.6, z]]),
        np.array([np.pi / 2]),
        None if score is None else np.array([score]),
    )


def rows(*tables):
    return Objects(
        *(
            None if getattr(tables[0], f.name) is None else np.concatenate([getattr(o, f.name) for o in tables])
            for f in fields(Objects)
        )
    )


def best(labels, detections, **kw):
    "Precision at recall 0: right boxes over all that are judged, at the highest threshold that a true positive sets."
    return precision_recall([labels], [detections], **kw).precision[0]


def nothing():
    return Objects(
        *(v[:0] for v in (np.array(["a"]), *np.zeros((3, 1)), np.zeros((1, 4)), *np.zeros((2, 1, 3)), np.zeros(1))),
        np.zeros(0),
    )


def test_ground_truth_against_itself_is_perfect(frames):
    labels, _ = frames
    results = evaluate(labels, [as_detections(o) for o in labels])
    full = results[results["class"].isin(["Car", "Pedestrian"]) & (results["difficulty"] != "easy")]
    assert len(full) == 64 and full["value"].astype(float).tolist() == pytest.approx([100] * 64)


def test_copied_labels_need_no_orientation_of_dontcare_regions(frames):
    labels, _ = frames
    copied = [
        replace(o, scores=np.ones(len(o))) for o in labels
    ]  # as `awk` would make them, alpha -10 in DontCare rows
    assert any((o.alpha == -10).any() for o in copied)
    assert values(evaluate(labels, copied), "Pedestrian", "AOS")[1] == pytest.approx(100)


@pytest.mark.parametrize("n", [1, 2, 10, 40, 41, 42])
def test_fewer_than_41_objects_cannot_give_100(n):
    p = precision_recall([one()] * n, [one(score=0.9)] * n).precision
    assert average_precision(p) == pytest.approx(min(100, 100 * (n - 1) / 40)) and average_precision(
        p, "R11"
    ) == pytest.approx(min(100, 100 * math.ceil(n / 4) / 11))


def test_who_counts_at_the_edges():
    box = lambda height: (100, 100, 200, 100 + height)
    for difficulty, low, cut, occ in (("easy", 40, 0.15, 0), ("moderate", 25, 0.3, 1), ("hard", 25, 0.5, 2)):
        count = lambda d=difficulty, **kw: precision_recall([one(**kw)], [nothing()], difficulty=d).n_gt
        assert count(box=box(low)) == 0 and count(box=box(low + 0.01)) == 1  # ground truth: taller than
        assert count(truncation=cut) == 1 and count(truncation=cut + 0.01) == 0
        assert count(occlusion=occ) == 1 and count(occlusion=occ + 1) == 0
        judged = lambda height, box=box, difficulty=difficulty: best(
            rows(one(), one(x=10)), rows(one(score=0.9), one(x=20, score=0.95, box=box(height))), difficulty=difficulty
        )
        assert judged(low) == 0.5 and judged(low - 0.01) == 1  # detections: at least as tall as
    assert (
        best(rows(one(), one("Van", x=10)), rows(one(score=0.9), one(x=10, score=0.95))) == 1
    )  # a van is not a false car
    assert best(rows(one(), one("Truck", x=10)), rows(one(score=0.9), one(x=10, score=0.95))) == 0.5  # a truck is
    assert (
        best(rows(one(), one(x=10)), rows(one(score=0.9), one(x=20, score=0.95, box=(100, 150, 200, 100)))) == 0.5
    )  # upside down is tall enough to be false
    person = dict(cls="Pedestrian", iou=0.5)
    assert (
        best(
            rows(one("Pedestrian"), one("Person_sitting", x=10)),
            rows(one("Pedestrian", score=0.9), one("Pedestrian", x=10, score=0.95)),
            **person,
        )
        == 1
    )
    assert (
        best(
            rows(one("Pedestrian"), one("Cyclist", x=10)),
            rows(one("Pedestrian", score=0.9), one("Pedestrian", x=10, score=0.95)),
            **person,
        )
        == 0.5
    )
    assert (
        best(rows(one(), one(x=10, occlusion=3)), rows(one(score=0.9), one(x=10, score=0.95))) == 1
    )  # nor is one that is too hard


def test_a_match_overlaps_more_than_the_threshold():
    half = one(box=(100, 100, 200, 125.0), score=0.9)  # 2D IoU exactly 1/2
    found = lambda iou: precision_recall([one()], [half], metric="2D", iou=iou, difficulty="moderate").precision[0]
    assert found(0.5) == 0 and found(0.4999) == 1


def test_dontcare_forgives_what_it_covers_by_more_than_the_threshold():
    region = lambda right: replace(
        one("DontCare", box=(400, 100, right, 150)), dimensions=-np.ones((1, 3)), locations=np.full((1, 3), -1000.0)
    )
    false = one(x=30, box=(400, 100, 500, 150), score=0.95)
    judged = lambda right, metric: best(rows(one(), region(right)), rows(one(score=0.9), false), metric=metric)
    assert judged(471, "2D") == 1 and judged(470, "2D") == 0.5  # 71 and exactly 70 % of the box, threshold 0.7
    assert judged(900, "2D") == 1  # of the box, not of the region
    assert judged(471, "BEV") == judged(471, "3D") == 0.5  # a region has no footprint


def test_thresholds_come_by_score_and_counts_by_overlap():
    gt, boxes = one(), rows(one(score=0.9, z=20.5), one(score=0.6))
    assert precision_recall([gt], [boxes]).thresholds.tolist() == [0.9]  # the confident box sets the threshold
    turned = rows(one(score=0.9, alpha=0.1 + math.pi, box=(105, 100, 205, 150)), one(score=0.9, alpha=0.1))
    c = precision_recall([gt], [turned], metric="2D")
    assert (c.precision[0], c.similarity[0]) == (
        0.5,
        0.5,
    )  # the one that overlaps more is the match, and looks the right way
    small = rows(one(score=0.8, box=(100, 100, 200, 124)), one(score=0.9, z=20.5), one(x=10, score=0.5))
    c = precision_recall([rows(gt, one(x=10))], [small])
    assert (
        c.thresholds.tolist() == [0.9, 0.5] and c.precision[1] == 1
    )  # an ignored box gives way to one that counts, though it fits better
    assert precision_recall([gt], [small[:1]], metric="BEV").recall.tolist() == []  # and alone it sets no threshold
    assert (
        precision_recall([gt], [replace(small[:2], scores=np.array([0.9, 0.9]))]).recall.tolist() == []
    )  # nor if its score is as high and it comes first
    c = precision_recall(
        [rows(gt, one(z=21.0), one(x=10))],
        [rows(one(z=20.5, score=0.9, box=(100, 100, 200, 124)), small[0:1], one(x=10, score=0.5))],
    )
    assert c.recall.tolist() == [0.5]  # of ignored boxes the first in the file goes, and the second car has none
    double = rows(one(score=0.9, alpha=2.0), one(score=0.9))
    assert precision_recall([gt], [double], metric="2D").similarity[0] == pytest.approx(
        (1 + math.cos(1.9)) / 4
    )  # of equals, the first in the file


def test_alpha_turns_the_similarity():
    for turn, expected in ((0, 1), (math.pi / 2, 0.5), (math.pi, 0), (-math.pi / 2, 0.5), (2 * math.pi, 1)):
        assert precision_recall([one()], [one(alpha=0.1 + turn, score=0.9)], metric="2D").similarity[
            0
        ] == pytest.approx(expected, abs=1e-12)


def test_score_thresholds_against_the_plain_loop():
    dice = np.random.default_rng(0)
    for _ in range(200):
        n = int(dice.integers(1, 300))
        scores = dice.integers(0, 40, int(dice.integers(0, n + 1))) / 40
        v, kept, recall = sorted(scores.tolist(), reverse=True), [], 0.0
        for i, s in enumerate(v):
            last = i == len(v) - 1
            if not last and (i + 2) / n - recall < recall - (i + 1) / n:
                continue
            kept.append(s)
            recall += 1 / 40
        assert score_thresholds(scores, n).tolist() == kept and len(kept) <= 41


def test_strict_and_loose_differ_from_above_only():
    assert all(STRICT[c]["2D"] == LOOSE[c]["2D"] == STRICT[c]["AOS"] == LOOSE[c]["AOS"] for c in STRICT)
    results = evaluate([one()] * 50, [one(z=21.0, score=0.9)] * 50)  # IoU 0.6
    at = lambda metric, strict: values(results, "Car", metric, "R40", strict)[1]
    assert [at("BEV", True), at("BEV", False), at("3D", True), at("3D", False), at("2D", True)] == pytest.approx(
        [0, 100, 0, 100, 100]
    )
    assert sorted(set(results["iou"])) == [0.25, 0.5, 0.7] and len(results) == 144


def test_no_detections_is_zero_and_no_ground_truth_is_none(frames):
    labels, detections = frames
    zero = evaluate(labels, [nothing() for _ in labels])
    assert zero["value"].tolist() == [0] * len(zero)
    dash = evaluate([o[o.names == "Cyclist"] for o in labels], detections)
    assert all(v is None for v in dash[dash["class"] != "Cyclist"]["value"]) and all(
        v is not None for v in dash[dash["class"] == "Cyclist"]["value"]
    )
    assert (table(dash).loc["Car"] == "–").all(axis=None)
    assert all(v is None for v in evaluate([], [])["value"])
    assert all(v is None for v in evaluate([nothing()], [nothing()])["value"])


def test_order_of_frames_and_case_of_names_change_nothing(frames):
    labels, detections = frames
    base = evaluate(labels, detections)["value"].astype(float)
    order = np.random.default_rng(0).permutation(len(labels))
    lower = lambda o: Objects(np.char.upper(o.names), *(getattr(o, f.name) for f in fields(Objects)[1:]))
    again = evaluate([lower(labels[i]) for i in order], [detections[i] for i in order])["value"].astype(float)
    np.testing.assert_allclose(again, base, atol=1e-9)


def test_height_scale_is_a_smaller_picture(frames):
    labels, detections = frames
    shrink = lambda o: Objects(
        *(getattr(o, f.name) * 0.25 if f.name == "boxes2d" else getattr(o, f.name) for f in fields(Objects))
    )
    small = evaluate([shrink(o) for o in labels], [shrink(o) for o in detections], height_scale=0.25)["value"].astype(
        float
    )
    np.testing.assert_allclose(small, evaluate(labels, detections)["value"].astype(float), atol=1e-9)


def test_missing_alpha_leaves_aos_open(frames):
    labels, detections = frames
    blind = [
        Objects(
            o.names,
            o.truncation,
            o.occlusion,
            np.full(len(o), -10.0),
            *(getattr(o, f.name) for f in fields(Objects)[4:]),
        )
        for o in detections
    ]
    results = evaluate(labels, blind)
    assert all(v is None for v in results[results["metric"] == "AOS"]["value"]) and values(
        results, "Car", "2D"
    ) == values(evaluate(labels, detections), "Car", "2D")


def test_weights_are_repeated_frames():
    labels, detections = crowded(7, 15)
    weights = np.random.default_rng(0).integers(0, 4, len(labels))
    repeat = lambda tables: [t for t, w in zip(tables, weights, strict=True) for _ in range(w)]
    for metric in ("2D", "3D"):
        weighted = curve_of(
            Contest(overlaps(labels, detections), "Car", metric, 0.5, "hard", 1.0, None), weights.astype(float)
        )
        plain = precision_recall(repeat(labels), repeat(detections), "Car", metric, "hard", 0.5)
        for f in fields(plain):
            np.testing.assert_allclose(getattr(weighted, f.name), getattr(plain, f.name), atol=1e-12)


def test_interval_holds_the_value(frames):
    labels, detections = frames
    for metric in ("3D", "AOS"):
        low, high = interval(labels, detections, metric=metric, draws=60)
        assert low < values(evaluate(labels, detections), "Car", metric)[1] < high
    assert interval(labels, detections, metric=metric, draws=60) == (low, high)
    assert interval([nothing()], [nothing()]) is None
    other = interval(labels, detections, metric=metric, draws=60, seed=1)
    assert other != (low, high) and interval(labels, detections, metric=metric, draws=60, level=0.5)[0] > low


def test_interval_by_hand():
    spread = [one(x=10.0 * i) for i in range(41)]
    labels, detections = [rows(*spread)] * 2, [rows(*[replace(o, scores=np.array([0.9])) for o in spread]), nothing()]
    both, middle = (
        100,
        average_precision(precision_recall(labels, detections).precision),
    )  # drawn: good twice 1/4, one of each 1/2, bad twice 1/4
    at = lambda level: interval(labels, detections, draws=1000, level=level)
    assert at(0.95) == at(0.6) == (0, both) and at(0.4) == (middle, middle) and 45 < middle < 55


def test_intervals_of_all_numbers_are_those_of_one(frames):
    labels, detections = frames
    results = evaluate(labels, detections, difficulties=("moderate",), draws=20)
    assert results.columns.tolist()[-5:] == ["value", "low", "high", "objects", "why"]
    for metric in ("AOS", "BEV"):
        row = results[
            (results["class"] == "Pedestrian")
            & (results["metric"] == metric)
            & (results["recall"] == "R11")
            & results["strict"]
        ].iloc[0]
        assert (row["low"], row["high"]) == interval(
            labels, detections, "Pedestrian", metric, "moderate", 0.5, "R11", draws=20
        )
    assert " to " in table(results).loc[("Car", "3D"), "moderate"]
    empty = evaluate([nothing()], [nothing()], draws=3)
    assert (
        all(v is None for k in ("value", "low", "high") for v in empty[k])
        and evaluate([], [], draws=2)["low"].isna().all()
    )
    plain = evaluate(labels, detections, difficulties=("moderate",))
    assert plain["value"].tolist() == results["value"].tolist()  # asking for an interval changes no number


def test_distance_splits_the_ground_truth(frames):
    labels, detections = frames
    n = [precision_recall(labels, detections, distance=band).n_gt for band in ((0, 15), (15, 30), (30, 1000), None)]
    assert sum(n[:3]) == n[3] and min(n) > 0
    own = [as_detections(o) for o in labels]
    assert precision_recall(labels, own, distance=(15, 30)).precision[0] == 1
    far = [o[o.locations[:, 2] >= 30] for o in own]
    assert precision_recall(labels, far, distance=(15, 30)).precision.max() == 0
    # what lies beyond the band is no false positive within it
    np.testing.assert_allclose(
        precision_recall(labels, own, distance=(15, 30)).precision,
        precision_recall(labels, [o[o.locations[:, 2] < 30] for o in own], distance=(15, 30)).precision,
    )


def test_distance_by_hand():
    band = lambda labels, boxes, near, far: precision_recall([labels], [boxes], distance=(near, far))
    gt, box = one(z=14.9), one(z=15.1, score=0.9)
    assert band(gt, box, 0, 15).precision[0] == 1 and band(gt, box, 15, 30).n_gt == 0  # the object's band decides
    assert band(one(z=15.0), nothing(), 0, 15).n_gt == 0 and band(one(z=15.0), nothing(), 15, 30).n_gt == 1
    both = rows(one(z=10), one(x=10, z=20))
    assert (
        band(both, rows(one(z=10, score=0.9), one(x=30, z=20, score=0.95)), 0, 15).precision[0] == 1
    )  # a false box is false in its own band
    assert band(both, rows(one(z=10, score=0.9), one(x=30, z=12, score=0.95)), 0, 15).precision[0] == 0.5
    assert (
        band(
            rows(one(z=10), one(x=10, z=15.1)), rows(one(z=10, score=0.9), one(x=10, z=14.9, score=0.95)), 0, 15
        ).precision[0]
        == 1
    )  # it found an object beyond the band
    assert band(both, rows(one(z=10, score=0.9), one(x=10, z=20, score=0.95)), 0, 15).thresholds.tolist() == [0.9]


def test_by_distance_is_evaluate_in_each_band(frames):
    labels, detections = frames
    results = by_distance(labels, detections)
    for near, far in ((0, 15), (15, 30), (30, 50)):
        part = results[results["near"] == near]
        assert part["value"].tolist() == evaluate(labels, detections, distance=(near, far))["value"].tolist() and set(
            part["far"]
        ) == {far}
        assert part[(part["class"] == "Car") & (part["difficulty"] == "hard")]["objects"].unique().tolist() == [
            precision_recall(labels, detections, difficulty="hard", distance=(near, far)).n_gt
        ]
    shown = distance_table(results)
    assert shown.index.tolist() == ["Car", "Pedestrian", "Cyclist"] and shown.columns.tolist() == [
        "0–15 m",
        "15–30 m",
        "30–50 m",
    ]


def counted(labels, boxes, **kw):
    found = confusion([labels], [boxes], **kw)
    return {(r["class"], r["of"], r["outcome"]): r["n"] for _, r in found.iterrows() if r["n"]}


def test_confusion_by_hand():
    gt = rows(one(), one("Van", x=10), one("Pedestrian", x=20), one(x=30, occlusion=3))
    assert counted(gt, rows(one(score=0.9), one(x=10, score=0.9), one(x=30, score=0.9))) == {
        ("Car", "object", "found"): 1,
        ("Car", "box", "right"): 1,
        ("Pedestrian", "object", "unseen"): 1,
    }  # van and hidden car take no part
    assert counted(gt, rows(one(score=0.9), one(x=20, score=0.9))) == {
        ("Car", "object", "found"): 1,
        ("Car", "box", "right"): 1,
        ("Car", "box", "other class"): 1,
        ("Pedestrian", "object", "called Car"): 1,
    }
    assert counted(gt, rows(one(score=0.9), one(score=0.2))) == counted(
        gt, one(score=0.9)
    )  # below the score nothing is there
    assert counted(gt, one(x=10, z=21.5, score=0.9))[("Car", "box", "other class")] == 1  # poorly over a van
    assert counted(gt, one(score=0.9, box=(100, 100, 200, 120))) == {
        ("Pedestrian", "object", "unseen"): 1
    }  # too small to count, so its car leaves too
    assert (
        counted(one(), rows(one(score=0.9), one(z=21.5, score=0.8)))[("Car", "box", "poorly placed")] == 1
    )  # IoU 0.45
    assert counted(one(), rows(one(score=0.9), one(z=20.4, score=0.8)))[("Car", "box", "duplicate")] == 1  # IoU 0.82
    assert (
        counted(rows(one(), one(z=23.0)), one(score=0.9))[("Car", "object", "unseen")] == 1
    )  # the box that touches it is another's
    two = counted(
        rows(one(), one("Pedestrian", z=22.5)), rows(one(score=0.9), one(z=21.8, score=0.8))
    )  # touches both, the pedestrian more
    assert (
        two[("Car", "box", "other class")] == two[("Pedestrian", "object", "called Car")] == 1
        and ("Car", "box", "poorly placed") not in two
    )
    far = dict(distance=(15, 30))
    assert ("Car", "box", "background") not in counted(gt, rows(one(score=0.9), one(x=50, z=40, score=0.9)), **far)
    assert counted(gt, one(score=0.9), near=0.1, metric="BEV", iou=LOOSE)[("Car", "object", "found")] == 1
    with pytest.raises(ValueError, match="Tram"):
        confusion([gt], [nothing()], classes=("Tram",))


@pytest.mark.parametrize("metric", ["2D", "BEV", "3D"])
def test_confusion_adds_up(metric):
    labels, detections = crowded(3)
    o = overlaps(labels, detections)
    found = confusion(labels, detections, score=0.3, metric=metric)
    for cls in ("Car", "Pedestrian", "Cyclist"):
        n = {(r["of"], r["outcome"]): r["n"] for _, r in found[found["class"] == cls].iterrows()}
        c = Contest(o, cls, metric, STRICT[cls][metric], "hard")
        g, d = c.matches(np.array([0.3]))
        d = d[:, 0]
        left = ((c.gs[g] == 0) & (d >= 0) & (c.ds[d] == 1)).sum()  # taken by a box too small to count
        assert sum(v for (of, _), v in n.items() if of == "object") == (c.gs == 0).sum() - left
        ignored = set(d[(d >= 0) & (c.gs[g] == 1)])
        assert sum(v for (of, _), v in n.items() if of == "box") == sum(
            s >= 0.3 and part == 0 and i not in ignored and (b or i in set(d))
            for i, (s, part, b) in enumerate(zip(o.det.scores, c.ds, c.blamed, strict=True))
        )
        assert n["object", "found"] == n["box", "right"] > 0
    assert confusion_table(found).shape == (3, 6) and confusion_table(found, "box").shape == (3, 5)
    assert confusion([], [])["n"].sum() == 0


# ---- damage -------------------------------------------------------------------------------------------------------

ROW = "Car 0.00 0 0.10 100.00 100.00 200.00 150.00 1.50 2.00 4.00 0.00 1.60 20.00 0.00"


@pytest.fixture
def folders(tmp_path):
    for i in range(3):
        for kind, row in (("label_2", ROW), ("det", ROW + " 0.9")):
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / kind / f"{i:06d}.txt").write_text(row + "\n")
    return tmp_path / "label_2", tmp_path / "det"


def test_missing_and_foreign_files_are_named(folders, capsys):
    labels, det = folders
    (det / "000001.txt").unlink()
    every = ["000000", "000001", "000002"]
    with pytest.raises(FileNotFoundError, match=r"det/000001\.txt.*1 of 3"):
        evaluate_folders(labels, det, ids=every)
    assert precision_recall(*read_folders(labels, det, ids=every, allow_missing=True)).n_gt == 3
    assert precision_recall(*read_folders(labels, det, allow_missing=True)).n_gt == 3 and not capsys.readouterr().err
    assert (
        precision_recall(*read_folders(labels, det)).n_gt == 2
    )  # the devkit's rule: frames that have a detection file
    assert "2 frames are evaluated" in (err := capsys.readouterr().err) and "000001.txt" in err
    assert (
        precision_recall(*read_folders(labels, det, ids=["000000", "000002"])).n_gt == 2 and not capsys.readouterr().err
    )
    with pytest.raises(FileNotFoundError, match="000009"):
        evaluate_folders(labels, det, ids=["000009"], allow_missing=True)
    with pytest.raises(ValueError, match="000002 is named more than once"):
        evaluate_folders(labels, det, ids=["000000", "000002", "000002"])
    with pytest.raises(ValueError, match="ids is empty"):
        evaluate_folders(labels, det, ids=[])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluate_folders(labels, det.parent / "nowhere")
    (det / "000009.txt").write_text(ROW + " 0.5\n")
    with pytest.raises(ValueError, match=r"det/000009\.txt: no label file.*1 of 3"):
        evaluate_folders(labels, det)
    (det.parent / "empty").mkdir()
    with pytest.raises(ValueError, match="no label files"):
        evaluate_folders(det.parent / "empty", det)
    with pytest.raises(FileNotFoundError, match="empty: no detection files"):
        evaluate_folders(labels, det.parent / "empty")


def test_empty_files_and_classes_are_zero_or_a_dash(folders):
    labels, det = folders
    for p in det.iterdir():
        p.write_text("")
    results = evaluate_folders(labels, det)
    assert {(r["class"], r["value"]) for _, r in results.iterrows()} == {
        ("Car", 0.0),
        ("Pedestrian", None),
        ("Cyclist", None),
    }
    for p in det.iterdir():
        p.write_text(ROW + " 0.9\n")
    (labels / "000001.txt").write_text("\n")  # a picture without labels: its box is false
    assert values(evaluate_folders(labels, det), "Car", "3D") == pytest.approx([100 * (2 / 3) / 40] * 3)
    for p in labels.iterdir():
        p.write_text("")
    assert set(evaluate_folders(labels, det)["value"]) == {None}


@pytest.mark.parametrize(
    "kind, row, message",
    [
        ("det", ROW + " nan", r"det/000001\.txt line 3: score is nan"),
        ("det", ROW.replace("20.00", "inf") + " 0.9", r"det/000001\.txt line 3: z is inf"),
        (
            "det",
            ROW.replace("2.00", "-2.00") + " 0.9",
            r"det/000001\.txt line 3: size is 1.5 -2 4, it must be positive",
        ),
        ("det", ROW.replace("4.00", "0.00") + " 0.9", r"det/000001\.txt line 3: size is 1.5 2 0"),
        ("det", ROW, r"det/000001\.txt line 3: 15 columns"),
        ("det", ROW + " 0.9 1", r"det/000001\.txt line 3: 17 columns"),
        ("det", "Cra" + ROW[3:] + " 0.9", r"det/000001\.txt line 3: 'Cra' is no class of KITTI"),
        ("label_2", "Boat" + ROW[3:], r"label_2/000001\.txt line 3: 'Boat' is no class"),
        ("label_2", ROW.replace("0.10", "nan"), r"label_2/000001\.txt line 3: alpha is nan"),
        ("label_2", ROW.replace("1.50", "0.00"), r"label_2/000001\.txt line 3: size is 0 2 4"),
        ("label_2", ROW.replace("1.50", "tall"), r"label_2/000001\.txt.*tall"),
    ],
)
def test_damaged_rows_are_named_by_file_and_line(folders, kind, row, message):
    good = ROW + (" 0.9" if kind == "det" else "")
    (folders[0].parent / kind / "000001.txt").write_text(good + "\n\n" + row + "\n")
    with pytest.raises(ValueError, match=message):
        evaluate_folders(*folders)


def test_bad_arguments_are_named(folders):
    gt = [read_label(p) for p in sorted(folders[0].iterdir())]
    det = [read_detections(folders[1], f"{i:06d}") for i in range(3)]
    with pytest.raises(ValueError, match="3 label tables, 2 detection tables"):
        evaluate(gt, det[:2])
    with pytest.raises(ValueError, match="without scores"):
        evaluate(gt, gt)
    with pytest.raises(ValueError, match="Tram"):
        evaluate(gt, det, classes=("Car", "Tram"))
    with pytest.raises(ValueError, match="R12"):
        average_precision(np.zeros(41), "R12")
    broken = Objects(
        *(getattr(det[1], f.name) if f.name != "locations" else np.full((1, 3), np.nan) for f in fields(Objects))
    )
    with pytest.raises(ValueError, match=r"detections\[1\] row 0: location is nan"):
        evaluate(gt, [det[0], broken, det[2]])


def test_dontcare_rows_need_no_size(folders):
    for p in folders[0].iterdir():
        p.write_text(p.read_text() + "DontCare -1 -1 -10 503.89 169.71 590.61 190.13 -1 -1 -1 -1000 -1000 -1000 -10\n")
    assert evaluate_folders(*folders)["value"][0] > 0


# ---- real labels and speed ----------------------------------------------------------------------------------------


def test_real_labels_against_themselves(shared):
    folder = shared / "data/kitti/training/label_2"
    labels = [read_label(p) for p in sorted(folder.iterdir())]
    results = evaluate(
        labels * 60, [as_detections(o) for o in labels] * 60
    )  # KITTI's 41 samples need many objects to fill
    known = [v for v in results["value"] if v is not None]
    assert known and min(known) > 99.9


@pytest.fixture(scope="module")
def val(shared):
    "Labels of KITTI's 3,769 val frames."
    archive = shared / "data/kitti_labels_calib_7481.tar.gz"
    if not archive.exists():
        pytest.skip(f"no {archive.name} in the data folder: the labels of all 7,481 frames")
    ids = set((shared / "data/splits/val.txt").read_text().split())
    with tarfile.open(archive) as t:
        texts = {
            name[-10:-4]: t.extractfile(m).read().decode()
            for m in t
            if (name := m.name).endswith(".txt") and "label_2" in name and name[-10:-4] in ids
        }
    kinds = (str, *[float] * 14)

    def parse(text):
        columns = [
            np.array(c, k)
            for c, k in zip(zip(*(line.split() for line in text.splitlines()), strict=True), kinds, strict=True)
        ] or [np.zeros(0, k) for k in kinds]
        stack = lambda i, j: np.column_stack(columns[i:j])
        return Objects(
            columns[0],
            columns[1],
            columns[2].astype(int),
            columns[3],
            stack(4, 8),
            stack(8, 11),
            stack(11, 14),
            columns[14],
        )

    return [parse(texts[i]) for i in sorted(texts)]


def test_full_val_agrees_with_cpp_and_is_fast(val, golden):
    "144 numbers of a C++ program that follows the devkit with boost's polygons, on `bench_detections` of val."
    cpp = json.loads((golden / "evaluate_val.json").read_text())
    detections = bench_detections(val)
    text = hashlib.sha256(
        "".join(
            f"{n} {a:.2f} {s:.4f} {z:.2f}\n"
            for o in detections
            for n, a, s, z in zip(o.names, o.alpha, o.scores, o.locations[:, 2], strict=True)
        ).encode()
    ).hexdigest()
    if text != cpp["detections"]:
        pytest.skip("this numpy draws other numbers, so these are other detections")
    start = time.process_time()
    results = evaluate(val, detections)
    spent = time.process_time() - start
    assert len(val) == 3769 and sum(map(len, detections)) == 39075 and spent < 8
    ours = {
        "/".join(map(str, (r["class"], r["metric"], r["recall"], r["strict"], r["difficulty"]))): r["value"]
        for _, r in results.iterrows()
    }
    assert ours.keys() == cpp["values"].keys() and max(abs(ours[k] - v) for k, v in cpp["values"].items()) < 1e-6


def test_full_val_against_itself_gives_100(val):
    results = evaluate(val, [replace(o, scores=np.ones(len(o))) for o in val])
    assert results["value"].tolist() == pytest.approx([100] * 144)


# ---- what it costs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["2D", "BEV", "3D"])
def test_the_plain_twin_agrees(metric):
    for labels, detections in (crowded(5), (made := bench_labels(80), bench_detections(made))):
        for cls, iou in (("Car", 0.7), ("Pedestrian", 0.25)):
            c = precision_recall(labels, detections, cls, metric, "hard", iou)
            assert by_the_book(labels, detections, cls, metric, "hard", iou) == pytest.approx(
                (average_precision(c.precision), average_precision(c.precision, "R11")), abs=1e-9
            )


def test_made_up_labels_and_detections_are_fair():
    labels = bench_labels(150)
    detections = bench_detections(labels)
    assert (
        evaluate(labels, [as_detections(o) for o in labels])["value"].notna().all()
    )  # sizes, boxes and classes that KITTI could have
    moderate = values(evaluate(labels, detections), "Car", "3D")[1]
    assert 20 < moderate < 90
    assert all((np.diff(o.scores) <= 0).all() for o in detections) and {n for o in detections for n in o.names} == {
        "Car",
        "Pedestrian",
        "Cyclist",
    }
    assert bench_detections([]) == [] and [len(o) for o in bench_detections([nothing(), nothing()])] == [0, 0]
    with pytest.raises(ValueError, match="frames is 0"):
        bench_labels(0)


def test_a_bench_row_says_what_was_measured():
    frame = evaluator(bench_labels(20), repeats=1)
    assert frame.columns.tolist() == ["part", "variant", "n", "cpu_median", "cpu_least", "cpu_most", "peak_mb", "note"]
    assert (
        (frame["cpu_least"] > 0).all()
        and (frame["peak_mb"] > 10).all()
        and "times ours" in frame["note"].iloc[-1]
        and "20 frames" in frame["note"].iloc[0]
    )
    with pytest.raises(ValueError, match="repeats is 0"):
        measure(lambda: None, 0)


def perfect(n):
    "n cars in plain view, ten metres apart, and the same as detections."
    cars = joined(*(placed(x=10 * i) for i in range(n)))
    return cars, replace(cars, scores=np.linspace(0.9, 0.1, n))


@pytest.mark.parametrize("n", [1, 2, 5, 40, 41, 60])
def test_few_objects_are_said_to_be_few(n):
    "The most that is told is what a perfect detector gets."
    cars, found = perfect(n)
    rows = evaluate([cars], [found], ("Car",), {True: STRICT}, difficulties=("easy",))
    for row in rows.itertuples():
        assert row.objects == n
        most = re.search(r"reach ([0-9.]+) at most", row.why)
        assert f"{row.value:.2f}" == (most[1] if most else "100.00")


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda c: replace(c, boxes2d=np.zeros((len(c), 4))), "none of the 3 Car has a 2D box"),
        (lambda c: replace(c, boxes2d=c.boxes2d * [1, 0, 1, 0] + [0, 0, 0, 30]), "3 at most 40 px high"),
        (lambda c: replace(c, occlusion=np.full(3, 2)), "none of the 3 Car is easy: 3 too much occluded"),
        (lambda c: replace(c, truncation=np.array([0.2, 0.3, 0.4])), "3 too much truncated"),
        (lambda c: replace(c, names=np.array(["Van"] * 3)), "no Car in the labels"),
    ],
)
def test_a_dash_says_why(change, why):
    cars, found = perfect(3)
    rows = evaluate([change(cars)], [found], ("Car",), {True: STRICT}, difficulties=("easy",))
    assert rows.value.isna().all() and rows.why.str.contains(re.escape(why)).all() and not rows.objects.any()
    assert any(why in line for line in reasons(rows))


@pytest.mark.parametrize("whose", ["labels", "detections"])
def test_boxes_without_3d_are_judged_in_2d(whose):
    "Only the numbers that need what is lacking have a dash; one damaged row among whole ones is still an error."
    cars, found = perfect(50)
    flat = lambda t: replace(t, dimensions=np.full((50, 3), -1.0), locations=np.full((50, 3), -1000.0))
    given = (flat(cars), found) if whose == "labels" else (cars, flat(found))
    rows = evaluate([given[0]], [given[1]], ("Car",), {True: STRICT}, difficulties=("easy",))
    values = rows[rows["recall"] == "R40"].set_index("metric").value
    assert values["2D"] == 100 and values["AOS"] == 100 and values["BEV"] is None and values["3D"] is None
    assert f"the {whose} have no 3D boxes" in reasons(rows)[0]
    with pytest.raises(ValueError, match=f"the {whose} have no 3D boxes"):
        evaluate([given[0]], [given[1]], distance=(0, 30))
    sizes = np.array(cars.dimensions, float)
    sizes[7] = -1
    with pytest.raises(ValueError, match="row 7: size is -1"):
        evaluate([replace(cars, dimensions=sizes)], [found])


def test_an_angle_that_is_missing_costs_aos_alone():
    cars, found = perfect(50)
    blind = replace(cars, alpha=np.full(50, -10.0))
    rows = evaluate([blind], [found], ("Car",), {True: STRICT}, difficulties=("easy",))
    values = rows[rows["recall"] == "R40"].set_index("metric").value
    assert values["AOS"] is None and [values[k] for k in ("2D", "BEV", "3D")] == [100, 100, 100]
