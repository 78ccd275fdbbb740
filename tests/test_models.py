"Teacher and student: the released networks' numbers, and does a pixel land where geometry says?"

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden.det import det_state, detu
from torch import nn

from cmkd.core import Batch, Boxes, Found, Frame, Pinhole, View
from cmkd.data.augment import flip_sample
from cmkd.data.dataset import FrameSet, Sample, collate, prepare
from cmkd.detect import as_boxes, detect_image, detect_set
from cmkd.distill.cmkd import distiller
from cmkd.distill.roles import camera, lidar
from cmkd.distill.teachers import Asked
from cmkd.geometry import bev_grid, image_grid, lidar_grid
from cmkd.layers.head import HeadMaps, detections
from cmkd.layers.image import ImageMaps
from cmkd.layers.lift import lift_plain
from cmkd.layers.voxels import voxelize
from cmkd.methods import recipe, role_of
from cmkd.models.camera import ImageToBev, added_up
from cmkd.models.checkpoints import released_name
from cmkd.models.lidar import bev_channels
from cmkd.taps import Taps
from cmkd.train.roles import load_network, save_weights
from cmkd.train.step import total

# --- the released networks, name by name ---


def fill(model: nn.Module, prefix: str = "") -> nn.Module:
    model.load_state_dict(
        {k: det_state(prefix + released_name(k), v.shape).to(v.dtype) for k, v in model.state_dict().items()}
    )
    return model


def released_student(*changes: str) -> nn.Module:
    model = fill(camera(recipe(name="release").override("student.lift=plain", *changes)))
    with torch.no_grad():
        model.lifted.image.reduce[1].weight *= 20
        model.lifted.image.classify[3].weight *= 8
    return model


def seen(images, lidar_to_cam, projection, size=(96, 320)) -> Batch:
    "Pictures of one camera, without a sweep, depth or labels."
    n, (H, W) = len(images), size
    nothing = [None] * n
    return Batch(
        [str(b) for b in range(n)],
        images[:, None],
        torch.tensor([[[H, W]]] * n),
        torch.zeros(0, 5),
        torch.as_tensor(lidar_to_cam)[:, None],
        torch.as_tensor(projection)[:, None],
        torch.zeros(n, 1, H, W),
        nothing,
        nothing,
    )


def swept(points) -> Batch:
    "A sweep that nobody photographed."
    image = torch.zeros(1, 3, 1, 1)
    return replace(seen(image, torch.eye(4)[None], torch.eye(4)[None, :3], (1, 1)), points=points)


def close(a, b, tol):
    np.testing.assert_allclose(torch.as_tensor(a).detach().numpy(), b, atol=tol, rtol=tol)


def test_released_teacher(golden):
    i = np.load(golden / "i_teacher_small.npz")
    model = fill(lidar(recipe(name="release"))).eval()
    p = torch.tensor(i["points"])
    with torch.no_grad():
        taps = model(swept(F.pad(p, (1, 0))))
    d = taps.bev.double()
    close([d.mean(), d.std(), d.abs().sum(), d.min(), d.max()], i["spatial_stats"], 1e-5)
    close(taps.head.cls.permute(0, 2, 3, 1)[:, ::8, ::8], i["cls_sub"], 1e-4)


def test_released_student(golden):
    "Picture to head, at 96 x 320 and the paper's space: frustum, BEV, class, box and direction maps (golden l)."
    z, model = np.load(golden / "l_student_reduced.npz"), released_student().eval()
    with torch.no_grad():
        model.head.conv_cls.weight *= 6
        model.head.conv_box.weight *= 0.3
        taps = model(seen(detu("l.reduced.img", (1, 3, 96, 320)), z["lidar_to_cam"], z["P2"]))
    depth = ImageMaps(taps.features, taps.depth_logits).depth
    close((taps.features[0, ::16, None, ::3, ::4] * depth[0, None, ::12, ::3, ::4]), z["frustum_sub"], 1e-4)
    close(taps.bev[0, ::16, ::4, ::4], z["bev"], 1e-4)
    assert np.ptp(z["bev"], axis=(1, 2)).max() > 0.1  # the picture is seen
    rows = {k: getattr(taps.head, k)[0].permute(1, 2, 0)[::4, ::4] for k in ("cls", "dir", "box")}
    close(rows["cls"], z["cls"], 1e-4)
    close(rows["dir"], z["dir"], 1e-4)
    close(rows["box"][::2, ::2], z["box"], 1e-4)


