"nuScenes' metrics: the devkit's numbers, to the ninth digit."
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cmkd.core import Boxes
from cmkd.data.dataset import FrameSet
from cmkd.data.nuscenes import CLASSES, NuScenes, quaternion_of
from cmkd.data.sets import KINDS
from cmkd.evaluate.metrics import METRICS, ap_record
from cmkd.evaluate.nuscenes import (
    DISTANCES,
    ERRORS,
    RACK,
    RANGE,
    Detection,
    counted,
    evaluate,
    found_of,
    pairs_within,
    table_of,
    taken,
)
from cmkd.geometry import lidar_to_img


class Case:
    "Samples, what is true and what was found, and what the devkit says."

    def __init__(self, folder):
        read = lambda name: json.loads((folder/f"{name}.json").read_text())
        samples = read("n_ground_truth")["samples"]
        self.tokens, self.ego = [s["token"] for s in samples], np.array([s["ego"] for s in samples])
        rows = [dict(sample=i, name=CLASSES.get(c, c), xyz=t, wlh=s, rotation=r, velocity=v or (np.nan, np.nan),
                     attribute=a, score=np.nan, points=lidar + radar)
                for i, x in enumerate(samples) for c, t, s, r, v, a, lidar, radar in x["annotations"]]
        self.racks = table_of([r for r in rows if r["name"] == RACK])
        self.truth = table_of([r for r in rows if r["name"] in RANGE])
        self.results, self.expected = read("n_results")["results"], read("n_expected")
        self.found = found_of(self.results, self.tokens)


@pytest.fixture(scope="module")
def case(golden) -> Case: return Case(golden)


@pytest.fixture(scope="module")
def said(case) -> Detection: return evaluate(case.truth, case.found, case.ego, case.racks)


def test_what_is_counted(case):
    before, after = case.expected["boxes_before_filter"], case.expected["boxes_after_filter"]
    assert (len(case.truth), len(case.found)) == (before["gt"], before["predictions"])
    for table, key in ((case.truth, "gt"), (case.found, "predictions")):
        names = counted(table, case.ego, case.racks).name.tolist()
        assert {n: names.count(n) for n in RANGE} == after[key]


def test_every_number_of_the_devkit(case, said):
    for name in RANGE:
        for d in DISTANCES:
            assert said.ap[name][d] == pytest.approx(case.expected["label_aps"][name][str(d)], abs=1e-9), (name, d)
        for k in ERRORS:
            want = case.expected["label_tp_errors"][name][k]
            want = np.nan if want is None else want
            assert said.errors[name][k] == pytest.approx(want, abs=1e-9, nan_ok=True), (name, k)
    assert said.mean_ap == pytest.approx(case.expected["mean_ap"], abs=1e-9)
    assert said.mean_errors == pytest.approx(case.expected["tp_errors"], abs=1e-9)
    assert said.nds == pytest.approx(case.expected["nd_score"], abs=1e-9)


def test_curves(case, said):
    for name, curves in case.expected["curves_at_2m"].items():
        ours = said.curves[name][2.]
        np.testing.assert_allclose(ours.precision, curves["precision"], atol=1e-8)
        key = next(k for k in curves if k != "precision" and k.startswith("conf"))
        np.testing.assert_allclose(ours.score, curves[key], atol=1e-8)


def test_a_split_of_ones_own(case, said):
    "Any samples; those that are missing or too many are an error that names one."
    few = case.tokens[3:9]
    here = lambda table: table.rows(np.isin(table.sample, range(3, 9)))
    assert evaluate(here(case.truth), here(case.found), case.ego, case.racks).nds != said.nds
    with pytest.raises(ValueError, match="1 of 7 samples are missing, e.g. other"):
        found_of(case.results, [*few, "other"])
    with pytest.raises(ValueError, match="is not among those judged"): found_of(case.results, few)
    with pytest.raises(ValueError, match="501 boxes"): found_of({"a": [{}]*501}, ["a"])


