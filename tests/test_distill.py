"Distillation: what flows, how much, and never back into the teacher."

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from golden.det import det
from safetensors.torch import load_file, save_file
from torch import nn

from cmkd.boxes import encode
from cmkd.core import Batch, Found
from cmkd.distill.base import Distiller
from cmkd.distill.cmkd import CMKD, distiller, feature_loss, needs_teacher
from cmkd.distill.depth import boxes_in_views, depth_term
from cmkd.distill.roles import camera, frozen, lidar
from cmkd.distill.store import TapStore
from cmkd.distill.teachers import Asked
from cmkd.geometry import DepthBins
from cmkd.layers.anchors import assign, make_anchors
from cmkd.layers.head import HeadMaps, detections
from cmkd.layers.head_loss import detection_loss
from cmkd.layers.losses import depth_loss
from cmkd.methods import recipe
from cmkd.taps import Taps
from cmkd.train.step import total

CFG = recipe(scale="smoke")
SHAPE = (40, 40)
ANCHORS = make_anchors(CFG.head, CFG.space.low, CFG.space.high, SHAPE)
RIG = torch.tensor([[0, -1.0, 0, 0], [0, 0, -1, -0.08], [1, 0, 0, -0.27], [0, 0, 0, 1]])
P2 = torch.tensor([[185.9, 0, 157, 11], [0, 185.9, 44, 0.06], [0, 0, 1, 0.003]])


def batch(n=2, seed=0, per=300) -> Batch:
    g = torch.Generator().manual_seed(seed)
    xyz = torch.rand(n * per, 4, generator=g) * torch.tensor([20.0, 16, 2, 1]) + torch.tensor([4.0, -8, -2, 0])
    points = torch.cat([torch.arange(n).repeat_interleave(per)[:, None], xyz], 1)
    boxes, labels = [torch.tensor([[11.0, 0, -0.9, 4, 1.6, 1.5, 0]])] * n, [torch.tensor([0])] * n
    return Batch(
        [str(i) for i in range(n)],
        torch.rand(n, 1, 3, 96, 320, generator=g),
        torch.tensor([[[96, 320]]] * n),
        points,
        RIG.expand(n, 1, 4, 4),
        P2.expand(n, 1, 3, 4),
        torch.rand(n, 1, 96, 320, generator=g) * 30,
        boxes,
        labels,
    )


def soft_boxes(head, anchors, cfg) -> list[Found]:
    "What CMKD learns from: the teacher's detections with a score of at least `distill.score`."
    return detections(head, anchors, replace(cfg.head, score=cfg.distill.score, per_class=False))


def net(cfg=CFG, anchors=None) -> CMKD:
    "The distiller of a config, on the anchors of these tests."
    return CMKD(
        cfg.distill,
        cfg.head,
        ANCHORS if anchors is None else anchors,
        cfg.data.classes,
        cfg.space,
        cfg.depth,
        cfg.load_head,
    )


def switched(**changes):
    "CFG with some of its `distill` fields changed."
    return replace(CFG, distill=replace(CFG.distill, **changes))


def taught(cfg=CFG, seed=0):
    "A teacher that finds things: its class bias is raised, its boxes and batch norms are no identity."
    torch.manual_seed(seed)
    t = lidar(cfg)
    with torch.no_grad():
        t.head.conv_cls.bias.fill_(-2.5)
        nn.init.normal_(t.head.conv_cls.weight, std=0.3)
        nn.init.normal_(t.head.conv_box.weight, std=0.02)
        for m in t.modules():
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
                m.momentum = 0.9
        t.train()
        [t(batch(seed=s)) for s in range(2)]
    return t.eval().requires_grad_(False)


