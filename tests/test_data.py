"KITTI in and out, the loader, raw drives, augmentation: against the released code's numbers and on real frames."

import functools
import os
import shutil
import tarfile
import time
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from cmkd.boxes import clipped, points_in_boxes, rectangles
from cmkd.core import Boxes, Frame
from cmkd.data import augment
from cmkd.data.dataset import Joined, Samples, collate, loader, no_overlap, prepare, within
from cmkd.data.doctor import iou_2d
from cmkd.data.facts import Memory, facts, manifest
from cmkd.data.kitti import (
    FILES,
    Calibration,
    Kitti,
    cam_corners,
    frame_path,
    read_calib,
    read_detections,
    read_image,
    read_label,
    read_points,
    read_split,
    submission,
    to_boxes,
    to_objects,
    wrapped,
    write_calib,
    write_detections,
    write_frame,
    write_image,
    write_label,
    write_points,
    write_split,
)
from cmkd.data.kitti_raw import KittiRaw, drive_ids, object_to_raw, read_raw_list, refuse_overlap, split_leaks
from cmkd.data.sets import Data, open_sets
from cmkd.geometry import Grid, depth_map, lidar_to_img
from cmkd.machine import rng
from cmkd.world.rays import WorldConfig
from cmkd.world.write import write as write_world

RIG = Calibration(
    [[185.9, 0, 159.5, 3], [0, 185.9, 47.5, 0.1], [0, 0, 1, 0.003]],
    np.eye(3),
    [[0, -1, 0, 0], [0, 0, -1, -0.08], [1, 0, 0, -0.27]],
)
CLASSES = ("Car", "Pedestrian", "Cyclist")
GRID = Grid((2.0, -12.8, -3.0), (27.6, 12.8, 1.0), (0.16, 0.16, 0.2))


def street(root, n=6):
    "A small healthy KITTI folder: road, one car with points on its rear, n frames."
    a, e = np.meshgrid(np.linspace(-0.8, 0.8, 120), np.linspace(-0.5, -0.06, 24))
    road = np.stack([1.7 / np.tan(-e) * np.cos(a), 1.7 / np.tan(-e) * np.sin(a), 0 * a - 1.7, 0 * a + 0.2], -1).reshape(
        -1, 4
    )
    for i in range(n):
        y, z = np.meshgrid(np.linspace(-0.7, 0.7, 9) + 0.3 * i, np.linspace(-1.5, -0.3, 9))
        rear = np.stack([0 * y + 10.1 + i, y, z, 0 * y + 0.7], -1).reshape(-1, 4)
        boxes = Boxes(
            [[12 + i, 0.3 * i, -0.95, 4, 1.6, 1.5, 0], [40, 0, -0.95, 4, 1.6, 1.5, 1]],
            ["Car", "Van"],
            truncation=[0, 0],
            occlusion=[0, 1],
        )
        image = np.random.default_rng(i).integers(0, 255, (96, 320, 3), dtype=np.uint8)
        write_frame(
            root, Frame(f"{i:06d}", (RIG.view(image),), np.concatenate([rear, road]).astype(np.float32), boxes), RIG
        )
    write_split(root, "train", [f"{i:06d}" for i in range(n - 2)])
    write_split(root, "val", [f"{i:06d}" for i in range(n - 2, n)])
    return root


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return street(tmp_path_factory.mktemp("kitti"), 8)


def released(golden):
    d = np.load(golden / "n_data_ops.npz")
    P2 = d["P2"].astype(float)
    P2[2, 3] = 0  # the released code divides by z_cam
    return d, Calibration(d["P2"], d["R0"], d["V2C"]), Calibration(P2, d["R0"], d["V2C"])


# --- the released code's numbers ---


def test_detections_as_the_released_code_writes_them(golden):
    _, _, rig = released(golden)
    d = np.load(golden / "n_prediction_dict.npz")
    names = np.array(["Car", "Pedestrian", "Cyclist"])[d["labels"] - 1]
    o = to_objects(Boxes(d["pred_boxes"], names, d["scores"]), rig.pinhole, (375, 1242))
    assert np.abs(o.locations - d["out_location"]).max() < 1e-4
    assert np.abs(o.dimensions[:, [2, 0, 1]] - d["out_dimensions"]).max() == 0
    assert np.abs(wrapped(o.rotation_y - d["out_rotation_y"])).max() < 1e-5
    assert np.abs(wrapped(o.alpha - d["out_alpha"])).max() < 1e-5
    assert np.abs(o.boxes2d - d["out_bbox"]).max() < 1e-2


