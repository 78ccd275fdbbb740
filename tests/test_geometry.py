"Projections, depth bins and cells: against the released code's numbers and against the slow way."

import numpy as np
import pytest
import torch

from cmkd.core import Boxes, Frame, Pinhole, View
from cmkd.data.dataset import prepare
from cmkd.data.kitti import Calibration
from cmkd.geometry import (
    DepthBins,
    Grid,
    cam_to_img,
    cam_to_lidar,
    depth_map,
    img_to_cam,
    img_to_lidar,
    in_view,
    lidar_to_cam,
    lidar_to_img,
    scaled,
)

# a rig with nothing round in it: the camera looks 3 degrees to the side and down, and P2 has an offset in every row
A = np.deg2rad(3.0)
R0 = np.array([[np.cos(A), 0, np.sin(A)], [0, 1, 0], [-np.sin(A), 0, np.cos(A)]]) @ np.array(
    [[1, 0, 0], [0, np.cos(A), -np.sin(A)], [0, np.sin(A), np.cos(A)]]
)
RIG = Calibration(
    [[186.0, 0, 157, 11], [0, 190.0, 44, 0.6], [0, 0, 1, 0.003]],
    R0,
    [[0, -1, 0, 0.02], [0, 0, -1, -0.08], [1, 0, 0, -0.27]],
).pinhole


def street(n=400, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).uniform([3, -12, -2], [45, 12, 1.5], (n, 3))


def pinhole(p) -> tuple[float, float, float]:
    "u, v and depth of one lidar point, the way one does it on paper."
    cam = R0 @ np.array([-p[1] + 0.02, -p[2] - 0.08, p[0] - 0.27])
    w = cam[2] + 0.003
    return (186 * cam[0] + 157 * cam[2] + 11) / w, (190 * cam[1] + 44 * cam[2] + 0.6) / w, cam[2]


# --- the released code's numbers ---


@pytest.mark.parametrize("count", [80, 120])
def test_depth_bins(golden, count):
    "Continuous index and class of every depth, among them 0, negative, the two ends, a hair outside, NaN and infinity."
    a, bins = np.load(golden / "a_lid_bins.npz"), DepthBins(2.0, 46.8, count)
    depth = torch.tensor(a["depth_map"])
    np.testing.assert_allclose(bins.edges, a[f"edges_{count}"], atol=1e-5)
    # a square root may differ in its last bit from one maker's CPU to another's; then so may the class of an exact edge
    want = a[f"idx_cont_{count}"]
    np.testing.assert_allclose(bins.index(depth).numpy(), want, rtol=3e-7)
    assert bins.target(depth).dtype == torch.int64
    with np.errstate(invalid="ignore"):
        inside = ~(np.abs(want - np.round(want)) < 1e-5) | (want == 0)
    assert inside.mean() > 0.99
    np.testing.assert_array_equal(bins.target(depth).numpy()[inside], a[f"idx_target_{count}"][inside])
    assert bins.target(depth)[0, [0, 1, 5, 6, 7, 8]].tolist() == [count] * 6 and bins.target(depth)[0, 2] == 0


def test_projection_of_the_released_code(golden):
    d = np.load(golden / "n_data_ops.npz")
    P2 = d["P2"].astype(float)
    P2[2, 3] = 0  # it divides by z_cam
    rig, xyz = Calibration(P2, d["R0"], d["V2C"]).pinhole, d["pts"][:, :3].astype(float)
    np.testing.assert_allclose(lidar_to_cam(xyz, rig), d["pts_rect"], atol=1e-4)
    uv, depth = lidar_to_img(xyz, rig)
    front = depth > 1
    np.testing.assert_allclose(uv[front], d["pts_uv"][front], atol=2e-2, rtol=1e-5)
    np.testing.assert_allclose(depth, d["pts_depth"], atol=5e-3)
    np.testing.assert_array_equal(in_view(xyz, rig, (375, 1242)), d["fov_flag"])


# --- by hand ---


def test_projection_of_single_points():
    xyz = street(50)
    uv, depth = lidar_to_img(xyz, RIG)
    for p, (u, v), d in zip(xyz, uv, depth, strict=True):
        np.testing.assert_allclose((u, v, d), pinhole(p), rtol=1e-10)


def test_there_and_back():
    xyz = street()
    uv, depth = lidar_to_img(xyz, RIG)
    np.testing.assert_allclose(img_to_lidar(uv, depth, RIG), xyz, atol=1e-9)
    np.testing.assert_allclose(cam_to_lidar(lidar_to_cam(xyz, RIG), RIG), xyz, atol=1e-9)
    cam = lidar_to_cam(xyz, RIG)
    np.testing.assert_allclose(img_to_cam(*cam_to_img(cam, RIG), RIG), cam, atol=1e-9)


def test_left_is_left_and_up_is_up():
    "Lidar y points left, so larger y is a smaller u; z points up, so larger z is a smaller v; x is depth."
    (u0, u1, u2, u3), depth = lidar_to_img(np.array([[20.0, 0, 0], [20, 1, 0], [20, 0, 1], [30, 0, 0]]), RIG)
    assert u1[0] < u0[0] - 5 and u2[1] < u0[1] - 5 and depth[3] > depth[0] + 9


