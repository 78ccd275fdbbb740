"Distillation: what flows, how much, and never back into the teacher."
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cmkd.boxes import encode
from cmkd.config import recipe
from cmkd.core import Batch
from cmkd.distill.base import Distiller, Terms
from cmkd.distill.cmkd import CMKD, feature_loss, soft_boxes
from cmkd.layers.anchors import HeadMaps, assign, detection_loss, make_anchors
from cmkd.layers.losses import depth_loss
from cmkd.geometry import DepthBins
from cmkd.models.student import Student
from cmkd.models.teacher import Teacher
from cmkd.taps import Taps
from cmkd.distill.shown import TapStore, TeacherTaps
from cmkd.train.stages import boxes2d, depth_term, load_teacher, needs_teacher
from golden.det import det

CFG = recipe(scale="smoke")
SHAPE = (40, 40)
ANCHORS = make_anchors(CFG.head, CFG.space.low, CFG.space.high, SHAPE)
RIG = torch.tensor([[0, -1., 0, 0], [0, 0, -1, -.08], [1, 0, 0, -.27], [0, 0, 0, 1]])
P2 = torch.tensor([[185.9, 0, 157, 11], [0, 185.9, 44, .06], [0, 0, 1, .003]])


def batch(n=2, seed=0, per=300) -> Batch:
    g = torch.Generator().manual_seed(seed)
    xyz = torch.rand(n*per, 4, generator=g)*torch.tensor([20., 16, 2, 1]) + torch.tensor([4., -8, -2, 0])
    points = torch.cat([torch.arange(n).repeat_interleave(per)[:, None], xyz], 1)
    boxes, labels = [torch.tensor([[11., 0, -.9, 4, 1.6, 1.5, 0]])]*n, [torch.tensor([0])]*n
    return Batch([str(i) for i in range(n)], torch.rand(n, 3, 96, 320, generator=g), torch.tensor([[96, 320]]*n), points, RIG.expand(n, 4, 4), P2.expand(n, 3, 4), torch.rand(n, 96, 320, generator=g)*30, boxes, labels)


def taught(cfg=CFG, seed=0) -> Teacher:
    "A teacher that finds things: its class bias is raised, its boxes and batch norms are no identity."
    torch.manual_seed(seed); t = Teacher(cfg)
    with torch.no_grad():
        t.head.conv_cls.bias.fill_(-2.5); nn.init.normal_(t.head.conv_cls.weight, std=.3); nn.init.normal_(t.head.conv_box.weight, std=.02)
        for m in t.modules():
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)): m.momentum = .9
        t.train(); [t(batch(seed=s)) for s in range(2)]
    return t.eval().requires_grad_(False)


def maps(boxes, scores, labels, background=-8., rest=0.) -> HeadMaps:
    "Head maps whose nearest anchors decode to `boxes` with `scores`."
    flat, A = ANCHORS.reshape(-1, 7), ANCHORS.shape[2]
    cls, box, way = torch.full((len(flat), 3), background), torch.full((len(flat), 7), rest), torch.zeros(len(flat), 2)
    for b, s, l in zip(boxes, scores, labels):
        kind = flat.reshape(-1, A, 7)[:, 2*l]; n = (kind[:, :2] - b[:2]).norm(dim=1).argmin()*A + 2*l
        cls[n, l], box[n] = torch.logit(torch.tensor(s)), encode(b, flat[n]); way[n, 1] = 4.
    put = lambda t: t.reshape(*SHAPE, -1).permute(2, 0, 1)[None].contiguous()
    return HeadMaps(put(cls), put(box), put(way))


CARS = torch.tensor([[10., 2, -1, 3.9, 1.6, 1.56, .1], [20., -5, -1, 4.1, 1.7, 1.5, .1], [15., 6, -.5, .8, .6, 1.7, .1]])


