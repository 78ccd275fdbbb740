"The embedded world: pure, consistent between its sensors, honest in its labels, resumable on disk."

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from cmkd.boxes import intersection_bev
from cmkd.data.kitti import Kitti, frame_path, read_frame, read_label, to_objects
from cmkd.geometry import lidar_to_img
from cmkd.world.cast import GRASS, LEAF, PAVEMENT, RING, ROAD, ZEBRA, cast, look
from cmkd.world.rays import WorldConfig, picture, rig, sweep
from cmkd.world.render import expose, frame, measure, render
from cmkd.world.scene import scene
from cmkd.world.traffic import KITTI
from cmkd.world.write import STREET, WORLDS, ranges, world, write

CONFIG = WorldConfig()
H, W = CONFIG.height, CONFIG.width
PINHOLE = rig(CONFIG).pinhole


@pytest.fixture(scope="module")
def some() -> list:
    return [
        (s, look(s.surfaces, picture(CONFIG)), look(s.surfaces, sweep(CONFIG)))
        for s in (scene(CONFIG, i) for i in range(30))
    ]


@pytest.fixture(scope="module")
def rendered(some) -> list:
    return [render(s, CONFIG) for s, _, _ in some]


def same(a, b) -> bool:
    columns = ("boxes", "names", "boxes2d", "truncation", "occlusion", "alpha")
    return (
        a.id == b.id
        and np.array_equal(a.views[0].image, b.views[0].image)
        and np.array_equal(a.points, b.points)
        and all(np.array_equal(getattr(a.objects, c), getattr(b.objects, c)) for c in columns)
    )


# --- a frame is a function of (seed, i) ---


def test_a_frame_depends_on_nothing_before_it(rendered):
    for i in (7, 3, 7, 29):
        assert same(frame(WorldConfig(), i), rendered[i])
    np.random.seed(5)
    frame(WorldConfig(seed=3), 7)
    assert same(frame(CONFIG, 7), rendered[7])


def test_seeds_and_numbers_differ(rendered):
    assert not np.array_equal(frame(WorldConfig(seed=1), 0).views[0].image, rendered[0].views[0].image)
    assert len({f.views[0].image.tobytes() for f in rendered}) == len(rendered)


def test_no_draw_changes_the_scene(some):
    "Rendering reads a scene and leaves it as it was."
    s = some[4][0]
    before = [
        a.copy() for a in (s.surfaces.quads, s.surfaces.blobs, s.surfaces.colour, s.shadows.colour, s.objects.boxes)
    ]
    render(s, CONFIG)
    for a, b in zip(
        before, (s.surfaces.quads, s.surfaces.blobs, s.surfaces.colour, s.shadows.colour, s.objects.boxes), strict=True
    ):
        assert np.array_equal(a, b)


def test_the_noise_is_not_a_pattern():
    "Two pictures of one scene with different numbers carry different noise, and points are off by 2 cm."
    s = scene(CONFIG, 0)
    v, l = look(s.surfaces, picture(CONFIG)), look(s.surfaces, sweep(CONFIG))
    a, b = (expose(replace(s, number=n), replace(CONFIG, seed=9), v).astype(float) for n in (1, 1))
    assert np.array_equal(a, b)
    p = measure(s, CONFIG, l)[::20, :3]
    far = np.linalg.norm(p, axis=1)
    rays = sweep(CONFIG).rays / np.linalg.norm(sweep(CONFIG).rays, axis=1, keepdims=True)
    which = (p / far[:, None] @ rays.T).argmax(1)
    true = l.t[which] * np.linalg.norm(sweep(CONFIG).rays[which], axis=1)
    assert 0.017 < (far - true).std() < 0.023 and abs((far - true).mean()) < 0.002


# --- the rays ---


def brute(quads: np.ndarray, blobs: np.ndarray, origin: np.ndarray, d: np.ndarray) -> np.ndarray:  # (Q + E,) t or inf
    "Ray against every surface: two triangles of each quad (Moeller, Trumbore 1997), the quadratic of each ellipsoid."
    out = np.full(len(quads) + len(blobs), np.inf)
    for i, (a, b, c, e) in enumerate(quads):
        for p, q, r in ((a, b, c), (a, c, e)):
            u, v = q - p, r - p
            if np.cross(u, v) @ (p - origin) >= 0:
                continue
            det = u @ np.cross(d, v)
            if abs(det) < 1e-12:
                continue
            s = origin - p
            x, y, t = s @ np.cross(d, v) / det, d @ np.cross(s, u) / det, v @ np.cross(s, u) / det
            if x >= -1e-9 and y >= -1e-9 and x + y <= 1 + 1e-9 and t > 0:
                out[i] = min(out[i], t)
    for i, (c, *axes) in enumerate(blobs):
        M = np.array(axes) / (np.array(axes) ** 2).sum(1, keepdims=True)
        o, f = M @ (origin - c), M @ d
        disc = (o @ f) ** 2 - (f @ f) * (o @ o - 1)
        if disc >= 0 and -(o @ f) > 0:
            out[len(quads) + i] = (-(o @ f) - np.sqrt(disc)) / (f @ f)
    return out