def maps(boxes, scores, labels, background=-8.0, rest=0.0) -> HeadMaps:
    "Head maps whose nearest anchors decode to `boxes` with `scores`."
    flat, A = ANCHORS.reshape(-1, 7), ANCHORS.shape[2]
    cls, box, way = torch.full((len(flat), 3), background), torch.full((len(flat), 7), rest), torch.zeros(len(flat), 2)
    for b, s, l in zip(boxes, scores, labels, strict=True):
        kind = flat.reshape(-1, A, 7)[:, 2 * l]
        n = (kind[:, :2] - b[:2]).norm(dim=1).argmin() * A + 2 * l
        cls[n, l], box[n] = torch.logit(torch.tensor(s)), encode(b, flat[n])
        way[n, 1] = 4.0
    put = lambda t: t.reshape(*SHAPE, -1).permute(2, 0, 1)[None].contiguous()
    return HeadMaps(put(cls), put(box), put(way))


CARS = torch.tensor(
    [[10.0, 2, -1, 3.9, 1.6, 1.56, 0.1], [20.0, -5, -1, 4.1, 1.7, 1.5, 0.1], [15.0, 6, -0.5, 0.8, 0.6, 1.7, 0.1]]
)


def test_soft_boxes_are_the_detections_above_the_score():
    head = maps(CARS, [0.9, 0.3, 0.08], [0, 0, 1])
    (found,) = soft_boxes(head, ANCHORS, CFG)
    boxes, scores, labels = found.boxes, found.scores, found.labels
    torch.testing.assert_close(scores, torch.tensor([0.9, 0.3]))
    assert labels.tolist() == [0, 0]
    torch.testing.assert_close(boxes[:, :6], CARS[:2, :6], atol=1e-4, rtol=1e-4)
    low = switched(score=0.05)
    assert len(soft_boxes(head, ANCHORS, low)[0]) == 3 and net(low).soft.score == 0.05
    high = replace(CFG, head=replace(CFG.head, score=0.95))
    assert len(soft_boxes(head, ANCHORS, high)[0]) == 2 and net(high).soft.score == 0.1, (
        "the head's own score plays no part"
    )


def test_every_term_is_weighed_by_the_score_of_its_box():
    "Two far boxes with scores .9 and .3 pull exactly .9 and .3 times as hard as two labels would: Eq. 4 and 5."
    student, teacher = maps([], [], [], background=-3.0, rest=0.1), maps(CARS[:2], [0.9, 0.3], [0, 0])
    soft = soft_boxes(teacher, ANCHORS, CFG)

    def pull(**k):
        return net(switched(feature=False, losses=d, **k))(Taps(head=student), dict(teacher=Taps(soft=soft)), batch(1))

    d = replace(CFG.distill.losses, even=False)
    boxes, scores, labels = soft[0].boxes, soft[0].scores, soft[0].labels
    alone = [
        detection_loss(student, ANCHORS, CFG.head, d, [Found.labelled(boxes[k : k + 1], labels[k : k + 1])])
        for k in (0, 1)
    ]
    counts = [
        (assign(ANCHORS, CFG.head, [boxes[k : k + 1]], [labels[k : k + 1]]).labels > 0).sum().item() for k in (0, 1)
    ]
    share = [c / sum(counts) for c in counts]
    for quality, s in ((True, scores.tolist()), (False, [1.0, 1.0])):
        terms = pull(quality=quality)
        np.testing.assert_allclose(
            terms["box"].item(), sum(w * q * a.box.item() for w, q, a in zip(share, s, alone, strict=True)), rtol=1e-4
        )
        np.testing.assert_allclose(
            terms["direction"].item(),
            sum(w * q * a.direction.item() for w, q, a in zip(share, s, alone, strict=True)),
            rtol=1e-4,
        )
    assert pull(quality=True)["cls"] < pull(quality=False)["cls"]