def test_released_training_step(golden):
    "Every loss term of the full stage of the recipe `release`, and the gradients' norms (golden l)."
    z, cfg = np.load(golden / "l_train_stage2_V2.npz"), recipe(name="release").override("student.lift=plain")
    rig, model = np.load(golden / "l_student_reduced.npz"), released_student("student.dropout=0").train()
    teacher = fill(lidar(cfg), "T.").eval().requires_grad_(False)
    kept = torch.arange(5) < torch.tensor(z["voxel_num_points"])[:, None]
    frame = torch.tensor(z["voxel_coords"])[:, :1, None].expand(-1, 5, 1).float()
    points = torch.cat([frame, torch.tensor(z["voxels"])], 2)[kept]
    assert len(voxelize(points, teacher.grid)[0]) == len(z["voxels"])
    depth = torch.zeros(2, 96, 320)
    depth[:, ::8, ::8] = detu("l.train.depth", (2, 12, 40), 0, 60) * (detu("l.train.dmask", (2, 12, 40)) >= 0.6)
    rigs = (torch.tensor(rig[k]).expand(2, -1, -1) for k in ("lidar_to_cam", "P2"))
    batch = replace(seen(detu("l.train.img", (2, 3, 96, 320)), *rigs), points=points, depth=depth[:, None])
    learns = distiller(cfg, model)
    terms = learns(model(batch), dict(teacher=Asked(teacher, learns.teacher_taps["teacher"])(batch)), batch)
    want = dict(zip(z["tb_names"], z["tb_values"], strict=True))
    for ours, theirs in (
        ("feature", "bev_loss"),
        ("cls", "rpn_loss_cls"),
        ("box", "rpn_loss_loc"),
        ("direction", "rpn_loss_dir"),
        ("depth", "loss_depth"),
    ):
        close(terms[ours], want[theirs], 1e-5)
    close(total(terms), z["loss"], 1e-5)
    total(terms).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    close(norm, z["grad_norm_before_clip"], 1e-3)
    grads = {released_name(k): p.grad.double() for k, p in model.named_parameters()}
    assert set(grads) == set(z["grad_names"])
    for name, (_, _, size, *_) in zip(z["grad_names"], z["grad_stats"], strict=True):
        if size > 1e-5:
            close(grads[name].abs().sum() / size, 1.0, 5e-3)  # smaller ones are rounding: biases before a batch norm
    head = grads["dense_head.conv_box.bias"][:2000]
    close(head, z["grad__dense_head__conv_box__bias"], 2e-5)


# --- shapes at the paper's size ---


