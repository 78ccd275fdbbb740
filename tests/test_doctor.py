"Healthy sets are called healthy; every damaged file is named, and only it."

import shutil

import numpy as np
import pytest
from PIL import Image
from test_data import street

from cmkd.data.doctor import as_text, calibration_picture, examine, report
from cmkd.data.kitti import frame_path, read_image, read_points, write_image, write_points, write_split


def files(found):
    return sorted(f.file for f in found)


@pytest.fixture
def small(tmp_path):
    return street(tmp_path / "kitti", 6)


@pytest.fixture
def real(shared, tmp_path):
    "A copy of nine real frames of three cameras (one frame of camera 1224 x 370, one of 1238 x 374)."
    ids = ["000000", "000001", "000003", "000004", "000006", "000007", "000008", "000038", "000142"]
    for kind in ("image_2", "velodyne", "calib", "label_2"):
        for i in ids:
            p = frame_path(tmp_path, kind, i)
            p.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(frame_path(shared / "data/kitti", kind, i), p)
    write_split(tmp_path, "train", [i for i in ids if i in ("000000", "000003", "000007", "000038", "000142")])
    write_split(tmp_path, "val", [i for i in ids if i in ("000001", "000004", "000006", "000008")])
    return tmp_path


def test_real_frames_are_healthy(shared):
    found, summary = examine(shared / "data/kitti")
    assert found == [] and summary["frames"] == 22 and summary["splits"] == {"train": 16, "val": 6}
    assert summary["image_sizes"] == {"1242x375": 20, "1224x370": 1, "1238x374": 1} and summary["classes"]["Car"] == 111
    assert 1e5 < summary["points"]["least"] and "healthy" in as_text(found, summary)