def test_soft_boxes_are_the_detections_above_the_score():
    head = maps(CARS, [.9, .3, .08], [0, 0, 1])
    (boxes, scores, labels), = soft_boxes(head, ANCHORS, CFG)
    torch.testing.assert_close(scores, torch.tensor([.9, .3])); assert labels.tolist() == [0, 0]
    torch.testing.assert_close(boxes[:, :6], CARS[:2, :6], atol=1e-4, rtol=1e-4)
    low = replace(CFG, distill=replace(CFG.distill, score=.05)); assert len(soft_boxes(head, ANCHORS, low)[0][0]) == 3
    high = replace(CFG, head=replace(CFG.head, score=.95)); assert len(soft_boxes(head, ANCHORS, high)[0][0]) == 2, "the head's own score plays no part"


def test_every_term_is_weighed_by_the_score_of_its_box():
    "Two far boxes with scores .9 and .3 pull exactly .9 and .3 times as hard as two labels would: Eq. 4 and 5."
    student, teacher = maps([], [], [], background=-3., rest=.1), maps(CARS[:2], [.9, .3], [0, 0])
    soft = soft_boxes(teacher, ANCHORS, CFG)
    def pull(**k):
        d = CMKD(replace(CFG, distill=replace(CFG.distill, feature=False, **k)), ANCHORS)
        return d(Taps(head=student), Taps(soft=soft), None)
    d = CFG.distill.losses; boxes, scores, labels = soft[0]
    alone = [detection_loss(student, ANCHORS, CFG.head, d, [boxes[k:k + 1]], [labels[k:k + 1]]) for k in (0, 1)]
    counts = [(assign(ANCHORS, CFG.head, [boxes[k:k + 1]], [labels[k:k + 1]]).labels > 0).sum().item() for k in (0, 1)]
    share = [c/sum(counts) for c in counts]
    for quality, s in ((True, scores.tolist()), (False, [1., 1.])):
        terms = pull(quality=quality)
        np.testing.assert_allclose(terms.box.item(), sum(w*q*a.box.item() for w, q, a in zip(share, s, alone)), rtol=1e-4)
        np.testing.assert_allclose(terms.direction.item(), sum(w*q*a.direction.item() for w, q, a in zip(share, s, alone)), rtol=1e-4)
    assert pull(quality=True).cls < pull(quality=False).cls


@pytest.mark.parametrize("quality", [True, False])
def test_the_class_target_of_a_soft_box_is_its_score(quality):
    "Eq. 5: a student that gives a positive the teacher's score has nothing to learn there; more and less pull to it from both sides."
    soft = soft_boxes(maps(CARS[:1], [.7], [0]), ANCHORS, CFG); positive = (assign(ANCHORS, CFG.head, [soft[0][0]], [soft[0][2]]).labels > 0).flatten()
    distiller = CMKD(replace(CFG, distill=replace(CFG.distill, feature=False, quality=quality, losses=replace(CFG.distill.losses, targets="label"))), ANCHORS)
    for p, sign in ((.7, 0), (.9, 1), (.4, -1)):
        student = maps([], []  , [], background=-6.); cls = student.cls.detach().clone(); rows = cls[0].permute(1, 2, 0).reshape(-1, 3)
        rows[positive, 0] = torch.logit(torch.tensor(p)); cls = rows.reshape(*SHAPE, -1).permute(2, 0, 1)[None].clone().requires_grad_()
        distiller(Taps(head=replace(student, cls=cls)), Taps(soft=soft), None).cls.backward()
        slope = cls.grad[0].permute(1, 2, 0).reshape(-1, 3)[positive, 0]
        assert positive.sum() > 2 and ((slope.abs() < 1e-7).all() if not sign else (slope*sign > 1e-6).all())


@pytest.mark.parametrize("response", ["soft", "dense"])
def test_quality_switch_does_something(response):
    "`distill.quality=false` is the row without s_i; it must change the loss of every response that has scores."
    student, teacher = maps([], [], [], background=-3., rest=.1), maps(CARS[:2], [.9, .3], [0, 0])
    shown = Taps(head=teacher, soft=soft_boxes(teacher, ANCHORS, CFG))
    box = [CMKD(replace(CFG, distill=replace(CFG.distill, feature=False, response=response, quality=q)), ANCHORS)(Taps(head=student), shown, None).box for q in (True, False)]
    assert not torch.isclose(*box)