def test_behind_the_camera_is_not_seen():
    xyz = street()
    behind = xyz * [-1, 1, 1]
    assert not in_view(behind, RIG, (96, 320)).any() and not depth_map(behind, RIG, (96, 320)).any()
    assert (lidar_to_img(behind, RIG)[1] < 0).all()


def test_depth_map_is_the_slow_loop():
    xyz = np.concatenate([street(6000), street(50) * [-1, 1, 1]])
    size = (48, 160)
    rig = scaled(RIG, (0.5, 0.5))
    want = np.zeros(size, np.float32)
    for (u, v), d in zip(*lidar_to_img(xyz, rig), strict=True):
        i, j = int(np.floor(v + 0.5)), int(np.floor(u + 0.5))
        if d > 0 and 0 <= i < size[0] and 0 <= j < size[1] and (want[i, j] == 0 or d < want[i, j]):
            want[i, j] = d
    got = depth_map(xyz, rig, size)
    assert got.dtype == np.float32 and (want > 0).sum() > 500
    np.testing.assert_array_equal(got, want)


def test_a_resized_picture_keeps_its_projection():
    "A white patch around a point's pixel is found, in the resized picture, where the scaled rig projects the point."
    point = np.array([[18.0, -2.5, 0.3]])
    ((u, v),) = np.round(lidar_to_img(point, RIG)[0]).astype(int)
    image = np.zeros((96, 320, 3), np.uint8)
    image[v - 3 : v + 4, u - 3 : u + 4] = 255
    exact = img_to_lidar(np.array([[u, v]], float), lidar_to_img(point, RIG)[1], RIG)
    for size in ((192, 480), (48, 200)):
        view = View(RIG.camera, RIG.lidar_to_cam, image)
        s = prepare(
            Frame("0", (view,), np.zeros((0, 4), np.float32), Boxes(np.zeros((0, 7)), [])), ("Car",), image_size=size
        )
        light = s.images[0, 0].double()
        light /= light.sum()
        seen = [
            (light.sum(0) * torch.arange(size[1])).sum().item(),
            (light.sum(1) * torch.arange(size[0])).sum().item(),
        ]
        rig = Pinhole(s.camera[0].numpy(), s.lidar_to_cam[0].numpy())
        np.testing.assert_allclose(lidar_to_img(exact, rig)[0][0], seen, atol=0.1)
        np.testing.assert_allclose(lidar_to_img(exact, rig)[1], lidar_to_img(exact, RIG)[1])


# --- bins and cells ---


@pytest.mark.parametrize("bins", [DepthBins(2.0, 46.8, 80), DepthBins(1.0, 9.0, 7)])
def test_a_bin_holds_its_centre(bins):
    "Centres lie in the middle of growing bins; one that is off by half a bin would change class."
    edges, middle = torch.tensor(bins.edges), torch.tensor(bins.centres)
    assert edges[0] == bins.low and abs(edges[-1] - bins.high) < 1e-9 and (torch.diff(edges, n=2) > 0).all()
    torch.testing.assert_close(torch.diff(edges)[1:] / torch.diff(edges)[0], torch.arange(2.0, bins.count + 1).double())
    assert bins.target(middle).tolist() == list(range(bins.count))
    torch.testing.assert_close(middle - edges[:-1], edges[1:] - middle)
    torch.testing.assert_close(bins.index(edges), torch.arange(bins.count + 1.0).double())
    assert (
        bins.target(torch.tensor([bins.low - 0.01, bins.high + 0.01, 0.0, float("nan")])).tolist() == [bins.count] * 4
    )


def test_grid_by_hand():
    g = Grid((2.0, -4.0, -3.0), (6.0, 4.0, 1.0), (1.0, 2.0, 0.5))
    assert g.shape == (8, 4, 4)
    c = g.centres()
    assert c.shape == (8, 4, 4, 3) and c.dtype == torch.float64
    assert (
        c[0, 0, 0].tolist() == [2.5, -3, -2.75]
        and c[7, 0, 1].tolist() == [3.5, -3, 0.75]
        and c[0, 3, 2].tolist() == [4.5, 3, -2.75]
    )
    inside = c.reshape(-1, 3)
    assert g.inside(inside).all() and g.inside(inside.numpy()).all()
    z, y, x = torch.meshgrid(*map(torch.arange, g.shape), indexing="ij")
    torch.testing.assert_close(g.index(inside), torch.stack([x, y, z], -1).reshape(-1, 3) + 0.5, check_dtype=False)
    np.testing.assert_allclose(g.index(np.array([[2.0, -4, -3]])), 0)
    edge = torch.tensor([[2.0, -4, -3], [6, 0, 0], [3, 4, 0], [3, 0, 1], [1.99, 0, 0], [3, -4.01, 0], [3, 0, -3.01]])
    assert g.inside(edge).tolist() == [True] + [False] * 6
    assert g.with_cell((2, 2, 2)).shape == (2, 4, 2)
    with pytest.raises(ValueError, match="y range"):
        Grid((0.0, 0.0, 0.0), (4.0, 4.0, 4.0), (1.0, 1.5, 1.0))