@pytest.mark.parametrize("quality", [True, False])
def test_the_class_target_of_a_soft_box_is_its_score(quality):
    "Eq. 5: a student that gives a positive the teacher's score has nothing to learn there; more and less pull back."
    soft = soft_boxes(maps(CARS[:1], [0.7], [0]), ANCHORS, CFG)
    positive = (assign(ANCHORS, CFG.head, [soft[0].boxes], [soft[0].labels]).labels > 0).flatten()
    learn = net(switched(feature=False, quality=quality, losses=replace(CFG.distill.losses, targets="label")))
    for p, sign in ((0.7, 0), (0.9, 1), (0.4, -1)):
        student = maps([], [], [], background=-6.0)
        cls = student.cls.detach().clone()
        rows = cls[0].permute(1, 2, 0).reshape(-1, 3)
        rows[positive, 0] = torch.logit(torch.tensor(p))
        cls = rows.reshape(*SHAPE, -1).permute(2, 0, 1)[None].clone().requires_grad_()
        learn(Taps(head=replace(student, cls=cls)), dict(teacher=Taps(soft=soft)), batch(1))["cls"].backward()
        slope = cls.grad[0].permute(1, 2, 0).reshape(-1, 3)[positive, 0]
        assert positive.sum() > 2 and ((slope.abs() < 1e-7).all() if not sign else (slope * sign > 1e-6).all())


@pytest.mark.parametrize("response", ["soft", "dense"])
def test_quality_switch_does_something(response):
    "`distill.quality=false` is the row without s_i; it must change the loss of every response that has scores."
    student, teacher = maps([], [], [], background=-3.0, rest=0.1), maps(CARS[:2], [0.9, 0.3], [0, 0])
    shown = Taps(head=teacher, soft=soft_boxes(teacher, ANCHORS, CFG))
    box = [
        net(switched(feature=False, response=response, quality=q))(Taps(head=student), dict(teacher=shown), batch(1))[
            "box"
        ]
        for q in (True, False)
    ]
    assert not torch.isclose(*box)


def test_feature_loss_is_the_plain_mean_square(golden):
    f = np.load(golden / "f_losses.npz")
    student = det("f.bev.img", (2, 128, 188, 140)).relu().requires_grad_()
    teacher = det("f.bev.lidar", (2, 128, 188, 140)).relu()
    teacher[:, :, ::2] = 0
    loss = 32 * feature_loss(student, teacher)
    np.testing.assert_allclose(loss.item(), f["bevloss_l2"], rtol=1e-5)
    small = student[:1, :2, :3, :4].detach(), teacher[:1, :2, :3, :4]
    np.testing.assert_allclose(
        feature_loss(*small, normalise=True).item(),
        (((small[0] - small[1]) ** 2).mean() / (small[1] ** 2).mean()).item(),
        rtol=1e-5,
    )
    assert feature_loss(torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 2) * 3, normalise=True) == 1
    with pytest.raises(ValueError, match="equal BEV maps"):
        feature_loss(small[0], small[1][:, :1])


@pytest.mark.parametrize("response", ["soft", "dense", "hard", "none"])
def test_gradient_reaches_the_student_and_never_the_teacher(response):
    cfg = CFG.override(f"distill.response={response}")
    b = batch()
    teacher = taught(cfg).requires_grad_(True)
    torch.manual_seed(1)
    student = camera(cfg)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    learn = distiller(cfg, student)
    full = teacher(b)
    shown = Taps(bev=full.bev, head=full.head, soft=soft_boxes(full.head, teacher.anchors, cfg))
    if response == "soft":
        assert all(len(s) for s in shown.soft)
    taps, shown = student(b), dict(teacher=shown)
    learn.check(taps, shown, b)
    terms = learn(taps, shown, b)
    total(terms).backward()
    assert set(terms) == {"feature"} | (set() if response == "none" else {"cls", "box", "direction"})
    assert all(p.grad is None for p in teacher.parameters())
    for part in (student.lifted.image.backbone, student.lifted.image.classify, student.lifted.collapse, student.adapt):
        assert next(part.parameters()).grad.abs().sum() > 0
    assert (student.head.conv_box.weight.grad is None) == (response == "none")
    for k, v in teacher.state_dict().items():
        assert torch.equal(v, before[k]), k