@pytest.mark.parametrize("name, voxels", [("paper", (25, 376, 280)), ("release", (10, 188, 140))])
def test_full_size(name, voxels):
    "The student on the meta device; the teacher's sparse part on a few points, the rest on meta."
    cfg = recipe(name=name)
    with torch.device("meta"):
        student = camera(cfg).eval()
        bev = student.adapt(
            student.align(student.lifted.collapse(torch.zeros(1, cfg.student.reduced * voxels[0], *voxels[1:])))
        )
        head = student.head(student.bev2d(bev))
    assert (
        student.lifted.grid.shape == voxels
        and lidar_grid(cfg.space).shape == (40, 1504, 1120)
        and bev_grid(cfg.space).shape == (1, 188, 140)
    )
    assert (
        bev.shape == (1, 128, 188, 140)
        and bev_channels(cfg.teacher, cfg.space) == 128
        and student.anchors.shape == (188, 140, 6, 7)
    )
    assert [m.shape[1:] for m in (head.cls, head.box, head.dir)] == [(18, 188, 140), (42, 188, 140), (12, 188, 140)]
    if name == "release":
        assert (
            sum(p.numel() for p in student.parameters())
            + sum(b.numel() for n, b in student.named_buffers() if "running" in n)
            > 45.0e6
        )
    teacher = lidar(cfg).eval()
    points = torch.tensor([[0, 20.0, 3, -1, 0.5], [0, 30, -8, -0.5, 0.1]])
    with torch.no_grad():
        mine = teacher.backbone3d(*voxelize(points, teacher.grid), 1)
    assert mine.flatten(1, 2).shape == bev.shape
    active = (mine[0] != 0).flatten(0, 1).any(0)
    assert active.sum() < 60
    for y, x in ((103, 56), (69, 87)):
        assert active[y - 1 : y + 2, x - 1 : x + 2].any()  # (3 + 30.08)/.32, (20 - 2)/.32


@pytest.mark.parametrize("scale", ["smoke", "mini", "full"])
@pytest.mark.parametrize("name", ["paper", "release"])
def test_teacher_fits_student(scale, name):
    "After the lift they are one architecture, whatever the scale and recipe; anchors are the same boxes."
    cfg = recipe(name=name, scale=scale)
    with torch.device("meta"):
        a, b = lidar(cfg), camera(cfg)
    for part in ("bev2d", "head"):
        shapes = [{k: v.shape for k, v in getattr(m, part).state_dict().items()} for m in (a, b)]
        assert shapes[0] == shapes[1] and len(shapes[0]) > 5
    assert a.anchors.shape == b.anchors.shape and a.anchors.shape[:2] == bev_grid(cfg.space).shape[1:]


# --- a pixel lands where geometry says ---

KITTI = Pinhole(
    [[721.5377, 0, 609.5593, 44.85728], [0, 721.5377, 172.854, 0.2163791], [0, 0, 1, 0.002745884]],
    [
        [0.0002347736, -0.9999441, -0.01056347, -0.002796816],
        [0.01044940, 0.01056535, -0.9998896, -0.07510879],
        [0.9999453, 0.0001243653, 0.01045130, -0.2721328],
        [0, 0, 0, 1],
    ],
)
FORWARD = [[0, -1, 0, 0], [0, 0, -1, -0.08], [1, 0, 0, -0.27], [0, 0, 0, 1]]
TOY = Pinhole([[185.9, 0, 157, 11], [0, 185.9, 44, 0.06], [0, 0, 1, 0.003]], FORWARD)
EVEN = Pinhole([[185.9, 0, 159.5, 0], [0, 185.9, 44, 0], [0, 0, 1, 0]], FORWARD)
CLASSES = ("Car", "Pedestrian", "Cyclist")
PLACES = [(11.0, 3.2, -0.6), (17.0, -5.0, -0.2), (24.5, 0.6, -0.8)]  # lidar, m: the middles of three upright boards


class Eye(nn.Module):
    "An image branch that sees perfectly: a cell shows the pixel under its centre, and knows its depth."

    def __init__(self, stride, bins, depth):
        super().__init__()
        self.stride, self.bins, self.depth = stride, bins, depth

    def forward(self, images, sizes):
        s = self.stride
        k = self.bins.target(self.depth[:, ::s, ::s])
        return ImageMaps(
            images[:, :1, ::s, ::s].clone(), 50 * F.one_hot(k, self.bins.count + 1).permute(0, 3, 1, 2).float()
        )