@pytest.mark.parametrize("sensor", (picture, sweep), ids=("picture", "sweep"))
def test_casting_agrees_with_brute_force(some, sensor):
    "Spans find the nearest surface that testing every surface finds; leaves and rings, which have holes, are left out."
    s, scan, r = some[5][0], sensor(CONFIG), np.random.default_rng(0)
    keep = ~np.isin(s.surfaces.material[len(s.surfaces.quads) :], (LEAF, RING))
    n, solid = len(s.surfaces.quads), s.surfaces.blobs[keep]
    surfaces = replace(s.surfaces, blobs=solid, material=np.r_[s.surfaces.material[:n], s.surfaces.material[n:][keep]])
    hits = cast(surfaces, scan)
    nearest = np.full(len(scan.rays), np.inf)
    np.minimum.at(nearest, hits.ray, hits.t)
    rows = r.choice(len(scan.rays), 40, replace=False)
    truth = np.array([brute(surfaces.quads, solid, scan.origin, scan.rays[k].astype(float)).min() for k in rows])
    wrong = ~np.isclose(nearest[rows], truth, rtol=2e-3, atol=2e-3)
    assert wrong.sum() <= 1, (nearest[rows][wrong], truth[wrong])  # one ray may graze an edge


def test_pixels_are_where_the_calibration_says():
    p = picture(CONFIG)
    uv, _ = lidar_to_img((p.origin + 9 * p.rays).astype(float), PINHOLE)
    v, u = np.mgrid[:H, :W]
    assert np.abs(uv - np.stack([u.ravel(), v.ravel()], 1)).max() < 1e-3


# --- two sensors, one scene ---


def agreement(some, change) -> float:
    "Share of object points whose pixel, or a neighbour of it, shows the same object, after `change` of the points."
    match = []
    for _, view, laser in some:
        hit = np.flatnonzero(laser.instance)
        uv, depth = lidar_to_img(change((sweep(CONFIG).rays[hit] * laser.t[hit, None]).astype(float)), PINHOLE)
        u, v = uv.round().astype(int).T
        ok = (depth > 0) & (u >= 1) & (u < W - 1) & (v >= 1) & (v < H - 1)
        image, k = view.instance.reshape(H, W), laser.instance[hit][ok]
        match.append(np.any([image[v[ok] + a, u[ok] + b] == k for a in (-1, 0, 1) for b in (-1, 0, 1)], 0))
    return np.concatenate(match).mean()


def test_points_of_an_object_fall_on_its_pixels(some):
    assert agreement(some, lambda p: p) > 0.97


def test_a_flipped_sign_is_noticed(some):
    assert agreement(some, lambda p: p * [1, -1, 1]) < 0.4
    assert agreement(some, lambda p: p * [1, 1, -1]) < 0.6


def test_depth_agrees(some):
    "Where a point and its pixel show the same object far from its edge, their depths agree."
    off = []
    for _, view, laser in some:
        hit = np.flatnonzero(laser.instance)
        uv, depth = lidar_to_img((sweep(CONFIG).rays[hit] * laser.t[hit, None]).astype(float), PINHOLE)
        u, v = uv.round().astype(int).T
        ok = (u >= 0) & (u < W) & (v >= 0) & (v < H)
        ok[ok] &= view.instance.reshape(H, W)[v[ok], u[ok]] == laser.instance[hit][ok]
        off.append(view.t.reshape(H, W)[v[ok], u[ok]] - depth[ok])
    assert np.quantile(np.abs(np.concatenate(off)), 0.9) < 0.25


# --- labels ---


def local(points: np.ndarray, box: np.ndarray) -> np.ndarray:  # (N, 3) in the box's axes, m
    c, s = np.cos(box[6]), np.sin(box[6])
    d = points[:, :3] - box[:3]
    return np.stack([c * d[:, 0] + s * d[:, 1], c * d[:, 1] - s * d[:, 0], d[:, 2]], 1)