def test_weights_of_the_terms():
    "Every weight of the config multiplies its own term and no other; the total is the sum."
    base = CFG.override(
        "distill.feature_weight=1", "distill.losses.cls=1", "distill.losses.box=1", "distill.losses.direction=1"
    )
    student, teacher = maps([], [], [], background=-3.0, rest=0.1), maps(CARS[:2], [0.9, 0.3], [0, 0])
    a, b = torch.randn(1, 4, *SHAPE), torch.randn(1, 4, *SHAPE)
    run = lambda cfg: net(cfg)(
        Taps(bev=a, head=student), dict(teacher=Taps(bev=b, soft=soft_boxes(teacher, ANCHORS, cfg))), batch(1)
    )
    one = run(base)
    for key, name in (
        ("feature_weight", "feature"),
        ("losses.cls", "cls"),
        ("losses.box", "box"),
        ("losses.direction", "direction"),
    ):
        seven = run(base.override(f"distill.{key}=7"))
        for k, v in seven.items():
            np.testing.assert_allclose(v.item(), one[k].item() * (7 if k == name else 1), rtol=1e-5)
        np.testing.assert_allclose(total(seven).item(), sum(v.item() for v in seven.values()), rtol=1e-6)
    with pytest.raises(ValueError, match="no loss"):
        total({})


def test_checks_name_what_is_missing():
    d, b = net(), batch()
    with pytest.raises(ValueError, match="shows no 'soft'"):
        d.check(Taps(bev=torch.ones(1), head=1), dict(teacher=Taps(bev=torch.ones(1))), b)
    with pytest.raises(ValueError, match="shows no 'head'"):
        d.check(Taps(bev=torch.ones(1)), dict(teacher=Taps()), b)
    with pytest.raises(ValueError, match="needs a teacher"):
        d.check(Taps(bev=torch.ones(1), head=1), {}, b)
    assert net(CFG.override("distill.response=hard", "distill.feature=false")).needs_labels and not d.needs_labels
    with pytest.raises(ValueError, match="nothing to learn from"):
        CFG.override("distill.feature=false", "distill.response=none")
    with pytest.raises(ValueError, match="distill.hard names Tram"):
        net(CFG.override('distill.hard=["Tram"]'))
    with pytest.raises(AttributeError, match="there is no tap 'rpn'"):
        Taps().need("rpn")
    assert not Distiller().student_taps and [
        needs_teacher(CFG.override(*o))
        for o in (
            (),
            ("distill.feature=false", "distill.response=hard"),
            ("distill.feature=false", "distill.response=hard", "load_head=false"),
        )
    ] == [True, True, False]


# --- the teacher's memory ---


def test_shown_equals_the_teacher_and_remembers():
    cfg, teacher = CFG, taught()
    soft = net().soft
    show = Asked(teacher, ("bev", "head", "soft"), soft)
    b = batch()
    with torch.no_grad():
        direct = teacher(b)
    for shown in (show(b), show(b)):
        torch.testing.assert_close(shown.bev, direct.bev, atol=1e-5, rtol=1e-5)
        for k in ("cls", "box", "dir"):
            torch.testing.assert_close(getattr(shown.head, k), getattr(direct.head, k), atol=1e-5, rtol=1e-5)
        for mine, theirs in zip(shown.soft, soft_boxes(direct.head, teacher.anchors, cfg), strict=True):
            assert len(mine) and len(mine) == len(theirs)
            torch.testing.assert_close(mine.scores, theirs.scores, atol=1e-4, rtol=1e-4)
    assert len(show.known) == 2
    alone = b.frame(1)
    assert torch.equal(show(alone).bev[0], show(b).bev[1]) and len(show.known) == 2, (
        "the same bits beside another frame"
    )
    assert not torch.equal(show(batch(seed=1)).bev, shown.bev) and len(show.known) == 4
    none = Asked(teacher, ("soft",), soft)
    t = none(b)
    assert t.bev is None and t.head is None and len(t.soft) == 2
    full = Asked(teacher, ("bev",), limit=direct.bev[0].nbytes)
    full(b)
    assert len(full.known) == 1, "no more than fits"
    empty = replace(b, points=b.points[b.points[:, 0] == 0])
    assert torch.equal(show(empty).bev[0], show(b).bev[0]) and not show(empty).bev[1].isnan().any()


