"UniDistill's detectors, part by part, against the numbers of the released code."
import numpy as np
import pytest
import torch
from golden.det import det_fill
from golden.reading import Golden

from cmkd.geometry import Grid
from cmkd.layers.bev import Bev, BevBackbone, height_to_channels
from cmkd.layers.centre import AutoWeights, Centre, CentreHead, CentreMaps, assigned
from cmkd.layers.centre_found import candidates, centres_found
from cmkd.layers.centre_loss import CentreLosses, balanced, centre_loss, group_losses
from cmkd.layers.fuse import Fusion
from cmkd.layers.lift import lift
from cmkd.layers.sparse import SparseBackbone
from cmkd.layers.splat import columns_of, frustum, in_street, splat_plain, splat_rays
from cmkd.layers.voxels import voxelize


def head_grid(golden: Golden) -> Grid:
    "The BEV grid of a golden that names no height."
    (Y, X), low = golden["grid_hw"].tolist(), golden["pc_range"].tolist()
    cell = round(float(golden["voxel_size"][0]*golden["out_size_factor"]), 4)
    return Grid((*low, -5.), (low[0] + X*cell, low[1] + Y*cell, 3.), (cell, cell, 8.))


def real(boxes):
    "Boxes with velocity and labels from 0 on, frame by frame, without padding."
    rows = [b[(b != 0).any(1)] for b in boxes]
    return [r[:, :9] for r in rows], [r[:, 9].long() - 1 for r in rows]


def test_targets():
    golden, wanted = Golden("u_head_targets"), Golden("u_head_targets").expected
    groups, at = assigned(*real(golden["boxes"]), head_grid(golden)), 0
    for t, (group, classes) in enumerate(zip(groups, Centre().tasks, strict=True)):
        heat = group.heat((3, classes, *golden["grid_hw"].tolist()))
        np.testing.assert_array_equal(heat, wanted["heatmap"][:, at:at + classes])
        on = wanted["mask"][:, t]
        np.testing.assert_array_equal(group.cell, wanted["ind"][:, t][on])
        np.testing.assert_array_equal(group.frame, on.nonzero()[0])
        atol, rtol = golden.allowed["box_encoding"]
        np.testing.assert_allclose(group.code, wanted["box_encoding"][:, t][on], rtol, atol)
        at += classes


@pytest.mark.parametrize("case", ["far", "near"])
def test_detection_loss(case):
    golden = Golden("u_head_loss")
    hm, reg = golden["hm"].clone(), golden["reg"].clone()
    at = golden["pos_b"].long(), golden["pos_task"].long(), golden["pos_ind"].long()
    if case == "near":
        reg = (reg*golden["near_scale"]).float()
        reg.view(3, 6, 11, -1)[at[0], at[1], :, at[2]] += golden["near_add"].float()
    hm.requires_grad_()
    reg.requires_grad_()
    weights, cfg = AutoWeights(), CentreLosses(balance="auto", axes="xzy")
    weights.params.data = golden["auto_params"].clone()
    maps, goals = CentreMaps(hm, reg), assigned(*real(golden["boxes"]), head_grid(golden))
    tasks, grid = Centre().tasks, head_grid(golden)
    each = [group_losses(m, g, grid, cfg) for m, g in zip(maps.groups(tasks), goals, strict=True)]
    told = {"hm": [e.heat for e in each], "loc": [e.box for e in each], "iou": [e.iou for e in each],
            "iou_aware": [e.iou_aware for e in each]}
    names = ("x", "y", "z", "w", "l", "h", "sin_r", "cos_r", "vx", "vy")
    told |= {name: [e.parts[i] for e in each] for i, name in enumerate(names)}
    for name, values in told.items(): golden.close(f"{case}_{name}_loss_per_task", torch.stack(values))
    golden.close(f"{case}_loss_per_task", torch.stack([balanced(e, weights, cfg) for e in each]))
    total = centre_loss(maps, goals, tasks, grid, weights, cfg)
    golden.close(f"{case}_loss", total)
    total.backward()
    golden.close(f"{case}_grad_hm_sub", hm.grad[..., ::4, ::4])
    golden.close(f"{case}_grad_hm_abssum", hm.grad.double().abs().sum())
    golden.close(f"{case}_grad_reg_abssum", reg.grad.double().abs().sum())
    golden.close(f"{case}_grad_reg_at_positives", reg.grad.view(3, 6, 11, -1)[at[0], at[1], :, at[2]])
    golden.close(f"{case}_grad_auto_params", weights.params.grad)


def test_boxes_off_the_maps():
    golden = Golden("u_head_decode")
    grid, reg = head_grid(golden), golden["reg"].clone().view(2, 6, 11, 44, 60)
    reg[:, :, 10], reg[:, :, 2] = golden["iou"], golden["z"]
    reg[:, :, 3:6] += .5
    maps = CentreMaps(golden["hm"], reg.flatten(1, 2))
    for b, found in enumerate(centres_found(maps, grid)):
        each = [candidates(m.heat[b], m.box[b], grid) for m in maps.groups(Centre().tasks)]
        golden.close(f"frame{b}_candidates_per_task", torch.tensor([len(c.heat) for c in each]))
        golden.close(f"frame{b}_candidate_scores", torch.cat([c.heat for c in each]))
        golden.close(f"frame{b}_candidate_nms_scores", torch.cat([c.rank for c in each]))
        golden.close(f"frame{b}_candidate_boxes", torch.cat([c.boxes for c in each])[::4])
        golden.close(f"frame{b}_boxes", torch.cat([found.boxes, found.velocity], 1))
        golden.close(f"frame{b}_scores", found.scores)
        golden.close(f"frame{b}_labels", found.labels + 1)