def resize(how):
    def hurt(path):
        im = Image.open(path).convert("RGB")
        W, H = im.size
        box = {
            "half": im.resize((W // 2, H // 2)),
            "crop": im.crop((0, 0, W - 40, H)),
            "wide": im.resize((1280, 384)),
            "slightly": im.resize((W - 2, H)),
        }[how]
        box.save(path)

    return hurt


def edit(f):
    return lambda path: path.write_text(f(path.read_text()))


WOUNDS = [
    ("image_2", "half", resize("half")),
    ("image_2", "crop", resize("crop")),
    ("image_2", "wide", resize("wide")),
    ("image_2", "slightly", resize("slightly")),
    ("image_2", "cut", lambda p: p.write_bytes(p.read_bytes()[:-20000])),
    ("image_2", "empty", lambda p: p.write_bytes(b"")),
    ("image_2", "no picture", lambda p: p.write_bytes(b"hello")),
    ("image_2", "missing", lambda p: p.unlink()),
    ("image_2", "black", lambda p: Image.new("RGB", Image.open(p).size).save(p)),
    ("velodyne", "cut in a point", lambda p: p.write_bytes(p.read_bytes()[:-7])),
    ("velodyne", "half", lambda p: write_points(p, read_points(p)[: len(read_points(p)) // 2])),
    ("velodyne", "empty", lambda p: p.write_bytes(b"")),
    ("velodyne", "missing", lambda p: p.unlink()),
    ("velodyne", "nan", lambda p: p.write_bytes(p.read_bytes()[:-4] + np.float32(np.nan).tobytes())),
    ("label_2", "14 columns", edit(lambda t: t.split("\n", 1)[0].rsplit(" ", 1)[0] + "\n" + t.split("\n", 1)[1])),
    ("label_2", "missing", lambda p: p.unlink()),
    ("label_2", "nan", edit(lambda t: t.split("\n", 1)[0].rsplit(" ", 1)[0] + " nan\n" + t.split("\n", 1)[1])),
    ("label_2", "unknown class", edit(lambda t: "Bicycle" + t[t.index(" ") :])),
    ("label_2", "degrees", edit(lambda t: t.split("\n", 1)[0].rsplit(" ", 1)[0] + " 90.00\n" + t.split("\n", 1)[1])),
    ("calib", "no P2", edit(lambda t: t.replace("P2:", "P9:"))),
    ("calib", "missing", lambda p: p.unlink()),
    (
        "calib",
        "short",
        edit(lambda t: "\n".join(l.rsplit(" ", 1)[0] if l.startswith("R0") else l for l in t.splitlines())),
    ),
    (
        "calib",
        "no rotation",
        edit(
            lambda t: "\n".join("R0_rect: " + " ".join(["1"] * 9) if l.startswith("R0") else l for l in t.splitlines())
        ),
    ),
]


@pytest.mark.parametrize("kind, name, hurt", WOUNDS, ids=[f"{k}-{n}" for k, n, _ in WOUNDS])
def test_small_wounds_are_named(small, kind, name, hurt):
    path = frame_path(small, kind, "000002")
    hurt(path)
    found, _ = examine(small)
    named = files(found)
    assert str(path.relative_to(small)) in named, found
    assert set(named) <= {str(path.relative_to(small))}, found
    assert all(f.problem and f.remedy for f in found)


@pytest.mark.parametrize(
    "id", ["000000", "000006", "000142"]
)  # alone with its camera, alone with its camera, one of seven
def test_real_wounds_are_named(real, id):
    for kind, name, hurt in WOUNDS:
        if id != "000142" and name not in ("half", "crop", "slightly"):
            continue
        path = frame_path(real, kind, id)
        before = path.read_bytes()
        hurt(path)
        found, _ = examine(real)
        path.write_bytes(before)
        assert str(path.relative_to(real)) in files(found), (kind, name, found)
        assert set(files(found)) <= {str(path.relative_to(real))}, (kind, name, found)
    assert examine(real)[0] == []


def test_several_wounds_at_once(real):
    cut, png, label = (
        frame_path(real, k, i) for k, i in (("velodyne", "000003"), ("image_2", "000006"), ("label_2", "000142"))
    )
    cut.write_bytes(cut.read_bytes()[:1001])
    resize("half")(png)
    label.write_text(label.read_text().replace(" -1.5", "", 1).replace(" 1.5", "", 1))
    write_split(real, "train", ["000000", "000003", "000007", "000038", "000142", "000001", "000142", "999999"])
    found, _ = examine(real)
    assert files(found) == ["ImageSets/train.txt"] * 3 + [
        "training/image_2/000006.png",
        "training/label_2/000142.txt",
        "training/velodyne/000003.bin",
    ], found
    text = "\n".join(map(str, found))
    assert all(w in text for w in ("000001", "000142", "999999", "leak"))


def test_files_of_another_frame(real):
    for kind, other in (("velodyne", "000007"), ("label_2", "000142")):
        path = frame_path(real, kind, "000008")
        before = path.read_bytes()
        shutil.copyfile(frame_path(real, kind, other), path)
        found, _ = examine(real)
        path.write_bytes(before)
        assert set(files(found)) == {"training/velodyne/000008.bin"}, (
            kind,
            found,
        )  # the sweep is named, the remedy names label and calib too


def test_one_picture_under_two_ids(small):
    image = read_image(frame_path(small, "image_2", "000000"))
    write_image(frame_path(small, "image_2", "000005"), image)
    found, _ = examine(small)
    assert files(found) == ["training/image_2/000005.png"] and "000000" in found[0].problem


def test_splits(small):
    write_split(small, "trainval", [f"{i:06d}" for i in range(6)])
    assert examine(small)[0] == []
    write_split(small, "unlabelled", ["000000", "000004"])
    found, _ = examine(small)
    assert files(found) == ["ImageSets/unlabelled.txt"] and "000004" in found[0].problem
    (small / "ImageSets/unlabelled.txt").write_text("")
    assert files(examine(small)[0]) == ["ImageSets/unlabelled.txt"]


def test_unlabelled_frames_need_no_label(small):
    write_split(small, "train", ["000000", "000001"])
    write_split(small, "unlabelled", ["000002", "000003"])
    frame_path(small, "label_2", "000002").unlink()
    assert examine(small)[0] == []


def test_no_kitti_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="ImageSets and training"):
        examine(tmp_path)


def test_report_is_written(small, tmp_path):
    frame_path(small, "calib", "000001").unlink()
    found, summary = report(small, tmp_path / "out", pictures=0)
    assert (
        "training/calib/000001.txt" in (tmp_path / "out/findings.csv").read_text()
        and (tmp_path / "out/summary.json").exists()
    )
    fig = calibration_picture(small, "000000")
    assert len(fig.data) >= 2