def fill(path, name):
    "One of several writers, in a process of its own."
    store = TapStore(path)
    for i in range(20):
        store.put(b"T", {(f"{name}{i}".encode(), "bev"): f"{name}{i}".encode() * 500})


def test_several_processes_share_a_store(tmp_path):
    with ProcessPoolExecutor(3, get_context("spawn")) as pool:
        list(pool.map(fill, [tmp_path / "t.sqlite"] * 3, "abc"))
    keys = [f"{n}{i}".encode() for n in "abc" for i in range(20)]
    assert TapStore(tmp_path / "t.sqlite").get(b"T", keys, ("bev",)) == {(k, "bev"): k * 500 for k in keys}


def test_a_store_changes_no_bit_of_a_batch(tmp_path):
    "Found on disk or computed, alone or beside another, in one layout."
    teacher, store, b = taught(), TapStore(tmp_path / "t.sqlite"), batch()
    names, soft = ("bev", "head", "soft"), net().soft
    ask = lambda: Asked(teacher, names, soft, store=store, frames=4)
    ask()(b.frame(1))
    mixed, never = ask()(b), Asked(teacher, names, soft)(b)
    assert (store.asked, store.found) == (3, 1)
    for x, y in (
        (mixed.bev, never.bev),
        *((getattr(mixed.head, k), getattr(never.head, k)) for k in ("cls", "box", "dir")),
    ):
        assert torch.equal(x, y) and x.stride() == y.stride()
    for x, y in zip(mixed.soft, never.soft, strict=True):
        assert len(x) and all(torch.equal(getattr(x, k), getattr(y, k)) for k in ("boxes", "scores", "labels"))


def test_a_store_tells_teachers_apart(tmp_path):
    "By one weight, by a field that is told, by the picture; each asks for itself."
    store, b = TapStore(tmp_path / "t.sqlite"), batch()
    ask = lambda teacher, told=None: Asked(teacher, ("bev",), told=told, store=store, frames=4)
    teacher, other = taught(), taught()
    ask(teacher)(b)
    next(iter(other.parameters())).data.flatten()[0] += 1e-3
    for one, told, found in ((teacher, None, 2), (other, None, 2), (teacher, {"space.max_points": 3}, 2)):
        ask(one, told)(b)
        assert store.found == found
    assert store.asked == 8
    moved = replace(b, points=b.points + b.points.new_tensor([0, 1e-3, 0, 0, 0]))
    ask(teacher)(moved)
    assert (store.asked, store.found) == (10, 2)


def test_loaded_teacher_is_frozen(tmp_path):
    save_file({k: v.contiguous() for k, v in taught().state_dict().items()}, tmp_path / "t.safetensors")
    t = frozen(CFG, tmp_path / "t.safetensors", torch.device("cpu"))
    assert not t.training and not any(p.requires_grad for p in t.parameters())
    for k, v in load_file(tmp_path / "t.safetensors").items():
        assert torch.equal(t.state_dict()[k], v)
    with torch.no_grad():
        a, b = t(batch()).bev, t(batch()).bev
    assert torch.equal(a, b)


# --- depth, as the stages ask for it ---


