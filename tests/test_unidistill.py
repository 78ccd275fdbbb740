"UniDistill: every published loss, as the released code computes it and as the paper says it."
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.det import det, detu

from cmkd.distill.points import nine_points, sampled, to_cells
from cmkd.distill.unidistill import (
    RELEASE,
    Distill,
    boxes_of,
    feature_loss,
    masks,
    relation_loss,
    response_loss,
    response_parts,
)
from cmkd.geometry import Grid

PAPER, CASES = Distill(), "ABC"
RELEASED = Distill(**RELEASE)


def made(kind, key, shape, a=None, b=None, post=None):
    "One regenerated input."
    if kind == "det": x = det(key, shape, 1. if a is None else a, b or 0.)
    else: x = detu(key, shape, 0. if a is None else a, 1. if b is None else b)
    return x.relu() if post == "relu" else x


class Golden:
    "Inputs in float64, what is expected of them, and how far float32 may be off."

    def __init__(self, path: Path):
        z = np.load(path, allow_pickle=False)
        spec = json.loads(str(z["spec"]))
        self.inputs = {k: made(*v) for k, v in spec["inputs"].items()}
        self.inputs |= {k[3:]: torch.from_numpy(z[k]) for k in z.files if k.startswith("in_")}
        self.expected = {k: z[k] for k in z.files if k != "spec" and not k.startswith("in_")}
        self.tol = spec["tol"]
        low, high = self.inputs["pc_range"].reshape(2, 3).tolist()
        cell = (self.inputs["voxel_size"]*self.inputs["out_size_factor"]).tolist()
        self.grid = Grid(tuple(low), tuple(high), (cell[0], cell[1], high[2] - low[2]))

    def __getitem__(self, name: str): return self.inputs[name].float().clone()

    def boxes(self, case: str) -> list: return list(self[f"{case}_boxes"])

    def check(self, name: str, got) -> None:
        atol, rtol = self.tol[name]
        got = got.detach().double().numpy() if isinstance(got, torch.Tensor) else got
        np.testing.assert_allclose(got, self.expected[name], rtol, max(atol, 1e-6), err_msg=name)


@pytest.fixture(scope="module")
def points(golden) -> Golden: return Golden(golden/"u_points.npz")


@pytest.fixture(scope="module")
def losses(golden) -> Golden: return Golden(golden/"u_losses.npz")


@pytest.mark.parametrize("case", CASES)
def test_nine_points_and_what_a_map_says_there(points, case):
    boxes = points.boxes(case)
    spots = [nine_points(b) for b in boxes]
    cells = [to_cells(s, points.grid) for s in spots]
    points.check(f"{case}_corners_m", torch.stack(spots)[:, :, :4])
    points.check(f"{case}_points_cell", torch.stack(cells))
    for name, coords in (("as_released", "released"), ("paper", "xy")):
        got = [sampled(m, c, coords) for m, c in zip(points["low_s"], cells, strict=True)]
        points.check(f"{case}_low_s_sampled_{name}", torch.stack(got))
    valid = points.expected[f"{case}_valid_as_released"].sum(1)
    assert [len(boxes_of(b, "released")) for b in boxes] == valid.tolist()


@pytest.mark.parametrize("case", CASES)
def test_the_released_losses_and_their_gradients(losses, case):
    boxes, grid = losses.boxes(case), losses.grid
    for name, tap, loss in (("fea", "low", feature_loss), ("rel", "high", relation_loss)):
        student = losses[f"{tap}_s"].requires_grad_()
        got = loss(student, losses[f"{tap}_t"], boxes, grid, RELEASED)
        got.backward()
        losses.check(f"{case}_{name}", got)
        losses.check(f"{case}_{name}_grad_{tap}_s", student.grad)
    mask = masks(boxes, grid, RELEASED)
    losses.check(f"{case}_mask", mask)
    heat, box = losses["hm_s"].requires_grad_(), losses["reg_s"].requires_grad_()
    parts = response_parts((heat, box), (losses["hm_t"], losses["reg_t"]), RELEASED)
    for name, part, of, every in (("cls", parts[0], heat, 1), ("reg", parts[1], box, 6)):
        got = (part*mask).sum()/(mask.sum() + RELEASED.eps)
        losses.check(f"{case}_resp_{name}", got)
        grad, = torch.autograd.grad(got, of)
        losses.check(f"{case}_resp_{name}_grad_{'hm' if name == 'cls' else 'reg'}_s", grad[:, ::every])
    whole = response_loss((heat, box), (losses["hm_t"], losses["reg_t"]), boxes, grid, RELEASED)
    want = losses.expected[f"{case}_resp_cls"] + losses.expected[f"{case}_resp_reg"]
    assert whole.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("clamp", [1e-4, 1e-3])
def test_the_teachers_clamp_is_a_field(losses, case, clamp):
    d = Distill(**RELEASE | dict(teacher_clamp=clamp))
    heat, _ = response_parts((losses["hm_s"], losses["reg_s"]), (losses["hm_t"] - 16, losses["reg_t"]), d)
    mask = masks(losses.boxes(case), losses.grid, d)
    losses.check(f"{case}_resp_cls_low_1e-{4 if clamp < 5e-4 else 3}", (heat*mask).sum()/(mask.sum() + d.eps))


@pytest.mark.parametrize("case", CASES)
def test_the_losses_as_the_paper_says_them(losses, case):
    boxes, grid = losses.boxes(case), losses.grid
    losses.check(f"{case}_paper_fea_channelmean", feature_loss(losses["low_s"], losses["low_t"], boxes, grid))
    losses.check(f"{case}_paper_rel", relation_loss(losses["high_s"], losses["high_t"], boxes, grid))
    student, teacher = ((losses[f"hm_{w}"], losses[f"reg_{w}"]) for w in "st")
    losses.check(f"{case}_paper_resp", response_loss(student, teacher, boxes, grid))


def test_where_a_loss_looks_changes_it(losses):
    "The variants of Tables 3, 5 and 7 by hand on one frame: all over the map is a plain mean."
    boxes, grid, low = losses.boxes("A"), losses.grid, (losses["low_s"], losses["low_t"])
    every = feature_loss(*low, boxes, grid, Distill(feature_where="all"))
    assert every.item() == pytest.approx((low[0] - low[1]).abs().mean().item(), rel=1e-6)
    mask = masks(boxes, grid, PAPER)
    want = ((low[0] - low[1]).abs().mean(1)*mask).sum()/mask.sum()
    got = feature_loss(*low, boxes, grid, Distill(feature_where="gaussian"))
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    small = [losses[name][:, :6, :5, :5] for name in ("high_s", "high_t")]
    got = relation_loss(*small, boxes, grid, Distill(relation_where="all")).item()
    cos = [torch.nn.functional.cosine_similarity(f[:, :, None], f[:, None], dim=0) for f in
           (m[0].flatten(1) for m in small)]
    other = [torch.nn.functional.cosine_similarity(f[:, :, None], f[:, None], dim=0) for f in
             (m[1].flatten(1) for m in small)]
    want = ((cos[0] - cos[1]).abs().mean() + (other[0] - other[1]).abs().mean())/2
    assert got == pytest.approx(want.item(), rel=1e-4)