def test_feature_loss_is_the_plain_mean_square(golden):
    f = np.load(golden/"f_losses.npz")
    student = det("f.bev.img", (2, 128, 188, 140)).relu().requires_grad_(); teacher = det("f.bev.lidar", (2, 128, 188, 140)).relu(); teacher[:, :, ::2] = 0
    loss = 32*feature_loss(student, teacher)
    np.testing.assert_allclose(loss.item(), f["bevloss_l2"], rtol=1e-5)
    small = student[:1, :2, :3, :4].detach(), teacher[:1, :2, :3, :4]
    np.testing.assert_allclose(feature_loss(*small, normalise=True).item(), (((small[0] - small[1])**2).mean()/(small[1]**2).mean()).item(), rtol=1e-5)
    assert feature_loss(torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 2)*3, normalise=True) == 1
    with pytest.raises(ValueError, match="equal BEV maps"): feature_loss(small[0], small[1][:, :1])


@pytest.mark.parametrize("response", ["soft", "dense", "hard", "none"])
def test_gradient_reaches_the_student_and_never_the_teacher(response):
    cfg = CFG.override(f"distill.response={response}"); b = batch(); teacher = taught(cfg).requires_grad_(True)
    torch.manual_seed(1); student = Student(cfg)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    distiller = CMKD(cfg, student.anchors); full = teacher(b)
    shown = Taps(bev=full.bev, head=full.head, soft=soft_boxes(full.head, teacher.anchors, cfg))
    if response == "soft": assert all(len(s[0]) for s in shown.soft)
    taps = student(b); distiller.check(taps, shown, True); terms = distiller(taps, shown, b); terms.total().backward()
    assert set(terms.named()) == {"feature"} | (set() if response == "none" else {"cls", "box", "direction"})
    assert all(p.grad is None for p in teacher.parameters())
    for part in (student.lifted.image.backbone, student.lifted.image.classify, student.lifted.collapse, student.adapt): assert next(part.parameters()).grad.abs().sum() > 0
    assert (student.head.conv_box.weight.grad is None) == (response == "none")
    for k, v in teacher.state_dict().items(): assert torch.equal(v, before[k]), k


def test_weights_of_the_terms():
    "Every weight of the config multiplies its own term and no other; the total is the sum."
    base = CFG.override("distill.feature_weight=1", "distill.losses.cls=1", "distill.losses.box=1", "distill.losses.direction=1")
    student, teacher = maps([], [], [], background=-3., rest=.1), maps(CARS[:2], [.9, .3], [0, 0])
    a, b = torch.randn(1, 4, *SHAPE), torch.randn(1, 4, *SHAPE)
    run = lambda cfg: CMKD(cfg, ANCHORS)(Taps(bev=a, head=student), Taps(bev=b, soft=soft_boxes(teacher, ANCHORS, cfg)), None)
    one = run(base).named()
    for key, name in (("feature_weight", "feature"), ("losses.cls", "cls"), ("losses.box", "box"), ("losses.direction", "direction")):
        seven = run(base.override(f"distill.{key}=7"))
        for k, v in seven.named().items(): np.testing.assert_allclose(v.item(), one[k].item()*(7 if k == name else 1), rtol=1e-5)
        np.testing.assert_allclose(seven.total().item(), sum(v.item() for v in seven.named().values()), rtol=1e-6)
    with pytest.raises(ValueError, match="no loss term"): Terms().total()


def test_checks_name_what_is_missing():
    d = CMKD(CFG, ANCHORS)
    with pytest.raises(ValueError, match="shows no 'soft'"): d.check(Taps(bev=torch.ones(1), head=1), Taps(bev=torch.ones(1)), True)
    with pytest.raises(ValueError, match="shows no 'head'"): d.check(Taps(bev=torch.ones(1)), Taps(), True)
    with pytest.raises(ValueError, match="needs a teacher"): d.check(Taps(bev=torch.ones(1), head=1), None, True)
    with pytest.raises(ValueError, match="learns from labels"): CMKD(CFG.override("distill.response=hard", "distill.feature=false"), ANCHORS).check(Taps(head=1), None, False)
    with pytest.raises(ValueError, match="nothing to learn from"): CMKD(CFG.override("distill.feature=false", "distill.response=none"), ANCHORS)
    with pytest.raises(AttributeError, match="there is no tap 'rpn'"): Taps().need("rpn")
    assert not Distiller().student_taps and [needs_teacher(CFG.override(*o)) for o in ((), ("distill.feature=false", "distill.response=none"), ("distill.feature=false", "distill.response=none", "load_head=false"))] == [True, True, False]