def test_boxes_in_the_picture():
    "A box's rectangle holds the projections of its corners and touches them; behind the camera it is clipped."
    b = batch(1)
    ((rect,),) = boxes_in_views(b)
    x, y, z, l, w, h, a = b.boxes[0][0].tolist()
    uv = []
    for i in (-0.5, 0.5):
        for j in (-0.5, 0.5):
            for k in (-0.5, 0.5):
                p = P2.double().numpy() @ (RIG.double().numpy() @ np.array([x + i * l, y + j * w, z + k * h, 1]))
                uv.append(p[:2] / p[2])
    np.testing.assert_allclose(rect, [*np.min(uv, 0), *np.max(uv, 0)], rtol=1e-4)
    near = replace(b, boxes=[torch.tensor([[0.5, 1.5, -0.9, 4, 1.6, 1.5, 0]])])
    ((l, t, r, bt),) = boxes_in_views(near)[0].tolist()
    assert l < r and t < bt and l < 0
    assert boxes_in_views(replace(b, boxes=[torch.zeros(0, 7)]))[0].shape == (0, 4)
    assert boxes_in_views(replace(b, boxes=[None]))[0].shape == (0, 4)


def test_depth_term_by_hand():
    "Nearest return of each cell; cells in a box count `foreground` times; a frame without labels weighs all alike."
    b = batch(1)
    sparse = torch.zeros(1, 96, 320)
    sparse[0, 49, 161], sparse[0, 51, 163], sparse[0, 5, 5] = 9.0, 14.0, 20.0
    b = replace(b, depth=sparse[None])
    logits, bins, cfg = torch.randn(1, 33, 24, 80), DepthBins(*CFG.space.depth, 32), CFG
    target = torch.zeros(1, 24, 80)
    target[0, 12, 40], target[0, 1, 1] = 9.0, 20.0
    ((l, t, r, bt),) = boxes_in_views(b)[0].tolist()
    assert l < 160 < r and t < 48 < bt
    front = torch.zeros(1, 24, 80, dtype=torch.bool)
    front[0, 12, 40] = True
    torch.testing.assert_close(
        depth_term(logits, b, cfg.space, cfg.depth), depth_loss(logits, target, bins, cfg.depth, front)
    )
    torch.testing.assert_close(
        depth_term(logits, replace(b, boxes=[None], labels=[None]), cfg.space, cfg.depth),
        depth_loss(logits, target, bins, cfg.depth),
    )
    assert cfg.depth.foreground > cfg.depth.background


def test_labels_for_one_class_soft_boxes_for_the_rest():
    "distill.hard (section 4.8): pedestrians from labels at score 1, cars from the teacher; its pedestrians are unread."
    car, walker, real = (
        torch.tensor([10.0, 0, -0.9, 3.9, 1.6, 1.5, 0]),
        torch.tensor([15.0, 4, -0.8, 0.8, 0.6, 1.7, 0]),
        torch.tensor([15.0, -4, -0.8, 0.8, 0.6, 1.7, 0]),
    )
    cfg = CFG.override('distill.hard=["Pedestrian"]', "distill.feature=false")
    hard, soft = net(cfg), net(CFG.override("distill.feature=false"))
    student = Taps(head=maps([], [], []))
    frame = batch(1)
    frame.boxes, frame.labels = [torch.stack([car + 3, real])], [torch.tensor([0, 1])]
    tell = lambda boxes, scores, labels: dict(
        teacher=Taps(soft=[Found(torch.stack(boxes), torch.tensor(scores), torch.tensor(labels))])
    )
    mixed = hard(student, tell([car, walker], [0.7, 0.4], [0, 1]), frame)
    meant = soft(student, tell([car, real], [0.7, 1.0], [0, 1]), frame)
    for name, value in mixed.items():
        assert value == meant[name] > 0, name
    assert total(hard(student, tell([car, walker], [0.7, 0.9], [0, 1]), frame)) == total(mixed)
    assert (
        total(hard(student, tell([car], [0.6], [0]), frame))
        != total(mixed)
        != total(soft(student, tell([car, walker], [0.7, 0.4], [0, 1]), frame))
    )
    assert hard.needs_labels and not soft.needs_labels