def board(place, rig, size, grown=1.0) -> Frame:
    "A black picture with one white board, 2.4 m wide and 1.6 m high, that faces the scanner, and its LiDAR points."
    y, z = (a.ravel() for a in np.meshgrid(np.linspace(-1.2, 1.2, 25), np.linspace(-0.8, 0.8, 17)))
    points = np.stack([place[0] + 0 * y, place[1] + y, place[2] + z, 0 * y], 1)
    cam = points[:, :3] @ rig.lidar_to_cam[:3, :3].T + rig.lidar_to_cam[:3, 3]
    p = cam @ rig.camera[:, :3].T + rig.camera[:, 3]
    (l, t), (r, b) = (p[:, :2] / p[:, 2:]).min(0), (p[:, :2] / p[:, 2:]).max(0)
    image = np.zeros((*size, 3), np.uint8)
    image[round(t) : round(b) + 1, round(l) : round(r) + 1] = 255
    view = View(rig.camera, rig.lidar_to_cam, image)
    return Frame("0", (view,), points.astype(np.float32), Boxes([[*place, 0.2, 2.4, 1.6, 0.3]], ["Car"]))


def lifted(cfg, samples, stride):
    "(B, Y, X) light from above: the student's lift after a perfect image branch."
    with torch.device("meta"):
        net = ImageToBev(replace(cfg.student, lift="plain"), cfg.space)
    batch = collate(samples)
    depth = torch.cat([torch.where(s.images[:, 0] > 0, s.depth[s.depth > 0].mean(), 0.0) for s in samples])
    heights = net.grid.shape[0]
    net.image, net.collapse = Eye(stride, net.bins, depth), nn.Sequential(nn.Conv2d(heights, 1, 1, bias=False))
    nn.init.ones_(net.collapse[0].weight)
    return net, net.eval()(batch)[1][:, 0].detach().double()


def middle(grid, light):
    x, y = grid.centres()[0, ..., 0], grid.centres()[0, ..., 1]
    return torch.stack([(light * x).sum((1, 2)), (light * y).sum((1, 2))], 1) / light.sum((1, 2))[:, None]


@pytest.mark.parametrize("flip", [False, True], ids=["", "flipped"])
@pytest.mark.parametrize(
    "cfg, rig, size, stride, tolerance",
    [
        (recipe(scale="mini"), TOY, (96, 320), 4, (0.25, 0.08)),
        (recipe(scale="mini", data="kitti"), KITTI, (375, 1242), 4, (0.15, 0.06)),
        (recipe(scale="full"), KITTI, (375, 1242), 4, (0.10, 0.03)),
        (recipe(name="release", scale="full"), KITTI, (375, 1242), 8, (0.20, 0.40)),
    ],
    ids=["world", "kitti-mini", "paper", "release"],
)
def test_light_lands_where_the_points_are(cfg, rig, size, stride, tolerance, flip):
    "Camera and LiDAR meet in one BEV cell, before and after the joint mirror; tolerance in metres, across and along."
    samples = [prepare(board(p, rig, size), CLASSES, cfg.data.image_size) for p in PLACES]
    if flip:
        samples = [flip_sample(s, cfg.data.mirror) for s in samples]
    net, light = lifted(cfg, samples, stride)
    assert (light.sum((1, 2)) > 0).all()
    truth = torch.stack([s.points[:, :2].double().mean(0) for s in samples])
    depth = torch.stack([s.depth[s.depth > 0].double().mean() for s in samples])
    truth[:, 0] += (
        torch.tensor(net.bins.centres)[net.bins.target(depth)] - depth
    )  # a board is as deep as the middle of its bin
    error = (middle(net.grid, light) - truth).abs()
    assert (error[:, 1] < tolerance[0]).all() and (error[:, 0] < tolerance[1]).all(), error
    far = (net.grid.centres()[0, ..., :2] - truth[:, None, None]).norm(dim=-1) > 2.4 + max(net.grid.cell) * 2
    assert (light * far).sum() < 0.02 * light.sum()


def test_lift_has_no_bias():
    "Cells are four pixels wide: one board may be off by a third of a metre; many, on average, are not."
    cfg, across = recipe(scale="mini"), np.linspace(-8.5, 8.5, 35)
    samples = [prepare(board((17.0, y, -0.3), TOY, (96, 320)), CLASSES) for y in across]
    net, light = lifted(cfg, samples, 4)
    error = (middle(net.grid, light)[:, 1] - torch.stack([s.points[:, 1].double().mean() for s in samples])).numpy()
    slope, shift = np.polyfit(across, error, 1)
    assert abs(shift) < 0.05 and abs(slope) < 0.03, (shift, slope)