# --- the teacher's memory ---

def test_shown_equals_the_teacher_and_remembers():
    cfg, teacher = CFG, taught(); show = TeacherTaps(teacher, ("bev", "head", "soft"), cfg); b = batch()
    with torch.no_grad(): direct = teacher(b)
    for shown in (show(b), show(b)):
        torch.testing.assert_close(shown.bev, direct.bev, atol=1e-5, rtol=1e-5)
        for k in ("cls", "box", "dir"): torch.testing.assert_close(getattr(shown.head, k), getattr(direct.head, k), atol=1e-5, rtol=1e-5)
        for mine, theirs in zip(shown.soft, soft_boxes(direct.head, teacher.anchors, cfg)):
            assert len(mine[0]) and [len(t) for t in mine] == [len(t) for t in theirs]
            torch.testing.assert_close(mine[1], theirs[1], atol=1e-4, rtol=1e-4)
    assert len(show.known) == 2
    alone = replace(b, ids=["1"], points=torch.cat([torch.zeros(300, 1), b.points[b.points[:, 0] == 1][:, 1:]], 1))
    assert torch.equal(show(alone).bev[0], show(b).bev[1]) and len(show.known) == 2, "the same bits beside another frame"
    assert not torch.equal(show(batch(seed=1)).bev, shown.bev) and len(show.known) == 4
    none = TeacherTaps(teacher, ("soft",), cfg); t = none(b); assert t.bev is None and t.head is None and len(t.soft) == 2
    full = TeacherTaps(teacher, ("bev",), cfg, limit=direct.bev[0].nbytes); full(b); assert len(full.known) == 1, "no more than fits"
    empty = replace(b, points=b.points[b.points[:, 0] == 0]); assert torch.equal(show(empty).bev[0], show(b).bev[0]) and not show(empty).bev[1].isnan().any()


def fill(path, name):
    "One of several writers, in a process of its own."
    store = TapStore(path)
    for i in range(20): store.put(b"T", {(f"{name}{i}".encode(), "bev"): f"{name}{i}".encode()*500})


def test_several_processes_share_a_store(tmp_path):
    with ProcessPoolExecutor(3, get_context("spawn")) as pool: list(pool.map(fill, [tmp_path/"t.sqlite"]*3, "abc"))
    keys = [f"{n}{i}".encode() for n in "abc" for i in range(20)]
    assert TapStore(tmp_path/"t.sqlite").get(b"T", keys, ("bev",)) == {(k, "bev"): k*500 for k in keys}


def test_a_store_changes_no_bit_of_a_batch(tmp_path):
    "Found on disk or computed, alone or beside another, in one layout."
    teacher, store, b = taught(), TapStore(tmp_path/"t.sqlite"), batch()
    names = ("bev", "head", "soft"); ask = lambda: TeacherTaps(teacher, names, CFG, store=store, sweeps=4)
    alone = replace(b, ids=["1"], points=torch.cat([torch.zeros(300, 1), b.points[b.points[:, 0] == 1][:, 1:]], 1)); ask()(alone)
    mixed, never = ask()(b), TeacherTaps(teacher, names, CFG)(b)
    assert (store.asked, store.found) == (3, 1)
    for x, y in ((mixed.bev, never.bev), *((getattr(mixed.head, k), getattr(never.head, k)) for k in ("cls", "box", "dir"))): assert torch.equal(x, y) and x.stride() == y.stride()
    for x, y in zip(mixed.soft, never.soft, strict=True): assert all(map(torch.equal, x, y)) and len(x[0])