def test_greedy_by_the_book():
    "Against the plain double loop on crowded samples full of ties."
    r = np.random.default_rng(0)
    for _ in range(40):
        n, m = r.integers(1, 9, 2)
        at = lambda k: [(float(x), float(y), 0.) for x, y in r.integers(0, 5, (k, 2))]
        row = dict(name="car", wlh=(2, 4, 1.5), rotation=(1, 0, 0, 0), velocity=(0, 0), attribute="", points=3)
        row |= dict(sample=0)
        truth = table_of([dict(row, xyz=p, score=np.nan) for p in at(n)])
        found = table_of([dict(row, xyz=p, score=float(s)) for p, s in zip(at(m), r.integers(1, 4, m)/4, strict=True)])
        found = found.rows(np.lexsort((np.arange(m), found.score))[::-1])
        for distance in DISTANCES:
            free, want = set(range(n)), {}
            for i in range(m):
                near = [(float(np.linalg.norm(found.xyz[i, :2] - truth.xyz[j, :2])), j) for j in sorted(free)]
                if near and min(near)[0] < distance:
                    want[i] = min(near)[1]
                    free.discard(want[i])
            assert taken(pairs_within(truth, found, max(DISTANCES)), distance, n) == want


# --- a real sample, through genuine tables ---


def posed(token: str, matrix, **more) -> dict:
    m = np.asarray(matrix, float)
    turn = Rotation.from_matrix(m[:3, :3])
    return dict(token=token, rotation=quaternion_of(turn).tolist(), translation=m[:3, 3].tolist(), **more)


def as_tables(info: dict, names: dict, folder: Path, to: Path) -> None:
    "The one real keyframe, whose poses are given as matrices, as tables of nuScenes' own form."
    ego, lidar = np.array(info["ego2global"]), np.array(info["lidar_points"]["lidar2ego"])
    world = ego @ lidar
    tables = dict(sensor=[], calibrated_sensor=[], ego_pose=[], sample_data=[], attribute=[], sample_annotation=[],
                  category=[dict(token=c, name=c) for c in (*CLASSES, "animal")], instance=[],
                  sample=[dict(token="now", timestamp=0, prev="", next="", scene_token="s")],
                  scene=[dict(token="s", name="scene", first_sample_token="now")])

    def shot(channel, file, to_ego, ego_pose, intrinsic):
        tables["sensor"].append(dict(token=channel, channel=channel))
        tables["calibrated_sensor"].append(posed(channel, to_ego, sensor_token=channel, camera_intrinsic=intrinsic))
        tables["ego_pose"].append(posed(channel, ego_pose))
        name = f"samples/{channel}/{file}"
        of = dict(sample_token="now", ego_pose_token=channel, calibrated_sensor_token=channel)
        at = dict(filename=name, timestamp=0, is_key_frame=True, prev="", next="")
        tables["sample_data"].append(dict(token=channel) | of | at)
        (to/name).parent.mkdir(parents=True)
        shutil.copyfile(folder/file, to/name)

    shot("LIDAR_TOP", info["lidar_points"]["lidar_path"], lidar, ego, [])
    for channel, c in info["images"].items():
        its_ego = world @ np.linalg.inv(c["lidar2cam"]) @ np.linalg.inv(c["cam2ego"])      # where it was by then
        shot(channel, c["img_path"], c["cam2ego"], its_ego, c["cam2img"])
    first = {v: k for k, v in reversed(CLASSES.items())}
    for k, o in enumerate(info["instances"]):
        x, y, z, dx, dy, dz, yaw = o["bbox_3d"]
        turn = Rotation.from_matrix(world[:3, :3]) * Rotation.from_euler("z", yaw)
        kind = first.get(names.get(o["bbox_label_3d"]), "animal")
        tables["instance"].append(dict(token=f"i{k}", category_token=kind))
        tables["sample_annotation"].append(dict(
            token=f"a{k}", sample_token="now", instance_token=f"i{k}", size=[dy, dx, dz], prev="", next="",
            rotation=quaternion_of(turn).tolist(), translation=(world @ [x, y, z, 1])[:3].tolist(), attribute_tokens=[],
            num_lidar_pts=o["num_lidar_pts"], num_radar_pts=o["num_radar_pts"]))
    for name in ("v1.0-one", "ImageSets"): (to/name).mkdir()
    for name, rows in tables.items(): (to/"v1.0-one"/f"{name}.json").write_text(json.dumps(rows))
    (to/"ImageSets"/"val.txt").write_text("scene\n")