def test_objects_fill_their_boxes_and_stay_inside(some):
    "Every hit of an object lies in its box (to a few cm), a car's near its faces: the shell is met, not the middle."
    near, spans = [], []
    for s, _, laser in some:
        for k in np.unique(laser.instance[laser.instance > 0]) - 1:
            box, hit = s.objects.boxes[k].astype(float), np.flatnonzero(laser.instance == k + 1)
            p = local(sweep(CONFIG).rays[hit] * laser.t[hit, None], box)
            out = np.abs(p) - box[3:6] / 2
            assert out.max() < 0.09, (s.number, s.objects.names[k], out.max(0))
            if s.objects.names[k] == "Car" and len(hit) > 150:
                near += [-out.max(1)]
                spans += [np.ptp(p[:, 2]) / box[5]]
    assert np.quantile(np.concatenate(near), 0.9) < 0.35 and np.median(spans) > 0.7


def test_points_lie_in_labelled_boxes(rendered):
    "A visible car within 20 m holds points; the sweep on disk is the sweep that was cast."
    counts = []
    for f in rendered:
        o = f.objects[
            (f.objects.names == "Car")
            & (f.objects.occlusion == 0)
            & (f.objects.truncation < 0.3)
            & (f.objects.boxes[:, 0] < 20)
        ]
        for box in o.boxes.astype(float):
            counts.append((np.abs(local(f.points, box)) < box[3:6] / 2 + 0.06).all(1).sum())
    assert len(counts) > 10 and min(counts) > 20


def test_boxes2d_hold_the_projected_corners(rendered):
    ring = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
    for f in rendered:
        for box, b2, cut in zip(f.objects.boxes.astype(float), f.objects.boxes2d, f.objects.truncation, strict=True):
            c, s = np.cos(box[6]), np.sin(box[6])
            p = (ring * box[3:6]) @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) + box[:3]
            uv, depth = lidar_to_img(p, PINHOLE)
            if depth.min() < 0.2:
                continue
            full = np.r_[uv.min(0), uv.max(0)]
            want = np.clip(full, 0, [W - 1, H - 1] * 2)
            assert (
                np.abs(b2 - want).max() < 0.2 + 4 / depth.min()
            )  # KITTI's boxes ignore the camera's lean of half a degree
            area = lambda b: (b[2] - b[0]) * (b[3] - b[1])
            assert abs(1 - area(want) / area(full) - cut) < 0.02 + 0.3 / depth.min()


def test_visible_pixels_lie_in_the_2d_box(some, rendered):
    for (s, view, _), f in zip(some, rendered, strict=True):
        for box, b2 in zip(f.objects.boxes, f.objects.boxes2d, strict=True):
            k = np.flatnonzero((s.objects.boxes == box).all(1))[0]
            v, u = np.nonzero(view.instance.reshape(H, W) == k + 1)
            assert u.min() > b2[0] - 2 and u.max() < b2[2] + 2 and v.min() > b2[1] - 2 and v.max() < b2[3] + 2


def test_occlusion_counts_pixels():
    "Alone, an object is visible; behind something that hides it wholly it is not labelled."
    s = next(
        s
        for s in (scene(CONFIG, i) for i in range(60))
        if len(s.objects) and (render(s, CONFIG).objects.occlusion == 2).any()
    )
    view, labels = look(s.surfaces, picture(CONFIG)), render(s, CONFIG).objects
    for k, box in enumerate(s.objects.boxes):
        share = (view.instance == k + 1).sum() / max(view.outline[k + 1], 1)
        row = np.flatnonzero((labels.boxes == box).all(1))
        if len(row):
            assert labels.occlusion[row[0]] == (0 if share > 0.92 else 1 if share > 0.42 else 2)
        assert len(row) == 0 or share > 0.03


def test_objects_stand_on_the_ground_and_apart(some):
    for s, _, _ in some:
        b = s.objects.boxes.astype(float)
        assert np.allclose(b[:, 2] - b[:, 5] / 2, s.ground.height(b[:, 0], b[:, 1]), atol=1e-4)
        if len(b) > 1:
            t = torch.tensor(b)
            over = intersection_bev(
                *(t[list(i)] for i in zip(*[(i, j) for i in range(len(b)) for j in range(i)], strict=True))
            )
            assert over.max() < 1e-6