def test_loaded_teacher_is_frozen(tmp_path):
    save_file({k: v.contiguous() for k, v in taught().state_dict().items()}, tmp_path/"t.safetensors"); t = load_teacher(CFG, tmp_path/"t.safetensors")
    assert not t.training and not any(p.requires_grad for p in t.parameters())
    for k, v in load_file(tmp_path/"t.safetensors").items(): assert torch.equal(t.state_dict()[k], v)
    with torch.no_grad(): a, b = t(batch()).bev, t(batch()).bev
    assert torch.equal(a, b)


# --- depth, as the stages ask for it ---

def test_boxes_in_the_picture():
    "A box's rectangle holds the projections of its corners and touches them; half behind the camera is clipped, not folded."
    b = batch(1); (rect,), = boxes2d(b)
    x, y, z, l, w, h, a = b.boxes[0][0].tolist()
    uv = []
    for i in (-.5, .5):
        for j in (-.5, .5):
            for k in (-.5, .5):
                p = P2.double().numpy() @ (RIG.double().numpy() @ np.array([x + i*l, y + j*w, z + k*h, 1])); uv.append(p[:2]/p[2])
    np.testing.assert_allclose(rect, [*np.min(uv, 0), *np.max(uv, 0)], rtol=1e-4)
    near = replace(b, boxes=[torch.tensor([[.5, 1.5, -.9, 4, 1.6, 1.5, 0]])]); (l, t, r, bt), = boxes2d(near)[0].tolist(); assert l < r and t < bt and l < 0
    assert boxes2d(replace(b, boxes=[torch.zeros(0, 7)]))[0].shape == (0, 4)


def test_depth_term_by_hand():
    "Nearest return of each cell; cells in a box count `foreground` times; a frame without labels weighs all alike."
    b = batch(1); sparse = torch.zeros(1, 96, 320); sparse[0, 49, 161], sparse[0, 51, 163], sparse[0, 5, 5] = 9., 14., 20.; b = replace(b, depth=sparse)
    logits, bins, cfg = torch.randn(1, 33, 24, 80), DepthBins(*CFG.space.depth, 32), CFG
    target = torch.zeros(1, 24, 80); target[0, 12, 40], target[0, 1, 1] = 9., 20.
    (l, t, r, bt), = boxes2d(b)[0].tolist(); assert l < 160 < r and t < 48 < bt
    front = torch.zeros(1, 24, 80, dtype=torch.bool); front[0, 12, 40] = True
    torch.testing.assert_close(depth_term(logits, b, cfg), depth_loss(logits, target, bins, cfg.depth, front))
    torch.testing.assert_close(depth_term(logits, replace(b, boxes=None, labels=None), cfg), depth_loss(logits, target, bins, cfg.depth))
    assert cfg.depth.foreground > cfg.depth.background


def test_labels_for_one_class_soft_boxes_for_the_rest():
    "distill.hard (section 4.8): pedestrians from labels, at score 1; cars from the teacher; what the teacher thinks of pedestrians is not read."
    car, walker, real = torch.tensor([10., 0, -.9, 3.9, 1.6, 1.5, 0]), torch.tensor([15., 4, -.8, .8, .6, 1.7, 0]), torch.tensor([15., -4, -.8, .8, .6, 1.7, 0])
    cfg = CFG.override('distill.hard=["Pedestrian"]', "distill.feature=false")
    net, soft = CMKD(cfg, ANCHORS), CMKD(CFG.override("distill.feature=false"), ANCHORS)
    student = Taps(head=maps([], [], []))
    frame = batch(1); frame.boxes, frame.labels = [torch.stack([car + 3, real])], [torch.tensor([0, 1])]
    tell = lambda boxes, scores, labels: Taps(soft=[(torch.stack(boxes), torch.tensor(scores), torch.tensor(labels))])
    mixed = net(student, tell([car, walker], [.7, .4], [0, 1]), frame)
    meant = soft(student, tell([car, real], [.7, 1.], [0, 1]), frame)
    for name, value in mixed.named().items(): assert value == getattr(meant, name) > 0, name
    assert net(student, tell([car, walker], [.7, .9], [0, 1]), frame).total() == mixed.total()
    assert net(student, tell([car], [.6], [0]), frame).total() != mixed.total() != soft(student, tell([car, walker], [.7, .4], [0, 1]), frame).total()
    assert net.needs_labels and not soft.needs_labels