@pytest.fixture(scope="module")
def keyframe(shared, tmp_path_factory) -> tuple[FrameSet, dict, dict]:
    "The real keyframe as a set, what its file says, and the names of its classes."
    whole = json.loads((shared/"data/nuscenes/info.json").read_text())
    names = {v: k for k, v in whole["metainfo"]["categories"].items()}
    to = tmp_path_factory.mktemp("nuscenes")
    as_tables(whole["data_list"][0], names, shared/"data/nuscenes", to)
    return KINDS["nuscenes"](to, "val"), whole["data_list"][0], names


def test_a_real_sample(keyframe):
    "Six cameras as they stood, the sweep, and every box where it was."
    frames, info, names = keyframe
    assert isinstance(frames, NuScenes)
    f = frames.frame(0)
    assert [v.name for v in f.views] == sorted(info["images"]) and f.points.shape[1] == 5 and len(f.points) > 30_000
    for v in f.views:
        np.testing.assert_allclose(v.lidar_to_cam, info["images"][v.name]["lidar2cam"], atol=1e-4)
        assert v.image.shape == (900, 1600, 3)
    known = [o for o in info["instances"] if o["bbox_label_3d"] >= 0]
    want = np.array([o["bbox_3d"] for o in known])
    np.testing.assert_allclose(f.objects.boxes[:, :6], want[:, :6], atol=1e-3)
    turned = np.exp(1j*(f.objects.boxes[:, 6] - want[:, 6]))
    np.testing.assert_allclose(np.angle(turned), 0, atol=1e-2)                                # the world leans a bit
    assert f.objects.names.tolist() == [names[o["bbox_label_3d"]] for o in known]
    xyz = f.objects.boxes[:, :3].astype(float)
    for channel, seen in info["cam_instances"].items():
        view = next(v for v in f.views if v.name == channel)
        for o in seen[:5]:
            if o.get("center_2d") is None: continue
            uv, depth = lidar_to_img(xyz, view)
            k = int(np.linalg.norm(uv - o["center_2d"], axis=1).argmin())
            np.testing.assert_allclose(uv[k], o["center_2d"], atol=1.5)
            assert depth[k] == pytest.approx(o["depth"], abs=.05)


def test_who_finds_all_of_a_real_sample(keyframe):
    "The truth as detections: AP 1 of every class that is judged there, no error but the attribute's and velocity's."
    frames, info, _ = keyframe
    hit = [o["num_lidar_pts"] + o["num_radar_pts"] > 0 for o in info["instances"] if o["bbox_label_3d"] >= 0]
    objects = frames.frame(0).objects[np.array(hit)]             # a box without a point is asked of nobody
    found = {"now": replace(objects, scores=np.linspace(.9, .5, len(objects)))}
    rows = METRICS[frames.metric].score(found, frames, ("car", "pedestrian", "barrier"))
    got = {(r["class"], r["metric"], r["iou"]): r["value"] for _, r in rows.iterrows()}
    for cls in ("pedestrian", "barrier"): assert got[cls, "AP", .5] == pytest.approx(100)
    errors = rows[rows.metric.isin(["trans_err", "scale_err"]) & rows["class"].isin(["pedestrian", "barrier"])].value
    assert errors.astype(float).max() < 1e-3
    assert "all/NDS/R101/nan/all" in ap_record(rows)
    moved = replace(found["now"], boxes=objects.boxes + np.float32([3, 0, 0, 0, 0, 0, 0]))
    worse = METRICS[frames.metric].score({"now": moved}, frames, ("pedestrian",))
    assert worse[worse.metric == "mAP"].value.iloc[0] < rows[rows.metric == "mAP"].value.iloc[0]
    none = {"now": Boxes(np.empty((0, 7)), [], np.empty(0), velocity=np.empty((0, 2)))}
    assert METRICS[frames.metric].score(none, frames, ("car",)).query("metric == 'mAP'").value.iloc[0] == 0
