"UniDistill's detectors and its four paths, on a street of two cameras that is made up here."
import gzip
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cmkd.boxes import points_in_boxes
from cmkd.core import Boxes, Frame, View
from cmkd.data.dataset import FrameSet, collate, prepare
from cmkd.data.sets import KINDS, open_sets
from cmkd.distill.paths import PATHS, ROLES, detector, frozen, moved, path_recipe
from cmkd.layers.bev import Bev
from cmkd.layers.centre import Centre
from cmkd.models.surround import (
    BUFFERS,
    FULL_SPACE,
    SENSORS,
    BevDetector,
    Rig,
    Sweep,
    camera_bev,
    from_released,
    released_name,
)
from cmkd.train.roles import Work, fit, save_weights

AHEAD = [[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
BACK = [[0, 1, 0, 0], [0, 0, -1, 0], [-1, 0, 0, 0], [0, 0, 0, 1]]
LENS = [[40, 0, 32, 0], [0, 40, 16, 0], [0, 0, 1, 0]]
TINY = (
    "space.low=[-6.4, -4.8, -2]", "space.high=[6.4, 4.8, 2]", "space.lidar_voxel=[0.2, 0.2, 0.25]",
    "space.bev_cell=0.8", "space.depth=[1, 7]", "space.depth_bins=12", "space.max_voxels=1000",
    "space.image_voxel=[0.8, 0.8, 4]", 'data.classes=["car", "truck"]', "data.image_size=[32, 64]", "data.kind=yard",
    "head.tasks=[1, 1]", "head.shared=8", "bev.layers=[1, 1]", "bev.filters=[8, 8]", "bev.up_filters=[8, 8]",
    "camera.backbone=resnet18", 'camera.backbone_args={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}',
    "camera.neck=4", "camera.context=8", "lidar.channels=[4, 4, 4]", "lidar.out_channels=4",
    *(f"{s}_stage.{k}" for s in SENSORS for k in ("epochs=0", "steps=2", "batch=2")))


class Yard(FrameSet):
    "A car and a truck each frame, seen by two cameras that look ahead and back, and by points with a time."
    name = "yard"

    def __init__(self, root, split: str, labelled: bool=True, seed: int=0):
        self.split, self.labelled = split, labelled
        self.ids = tuple(f"{split}{i}" for i in range(4))

    def frame(self, i: int) -> Frame:
        r = np.random.default_rng([*self.split.encode(), i])
        boxes = np.array([[r.uniform(2, 5), r.uniform(-2, 2), 0, 2, 1, 1, .3], [-3, r.uniform(-2, 2), 0, 3, 1, 1, 0]])
        points = (boxes[:, None, :3] + r.uniform(-.4, .4, (2, 60, 3))).reshape(-1, 3)
        points = np.c_[points, r.uniform(0, 1, (120, 2))].astype(np.float32)
        views = tuple(View(LENS, pose, r.integers(0, 255, (32, 64, 3), dtype=np.uint8)) for pose in (AHEAD, BACK))
        return Frame(self.ids[i], views, points, Boxes(boxes, ["car", "truck"]) if self.labelled else None)


@pytest.fixture
def sets(monkeypatch, tmp_path):
    monkeypatch.setitem(KINDS, "yard", Yard)
    return lambda cfg: open_sets(cfg.data, tmp_path)


def trained(cfg, role, sets, folder, **parents):
    work = Work(f"{role}/0", sets(cfg), parents, device="cpu")
    fit(ROLES[role], cfg, work, folder, 60., False)
    return folder/"weights.safetensors"


@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_four_paths_share_three_teachers(recipe, sets, tmp_path):
    put = lambda path: path_recipe(recipe, path).override(*TINY)
    teachers = {s: trained(put("l-c"), s, sets, tmp_path/s) for s in SENSORS}
    for path, roles in PATHS.items():
        cfg = put(path)
        weights = trained(cfg, "student", sets, tmp_path/path, **{roles.teacher: teachers[roles.teacher]})
        assert load_file(weights).keys() == detector(cfg, roles.student).state_dict().keys(), "adapters stay behind"
        log = (tmp_path/path/"metrics.csv").read_text().splitlines()
        row = dict(zip(log[0].split(","), log[-1].split(","), strict=True))
        assert all(float(row[k]) > 0 for k in ("detection", "feature", "relation", "response")), row
    net = detector(cfg, "lidar")
    found = ROLES["lidar"].detect(cfg, net, sets(cfg).val, progress=False, device="cpu")
    assert len(found) == 4 and all(f.velocity is not None for f in found.values())


def test_a_baseline_needs_no_teacher(sets, tmp_path):
    off = tuple(f"distill.{k}=0" for k in ("feature", "relation", "response"))
    cfg = path_recipe("paper", "l-c").override(*TINY, *off)
    assert ROLES["student"].parents(cfg) == ()
    log = (trained(cfg, "student", sets, tmp_path).parent/"metrics.csv").read_text().splitlines()
    assert "detection" in log[0] and "feature" not in log[0]


def test_fusion_wants_equal_maps():
    with pytest.raises(ValueError, match="set camera.context to them"):
        detector(path_recipe("paper", "lc-c").override("camera.context=64"), "fusion")


@pytest.mark.parametrize("sensor", SENSORS)
def test_full_size_is_the_released_one(sensor, golden):
    shapes = json.loads(gzip.open(golden/"u_state_dicts.json.gz").read())[sensor]
    with torch.device("meta"): net = BevDetector(sensor, Rig(), Sweep(), FULL_SPACE, Centre(), Bev())
    ours = {released_name(k): list(v.shape) for k, v in net.state_dict().items()}
    assert ours == {k: v for k, v in shapes.items() if k not in BUFFERS}
    state = {k: torch.zeros(v, device="meta") for k, v in shapes.items()}
    assert from_released(state, net).keys() == net.state_dict().keys()
    broken = dict(state)
    broken["det_head.dense_head.shared_conv.0.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match="shared_conv.0.bias"): from_released(broken, net)
    del broken["det_head.dense_head.shared_conv.0.bias"]
    with pytest.raises(ValueError, match="shared_conv.0.bias"): from_released(broken, net)


def test_the_street_moves_as_one(tmp_path):
    "Points stay in their boxes, and in their pixels."
    sample = prepare(Yard(tmp_path, "train").frame(0), ("car", "truck"), image_size=(32, 64))
    for seed in range(4):
        one = moved(sample, np.random.default_rng(seed), .5, .7, .1)
        assert not torch.allclose(one.points[:, :3], sample.points[:, :3])
        inside = [points_in_boxes(s.points[:, :3], s.boxes) for s in (sample, one)]
        assert torch.equal(*inside) and inside[0].any()
        pixels = []
        for s in (sample, one):
            xyz = torch.nn.functional.pad(s.points[:, :3].double(), (0, 1), value=1)
            uvw = xyz @ (s.camera[0].double() @ s.lidar_to_cam[0].double()).T
            pixels.append(uvw[:, :2]/uvw[:, 2:])
        torch.testing.assert_close(*pixels, rtol=1e-4, atol=1e-2)


def test_a_teacher_stays_as_it_is(tmp_path):
    cfg = path_recipe("paper", "l-c").override(*[t for t in TINY if "yard" not in t])
    save_weights(detector(cfg, "lidar"), tmp_path/"w.safetensors")
    teacher = frozen(cfg, "lidar", tmp_path/"w.safetensors", torch.device("cpu"))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_fusion_hears_lidar_first(tmp_path):
    cfg = path_recipe("paper", "lc-c").override(*[t for t in TINY if "yard" not in t])
    net = detector(cfg, "fusion").eval()
    batch = collate([prepare(Yard(tmp_path, "train").frame(0), ("car", "truck"), image_size=(32, 64))])
    with torch.no_grad():
        apart = net.fusion(net.lidar_bev(batch), camera_bev(net.camera, batch).bev)
        assert torch.equal(net(batch, "bev").bev, apart)
