"Losses against the numbers of the released code (goldens c, g, n)."

import numpy as np
import pytest
import torch
from golden.det import det

from cmkd.geometry import DepthBins
from cmkd.layers.losses import (
    Depth,
    depth_focal,
    depth_loss,
    direction_loss,
    direction_targets,
    focal_loss,
    foreground_mask,
    pool_depth,
    quality_focal_loss,
    sine_difference,
    smooth_l1,
)

BINS = DepthBins(2.0, 46.8, 120)
RELEASE = Depth(weight=0.5, mask_invalid=False)


def close(a, b, tol=1e-5):
    np.testing.assert_allclose(torch.as_tensor(a).detach().numpy(), b, rtol=tol, atol=tol)


@pytest.fixture(scope="module")
def c(golden):
    return np.load(golden / "c_ddn_loss.npz")


@pytest.fixture(scope="module")
def g(golden):
    return np.load(golden / "g_qfl.npz")


def logits():
    return det("c.logits", (2, 121, 12, 40), 2.0).requires_grad_()


def test_depth_released(c):
    x, depth = logits(), torch.tensor(c["depth_maps"])
    assert (BINS.target(depth).numpy() == c["target"]).all()
    close(depth_focal(x, BINS.target(depth)), c["per_pixel"])
    loss = depth_loss(x, depth, BINS, RELEASE)
    loss.backward()
    close(loss, c["loss_nobal"])
    close(x.grad[:, ::10], c["grad_nobal_sub"], 1e-7)


def test_depth_balanced(c):
    x, depth = logits(), torch.tensor(c["depth_maps"])
    mask = foreground_mask(list(torch.tensor(c["gt_boxes2d"])), (12, 40), 8)
    assert (mask.numpy() == c["fg_mask"]).all()
    loss = depth_loss(x, depth, BINS, Depth(mask_invalid=False), mask)
    loss.backward()
    close(loss, c["loss_bal"])
    close(x.grad[:, ::10], c["grad_bal_sub"], 1e-7)


def test_depth_mask_is_a_subset_mean(c):
    depth = torch.tensor(c["depth_maps"])
    hit = depth.numpy() > 0
    close(depth_loss(logits(), depth, BINS, Depth(weight=1.0)), c["per_pixel"][hit].mean())
    half = depth_loss(
        logits(),
        depth,
        BINS,
        Depth(weight=1.0, foreground=2.0, background=2.0),
        torch.zeros(2, 12, 40, dtype=torch.bool),
    )
    close(half, 2 * c["per_pixel"][hit].mean())


def test_depth_bf16_logits_give_fp32_loss(c):
    assert depth_loss(logits().bfloat16(), torch.tensor(c["depth_maps"]), BINS, RELEASE).dtype == torch.float32


def test_qfl_and_focal(g):
    t = lambda k: torch.tensor(g[k])
    close(quality_focal_loss(t("logits"), t("target")), g["loss"])
    close(focal_loss(t("focal_in"), t("focal_t")) * t("sl1_w")[..., None], g["focal"])


def test_smooth_l1_with_nan(g):
    t = lambda k: torch.tensor(g[k])
    out = smooth_l1(t("sl1_in"), t("sl1_t")) * t("sl1_w")[..., None]
    assert torch.isnan(t("sl1_t")).sum() == 1 and out.isfinite().all()
    close(out, g["sl1"])


def test_pool(golden):
    n = np.load(golden / "n_data_ops.npz")
    depth = torch.tensor(n["depth"])[None]
    close(pool_depth(depth, 8)[0], n["depth_pool8"])
    near = pool_depth(depth, 8, how="min")[0]
    assert ((near > 0) == (pool_depth(depth, 8)[0] > 0)).all() and (near <= pool_depth(depth, 8)[0] + 1e-5).all()
    one = depth[0, 8:16, 16:24]
    close(near[1, 2], one[one > 0].min() if (one > 0).any() else 0.0)


def test_gradients_numerically():
    x = det("t.x", (6, 7)).double().requires_grad_()
    y = det("t.y", (6, 7))
    for f in (
        lambda x: quality_focal_loss(x, y.sigmoid()),
        lambda x: focal_loss(x, (y > 0).float()),
        lambda x: smooth_l1(*sine_difference(x, y)),
        lambda x: direction_loss(x, (y[:, 0] > 0).long()).sum(),
    ):
        (g,) = torch.autograd.grad(f(x).sum(), x)
        h = 3e-3
        for i, j in ((0, 0), (2, 6), (5, 3)):
            e = torch.zeros_like(x)
            e[i, j] = h
            assert abs((f(x + e) - f(x - e)).sum().item() / (2 * h) - g[i, j].item()) < 3e-3


@pytest.mark.parametrize(
    "degrees, bin",
    [(0, 1), (44, 1), (46, 0), (90, 0), (180, 0), (224, 0), (226, 1), (270, 1), (-90, 1), (-180, 0), (405.1, 0)],
)
def test_direction_bins(degrees, bin):
    assert direction_targets(torch.tensor(float(np.deg2rad(degrees)))).item() == bin