def test_fusion():
    golden = Golden("u_fusion")
    net = det_fill(Fusion(32), "dev.fusion_encoder.").eval()
    lidar, camera = (golden[k].clone().requires_grad_() for k in ("lidar", "camera"))
    golden.close("y_eval", net(lidar, camera)[:, ::4])
    y = net.train()(lidar, camera)
    (y**2).sum().backward()
    golden.close("y_train", y[:, ::4])
    golden.close("grad_lidar", lidar.grad[:, ::8])
    golden.close("grad_camera", camera.grad[:, ::8])
    for name in ("running_mean", "running_var"):
        golden.close(f"after_reduce_conv.1.{name}", getattr(net.reduce_conv[1], name))


def test_bev_encoder_and_head():
    golden = Golden("u_bev_and_head")
    encoder = det_fill(BevBackbone(256, Bev()), "dev.bev_encoder.backbone_2d.").eval()
    head = det_fill(CentreHead(512), "dev.det_head.dense_head.").eval()
    with torch.no_grad():
        high = encoder(golden["x"])
        maps = head(high)
        golden.close("shared", head.shared_conv(high)[:, ::8])
    golden.close("bev_high", high[:, ::16])
    golden.close("hm", maps.heat)
    golden.close("reg", maps.box)


def test_lidar_branch():
    golden = Golden("u_lidar")
    clouds = []
    for b in range(2):
        cloud = torch.stack([golden[f"{k}{b}"] for k in "xyzit"], 1)
        n = len(cloud)//3
        cloud[:n, :3] = cloud[:n, :3]*golden["cluster_scale"] + golden["cluster_shift"]
        clouds.append(torch.nn.functional.pad(cloud, (1, 0), value=b))
    low, high = golden["point_cloud_range"].view(2, 3).tolist()
    cell = golden["voxel_size"].tolist()
    grid = Grid(*(tuple(round(float(x), 4) for x in v) for v in (low, high, cell)))
    features, coords = voxelize(torch.cat(clouds).float(), grid, 10, 100000)
    order = np.lexsort(coords.numpy().T[::-1])
    golden.close("voxel_coords", coords[order])
    golden.close("voxel_mean", features[order])
    net = SparseBackbone(grid, (16, 32, 64, 128), 128, True, 5).eval()
    det_fill(net, "dev.lidar_encoder.backbone_3d.")
    with torch.no_grad(): bev = height_to_channels(net(features, coords, 2))
    golden.close("bev", bev[:, ::4])


def rigs(golden):
    "lidar to camera and camera matrices of the frames of u_lss: augmentations of picture and street are parts of them."
    ida, intrinsic = (golden[k][:, 0].double() for k in ("ida_mats", "intrin_mats"))
    crop = ida[..., :3, :3].clone()
    crop[..., :2, 2] += ida[..., :2, 3]
    street = golden["bda_mat"][:, None].double() @ golden["sensor2ego_mats"][:, 0].double()
    return torch.linalg.inv(street), torch.cat([crop @ intrinsic[..., :3, :3], torch.zeros(2, 3, 3, 1)], -1)


def test_camera_branch():
    golden = Golden("u_lss")
    (x, y, z), image = (golden[f"{k}_bound"].tolist() for k in "xyz"), tuple(golden["final_dim"].tolist())
    grid = Grid(*(tuple(round(b[i], 4) for b in (x, y, z)) for i in range(3)))
    start, stop, step = golden["d_bound"].tolist()
    bins, channels = round((stop - start)/step), int(golden["output_channels"])
    points = frustum(image, (4, 10), (start, stop), bins)
    golden.close("frustum", torch.nn.functional.pad(points, (0, 1), value=1))
    xyz = torch.stack([in_street(points, *rig) for rig in zip(*rigs(golden), strict=True)])
    golden.close("geometry", xyz)
    for name, released in (("as_released", True), ("floor", False)):
        columns = columns_of(xyz.float(), grid, released)
        golden.close(f"points_kept_{name}", (columns >= 0).sum())
        said = golden["depth_and_context"].clone().requires_grad_()
        features, depth = said[:, bins:].unflatten(0, (2, 3)), said[:, :bins].softmax(1).unflatten(0, (2, 3))
        tall = (m.transpose(1, 2).flatten(2, 3) for m in (features, depth))
        known = [splat_rays(c, grid.shape[1:]) for c in columns]
        for bev in (splat_plain(features, depth, columns, grid.shape[1:]),
                    lift(*tall, known, torch.eye(channels)[None], grid.shape[1:])):
            golden.close(f"bev_{name}", bev)
            grad, = torch.autograd.grad((bev*golden["w"]).sum(), said, retain_graph=True)
            if released: golden.close("grad_depth_and_context", grad)