def test_mirrored_frame_mirrors_both_maps():
    "With the camera above the scanner's x axis, the mirrored frame is the mirrored map, for LiDAR and for the lift."
    cfg = recipe(scale="mini")
    samples = [prepare(board(p, EVEN, (96, 320)), CLASSES) for p in PLACES]
    flipped = [flip_sample(s) for s in samples]
    (_, a), (_, b) = lifted(cfg, samples, 1), lifted(cfg, flipped, 1)
    assert a.sum() > 0
    close(b, a.flip(1).numpy(), 1e-4)
    assert not torch.allclose(a, b)
    grid, teacher = bev_grid(cfg.space), lidar(cfg).eval()

    def occupied(samples):
        _, c = voxelize(collate(samples).points, grid)
        out = torch.zeros(3, *grid.shape[1:])
        out[c[:, 0].long(), c[:, 2].long(), c[:, 3].long()] = 1
        return out

    one = occupied(samples)
    assert torch.equal(occupied(flipped), one.flip(1)) and one.sum() > 6
    boxes = torch.stack([s.boxes[0] for s in samples]), torch.stack([s.boxes[0] for s in flipped])
    close(boxes[1][:, [1, 6]], -boxes[0][:, [1, 6]].numpy(), 1e-4)
    with torch.no_grad():
        bev = teacher(collate(samples)).bev
    assert ((bev != 0).any(1).float().sum((1, 2)) > 0).all() and bev.shape[2:] == a.shape[1:]


def test_a_frame_does_not_see_its_neighbour():
    "In eval mode, with another rig beside it, each frame's maps stay what they are alone."
    torch.manual_seed(0)
    cfg = recipe(scale="smoke")
    model = camera(cfg).eval()
    r = np.random.default_rng(0)
    samples = [
        prepare(
            Frame(
                str(k),
                (View(rig.camera, rig.lidar_to_cam, r.integers(0, 255, (96, 320, 3), dtype=np.uint8)),),
                np.zeros((0, 4), np.float32),
            ),
            CLASSES,
        )
        for k, rig in enumerate((TOY, EVEN))
    ]
    with torch.no_grad():
        both = model(collate(samples))
        for k in (0, 1):
            alone = model(collate(samples[k : k + 1]))
            close(both.head.cls[k], alone.head.cls[0].numpy(), 1e-4)
            close(both.bev_raw[k], alone.bev_raw[0].numpy(), 1e-4)
    assert not torch.allclose(both.bev_raw[0], both.bev_raw[1])
    upto = model(collate(samples), upto="bev")
    assert upto.head is None and upto.bev2d is None and upto.bev is not None
    assert len(model.lifted.known) == 2, "one set of rays a rig"


# --- detection ---


class Noise(FrameSet):
    "Five random pictures of two rigs with a few points."

    name, split, labelled, ids = "noise", "val", False, tuple("abcde")

    def frame(self, i):
        r = np.random.default_rng(i)
        points = r.uniform([5, -6, -1.5, 0], [25, 6, 0.5, 1], (200, 4)).astype(np.float32)
        rig, image = (TOY, EVEN)[i % 2], r.integers(0, 255, (120, 400, 3), dtype=np.uint8)
        return Frame(self.ids[i], (View(rig.camera, rig.lidar_to_cam, image),), points)


