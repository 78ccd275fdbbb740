"KITTI AP against both reference evaluators, against a literal per-frame loop, and against damaged input."
import json
import math
import tarfile
from dataclasses import fields

import numpy as np
import pytest

from cmkd.data.kitti import Objects, read_detections, read_label
from cmkd.evaluate.kitti import (_Contest, _curve, average_precision, evaluate, evaluate_folders, interval, overlaps,
                                 precision_recall, table)

DIFFICULTIES = ("easy", "moderate", "hard")


@pytest.fixture(scope="module")
def reference(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("m_eval")
    with tarfile.open(golden/"m_eval_A.tar.gz") as t: t.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def frames(reference):
    ids = sorted(p.stem for p in (reference/"label_2").iterdir())
    return [read_label(reference/f"label_2/{i}.txt") for i in ids], [read_detections(reference/"det", i) for i in ids]


def values(results, cls, metric, recall="R40", strict=True):
    rows = results[(results["class"] == cls) & (results["metric"] == metric) & (results["recall"] == recall) & (results["strict"] == strict)]
    assert rows["difficulty"].tolist() == list(DIFFICULTIES)
    return rows["value"].tolist()


# ---- the reference evaluators -------------------------------------------------------------------------------------

def test_agrees_with_the_cpp_devkit(reference):
    results = evaluate_folders(reference/"label_2", reference/"det")
    cpp = json.loads((reference/"cpp.json").read_text())
    names = {"2D": "detection", "AOS": "orientation", "BEV": "detection_ground", "3D": "detection_3d"}
    worst = 0
    for recall in ("R11", "R40"):
        for cls in ("Car", "Pedestrian", "Cyclist"):
            for metric, name in names.items():
                ours = np.array(values(results, cls, metric, recall), float)
                worst = max(worst, np.abs(ours - cpp[recall][f"{cls.lower()}_{name}"]).max())
    assert worst < 1e-4


def test_agrees_with_the_python_evaluator_strict_and_loose(reference):
    results, lines = evaluate_folders(reference/"label_2", reference/"det"), (reference/"python_result.txt").read_text().splitlines()
    checked = 0
    for head, *rows in (lines[i:i+5] for i in range(0, len(lines), 5)):
        cls, recall = head.split()[0], "R40" if "R40" in head else "R11"
        strict = head.split("@")[1].split(",")[1].strip() == ("0.70" if cls == "Car" else "0.50")
        for row in rows:
            name, numbers = row.split(" AP:") if " AP:" in row else row.split("AP:")
            metric = {"bbox": "2D", "bev": "BEV", "3d": "3D", "aos": "AOS"}[name.strip()]
            expected = [float(v) for v in numbers.split(",")]
            assert np.abs(np.array(values(results, cls, metric, recall, strict), float) - expected).max() < (.0051 if metric == "AOS" else 1e-3), head + row
            checked += 1
    assert checked == 48


# ---- a literal evaluator, one frame and one ground truth at a time ------------------------------------------------

def area(poly): return sum(p[0]*q[1] - q[0]*p[1] for p, q in zip(poly, poly[1:] + poly[:1]))/2


def footprint(o, i):
    (h, w, l), (x, y, z), r = o.dimensions[i], o.locations[i], o.rotation_y[i]
    ring = [(math.cos(r)*a + math.sin(r)*b + x, -math.sin(r)*a + math.cos(r)*b + z)
            for a, b in ((l/2, w/2), (-l/2, w/2), (-l/2, -w/2), (l/2, -w/2))]
    return ring if area(ring) > 0 else ring[::-1]


def shared_area(p, q):
    for (ax, ay), (bx, by) in zip(q, q[1:] + q[:1]):
        side = [(bx - ax)*(y - ay) - (by - ay)*(x - ax) for x, y in p]
        out = []
        for i in range(len(p)):
            j = (i + 1) % len(p)
            if side[i] >= 0: out.append(p[i])
            if side[i]*side[j] < 0: s = side[i]/(side[i] - side[j]); out.append((p[i][0] + s*(p[j][0] - p[i][0]), p[i][1] + s*(p[j][1] - p[i][1])))
        p = out
    return max(area(p), 0)


def overlap(a, i, b, j, metric, over_first=False):
    "IoU of row i of a with row j of b."
    if metric == "2D":
        p, q = a.boxes2d[i], b.boxes2d[j]
        w, h = min(p[2], q[2]) - max(p[0], q[0]), min(p[3], q[3]) - max(p[1], q[1])
        if w <= 0 or h <= 0: return 0
        first, second = ((r[2] - r[0])*(r[3] - r[1]) for r in (p, q))
        return w*h/(first if over_first else first + second - w*h)
    inter = shared_area(footprint(a, i), footprint(b, j))
    (ha, wa, la), (hb, wb, lb) = a.dimensions[i], b.dimensions[j]
    if metric == "BEV": return inter/(la*wa + lb*wb - inter)
    ya, yb = a.locations[i, 1], b.locations[j, 1]
    inter *= max(0, min(ya, yb) - max(ya - ha, yb - hb))
    return inter/(ha*la*wa + hb*lb*wb - inter)


def literal(labels, detections, cls, metric, iou, difficulty):
    "(AP R40, AP R11, AOS R40), or None without ground truth."
    k = DIFFICULTIES.index(difficulty)
    low, occ, cut = (40, 25, 25)[k], (0, 1, 2)[k], (.15, .3, .5)[k]
    jobs = []
    for gt, det in zip(labels, detections):
        gs, ds = [], []
        for n, b, o, t in zip(gt.names, gt.boxes2d, gt.occlusion, gt.truncation):
            bad = o > occ or t > cut or b[3] - b[1] <= low
            same, alike = n == cls, n == {"Car": "Van", "Pedestrian": "Person_sitting"}.get(cls)
            gs.append(0 if same and not bad else 1 if same or alike else -1)
        for n, b in zip(det.names, det.boxes2d): ds.append(1 if abs(b[3] - b[1]) < low else 0 if n == cls else -1)
        table = {(i, j): overlap(gt, i, det, j, metric) for i in range(len(gt)) if gs[i] >= 0 for j in range(len(det)) if ds[j] >= 0}
        dc = [i for i in range(len(gt)) if gt.names[i] == "DontCare"] if metric == "2D" else []
        stuff = [any(overlap(det, j, gt, i, "2D", over_first=True) > iou for i in dc) for j in range(len(det))]
        jobs.append((gt, det, gs, ds, table, stuff))
    n_gt = sum(gs.count(0) for _, _, gs, *_ in jobs)
    if n_gt == 0: return None
    found = []
    for gt, det, gs, ds, table, _ in jobs:
        used = set()
        for i, a in enumerate(gs):
            best, score = None, -1e7
            for j, b in enumerate(ds):
                if a >= 0 and b >= 0 and j not in used and table[i, j] > iou and det.scores[j] > score: best, score = j, det.scores[j]
            if best is None: continue
            used.add(best)
            if a == 0 and ds[best] == 0: found.append(score)
    found.sort(reverse=True)
    thresholds, current = [], 0.
    for i, s in enumerate(found):
        left = (i + 1)/n_gt
        right = (i + 2)/n_gt if i < len(found) - 1 else left
        if right - current < current - left and i < len(found) - 1: continue
        thresholds.append(s); current += 1/40
    precision, similarity = [0.]*41, [0.]*41
    for t, threshold in enumerate(thresholds):
        tp = fp = 0; like = 0.
        for gt, det, gs, ds, table, stuff in jobs:
            used = set()
            there = [b >= 0 and s >= threshold for b, s in zip(ds, det.scores)]
            for i, a in enumerate(gs):
                if a < 0: continue
                best, most, second_rate = None, 0., False
                for j, b in enumerate(ds):
                    if not there[j] or j in used or not table[i, j] > iou: continue
                    if b == 0 and (table[i, j] > most or second_rate): best, most, second_rate = j, table[i, j], False
                    elif b == 1 and best is None: best, second_rate = j, True
                if best is None: continue
                used.add(best)
                if a == 0 and ds[best] == 0: tp += 1; like += (1 + math.cos(gt.alpha[i] - det.alpha[best]))/2
            fp += sum(there[j] and ds[j] == 0 and j not in used and not stuff[j] for j in range(len(ds)))
        if tp + fp: precision[t], similarity[t] = tp/(tp + fp), like/(tp + fp)
    precision, similarity = ([max(v[i:]) for i in range(41)] for v in (precision, similarity))
    return 100*sum(precision[1:])/40, 100*sum(precision[::4])/11, 100*sum(similarity[1:])/40


def crowded(seed, frames=120):
    "Frames in which boxes crowd, scores tie, boxes repeat, sizes straddle the minimum heights and classes mix."
    g = np.random.default_rng(seed)
    labels, detections = [], []
    for _ in range(frames):
        n = int(g.integers(0, 9))
        spot = g.uniform(size=(n, 2))*[6, 8] + [-3, 20]
        height = g.choice([20., 25., 26., 39.5, 40., 41., 80.], n)
        u = g.integers(100, 160, n).astype(float)
        names = g.choice(["Car", "Car", "Van", "Pedestrian", "Pedestrian", "Person_sitting", "Cyclist", "DontCare", "Truck"], n)
        size = np.column_stack([g.uniform(1.4, 1.8, n), g.uniform(1.2, 1.8, n), g.uniform(1.5, 4, n)])
        gt = Objects(names, g.choice([0., .15, .2, .3, .5, .6], n), g.integers(0, 4, n), g.uniform(-3, 3, n),
                     np.column_stack([u, np.full(n, 100.), u + 60, 100 + height]), size,
                     np.column_stack([spot[:, 0], g.uniform(1.5, 1.8, n), spot[:, 1]]), g.uniform(-3, 3, n))
        k = g.integers(0, max(n, 1), int(g.integers(0, 14)) if n else 0)
        m = len(k)
        jitter = np.where(g.uniform(size=(m, 1)) < .3, 0, g.normal(size=(m, 3))*[.25, .05, .3])
        shift = g.choice([0., 0, 2, -3, 8], (m, 1))
        det = Objects(np.where(np.isin(names[k], ["Car", "Pedestrian", "Cyclist"]) & (g.uniform(size=m) < .85), names[k], g.choice(["Car", "Pedestrian", "Cyclist"], m)),
                      -np.ones(m), -np.ones(m, int), gt.alpha[k] + g.normal(size=m), gt.boxes2d[k] + shift*[1, 0, 1, g.choice([0, 1])],
                      gt.dimensions[k]*g.choice([1, 1.1], (m, 1)), gt.locations[k] + jitter, gt.rotation_y[k] + g.choice([0, .1, 3.14], m),
                      g.integers(1, 20, m)/20)
        dc = np.flatnonzero(gt.names == "DontCare")
        gt.dimensions[dc], gt.locations[dc] = -1, -1000
        det = det[det.dimensions[:, 0] > 0]
        labels.append(gt); detections.append(det)
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
                iou = (.5 if loose else .7) if cls == "Car" else (.25 if loose else .5)
                for k, difficulty in enumerate(DIFFICULTIES):
                    expected = literal(labels, detections, cls, metric, iou, difficulty)
                    ours = [values(results, cls, metric, "R40", strict)[k], values(results, cls, metric, "R11", strict)[k]]
                    if expected is None: assert ours == [None, None]; continue
                    assert ours == pytest.approx(expected[:2], abs=1e-9), (cls, metric, iou, difficulty)
                    if metric == "2D": assert values(results, cls, "AOS", "R40", strict)[k] == pytest.approx(expected[2], abs=1e-9)
                    seen.add(round(expected[0], 6))
    assert len(seen) > 20                                  # the check has teeth: many different numbers


# ---- properties ---------------------------------------------------------------------------------------------------

def as_detections(o):
    o = o[o.names != "DontCare"]
    return Objects(*(getattr(o, f.name) for f in fields(Objects)[:-1]), np.ones(len(o)))


def nothing(): return Objects(*(v[:0] for v in (np.array(["a"]), *np.zeros((3, 1)), np.zeros((1, 4)), *np.zeros((2, 1, 3)), np.zeros(1))), np.zeros(0))


def test_ground_truth_against_itself_is_perfect(frames):
    labels, _ = frames
    results = evaluate(labels, [as_detections(o) for o in labels])
    full = results[results["class"].isin(["Car", "Pedestrian"]) & (results["difficulty"] != "easy")]
    assert len(full) == 64 and full["value"].astype(float).tolist() == pytest.approx([100]*64)


def test_no_detections_is_zero_and_no_ground_truth_is_none(frames):
    labels, detections = frames
    zero = evaluate(labels, [nothing() for _ in labels])
    assert zero["value"].tolist() == [0]*len(zero)
    dash = evaluate([o[o.names == "Cyclist"] for o in labels], detections)
    assert all(v is None for v in dash[dash["class"] != "Cyclist"]["value"]) and all(v is not None for v in dash[dash["class"] == "Cyclist"]["value"])
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
    shrink = lambda o: Objects(*(getattr(o, f.name)*.25 if f.name == "boxes2d" else getattr(o, f.name) for f in fields(Objects)))
    small = evaluate([shrink(o) for o in labels], [shrink(o) for o in detections], height_scale=.25)["value"].astype(float)
    np.testing.assert_allclose(small, evaluate(labels, detections)["value"].astype(float), atol=1e-9)


def test_missing_alpha_leaves_aos_open(frames):
    labels, detections = frames
    blind = [Objects(o.names, o.truncation, o.occlusion, np.full(len(o), -10.), *(getattr(o, f.name) for f in fields(Objects)[4:])) for o in detections]
    results = evaluate(labels, blind)
    assert all(v is None for v in results[results["metric"] == "AOS"]["value"]) and values(results, "Car", "2D") == values(evaluate(labels, detections), "Car", "2D")


def test_weights_are_repeated_frames():
    labels, detections = crowded(7, 15)
    weights = np.random.default_rng(0).integers(0, 4, len(labels))
    repeat = lambda tables: [t for t, w in zip(tables, weights) for _ in range(w)]
    for metric in ("2D", "3D"):
        weighted = _curve(_Contest(overlaps(labels, detections), "Car", metric, .5, "hard", 1., None), weights.astype(float))
        plain = precision_recall(repeat(labels), repeat(detections), "Car", metric, "hard", .5)
        for f in fields(plain): np.testing.assert_allclose(getattr(weighted, f.name), getattr(plain, f.name), atol=1e-12)


def test_interval_holds_the_value(frames):
    labels, detections = frames
    for metric in ("3D", "AOS"):
        low, high = interval(labels, detections, metric=metric, draws=60)
        assert low < values(evaluate(labels, detections), "Car", metric)[1] < high
    assert interval(labels, detections, metric=metric, draws=60) == (low, high)
    assert interval([nothing()], [nothing()]) is None


def test_distance_splits_the_ground_truth(frames):
    labels, detections = frames
    n = [precision_recall(labels, detections, distance=band).n_gt for band in ((0, 15), (15, 30), (30, 1000), None)]
    assert sum(n[:3]) == n[3] and min(n) > 0
    own = [as_detections(o) for o in labels]
    assert precision_recall(labels, own, distance=(15, 30)).precision[0] == 1
    far = [o[o.locations[:, 2] >= 30] for o in own]
    assert precision_recall(labels, far, distance=(15, 30)).precision.max() == 0
    # what lies beyond the band is no false positive within it
    np.testing.assert_allclose(precision_recall(labels, own, distance=(15, 30)).precision,
                               precision_recall(labels, [o[o.locations[:, 2] < 30] for o in own], distance=(15, 30)).precision)


# ---- damage -------------------------------------------------------------------------------------------------------

ROW = "Car 0.00 0 0.10 100.00 100.00 200.00 150.00 1.50 2.00 4.00 0.00 1.60 20.00 0.00"


@pytest.fixture
def folders(tmp_path):
    for i in range(3):
        for kind, row in (("label_2", ROW), ("det", ROW + " 0.9")):
            (tmp_path/kind).mkdir(exist_ok=True); (tmp_path/kind/f"{i:06d}.txt").write_text(row + "\n")
    return tmp_path/"label_2", tmp_path/"det"


def test_missing_files_are_named(folders):
    labels, det = folders
    (det/"000001.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"det/000001\.txt.*1 of 3.*allow_missing"): evaluate_folders(labels, det)
    assert evaluate_folders(labels, det, allow_missing=True)["value"][0] > 0
    assert evaluate_folders(labels, det, ids=["000000", "000002"])["value"][0] > 0
    with pytest.raises(FileNotFoundError, match="000009"): evaluate_folders(labels, det, ids=["000009"], allow_missing=True)
    with pytest.raises(FileNotFoundError, match="nowhere"): evaluate_folders(labels, det.parent/"nowhere")
    (det.parent/"empty").mkdir()
    with pytest.raises(ValueError, match="no label files"): evaluate_folders(det.parent/"empty", det)


@pytest.mark.parametrize("kind, row, message", [
    ("det", ROW + " nan", r"det/000001\.txt line 3: score is nan"),
    ("det", ROW.replace("20.00", "inf") + " 0.9", r"det/000001\.txt line 3: z is inf"),
    ("det", ROW.replace("2.00", "-2.00") + " 0.9", r"det/000001\.txt line 3: size is 1.5 -2 4, it must be positive"),
    ("det", ROW.replace("4.00", "0.00") + " 0.9", r"det/000001\.txt line 3: size is 1.5 2 0"),
    ("det", ROW, r"det/000001\.txt line 3: 15 columns"),
    ("label_2", ROW.replace("1.50", "0.00"), r"label_2/000001\.txt line 3: size is 0 2 4"),
    ("label_2", ROW.replace("1.50", "tall"), r"label_2/000001\.txt.*tall")])
def test_damaged_rows_are_named_by_file_and_line(folders, kind, row, message):
    good = ROW + (" 0.9" if kind == "det" else "")
    (folders[0].parent/kind/"000001.txt").write_text(good + "\n\n" + row + "\n")
    with pytest.raises(ValueError, match=message): evaluate_folders(*folders)


def test_bad_arguments_are_named(folders):
    gt = [read_label(p) for p in sorted(folders[0].iterdir())]; det = [read_detections(folders[1], f"{i:06d}") for i in range(3)]
    with pytest.raises(ValueError, match="3 label tables, 2 detection tables"): evaluate(gt, det[:2])
    with pytest.raises(ValueError, match="without scores"): evaluate(gt, gt)
    with pytest.raises(ValueError, match="Tram"): evaluate(gt, det, classes=("Car", "Tram"))
    with pytest.raises(ValueError, match="R12"): average_precision(np.zeros(41), "R12")
    broken = Objects(*(getattr(det[1], f.name) if f.name != "locations" else np.full((1, 3), np.nan) for f in fields(Objects)))
    with pytest.raises(ValueError, match=r"detections\[1\] row 0: location is nan"): evaluate(gt, [det[0], broken, det[2]])


def test_dontcare_rows_need_no_size(folders):
    for p in folders[0].iterdir(): p.write_text(p.read_text() + "DontCare -1 -1 -10 503.89 169.71 590.61 190.13 -1 -1 -1 -1000 -1000 -1000 -10\n")
    assert evaluate_folders(*folders)["value"][0] > 0


# ---- real labels and speed ----------------------------------------------------------------------------------------

def test_real_labels_against_themselves(shared):
    folder = shared/"data/kitti/training/label_2"
    labels = [read_label(p) for p in sorted(folder.iterdir())]
    results = evaluate(labels*60, [as_detections(o) for o in labels]*60)         # KITTI's 41 samples need many objects to fill
    known = [v for v in results["value"] if v is not None]
    assert known and min(known) > 99.9