def test_the_ground_under_an_object_is_seen_where_it_stands(some):
    "Road and pavement pixels lie on the ground's height: contact points are true."
    for s, view, _ in some:
        flat = np.flatnonzero(
            np.isin(s.surfaces.material[view.surface], (ROAD, PAVEMENT, GRASS, ZEBRA))
            & (view.surface >= 0)
            & (view.t < 40)
        )
        p = picture(CONFIG).rays[flat] * view.t[flat, None] + picture(CONFIG).origin
        assert np.quantile(np.abs(p[:, 2] - s.ground.height(p[:, 0], p[:, 1])), 0.99) < 0.02


def test_the_foot_alone_does_not_give_depth(some):
    "On a flat road a level camera reads depth off the row of the foot. Here one row means depths more than 10 % apart."
    ratio = []
    for s, _, _ in some:
        b = s.objects.boxes.astype(float)
        if not len(b):
            continue
        uv, depth = lidar_to_img(b[:, :3] - b[:, 5:6] / 2 * [0, 0, 1], PINHOLE)
        level = 185.9 * 1.65 / (uv[:, 1] - rig(CONFIG).P2[1, 2])
        ratio += list((level / depth)[depth > 12])
    assert np.std(np.log(np.clip(ratio, 0.1, 10))) > 0.1


# --- on disk ---


def test_frames_survive_kitti_files(tmp_path, rendered):
    write(tmp_path, CONFIG, {"train": range(6), "val": range(6, 9)}, progress=False)
    for i in range(6):
        f, g = rendered[i], read_frame(tmp_path, f"{i:06d}")
        assert np.array_equal(f.views[0].image, g.views[0].image) and np.array_equal(f.points, g.points)
        assert np.allclose(f.views[0].lidar_to_img, g.views[0].lidar_to_img)
        a, b = to_objects(f.objects, PINHOLE, (H, W)), read_label(frame_path(tmp_path, "label_2", f"{i:06d}"))
        assert a.names.tolist() == b.names.tolist() and np.array_equal(a.occlusion, b.occlusion)
        for c in ("truncation", "alpha", "boxes2d", "dimensions", "locations", "rotation_y"):
            assert np.abs(getattr(a, c) - getattr(b, c)).max(initial=0) < 0.006
        if len(f.objects):
            assert np.abs(f.objects.boxes[:, :6] - g.objects.boxes[:, :6]).max() < 0.012
    assert Kitti(tmp_path, "val").ids == ("000006", "000007", "000008")


def test_labels_are_in_kittis_ranges(rendered):
    for f in rendered:
        o = to_objects(f.objects, PINHOLE, (H, W))
        assert set(o.names) <= {"Car", "Van", "Pedestrian", "Cyclist"} and set(o.occlusion) <= {0, 1, 2}
        assert (
            (o.truncation >= 0) & (o.truncation <= 1) & (np.abs(o.alpha) <= np.pi) & (np.abs(o.rotation_y) <= np.pi)
        ).all()
        b = o.boxes2d
        assert (
            (b[:, 0] >= 0) & (b[:, 1] >= 0) & (b[:, 2] <= W - 1) & (b[:, 3] <= H - 1) & (b[:, 3] - b[:, 1] >= 4)
        ).all()


def files(folder) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path):
    write(tmp_path / "a", CONFIG, {"train": 4, "val": 2}, progress=False)
    write(tmp_path / "b", CONFIG, {"train": 4}, progress=False)
    frame_path(tmp_path / "b", "velodyne", "000002").unlink()  # half a frame
    kept = frame_path(tmp_path / "b", "image_2", "000001")
    stamp = kept.stat().st_mtime_ns
    write(tmp_path / "b", CONFIG, {"train": 4, "val": 2}, progress=False)
    assert kept.stat().st_mtime_ns == stamp and files(tmp_path / "a") == files(tmp_path / "b")


def test_two_processes_write_the_same_bits(tmp_path):
    write(tmp_path / "a", CONFIG, {"train": 20}, progress=False)
    write(tmp_path / "b", CONFIG, {"train": 20}, progress=False, workers=2)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_another_world_is_refused(tmp_path):
    write(tmp_path, CONFIG, {"train": 1}, progress=False)
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*seed.*another folder"):
        write(tmp_path, replace(CONFIG, seed=1), {"train": 1}, progress=False)
    mark = json.loads((tmp_path / "world.json").read_text())
    (tmp_path / "world.json").write_text(json.dumps(mark | {"version": 0}))
    with pytest.raises(ValueError, match="version"):
        write(tmp_path, CONFIG, {"train": 1}, progress=False)
    (tmp_path / "world.json").unlink()  # data of unknown origin, perhaps KITTI itself
    with pytest.raises(ValueError, match="no world.json"):
        write(tmp_path, CONFIG, {"train": 1}, progress=False)