def test_flip_as_the_released_code_does_it(golden):
    d, rig, _ = released(golden)
    for W in (128, 1242):
        M = augment.mirror_matrix(torch.from_numpy(rig.pinhole.lidar_to_cam), torch.from_numpy(rig.P2), W, mirror=0.0)
        points, gt = (augment._moved(torch.from_numpy(d[k]), M).numpy() for k in ("pts", "gt"))
        np.testing.assert_allclose(points, d[f"pts_flip_W{W}"], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(gt[:, :6], d[f"gt_flip_W{W}"][:, :6], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(-gt[:, 6], d[f"gt_flip_W{W}"][:, 6])


# --- KITTI files ---


def test_all_label_and_calib_files_come_back_text_equal(shared, tmp_path):
    path, far, alphas = tmp_path / "x.txt", 0.0, []
    with tarfile.open(shared / "data/kitti_labels_calib_7481.tar.gz") as tar:
        texts = {m.name: tar.extractfile(m).read().decode() for m in tar if m.name.endswith(".txt")}
    labels = sorted(k for k in texts if "label_2" in k)
    assert len(labels) == 7481
    for name in labels[::10]:
        path.write_text(texts[name])
        o = read_label(path)
        write_label(path, o)
        assert path.read_text() == texts[name], name
        path.write_text(texts[name.replace("label_2", "calib")])
        calib = read_calib(path)
        real = o[o.names != "DontCare"]
        boxes = to_boxes(o, calib.pinhole)
        back = to_objects(boxes, calib.pinhole, None)
        far = max(
            far,
            np.abs(back.locations - real.locations).max(initial=0),
            np.abs(wrapped(back.rotation_y - real.rotation_y)).max(initial=0),
        )
        alphas.append(wrapped(to_objects(replace(boxes, alpha=None), calib.pinhole, None).alpha - real.alpha))
    assert far < 1e-3
    assert np.percentile(np.abs(np.concatenate(alphas)), 95) < 0.01  # alpha is measured from the scanner


def test_real_frames_round_trip(shared, tmp_path):
    root = shared / "data/kitti"
    rows = []
    for split, n in (("train", 16), ("val", 6)):
        real = Kitti(root, split)
        assert len(real) == n
        for i in range(n):
            f = real.frame(i)
            assert f.points.dtype == np.float32 and len(f.points) > 1e5
            write_points(tmp_path / "p.bin", f.points)
            assert (tmp_path / "p.bin").read_bytes() == real.path("velodyne", i).read_bytes()
            calib = read_calib(real.path("calib", i))
            write_calib(tmp_path / "c.txt", calib)
            c = read_calib(tmp_path / "c.txt")
            assert all(np.array_equal(getattr(c, k.name), getattr(calib, k.name)) for k in fields(c))
            view = f.views[0]
            assert np.array_equal(calib.P2, view.camera) and np.array_equal(
                calib.pinhole.lidar_to_cam, view.lidar_to_cam
            )
            write_label(tmp_path / "l.txt", real.objects(i))
            assert (tmp_path / "l.txt").read_text() == real.path("label_2", i).read_text()
            near = f.objects[(f.objects.occlusion <= 1) & (f.objects.boxes[:, 0] < 40)]
            inside = points_in_boxes(torch.from_numpy(f.points), torch.from_numpy(near.boxes)).sum(0)
            assert (inside >= 5).all(), (f.id, near.names, inside)  # the geometry is right: cars hold points
            o = real.objects(i)
            o = o[(o.names == "Car") & (o.truncation <= 0)]
            projected = rectangles(torch.from_numpy(cam_corners(o)), torch.from_numpy(calib.P2))
            rows.append(iou_2d(o.boxes2d, clipped(projected, view.size).numpy()))
    iou = np.concatenate(rows)
    assert len(iou) > 50 and np.median(iou) > 0.8, np.median(iou)


def test_a_frame_with_image_round_trips(small, shared, tmp_path):
    f = Kitti(shared / "data/kitti", "val").frame(0)
    write_frame(tmp_path, f)
    write_split(tmp_path, "one", [f.id])
    g = Kitti(tmp_path, "one").frame(0)
    assert (
        np.array_equal(f.views[0].image, g.views[0].image)
        and np.array_equal(f.points, g.points)
        and g.objects.names.tolist() == f.objects.names.tolist()
    )
    assert np.abs(g.objects.boxes - f.objects.boxes).max() < 0.0051


@pytest.mark.parametrize(
    "hurt, says",
    [
        (lambda r: (r / "training/label_2/000000.txt").write_text("Car 0 0 0\n"), "000000.txt line 1: 4 columns"),
        (
            lambda r: (r / "training/label_2/000000.txt").write_text("Car 0 0 inf 1 2 3 4 1 1 1 1 1 1 1\n"),
            "alpha is inf",
        ),
        (
            lambda r: (r / "training/label_2/000000.txt").write_text(
                "Car 0 0 0 1 2 3 4 1 1 1 1 1 1 1\nCar 0 0 x 1 2 3 4 1 1 1 1 1 1 1\n"
            ),
            "000000.txt line 2: alpha is .x., not a number",
        ),
        (lambda r: (r / "training/label_2/000000.txt").write_bytes(b"\xff\xfe\x00Car"), "no UTF-8 text"),
        (lambda r: (r / "training/calib/000000.txt").write_text("P2: 1 2 3\n"), "P2 has 3 numbers"),
        (lambda r: (r / "training/calib/000000.txt").unlink(), "000000.txt: no such file"),
        (lambda r: (r / "training/velodyne/000000.bin").write_bytes(b"0" * 33), "33 bytes"),
        (
            lambda r: (r / "training/velodyne/000000.bin").write_bytes(np.full(8, np.nan, np.float32).tobytes()),
            "point 0 is not finite",
        ),
        (
            lambda r: (r / "training/image_2/000000.png").write_bytes(
                (r / "training/image_2/000000.png").read_bytes()[:900]
            ),
            "000000.png: .*no readable picture",
        ),
        (lambda r: (r / "training/image_2/000000.png").unlink(), "000000.png: no such file"),
        (lambda r: (r / "ImageSets/train.txt").write_text("000000\n000000\n"), "more than once"),
        (lambda r: (r / "ImageSets/train.txt").unlink(), "no such split"),
    ],
)
def test_damage_is_named(tmp_path, hurt, says):
    street(tmp_path, 3)
    hurt(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        Kitti(tmp_path, "train").frame(0)


def test_hidden_labels_are_not_read(small, tmp_path):
    street(tmp_path, 3)
    (tmp_path / "training/label_2/000000.txt").unlink()
    assert Kitti(tmp_path, "train", labelled=False).frame(0).objects is None


def test_empty_label_is_not_no_label(tmp_path):
    street(tmp_path, 3)
    (tmp_path / "training/label_2/000000.txt").write_text("")
    assert len(Kitti(tmp_path, "train").frame(0).objects) == 0
    s = prepare(Kitti(tmp_path, "train").frame(0), CLASSES, grid=GRID)
    assert s.boxes.shape == (0, 7) and collate([augment.flip_sample(s)]).boxes[0].shape == (0, 7)


def test_detections_and_submission(tmp_path):
    boxes = Boxes([[20, 0, -1, 4, 1.6, 1.5, 0.2], [-9, 0, -1, 4, 1.6, 1.5, 0]], ["Car", "Car"], scores=[0.91234, 0.5])
    write_detections(tmp_path / "det", "000000", boxes, RIG.pinhole, (96, 320))
    write_detections(tmp_path / "det", "000001", boxes[:0], RIG.pinhole, (96, 320))
    o = read_detections(tmp_path / "det", "000000")
    assert o.scores.tolist() == [0.9123] and np.abs(to_boxes(o, RIG.pinhole).boxes - boxes.boxes[:1]).max() < 1e-3
    assert (
        len(read_detections(tmp_path / "det", "000001")) == 0
        and submission(tmp_path / "det", tmp_path / "a.zip", ["000000", "000001"]) == 2
    )
    (tmp_path / "det/000007.txt").write_text("")
    with pytest.raises(ValueError, match="not asked for"):
        submission(tmp_path / "det", tmp_path / "a.zip", ["000000", "000001"])
    with pytest.raises(ValueError, match="no scores"):
        write_detections(tmp_path, "1", replace(boxes, scores=None), RIG.pinhole, (96, 320))


# --- samples, batches, loader ---


def same(a, b):
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        pairs = zip(x, y, strict=True) if isinstance(x, list) else [(x, y)]
        assert all(torch.equal(p, q) if isinstance(p, torch.Tensor) else p == q for p, q in pairs), f.name


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("cache", [False, True])
def test_workers_and_cache_change_no_bit(small, cache):
    aug = functools.partial(augment.student, photometric=0.2)

    def epoch(workers, cache, start=0):
        return list(
            loader(
                Samples(Kitti(small, "train"), CLASSES, grid=GRID, cache=cache),
                4,
                run="r",
                epoch=3,
                shuffle=True,
                augment=aug,
                workers=workers,
                start=start,
            )
        )

    plain = epoch(0, False)
    assert len(plain) == 2 and len(plain[1]) == 2
    for workers in (0, 1, 4):
        [same(a, b) for a, b in zip(plain, epoch(workers, cache), strict=True)]
    same(plain[1], epoch(0, cache, start=1)[0])


def test_loader_leaves_the_global_generator_alone(small):
    torch.manual_seed(0)
    a = torch.rand(3)
    torch.manual_seed(0)
    list(loader(Samples(Kitti(small, "train"), CLASSES), 2, run="r", shuffle=True))
    assert torch.equal(a, torch.rand(3))


def test_prepare_on_a_real_frame(shared):
    f = Kitti(shared / "data/kitti", "train").frame(0)
    full, half = prepare(f, CLASSES), prepare(f, CLASSES, image_size=(188, 621))
    assert len(full.points) == len(half.points) and 15e3 < len(full.points) < 25e3
    assert half.sizes.tolist() == [[188, 621]] and (half.depth > 0).float().mean() > 0.1
    cut = within(half, GRID)
    assert len(cut.points) < len(half.points) and torch.equal(cut.depth, half.depth)


def test_labels_belong_to_their_frame(small):
    "A frame that nobody labelled takes nothing from its neighbours."
    train, raw = Kitti(small, "train"), Kitti(small, "val", labelled=False)
    joined = Joined(train, raw)
    assert not joined.labelled and len(joined) == 8
    b = list(loader(Samples(joined, CLASSES), 8))[0]
    assert len(b) == 8 and b.boxes[6:] == b.labels[6:] == [None, None]
    alone = list(loader(Samples(train, CLASSES), 6))[0]
    for k in range(6):
        assert (
            torch.equal(b.boxes[k], alone.boxes[k])
            and torch.equal(b.labels[k], alone.labels[k])
            and len(b.boxes[k]) == 1
        )
    assert len(list(loader(Samples(train, CLASSES), 3, drop_last=True))) == 2
    with pytest.raises(ValueError, match="batch_size"):
        loader(Samples(train, CLASSES), 0)


ENDS = [(2, 0, 1), (1.99, 0, 0), (5, -12.8, 1), (5, -12.81, 0), (27.6, 0, 0), (5, 12.8, 0)]


@pytest.mark.parametrize("x, y, stays", ENDS)
def test_the_space_ends_on_every_side(x, y, stays):
    "A box counts by its centre: the near edges belong to the space, the far ones do not."
    view = RIG.view(np.zeros((96, 320, 3), np.uint8))
    frame = Frame("0", (view,), np.zeros((1, 4), np.float32), Boxes([[x, y, -1, 4, 1.6, 1.5, 0]], ["Car"]))
    assert len(within(prepare(frame, CLASSES), GRID).boxes) == stays


def test_leaks_are_refused(small):
    train, val = Kitti(small, "train"), Kitti(small, "val")
    no_overlap(val, train)
    with pytest.raises(ValueError, match="000006"):
        no_overlap(val, train, Kitti(small, "val", labelled=False))
    with pytest.raises(ValueError, match="twice"):
        Joined(train, train)


def test_sets_that_meet_are_refused(tmp_path):
    street(tmp_path, 6)
    write_split(tmp_path, "more", ["000001", "000004"])
    assert [len(s) for s in (vars(open_sets(Data(), tmp_path))[k] for k in ("train", "val"))] == [4, 2]
    for wrong in (Data(train="val"), Data(unlabelled="more"), Data(unlabelled="val")):
        with pytest.raises(ValueError, match="0000"):
            open_sets(wrong, tmp_path)


@pytest.mark.parametrize("kinds", [("image_2",), ("velodyne",), ("image_2", "velodyne", "calib")])
def test_a_copy_of_val_under_another_id_is_refused(tmp_path, kinds):
    "A picture or a sweep alone is enough."
    write_world(tmp_path, WorldConfig(), dict(train=2, val=1), progress=False)
    write_split(tmp_path, "more", ["000009"])
    for kind in FILES:
        source = "000002" if kind in kinds else "000001"
        shutil.copyfile(frame_path(tmp_path, kind, source), frame_path(tmp_path, kind, "000009"))
    for data in (Data(kind="world", unlabelled="more"), Data(kind="world", train="more")):
        with pytest.raises(ValueError, match="kitti/more holds copies of 1 frames .* 000009 is 000002"):
            open_sets(data, tmp_path)


@pytest.mark.parametrize(
    "kind, change",
    [
        ("image_2", lambda p: write_image(p, 255 - read_image(p))),
        ("velodyne", lambda p: write_points(p, read_points(p) * [1, -1, 1, 1])),
        ("calib", lambda p: p.write_text(p.read_text().replace("P0: 1", "P0: 2"))),
        ("label_2", lambda p: p.write_text(p.read_text() + "DontCare -1 -1 -10 1 2 3 4 -1 -1 -1 -9 -9 -9 -10\n")),
    ],
)
def test_every_byte_that_is_read_counts(tmp_path, monkeypatch, kind, change):
    "Also where time stamps are put back, and where the folder is a link."
    write_world(tmp_path / "real", WorldConfig(), dict(train=2, val=1), progress=False)
    (tmp_path / "linked").mkdir()
    for part in ("ImageSets", "training", "world.json"):
        (tmp_path / "linked" / part).symlink_to(tmp_path / "real" / part)
    frames = Kitti(tmp_path / "linked", "train")
    path, memory = frame_path(tmp_path / "real", kind, "000000"), Memory(tmp_path / "facts.sqlite")
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 10 * 10**9)  # no file is too young to be remembered
    was, stats = manifest(frames, facts(frames, memory)), path.stat()
    assert manifest(frames, facts(frames, memory)) == was
    text = path.read_bytes()
    change(path)
    assert path.read_bytes() != text
    os.utime(path, ns=(stats.st_atime_ns, stats.st_mtime_ns))
    assert manifest(frames, facts(frames, memory))["content_sha256"] != was["content_sha256"]


def broken_point(folder):
    frame_path(folder, "velodyne", "000003").write_bytes(np.full((4, 4), np.nan, np.float32).tobytes())


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda r: frame_path(r, "label_2", "000002").write_text("Car 1 2\n"), "000002.txt line 1: 3 columns"),
        (broken_point, "000003.bin: point 0 is not finite"),
        (lambda r: frame_path(r, "image_2", "000003").write_bytes(b"x"), "000003.png: .*no readable picture"),
        (lambda r: (r / "ImageSets/val.txt").write_text(""), "val.txt: an empty split"),
        (lambda r: [p.write_text("") for p in (r / "training/label_2").glob("*")], "no object of Car, Pedestrian"),
        (
            lambda r: [p.write_text(p.read_text().replace("Car", "car")) for p in (r / "training/label_2").glob("*")],
            "is called 'car', data.classes says 'Car'; write both the same way",
        ),
    ],
)
def test_everything_is_read_before_anything_learns(tmp_path, damage, says):
    "A label of val, a point of a frame that nobody labelled: opening the sets finds it."
    street(tmp_path, 4)
    write_split(tmp_path, "more", ["000003"])
    write_split(tmp_path, "val", ["000002"])
    write_split(tmp_path, "train", ["000000", "000001"])
    open_sets(Data(unlabelled="more"), tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        open_sets(Data(unlabelled="more"), tmp_path)


def sweep(columns, kind, top):
    dice = np.random.default_rng(0)
    xyz = dice.uniform(-40, 40, (400, 3))
    return np.c_[xyz, dice.uniform(0, top, (400, columns - 3))].astype(kind)


@pytest.mark.parametrize(
    "points, told",
    [
        (sweep(5, np.float32, 1.0), "5 columns of float32"),
        (sweep(5, np.float32, 255.0), "5 columns of float32"),
        (sweep(4, np.float64, 1.0), "4 columns of float64"),
        (sweep(4, np.float32, 255.0), "reflectance from .* to 25"),
        (sweep(6, np.float32, 1.0), "6 columns of float32"),
    ],
)
def test_sweeps_of_another_form_are_refused(tmp_path, points, told):
    (tmp_path / "a.bin").write_bytes(points.tobytes())
    with pytest.raises(ValueError, match=f"a.bin: .*{told}.*reflectance from 0 to 1"):
        read_points(tmp_path / "a.bin")


def test_the_memory_of_facts_steps_aside(tmp_path):
    "A file that is no database, or a folder where nothing may be written: one warning, the same facts."
    write_world(tmp_path / "w", WorldConfig(), dict(train=2, val=1), progress=False)
    frames = Kitti(tmp_path / "w", "train")
    (tmp_path / "bad.sqlite").write_bytes(b"no database" * 1000)
    with pytest.warns(UserWarning, match="bad.sqlite: .*changes no number"):
        found = facts(frames, Memory(tmp_path / "bad.sqlite"))
    assert found == facts(frames, Memory(tmp_path / "good.sqlite"))


def test_another_street_is_refused(tmp_path):
    street(tmp_path, 6)
    with pytest.raises(ValueError, match="did not write this folder; say data.kind=kitti"):
        open_sets(Data(kind="world"), tmp_path)
    (tmp_path/"world.json").write_text('{"seed": 1, "width": 320}')
    assert open_sets(Data(kind="world", world=1), tmp_path).train.height_scale == 320/1242
    with pytest.raises(ValueError, match="this is street 1, data.world asks for 2"):
        open_sets(Data(kind="world", world=2), tmp_path)
    with pytest.raises(ValueError, match="say data.kind=world"):
        open_sets(Data(), tmp_path)


def test_manifest_notices_changes(tmp_path):
    street(tmp_path, 4)
    a = manifest(Kitti(tmp_path, "train"))
    assert a == manifest(Kitti(tmp_path, "train")) and a["count"] == 2
    p = tmp_path / "training/label_2/000000.txt"
    p.write_text(p.read_text().replace("Car", "Van"))
    b = manifest(Kitti(tmp_path, "train"))
    assert b["ids_sha256"] == a["ids_sha256"] and b["content_sha256"] != a["content_sha256"]
    assert manifest(Kitti(tmp_path, "val"))["ids_sha256"] != a["ids_sha256"]


# --- augmentation ---


@pytest.mark.parametrize("rig, size", [(RIG, (96, 320)), (None, (375, 1242))])
def test_the_mirror_is_exact(golden, rig, size):
    rig = rig or released(golden)[1]
    g = np.random.default_rng(0)
    x = g.uniform(4, 40, 4000)
    points = np.stack([x, x * g.uniform(-0.8, 0.8, 4000), g.uniform(-1.7, 1, 4000), x], 1).astype(np.float32)
    boxes = Boxes([[12, 1, -1, 4, 1.6, 1.5, 0.4], [30, -6, -1, 0.8, 0.6, 1.7, 3]], ["Car", "Pedestrian"])
    view = rig.view(g.integers(0, 255, (*size, 3), dtype=np.uint8))
    s = prepare(Frame("0", (view,), points, boxes), CLASSES)
    f = augment.flip_sample(s)
    uv, depth = lidar_to_img(s.points[:, :3].double().numpy(), view)
    uv2, depth2 = lidar_to_img(f.points[:, :3].double().numpy(), view)
    assert (
        np.abs(size[1] - 1 - uv[:, 0] - uv2[:, 0]).max() < 1e-3
        and np.abs(uv[:, 1] - uv2[:, 1]).max() < 1e-3
        and np.abs(depth - depth2).max() < 1e-4
    )
    t = augment.flip_sample(f)
    assert torch.equal(t.images, s.images) and torch.equal(t.depth, s.depth) and torch.equal(t.camera, s.camera)
    assert (t.points - s.points).abs().max() < 1e-4 and (t.boxes - s.boxes).abs().max() < 1e-4
    again = depth_map(f.points[:, :3].double().numpy(), view, size)
    assert (
        np.abs(again - f.depth[0].numpy()) < 1e-3
    ).mean() > 0.9995  # a pixel may change hands where a point falls on its edge


def test_points_stay_in_their_boxes(shared):
    f = Kitti(shared / "data/kitti", "train").frame(2)
    s = prepare(f, CLASSES)
    count = lambda s: points_in_boxes(s.points, s.boxes).sum(0)
    before = count(s)
    assert before.sum() > 100
    for t in (augment.flip_sample(s), augment.teacher(s, rng(1))):
        assert (count(t) - before).abs().max() <= 0.05 * before.max() + 2


def test_teacher_augmentation_moves_nothing_apart():
    points = torch.tensor([[10.0, 1, 0, 0.5], [12.0, 1.5, 0, 0.5]])
    boxes = torch.tensor([[11.0, 1.2, 0, 4, 2, 1.5, 0.3]])
    for seed in range(20):
        p, b = augment.stretch(*augment.turn(*augment.flip_along_x(points, boxes, rng(seed)), rng(seed)), rng(seed))
        k = (b[0, 3] / 4).item()
        assert 0.95 <= k <= 1.05
        d = (p[:, :2] - b[:, :2]).norm(dim=1) / k
        torch.testing.assert_close(d, (points[:, :2] - boxes[:, :2]).norm(dim=1), atol=1e-4, rtol=0)


# --- raw drives ---


def test_raw_drive(shared):
    raw = KittiRaw(shared / "data/kitti_raw")
    assert len(raw) == 8 and not raw.labelled
    f = raw.frame(0)
    assert f.views[0].size == (375, 1242) and f.objects is None and len(prepare(f, CLASSES).points) > 15e3
    shipped = read_calib(shared / "data/splits/raw_calib_2011_09_26.txt")
    assert np.abs(shipped.pinhole.lidar_to_img - f.views[0].lidar_to_img).max() < 1e-9
    assert drive_ids(shared / "data/kitti_raw", "2011_09_26_drive_0005_sync") == raw.ids


def test_raw_lists_against_val(shared):
    mapping, val = (
        object_to_raw(shared / "data/splits/kitti_object_to_raw.json"),
        (shared / "data/splits/val.txt").read_text().split(),
    )
    train = (shared / "data/splits/train.txt").read_text().split()
    eigen, everything = (read_raw_list(shared / f"data/splits/{k}.txt") for k in ("eigen_clean", "kitti_raw"))
    assert (len(eigen), len(everything)) == (14940, 42378)
    refuse_overlap(eigen, val, mapping)
    refuse_overlap([mapping[i] for i in train], val, mapping)
    clean, same, near = split_leaks(everything, val, mapping)
    assert (len(same), len(same) + len(near)) == (3551, 8848)
    refuse_overlap(clean, val, mapping)
    with pytest.raises(ValueError, match=r"3551 raw frames .* 5297 more"):
        refuse_overlap(everything, val, mapping)
    refuse_overlap(KittiRaw(shared / "data/kitti_raw").ids, val, mapping)


def test_bad_raw_lists_are_named(tmp_path):
    (tmp_path / "l.txt").write_text("2011_09_26_drive_0005_sync/0000000050\nnonsense\n")
    with pytest.raises(ValueError, match="l.txt line 2"):
        read_raw_list(tmp_path / "l.txt")
    with pytest.raises(FileNotFoundError, match="no such drive"):
        drive_ids(tmp_path, "2011_09_26_drive_0009_sync")


@pytest.mark.parametrize("name", ["../000024", "./000024", "a/b", "..", ".hidden", "\x1b[31m7", "\u200b7", "a:b", ""])
def test_a_split_and_an_id_are_plain_names(tmp_path, name):
    with pytest.raises(ValueError, match="split .* is no plain name"):
        write_split(tmp_path, name, ["000000"])
    with pytest.raises(ValueError, match="split .* is no plain name"):
        read_split(tmp_path, name)
    with pytest.raises(ValueError, match="split .* is no plain name"):
        write_world(tmp_path / "world", WorldConfig(), {name: 1}, progress=False)
    assert not list(tmp_path.rglob("*.txt")) and not (tmp_path / "world").exists()
    if name:
        write_split(tmp_path, "train", ["000000", name])
        with pytest.raises(ValueError, match=r"train.txt: id .* is no plain name"):
            read_split(tmp_path, "train")


NO_SPLITS = [(b"", "empty split"), (b" \n", "empty split"), (b"\xff00", "no UTF-8 text")]


@pytest.mark.parametrize("content, told", NO_SPLITS)
def test_a_split_of_nothing_or_of_other_bytes_is_named(tmp_path, content, told):
    (tmp_path / "ImageSets").mkdir()
    (tmp_path / "ImageSets" / "val.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"val.txt: .*{told}"):
        read_split(tmp_path, "val")