def test_detections_carry_names_and_come_best_first():
    found = Found(torch.rand(3, 7), torch.tensor([0.9, 0.5, 0.2]), torch.tensor([1, 2, 0]))
    boxes = as_boxes(found, CLASSES)
    assert boxes.names.tolist() == ["Pedestrian", "Cyclist", "Car"]
    close(boxes.scores, [0.9, 0.5, 0.2], 1e-6)
    close(boxes.boxes, found.boxes.numpy(), 0)
    assert len(as_boxes(Found(torch.zeros(0, 7), torch.zeros(0), torch.zeros(0).long()), CLASSES)) == 0


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_set_is_detected_frame_by_frame(role, tmp_path):
    "Whatever the batch, each id gets its own boxes; a picture alone gives what the set gave."
    cfg = recipe(scale="smoke").override("data.image_size=[96, 320]")
    torch.manual_seed(0)
    model = (lidar if role == "teacher" else camera)(cfg)
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.momentum = 0.9
    with torch.no_grad():
        nn.init.normal_(model.head.conv_cls.weight, std=0.5)
        model.head.conv_cls.bias.fill_(-2.6)
        model.train()
        for _ in range(2):
            model(collate([prepare(Noise().frame(i), CLASSES, cfg.data.image_size) for i in range(4)]))
    save_weights(model, tmp_path / "w.safetensors")
    load = lambda cfg: load_network(role_of(cfg, role), cfg, tmp_path / "w.safetensors")
    model = load(cfg)
    assert not model.training
    a, b = (
        detect_set(model, Noise(), cfg.data, cfg.space, cfg.head, batch=n, progress=False, device="cpu") for n in (2, 5)
    )
    assert list(a) == list("abcde") and sum(map(len, a.values())) > 5
    assert len({len(v) for v in a.values()} | {v.boxes.tobytes() for v in a.values()}) > 3
    for k in a:
        assert len(a[k]) == len(b[k])
        close(a[k].scores, b[k].scores, 1e-4)
    assert all((np.diff(v.scores) <= 0).all() and (v.scores >= 0.1).all() for v in a.values())
    view = Noise().frame(1).views[0]
    if role == "student":
        one = detect_image(model, view, cfg.data, cfg.head)
        close(one.boxes, a["b"].boxes, 1e-3)
        assert one.names.tolist() == a["b"].names.tolist()
    else:
        with pytest.raises(ValueError, match="needs a student, got a LidarDetector"):
            detect_image(model, view, cfg.data, cfg.head)
    with pytest.raises(ValueError, match="does not fit this"):
        load(cfg.override("bev.filters=[8, 8]"))


# --- several cameras ---


