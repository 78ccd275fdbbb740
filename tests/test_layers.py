"Voxels, sparse and 2D backbones, image branch, lift, adaptation: against the released code and against the slow way."

import numpy as np
import pytest
import spconv.pytorch as spconv
import torch
import torch.nn.functional as F
from golden.det import det, det_fill
from torch import nn

from cmkd.geometry import DepthBins, Grid
from cmkd.layers.adapt import DomainAdaptation, ReleasedBlock, SelfCalibrated
from cmkd.layers.bev import Bev, BevBackbone, height_to_channels
from cmkd.layers.image import MEAN, STD, ImageBackbone, ImageBranch, ImageMaps, inside
from cmkd.layers.lift import lift, lift_plain, rays, voxel_texels
from cmkd.layers.sparse import Residual, SparseBackbone, dense
from cmkd.layers.voxels import voxelize
from cmkd.methods import recipe

PAPER = Grid((2.0, -30.08, -3.0), (46.8, 30.08, 1.0), (0.04, 0.04, 0.1))


def close(a, b, tol):
    np.testing.assert_allclose(torch.as_tensor(a).detach().numpy(), b, atol=tol, rtol=tol)


# --- voxels ---


def test_voxels_are_the_slow_loop():
    "Mean of the first five points of a voxel, the first voxels of each frame, z y x; frames do not mix."
    g = Grid((0.0, -4.0, -1.0), (8.0, 4.0, 1.0), (1.0, 2.0, 0.5))
    r = np.random.default_rng(0)
    points = np.concatenate(
        [r.integers(0, 3, (900, 1)), r.uniform([-0.5, -4.5, -1.2, 0], [8.5, 4.5, 1.2, 1], (900, 4))], 1
    ).astype(np.float32)
    points = points[np.argsort(points[:, 0], kind="stable")]
    cells = {}
    for b, x, y, z, i in points.tolist():
        if not (0 <= x < 8 and -4 <= y < 4 and -1 <= z < 1):
            continue
        key = int(b), int((z + 1) // 0.5), int((y + 4) // 2), int(x // 1)
        if key not in cells and sum(k[0] == key[0] for k in cells) == 40:
            continue
        if len(cells.setdefault(key, [])) < 5:
            cells[key].append((x, y, z, i))
    mean, coords = voxelize(torch.tensor(points), g, max_points=5, max_voxels=40)
    assert coords.dtype == torch.int32 and len(coords) == len(cells) == 120
    for c, m in zip(coords.tolist(), mean, strict=True):
        close(m, np.mean(cells[tuple(c)], 0), 1e-5)


def test_released_teacher_backbone(golden):
    "Voxels, residual sparse backbone and the order of heights and channels (golden i)."
    i = np.load(golden / "i_teacher_small.npz")
    mean, coords = voxelize(F.pad(torch.tensor(i["points"]), (1, 0)), PAPER)
    row = {tuple(c): n for n, c in enumerate(coords[:, 1:].tolist())}
    assert row.keys() == {tuple(c) for c in i["voxel_coords"].tolist()}
    close(mean[[row[tuple(c)] for c in i["voxel_coords"].tolist()]], i["voxels_sum"] / i["voxel_num"][:, None], 1e-5)
    net = det_fill(SparseBackbone(PAPER, (16, 32, 64, 64), 64, residual=True), "backbone_3d.").eval()
    shuffled = torch.randperm(len(mean), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bev = height_to_channels(net(mean[shuffled], coords[shuffled], 1))
    assert bev.shape == (1, 128, 188, 140)
    y, x = i["nz_index"].T
    close(bev[0, :, y, x][:, ::4], i["spatial_nz"], 1e-4)
    assert ((bev[0] != 0).any(0).nonzero().numpy() == i["nz_index"]).all()


def test_height_is_the_fast_half_of_the_channel():
    v = torch.arange(2 * 3 * 4 * 1 * 1.0).reshape(2, 3, 4, 1, 1)
    assert height_to_channels(v)[1, 2 * 4 + 3, 0, 0] == v[1, 2, 3, 0, 0]


@pytest.mark.parametrize("residual", [False, True])
def test_sparse_is_dense_where_voxels_are(residual):
    "The whole backbone, plain and residual, against dense convolutions that forget what lies off the active set."
    g = Grid((0.0, 0.0, 0.0), (8.0, 8.0, 40.0), (1.0, 1.0, 1.0))
    torch.manual_seed(0)
    net = SparseBackbone(g, (4, 6, 6, 6), 5, residual).double()
    cell = torch.randperm(2 * 40 * 64)[:150]
    c = torch.stack([cell // 2560, cell // 64 % 40, cell // 8 % 8, cell % 8], 1).int()
    f = torch.randn(len(c), 4, dtype=torch.float64)
    net.train()
    [net(f, c, 2) for _ in range(3)]
    net.eval()  # running statistics that are no identity
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.3, 0.3)
    x = torch.zeros(2, 4, *net.shape, dtype=torch.float64)
    on = torch.zeros(2, 1, *net.shape, dtype=torch.float64)
    at = tuple(c.long().T)
    x[at[0], :, at[1], at[2], at[3]] = f
    on[at[0], 0, at[1], at[2], at[3]] = 1

    def conv(m, x, on):
        w = m.weight.permute(0, 4, 1, 2, 3)
        if not isinstance(m, spconv.SubMConv3d):
            on = (
                F.conv3d(
                    on,
                    torch.ones(1, 1, *w.shape[2:], dtype=torch.float64),
                    stride=tuple(m.stride),
                    padding=tuple(m.padding),
                )
                > 0
            ).double()
            return F.conv3d(x, w, None, tuple(m.stride), tuple(m.padding)) * on, on
        return F.conv3d(x, w, m.bias, 1, 1) * on, on

    def bn(m, x, on):
        return F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, eps=1e-3) * on

    def run(layer, x, on):
        if isinstance(layer, Residual):
            y = bn(layer.bn1, conv(layer.conv1, x, on)[0], on).relu()
            return (bn(layer.bn2, conv(layer.conv2, y, on)[0], on) + x).relu(), on
        if isinstance(layer, (spconv.SubMConv3d, spconv.SparseConv3d)):
            return conv(layer, x, on)
        if isinstance(layer, nn.BatchNorm1d):
            return bn(layer, x, on), on
        if isinstance(layer, nn.ReLU):
            return x.relu(), on
        for part in layer:
            x, on = run(part, x, on)
        return x, on

    for stage in (net.conv_input, net.conv1, net.conv2, net.conv3, net.conv4, net.conv_out):
        x, on = run(stage, x, on)
    close(net(f, c, 2), x.detach(), 1e-9)


@pytest.mark.parametrize(
    "grid, channels", [(PAPER, (4, 4, 4, 4)), (Grid((0.0,) * 3, (8.0, 16.0, 20.0), (1.0,) * 3), (4, 4, 4))]
)
def test_an_empty_sweep_is_a_map_of_zeros(grid, channels):
    "Of the shape of any other, whether the whole batch is empty or one of its frames."
    net = SparseBackbone(grid, channels, 3).eval()
    point = torch.tensor([[1, 5.0, 5, 0.5, 1]])
    with torch.no_grad():
        some, none = net(*voxelize(point, grid), 2), net(*voxelize(point[:0], grid), 2)
    assert none.shape == some.shape and not none.any() and not some[0].any() and some[1].any()


def test_the_bias_of_a_residual_learns():
    x = spconv.SparseConvTensor(
        torch.randn(6, 4),
        torch.cat([torch.zeros(6, 1), torch.arange(6.0)[:, None].expand(-1, 3)], 1).int(),
        [6, 6, 6],
        1,
    )
    block = Residual(4, "k").train()
    block(x).features.square().sum().backward()
    assert (
        block.conv1.bias is not None and block.conv2.bias.grad is not None and block.conv1.weight.grad.abs().sum() > 0
    )
    block.eval()
    with_it = block(x).features
    with torch.no_grad():
        block.conv2.bias += 1.0
    assert not torch.allclose(with_it, block(x).features)


def test_dense_puts_every_voxel_in_its_place():
    x = spconv.SparseConvTensor(
        torch.randn(3, 2), torch.tensor([[0, 1, 2, 3], [1, 0, 4, 1], [1, 3, 0, 0]]).int(), [4, 5, 6], 2
    )
    v = dense(x)
    assert v.shape == (2, 2, 4, 5, 6) and (v != 0).any(1).sum() == 3
    for (b, z, y, x_), f in zip(x.indices.tolist(), x.features, strict=True):
        assert torch.equal(v[b, :, z, y, x_], f)


# --- BEV ---


def test_released_bev_backbone(golden):
    net = det_fill(BevBackbone(128, Bev()), "backbone_2d.").eval()
    with torch.no_grad():
        y = net(det("j.x.small", (1, 128, 24, 20)))
    assert y.shape == (1, 512, 24, 20)
    close(y[:, ::4], np.load(golden / "j_bevbackbone_small.npz")["y"], 1e-4)


def test_bev_norm_settings():
    "SECOND's slow batch norm; the golden runs in eval mode and would not notice the momentum."
    for net in (
        BevBackbone(8, Bev((1, 1), (1, 2), (8, 8), (1, 2), (4, 4))),
        SparseBackbone(Grid((0.0,) * 3, (8.0,) * 3, (1.0,) * 3), (4, 4), 4),
    ):
        norms = [m for m in net.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
        assert norms and {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}


# --- adaptation ---


def test_released_block(golden):
    h, x = np.load(golden / "h_scblock_12x16.npz"), det("h.x.(12, 16)", (1, 128, 12, 16))
    block = det_fill(ReleasedBlock(128), "h.block.")
    with torch.no_grad():
        close(block.eval()(x), h["y_eval"], 1e-5)
        close(block.train()(x), h["y_train"], 1e-5)
    close(block.bn1_a.running_mean, h["rm_bn1a"], 1e-6)
    close(block.bn1_a.running_var, h["rv_bn1a"], 1e-6)


def test_released_adaptation(golden):
    h = np.load(golden / "h_scnet_small.npz")
    assert h["n_blocks"] == 4
    net = det_fill(DomainAdaptation(128, 4, "released"), "domain_adaptation.").eval()
    with torch.no_grad():
        close(net(det("h.x.small", (2, 128, 24, 20)))[:, ::4], h["y"], 1e-5)


@pytest.mark.parametrize("size", [(8, 12), (9, 14)])
def test_self_calibrated_block_step_by_step(size):
    "Supplement Eq. 4 to 11, written out; sizes need not divide by four."
    torch.manual_seed(0)
    block = SelfCalibrated(8).eval()
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.running_mean, std=0.1)
    x = torch.randn(2, 8, *size)
    cbr = lambda layer, x: torch.relu(layer[1](F.conv2d(x, layer[0].weight, padding=layer[0].weight.shape[-1] // 2)))
    x1, x2 = cbr(block.split1, x), cbr(block.split2, x)
    down = x1.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2))
    rows, cols = (torch.arange(n) * d // n for n, d in zip(size, down.shape[2:], strict=True))
    a = 1 / (1 + torch.exp(-(x1 + cbr(block.far, down)[:, :, rows][:, :, :, cols])))
    x5, x6 = cbr(block.gated, cbr(block.near, x1) * a), cbr(block.plain, x2)
    with torch.no_grad():
        close(block(x), torch.cat([x5, x6], 1).detach(), 1e-5)


# --- image ---


@pytest.mark.parametrize("name, level, size", [("paper", 256, (94, 311)), ("release", 1024, (47, 156))])
def test_image_maps_at_full_size(name, level, size):
    cfg = recipe(name=name)
    with torch.device("meta"):
        net = ImageBranch(cfg.student, cfg.space.depth_bins).eval()
        maps = net(torch.zeros(1, 3, 375, 1242), torch.tensor([[375, 1242]]))
    assert net.backbone.channels == [level, 2048] and maps.features.shape == (1, 64, *size)
    assert maps.logits.shape == (1, cfg.space.depth_bins + 1, *size)


def test_pictures_are_normalised_and_padding_is_nothing():
    "RGB by ImageNet's mean and deviation; beyond the true size the network sees 0, not black."
    net = ImageBackbone(recipe(scale="smoke").student)

    class Keep(nn.Module):
        def forward(self, x):
            self.x = x
            return x, x

    net.net = Keep()
    images = torch.rand(2, 3, 6, 8)
    sizes = torch.tensor([[6, 8], [4, 5]])
    net(images, sizes)
    for b, (h, w) in enumerate(sizes):
        for c in range(3):
            close(
                net.net.x[b, c, :h, :w],
                ((images[b, c, :h, :w] - (0.485, 0.456, 0.406)[c]) / (0.229, 0.224, 0.225)[c]).numpy(),
                1e-6,
            )
    assert (net.net.x[1, :, 4:] == 0).all() and (net.net.x[1, :, :, 5:] == 0).all()
    assert inside(sizes, images)[1, 0].sum() == 20 and MEAN[0] > MEAN[2] and STD[0] > STD[2]


def test_padding_changes_no_inner_feature():
    torch.manual_seed(0)
    net = ImageBranch(recipe(scale="smoke").student, 32).eval().backbone
    image = torch.rand(1, 3, 96, 320)
    with torch.no_grad():
        level, _ = net(image, torch.tensor([[96, 320]]))
        wide, _ = net(F.pad(image, (0, 32, 0, 32), value=0.7), torch.tensor([[96, 320]]))
    close(wide[:, :, :24, :80][..., :20, :70], level[..., :20, :70], 1e-4)


def test_depth_logits_grow_by_halves_of_a_pixel():
    "Twice the size, each border at its border: the middle of four new pixels is the old one (DeepLabV3)."

    class Flat(nn.Module):
        channels = (8, 8)

        def forward(self, images, sizes):
            return torch.zeros(1, 8, 2, 8), torch.arange(4.0).repeat(1, 8, 1, 1)

    cfg = recipe(scale="smoke").student
    net = ImageBranch(cfg, 3).eval()
    net.backbone, net.reduce, net.aspp, net.classify = Flat(), nn.Identity(), nn.Identity(), nn.Identity()
    close(net(None, None).logits[0, 0, 0], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3], 1e-6)


def test_depth_is_a_distribution_whose_rest_is_outside():
    maps = ImageMaps(torch.zeros(1, 1, 2, 2), torch.randn(1, 6, 2, 2).bfloat16())
    assert maps.depth.dtype == torch.float32 and maps.depth.shape == (1, 5, 2, 2)
    close(maps.depth.sum(1) + maps.logits.float().softmax(1)[:, 5], np.ones((1, 2, 2)), 1e-6)
    peak = torch.full((1, 6, 1, 1), -20.0)
    peak[0, 0] = 20.0
    assert ImageMaps(peak, peak).depth[0, 0] > 0.99


# --- lift ---


@pytest.fixture(scope="module")
def b(golden):
    return np.load(golden / "b_frustum_small.npz")


def released_texels(b):
    low, high, n = (2.0, -30.08, -3.0), (46.8, 30.08, 1.0), b["grid_size"]
    grid = Grid(low, high, tuple((hi - lo) / k for lo, hi, k in zip(low, high, n, strict=True)))
    return grid, voxel_texels(
        grid,
        torch.tensor(b["lidar_to_cam"][0]),
        torch.tensor(b["P2"][0]),
        DepthBins(2.0, 46.8, int(b["num_bins"])),
        (375, 1242),
        (12, 39),
        align_corners=False,
    )


def test_released_sampling_grid(b):
    grid, texels = released_texels(b)
    seen = ((2 * texels + 1) / torch.tensor([39, 12, 16.0]) - 1).reshape(*grid.shape, 3).permute(2, 1, 0, 3)
    close(seen, b["grid"][0], 1e-5)
    assert (seen.abs() <= 1).all(-1).sum() == b["n_inside"]


def separate(features, depth, seen, shape):
    "What `lift` sums over the heights, (B, C, Z, Y, X): a collapse that keeps every height and channel apart."
    Z, C = shape[0], features.shape[1]
    apart = torch.eye(C * Z, dtype=features.dtype).view(C, Z, C * Z).transpose(0, 1)
    return lift(features, depth, seen, apart, shape[1:]).reshape(len(features), C, *shape)


@pytest.mark.parametrize("fast", [True, False])
def test_released_voxels(b, fast):
    "The golden's frustum is no outer product, but it is a sum of them: bin by bin, or channel by channel."
    grid, texels = released_texels(b)
    frustum = torch.tensor(b["frustum_features"])[0]  # (C, D, h, w)
    seen = rays(texels, (12, 39), 16, grid.shape)
    run = lambda f, d: (
        separate(f, d, [seen] * len(f), grid.shape)
        if fast
        else lift_plain(f, d, texels.expand(len(f), -1, -1), grid.shape)
    )
    by_channel = run(torch.ones(4, 1, 12, 39), frustum)[:, 0]
    one = torch.eye(16)[:, :, None, None].expand(16, 16, 12, 39)
    by_bin = run(frustum.transpose(0, 1), one).sum(0)
    for volume in (by_channel, by_bin):
        close(volume, b["voxel_features"][0], 1e-4)


def small_rig(align, level=(5, 7), image=(20, 28)):
    grid, bins = Grid((0.0, -3.0, -2.0), (9.0, 3.0, 2.0), (1.5, 1.5, 2.0)), DepthBins(1.0, 8.0, 4)
    cam = torch.tensor([[0, -1, 0, 0.1], [0, 0, -1, 0.2], [1, 0, 0, -0.3], [0, 0, 0, 1.0]])
    P2 = torch.tensor([[30.0, 0, 14, 3], [0, 34.0, 9, 0.5], [0, 0, 1, 0.01]])
    return grid, bins, voxel_texels(grid, cam, P2, bins, image, level, align)


@pytest.mark.parametrize("align", [True, False])
def test_lift_and_its_gradient(align):
    grid, bins, texels = small_rig(align)
    torch.manual_seed(0)
    f, d = (
        torch.randn(2, 2, 5, 7, dtype=torch.float64, requires_grad=True),
        torch.rand(2, 4, 5, 7, dtype=torch.float64, requires_grad=True),
    )
    m = torch.randn(grid.shape[0], 2, 3, dtype=torch.float64, requires_grad=True)
    plain = lambda f, d, m: torch.einsum("bczyx,zco->boyx", lift_plain(f, d, texels.expand(2, -1, -1), grid.shape), m)
    assert (plain(f, d, m) != 0).any(1).float().mean() > 0.15 and (plain(f, d, m) == 0).any()
    for limit in (1, 80, 2**16):  # a height a slab, two, all
        seen = [rays(texels, (5, 7), 4, grid.shape, limit)] * 2
        fast = lambda f, d, m, seen=seen: lift(f, d, seen, m, grid.shape[1:])
        close(fast(f, d, m), plain(f, d, m).detach().numpy(), 1e-6)
        weight = torch.randn_like(plain(f, d, m))
        for a, b in zip(
            *(torch.autograd.grad((run(f, d, m) * weight).sum(), (f, d, m)) for run in (fast, plain)), strict=True
        ):
            close(a, b.numpy(), 1e-6)
        assert torch.autograd.gradcheck(fast, (f, d, m), atol=1e-6)


def test_every_frame_has_its_own_rig():
    "Two rigs in one batch give what each gives alone; a voxel behind the camera stays empty."
    grid, bins, t = small_rig(True)
    torch.manual_seed(0)
    f, d = torch.randn(2, 2, 5, 7), torch.rand(2, 4, 5, 7)
    other = rays(t + torch.tensor([0.7, -0.4, 0.2], dtype=torch.float64), (5, 7), 4, grid.shape)
    seen = [rays(t, (5, 7), 4, grid.shape), other]
    both = separate(f, d, seen, grid.shape)
    for k in (0, 1):
        close(both[k], separate(f[k : k + 1], d[k : k + 1], [seen[k]], grid.shape)[0].numpy(), 1e-6)
    behind = Grid((-9.0, -3.0, -2.0), (0.0, 3.0, 2.0), (1.5, 1.5, 2.0))
    cam = torch.tensor([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    P2 = torch.tensor([[30.0, 0, 14, 3], [0, 34.0, 9, 0.5], [0, 0, 1, 0]])
    nothing = rays(voxel_texels(behind, cam, P2, bins, (20, 28), (5, 7)), (5, 7), 4, behind.shape)
    assert nothing.seen == 0 and (separate(f, d, [nothing] * 2, behind.shape) == 0).all()


@pytest.mark.parametrize("align", [True, False])
def test_texels_by_hand(align):
    "One voxel, computed on paper: column, row and bin, in this order."
    grid, bins = Grid((8.0, 1.0, -1.0), (9.0, 2.0, 0.0), (1.0, 1.0, 1.0)), DepthBins(2.0, 46.8, 80)
    cam = torch.tensor([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, -0.5], [0, 0, 0, 1.0]])
    P2 = torch.tensor([[200.0, 0, 160, 4], [0, 210.0, 50, 0], [0, 0, 1, 0]])
    u, v, z = 160 + (200 * -1.5 + 4) / 8, 50 + 210 * 0.5 / 8, 8.0  # centre (8.5, 1.5, -.5)
    i = -0.5 + 0.5 * np.sqrt(1 + 8 * (z - 2) / (2 * 44.8 / (80 * 81)))
    want = [u / 4, v / 4, i - 0.5] if align else [u / 319 * 80 - 0.5, v / 95 * 24 - 0.5, i / 79 * 80 - 0.5]
    close(voxel_texels(grid, cam, P2, bins, (96, 320), (24, 80), align)[0], want, 1e-6)