def test_a_second_street_has_a_folder_of_its_own(tmp_path, monkeypatch):
    "The seed is in world.json, and in the name of the folder where it is not the usual one."
    import cmkd.world.write as room

    monkeypatch.setattr(room, "root", lambda: tmp_path)
    monkeypatch.setitem(WORLDS, "smoke", dict(train=1, val=1))
    usual, other = world("smoke", progress=False), world("smoke", progress=False, seed=7)
    assert (usual.name, other.name) == ("world-smoke", "world-smoke-7") and STREET.seed == 1
    assert [json.loads((f / "world.json").read_text())["seed"] for f in (usual, other)] == [1, 7]
    assert files(usual)["training/image_2/000000.png"] != files(other)["training/image_2/000000.png"]


def test_splits():
    assert ranges({"train": 3, "val": range(9, 11), "more": 2}) == {
        "train": range(3),
        "val": range(9, 11),
        "more": range(11, 13),
    }
    for bad in (0, range(0), range(-1, 2)):
        with pytest.raises(ValueError, match="split train"):
            ranges({"train": bad})


@pytest.mark.parametrize("change", (dict(beams=65), dict(width=10), dict(balance=-1), dict(max_distance=500)))
def test_bad_configs_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        WorldConfig(**change)


@pytest.mark.parametrize(
    "change",
    (
        dict(width=160, height=48, beams=16, azimuths=100),
        dict(width=621, height=188, beams=64),
        dict(balance=0, max_distance=28),
    ),
)
def test_other_sizes(change):
    c = WorldConfig(**change)
    frames = [frame(c, i) for i in range(8)]
    assert all(f.views[0].size == (c.height, c.width) for f in frames) and all(len(f.points) > 500 for f in frames)
    if c.balance == 0:
        assert {n for f in frames for n in f.objects.names} <= {"Car", "Van"}
    assert max(f.objects.boxes[:, 0].max(initial=0) for f in frames) < c.max_distance


# --- the mix ---


def test_the_street_follows_kitti(rendered):
    frames = rendered + [frame(CONFIG, i) for i in range(30, 130)]
    count = lambda name: np.mean([(f.objects.names == name).sum() for f in frames])
    assert 0.75 < count("Car") / (KITTI["Car"].count / 7481) < 1.3
    for name in ("Pedestrian", "Cyclist"):
        assert 1.2 < count(name) / (KITTI[name].count / 7481) < 3
    cars = np.concatenate([f.objects.boxes[f.objects.names == "Car"] for f in frames])
    have = np.histogram(cars[:, 0], 10, (0, 50))[0] / len(cars)
    assert np.abs(np.cumsum(have) - np.cumsum(KITTI["Car"].distance)).max() < 0.12
    assert np.abs(cars[:, 3:6].mean(0) - KITTI["Car"].size).max() < 0.1


def test_the_table_is_what_the_label_files_say(shared):
    rows = {name: [] for name in KITTI}
    per = {name: [] for name in KITTI}
    with tarfile.open(shared / "data" / "kitti_labels_calib_7481.tar.gz") as tar:
        for member in tar:
            if "label_2" not in member.name or not member.isfile():
                continue
            found = [line.split() for line in io.TextIOWrapper(tar.extractfile(member))]
            for name in KITTI:
                mine = [list(map(float, w[1:])) for w in found if w[0] == name]
                mine = [m for m in mine if 0 < m[12] < 50]
                rows[name] += mine
                per[name].append(len(mine))
    for name, s in KITTI.items():
        a, n = np.array(rows[name]), np.array(per[name])
        assert len(n) == 7481 and len(a) == s.count

        def agree(have, values, bins, low, high):
            h = np.histogram(np.clip(values, low + 1e-6, high - 1e-6), bins, (low, high))[0]
            assert np.abs(h / h.sum() - have).max() < 6e-4

        agree(s.frames, n, 13, -0.5, 12.5)
        agree(s.distance, a[:, 12], 10, 0, 50)
        agree(s.lateral, a[:, 10], 14, -14, 14)
        agree(s.alpha, a[:, 2], 12, -np.pi, np.pi)
        agree(s.turn, a[:, 13], 12, -np.pi, np.pi)
        agree(s.occlusion, a[:, 1], 4, -0.5, 3.5)
        agree(s.pixels, a[:, 6] - a[:, 4], 10, 0, 200)
        assert np.allclose(a[:, [9, 8, 7]].mean(0), s.size, atol=0.006) and np.allclose(
            a[:, [9, 8, 7]].std(0), s.spread, atol=0.006
        )