def turned(rig: Pinhole, angle: float) -> Pinhole:
    "The same camera, turned about the scanner's upright axis by `angle` to the left, rad."
    c, s = np.cos(angle), np.sin(angle)
    return Pinhole(rig.camera, rig.lidar_to_cam @ np.array([[c, s, 0, 0], [-s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))


def moment(*rigs: Pinhole, seed=0) -> Sample:
    "One frame of a random picture a camera; the first camera's picture is the same whoever stands beside it."
    pictures = [
        np.random.default_rng(seed + k).integers(0, 255, (96, 320, 3), dtype=np.uint8) for k in range(len(rigs))
    ]
    views = tuple(
        View(r.camera, r.lidar_to_cam, p, f"camera {k}") for k, (r, p) in enumerate(zip(rigs, pictures, strict=True))
    )
    return prepare(Frame("0", views, np.zeros((0, 4), np.float32)), CLASSES)


@pytest.mark.parametrize("shift", [0.3, 3.1], ids=["overlapping", "back to back"])
def test_two_cameras_fill_one_map(shift):
    "The sum of what each camera alone lifts; fused and plain agree, and the order of cameras does not matter."
    torch.manual_seed(0)
    cfg = recipe(scale="smoke").override("space.low=[-25.6, -12.8, -3]", "space.high=[25.6, 12.8, 1]")
    fused, plain = (ImageToBev(replace(cfg.student, lift=how), cfg.space).eval() for how in ("fused", "plain"))
    plain.load_state_dict(fused.state_dict())
    left, right = TOY, turned(EVEN, shift)
    bare = [nn.Sequential(n.collapse[0], nn.Identity()) for n in (fused, plain)]  # linear: no norm, no relu
    for net, collapse in zip((fused, plain), bare, strict=True):
        net.collapse = collapse
    both = moment(left, right)
    of_cameras = ("images", "sizes", "lidar_to_cam", "camera", "depth")
    alone = [replace(both, **{k: getattr(both, k)[i : i + 1] for k in of_cameras}) for i in (0, 1)]
    swapped = replace(both, **{k: getattr(both, k).flip(0) for k in of_cameras})
    batch = collate([both, swapped])
    with torch.no_grad():
        maps, bev = fused(batch)
        one, two = (fused(collate([a]))[1] for a in alone)
        features, depth = maps.features.double(), maps.depth.double()  # as float32 the plain lift rounds places to 1e-5
        texels = torch.stack(plain.rigs(batch, tuple(features.shape[2:])))
        volume = added_up(lift_plain(features, depth, texels, plain.grid.shape), 2)
        reference = torch.einsum("bczyx,zco->boyx", volume, plain.matrix(features.shape[1]).double())
    assert len(features) == 4 and bev.shape == reference.shape and bev.shape[2:] == image_grid(cfg.space).shape[1:]
    bev, one, two = (m / reference.abs().max() for m in (bev, one, two))
    close(bev[0], bev[1], 1e-6)
    close(bev[:1], (one + two).numpy(), 1e-6)
    close(bev, (reference / reference.abs().max()).numpy(), 1e-6)
    assert one.abs().max() > 0.05 and two.abs().max() > 0.05
    shared = ((one != 0).any(1) & (two != 0).any(1)).float().mean()
    assert shared > 0.05 if shift < 1 else shared == 0


def test_a_blind_camera_changes_nothing():
    "A camera that looks away from the whole space beside the one that looks into it: the same detections."
    torch.manual_seed(0)
    model = camera(recipe(scale="smoke")).eval()
    with torch.no_grad():
        alone, beside = (model(collate([moment(TOY, *more)])) for more in ((), (turned(TOY, np.pi),)))
    assert alone.features.shape[0] == 1 and beside.features.shape[0] == 2
    close(beside.head.cls, alone.head.cls.numpy(), 1e-5)
    close(beside.bev_raw, alone.bev_raw.numpy(), 1e-5)


def test_frames_of_several_cameras_keep_to_themselves():
    "In a batch of frames with two cameras each, every frame's maps are those that it has alone."
    torch.manual_seed(0)
    model = camera(recipe(scale="smoke")).eval()
    samples = [moment(TOY, turned(EVEN, 0.4), seed=10), moment(turned(TOY, -0.2), EVEN, seed=20)]
    with torch.no_grad():
        both = model(collate(samples))
        for k in (0, 1):
            close(both.head.cls[k], model(collate(samples[k : k + 1])).head.cls[0].numpy(), 1e-4)
    assert not torch.allclose(both.bev_raw[0], both.bev_raw[1])
    with pytest.raises(ValueError, match=r"frames of \[1, 2\] cameras"):
        collate([moment(TOY), samples[0]])


@pytest.mark.parametrize("build", [camera, lidar])
def test_a_detector_reads_its_own_boxes_each_class_for_itself_where_asked(build):
    "As `detections` of its maps and anchors; two classes at one place are both found only class by class."
    cfg = recipe(scale="smoke")
    model, head = build(cfg).eval(), replace(cfg.head, score=0.6)
    (Y, X, A), C = model.anchors.shape[:3], len(cfg.data.classes)
    cls = torch.full((1, A, C, Y, X), -9.0)
    cls[0, 0, :2, 3, 5] = torch.tensor([2.0, 1.0])
    maps = HeadMaps(cls.flatten(1, 2), torch.zeros(1, A * 7, Y, X), torch.zeros(1, A * 2, Y, X))
    for per_class, labels in ((False, [0]), (True, [0, 1])):
        own = replace(head, per_class=per_class)
        (found,) = model.found(Taps(head=maps), own)
        (want,) = detections(maps, model.anchors, own)
        assert found.labels.tolist() == labels and torch.equal(found.boxes, want.boxes)
