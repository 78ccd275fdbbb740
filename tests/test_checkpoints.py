"Released checkpoints: every key accounted for, the released networks' numbers, and nothing in a file is executed."

import gzip
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden.det import det, det_fill, det_state, detu
from torch import nn

from cmkd import cli
from cmkd.core import Batch
from cmkd.distill.cmkd import distiller
from cmkd.distill.released import load_converted, load_released, read_released, save_released
from cmkd.distill.roles import camera, lidar
from cmkd.distill.teachers import Asked
from cmkd.layers.adapt import DomainAdaptation
from cmkd.layers.image import ImageBranch, ImageMaps, import_timm
from cmkd.methods import recipe
from cmkd.models.camera import CameraDetector
from cmkd.models.checkpoints import FIRST, model_state, released_name, start_from
from cmkd.models.lidar import LidarDetector
from cmkd.train.step import total

RELEASE = recipe(name="release")


@pytest.fixture(scope="session")
def states(golden) -> dict[str, dict[str, list[int]]]:
    "{network: {key: shape}} of the released code's state dicts."
    return json.loads(gzip.decompress((golden / "state_dicts.json.gz").read_bytes()))


def write(path, state, **more):
    torch.save(dict(epoch=80, it=9, model_state=state, optimizer_state=None, version="pcdet+0.5.2") | more, path)
    return path


def hollow(shapes) -> dict[str, torch.Tensor]:
    "Tensors of these shapes, each one number large."
    return {
        k: torch.zeros(
            (), dtype=torch.int64 if k.endswith(("num_batches_tracked", "global_step")) else torch.float32
        ).expand(s)
        for k, s in shapes.items()
    }


def filled(shapes, prefix="") -> dict[str, torch.Tensor]:
    return {k: det_state(prefix + k, s) for k, s in shapes.items()}


def loud(state):
    "The golden's student sees more: two weights are scaled."
    state["vfe.ffn.channel_reduce.bn.weight"] *= 20
    state["vfe.ffn.ddn.model.classifier.4.weight"] *= 8
    return state


def close(a, b, tol):
    np.testing.assert_allclose(torch.as_tensor(a).detach().numpy(), b, atol=tol, rtol=tol)


def seen(images, rig, size=(96, 320)) -> Batch:
    "Pictures of one camera, without a sweep, depth or labels."
    n, (H, W), nothing = len(images), size, [None] * len(images)
    rigs = (torch.tensor(rig[k]).expand(n, -1, -1)[:, None] for k in ("lidar_to_cam", "P2"))
    return Batch(
        nothing,
        images[:, None],
        torch.tensor([[[H, W]]] * n),
        torch.zeros(0, 5),
        *rigs,
        torch.zeros(n, 1, H, W),
        nothing,
        nothing,
    )


def swept(points) -> Batch:
    "A sweep that nobody photographed."
    eye = torch.eye(4)[None, None]
    return Batch(
        ["0"],
        torch.zeros(1, 1, 3, 1, 1),
        torch.ones(1, 1, 2),
        points,
        eye,
        eye[:, :, :3],
        torch.zeros(1, 1, 1, 1),
        [None],
        [None],
    )


def same(a: nn.Module, b: nn.Module):
    x, y = a.state_dict(), b.state_dict()
    assert list(x) == list(y)
    for k in x:
        assert torch.equal(x[k], y[k]), k


# --- each released network, key by key ---

R101 = ["student.backbone=resnet101", "student.feature_level=1"]
CADDN = [
    *R101,
    "space.depth_bins=80",
    "space.image_voxel=[0.16, 0.16, 0.16]",
    "space.bev_cell=0.16",
    "student.collapse=64",
    "teacher.out_channels=32",
    "student.adapt=false",
    "bev.layers=[10, 10, 10]",
    "bev.strides=[2, 2, 2]",
    "bev.filters=[64, 128, 256]",
    "bev.up_strides=[1, 2, 4]",
    "bev.up_filters=[128, 128, 128]",
]
PLAIN = [
    "teacher.encoder=plain",
    "teacher.out_channels=128",
    "space.low=[0, -40, -3]",
    "space.high=[70.4, 40, 1]",
    "space.lidar_voxel=[0.05, 0.05, 0.1]",
    "space.bev_cell=0.4",
]


@pytest.mark.parametrize(
    "name, role, count, changes",
    [
        ("teacher_second", "teacher", 233, []),
        ("second_openpcdet", "teacher", 163, PLAIN),
        ("student_R50_scd", "student", 649, []),
        ("student_R50_scd_bev", "student", 559, []),
        ("student_ResNet101_layer1_scd", "student", 955, R101),
        ("caddn_R101", "student", 903, CADDN),
    ],
)
def test_every_key_is_accounted_for(states, tmp_path, name, role, count, changes):
    found = read_released(write(tmp_path / "c.pth", hollow(states[name])))
    assert found.role == role and found.config == RELEASE.override(*changes)
    assert (
        len(states[name]) == count == len(found.weights) + 1
        and found.left_out == ("global_step",)
        and found.permuted == ()
    )
    assert {released_name(k): list(v.shape) for k, v in found.weights.items()} == {
        k: s for k, s in states[name].items() if k != "global_step"
    }
    stage2 = set(states["student_R50_scd"]) - set(states["student_R50_scd_bev"])
    assert set(map(released_name, found.absent)) == (stage2 if name == "student_R50_scd_bev" else set())


def test_caddn_is_a_student(states, tmp_path):
    "From the lift to the head: its maps and its anchors fit."
    with pytest.MonkeyPatch.context() as m:
        m.setattr("torch.nn.init.kaiming_normal_", lambda t, *a, **k: t)
        m.setattr("torch.nn.init.kaiming_uniform_", lambda t, *a, **k: t)  # no time for random numbers
        _, _, model = load_released(write(tmp_path / "c.pth", hollow(states["caddn_R101"])))
    assert (
        isinstance(model, CameraDetector)
        and not model.training
        and isinstance(model.align, nn.Identity)
        and isinstance(model.adapt, nn.Identity)
    )
    assert (
        model.lifted.grid.shape == (25, 376, 280)
        and model.lifted.bins.count == 80
        and model.anchors.shape == (188, 140, 6, 7)
    )
    with torch.no_grad():
        assert all((v == 0).all() for v in model.parameters())
    low, high = model.anchors[0, 0, 0, :2], model.anchors[-1, -1, 0, :2]
    close(low, [2, -30.08], 1e-4)
    close(high, [46.8, 30.08], 1e-4)
    head = model.to("meta").head(model.bev2d(model.lifted.collapse(torch.zeros(1, 1600, 376, 280, device="meta"))))
    assert head.cls.shape == (1, 18, 188, 140)


def test_teacher_gives_a_student_its_detector(golden):
    "Same names, same shapes: 91 of 649 keys."
    want = json.loads((golden / "n_teacher_to_student_keys.json").read_text())
    with torch.device("meta"):
        a, b = ({released_name(k): v.shape for k, v in net(RELEASE).state_dict().items()} for net in (lidar, camera))
    given = {k for k in a if a[k] == b.get(k)} | {"global_step"}
    assert (
        given == set(want["keys"]) and len(given) == want["n_loaded"] == 91 and len(b) + 1 == want["n_student"] == 649
    )
    assert {k.split(".")[0] for k in given} == set(want["prefixes"])


# --- the numbers of a converted network ---


def spconv1(state):
    return {
        k: v.permute(1, 2, 3, 4, 0).contiguous() if k.startswith("backbone_3d.") and v.dim() == 5 else v
        for k, v in state.items()
    }


def test_converted_teacher(golden, states, tmp_path):
    "Golden i, out of a file of spconv 1.x; the file of 2.x gives the same weights."
    state = filled(states["teacher_second"])
    old = spconv1(state)
    assert old[FIRST].shape == (3, 3, 3, 4, 16) and old["backbone_3d.conv1.0.conv1.weight"].shape == (3, 3, 3, 16, 16)
    _, _, model = load_released(write(tmp_path / "1.pth", old))
    same(model, load_released(write(tmp_path / "2.pth", state))[2])
    convs = {k for k, v in state.items() if v.dim() == 5}
    assert (
        set(read_released(tmp_path / "1.pth").permuted) == convs
        and len(convs) == 21
        and isinstance(model, LidarDetector)
        and not model.training
    )
    i = np.load(golden / "i_teacher_small.npz")
    p = torch.tensor(i["points"])
    with torch.no_grad():
        taps = model(swept(F.pad(p, (1, 0))))
    d = taps.bev.double()
    close([d.mean(), d.std(), d.abs().sum(), d.min(), d.max()], i["spatial_stats"], 1e-5)
    close(taps.head.cls.permute(0, 2, 3, 1)[:, ::8, ::8], i["cls_sub"], 1e-4)


def test_converted_student(golden, states, tmp_path):
    "Golden l, the dense maps; and the file that we write back is the file that we read."
    state, z = loud(filled(states["student_R50_scd"])), np.load(golden / "l_student_reduced.npz")
    state["dense_head.conv_cls.weight"] *= 6
    state["dense_head.conv_box.weight"] *= 0.3
    cfg, role, model = load_released(write(tmp_path / "c.pth", state))
    assert not model.training and role == "student" and cfg == RELEASE
    with torch.no_grad():
        taps = model(seen(detu("l.reduced.img", (1, 3, 96, 320)), z))
    depth = ImageMaps(taps.features, taps.depth_logits).depth
    close(taps.features[0, ::16, None, ::3, ::4] * depth[0, None, ::12, ::3, ::4], z["frustum_sub"], 1e-4)
    close(taps.bev[0, ::16, ::4, ::4], z["bev"], 1e-4)
    rows = {k: getattr(taps.head, k)[0].permute(1, 2, 0)[::4, ::4] for k in ("cls", "dir", "box")}
    close(rows["cls"], z["cls"], 1e-4)
    close(rows["dir"], z["dir"], 1e-4)
    close(rows["box"][::2, ::2], z["box"], 1e-4)
    save_released(cfg, role, model, tmp_path / "back.pth")
    back = model_state(tmp_path / "back.pth")
    assert set(back) == set(state) and all(torch.equal(v, state[k]) for k, v in back.items())


def test_first_stage_checkpoint_trains_as_released(golden, states, tmp_path):
    "The student of a stage-1 file, one training step of the feature stage: losses and gradients (golden l)."
    path = write(tmp_path / "bev.pth", loud(filled(states["student_R50_scd_bev"])))
    with pytest.warns(UserWarning, match="bev.pth: a first-stage checkpoint, without bev2d and head"):
        cfg, _, model = load_released(path, "student.dropout=0", "student.lift=plain")
    model.train()
    teacher = load_released(write(tmp_path / "t.pth", filled(states["teacher_second"], "T.")))[2].requires_grad_(False)
    z, rig = np.load(golden / "l_train_stage1_bev.npz"), np.load(golden / "l_student_reduced.npz")
    kept = torch.arange(5) < torch.tensor(z["voxel_num_points"])[:, None]
    points = torch.cat(
        [torch.tensor(z["voxel_coords"])[:, :1, None].expand(-1, 5, 1).float(), torch.tensor(z["voxels"])], 2
    )[kept]
    depth = torch.zeros(2, 96, 320)
    depth[:, ::8, ::8] = detu("l.train.depth", (2, 12, 40), 0, 60) * (detu("l.train.dmask", (2, 12, 40)) >= 0.6)
    batch = replace(seen(detu("l.train.img", (2, 3, 96, 320)), rig), points=points, depth=depth[:, None])
    learns = distiller(cfg, model)
    terms = learns(model(batch, upto="bev"), dict(teacher=Asked(teacher, learns.teacher_taps["teacher"])(batch)), batch)
    want = dict(zip(z["tb_names"], z["tb_values"], strict=True))
    close(terms["feature"], want["bev_loss"], 1e-5)
    close(terms["depth"], want["loss_depth"], 1e-5)
    close(total(terms), z["loss"], 1e-5)
    total(terms).backward()
    grads = {released_name(k): p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == set(z["grad_names"])
    norm = nn.utils.clip_grad_norm_(model.parameters(), 10.0).item()
    close(norm / z["grad_norm_before_clip"], 1.0, 1e-3)
    # In float64 the norm is 2.4e-3 from the golden's and single entries up to 1.7e-2 of the largest:
    # that is float32's own error here, so no more can be asked.
    for name, (_, _, size, *_) in zip(z["grad_names"], z["grad_stats"], strict=True):
        if size > 1e-5:
            close(
                grads[name].double().abs().sum() / size, 1.0, 5e-3
            )  # smaller ones are rounding: biases before a batch norm
    for name in (n for n in z.files if n.startswith("grad__")):
        g = grads[name[6:].replace("__", ".")].flatten()[:2000].numpy()
        close(g / np.abs(z[name]).max(), z[name] / np.abs(z[name]).max(), 1e-3 if "layers__3" in name else 2e-2)
    close(model.adapt.layers[0].bn1_a.running_mean, z["bn_rm"], 1e-6)


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_begins_with_torchvisions_deeplab(name, tmp_path):
    "COCO weights, as torchvision saves them, go into the image branch: the same maps."
    import_timm()
    from torchvision.models import segmentation

    torch.manual_seed(0)
    theirs = getattr(segmentation, f"deeplabv3_{name}")(weights=None, weights_backbone=None, aux_loss=True).eval()
    for m in theirs.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    torch.save(theirs.state_dict(), tmp_path / "deeplabv3.pth")
    ours = ImageBranch(recipe().override(f"student.backbone={name}").student, 80).eval()
    left = start_from(ours, tmp_path / "deeplabv3.pth")
    assert {k.rsplit(".", 1)[0] for k in left} == {"reduce.0", "reduce.1", "classify.3"}
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        level, last = ours.backbone.net(x)
        seen = theirs.backbone(x)["out"]
        want = nn.Sequential(*list(theirs.classifier)[:4])(seen)
        got = ours.classify[:3](ours.aspp(last))
    close(last / seen.abs().max(), seen / seen.abs().max(), 1e-5)
    close(got / want.abs().max(), want / want.abs().max(), 1e-5)
    with pytest.raises(
        ValueError, match="deeplabv3.pth: not the DeepLabV3 of this student.backbone: .*student.initial"
    ):
        start_from(ImageBranch(recipe().override("student.backbone=resnet18").student, 80), tmp_path / "deeplabv3.pth")


def test_stride_two_adaptation(golden):
    "The released form that halves the map; its names are the released ones."
    net = det_fill(DomainAdaptation(128, 4, "released", cin=64), "h.down.").eval()
    with torch.no_grad():
        close(net(det("h.xd", (1, 64, 24, 20))), np.load(golden / "h_scnet_down.npz")["y"], 1e-5)


# --- what does not fit is named ---


def test_one_error_names_all(states, tmp_path):
    state = hollow(states["student_R50_scd"])
    for k in ("dense_head.conv_cls.bias", "vfe.ffn.channel_reduce.bn.bias"):
        del state[k]
    state["domain_adaptation.down_layer.0.weight"] = torch.zeros(2)
    state["map_to_bev_module.block.bn.bias"] = torch.zeros(5)
    with pytest.raises(ValueError) as e:
        load_released(write(tmp_path / "spoilt.pth", state))
    text = str(e.value)
    assert "\n" not in text
    for part in (
        "spoilt.pth",
        "1 unknown: domain_adaptation.down_layer.0.weight",
        "2 missing: ",
        "dense_head.conv_cls.bias",
        "vfe.ffn.channel_reduce.bn.bias",
        "1 of wrong shape: map_to_bev_module.block.bn.bias is (5,), not (128,)",
    ):
        assert part in text, text


@pytest.mark.parametrize(
    "gone",
    [
        "vfe.ffn.channel_reduce.conv.weight",
        "map_to_bev_module.block.conv.weight",
        "backbone_2d.deblocks.0.0.weight",
        "dense_head.conv_box.weight",
        "domain_adaptation.layers.2.k1.0.weight",
    ],
)
def test_a_missing_key_is_named_whichever_it_is(states, tmp_path, gone):
    state = hollow(states["student_R50_scd"])
    del state[gone]
    with pytest.raises(ValueError, match=f"c.pth: .* 1 missing: {gone}"):
        read_released(write(tmp_path / "c.pth", state))


@pytest.mark.parametrize(
    "spoil, says",
    [
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("dense_head.")},
            "6 missing: dense_head",
        ),  # a detector without its head is no first stage
        (
            lambda s: s | {"backbone_2d.blocks.0.1.weight": torch.zeros(128, 999, 3, 3)},
            r"blocks.0.1.weight is \(128, 999, 3, 3\), not \(128, 128, 3, 3\)",
        ),
        (
            lambda s: s | {"map_to_bev_module.block.conv.weight": torch.zeros(128, 704, 1, 1)},
            r"11 heights of 64; \[10, 25\] heights are known",
        ),
        (lambda s: s | {"vfe.ffn.ddn.model.backbone.layer4.3.conv1.weight": torch.zeros(1)}, r"\(3, 4, 6, 4\) blocks"),
        (lambda s: {"anything": torch.zeros(1)}, "neither a teacher"),
        (lambda s: {}, "neither a teacher"),
    ],
)
def test_what_is_no_released_network(states, tmp_path, spoil, says):
    with pytest.raises(ValueError, match="c.pth: .*" + says):
        read_released(write(tmp_path / "c.pth", spoil(hollow(states["student_R50_scd"]))))


def test_networks_without_a_module_here(states, tmp_path):
    with pytest.raises(ValueError, match="c.pth: a PointPillars or CenterPoint teacher"):
        read_released(write(tmp_path / "c.pth", hollow(states["teacher_pointpillar"])))


def test_wrappers_old_counters_and_named_changes(states, tmp_path):
    student, teacher = hollow(states["student_R50_scd_bev"]), hollow(states["second_openpcdet"])
    both = {f"module.model_img.{k}": v for k, v in student.items()} | {
        f"module.model_lidar.{k}": v for k, v in teacher.items()
    }
    found = read_released(write(tmp_path / "both.pth", both))
    assert (
        found.role == "student"
        and len(found.weights) == 558
        and len(found.left_out) == 1 + 163
        and "model_lidar.global_step" in found.left_out
    )
    old = {k: v for k, v in teacher.items() if "num_batches" not in k}
    found = read_released(
        write(tmp_path / "old.pth", old),
        "space.low=[2, -30.08, -3]",
        "space.high=[46.8, 30.08, 1]",
        "space.lidar_voxel=[0.04, 0.04, 0.1]",
        "space.bev_cell=0.32",
    )
    assert (
        all("num_batches" in k for k in found.absent)
        and len(found.absent) == sum("num_batches" in k for k in teacher)
        and not found.untrained
    )
    assert found.config == RELEASE.override("teacher.encoder=plain", "teacher.out_channels=128")


# --- a file is data, never a program ---


class Runs:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["extra", "model_state"])
@pytest.mark.parametrize("call", ["open", "system"])
def test_nothing_is_executed(tmp_path, call, where, zipped):
    touched = tmp_path / "touched"
    bad = Runs(open, str(touched), "w") if call == "open" else Runs(os.system, f"touch {touched}")
    whole = {"model_state": {"a": torch.zeros(1)}}
    (whole["model_state"] if where == "model_state" else whole)["b"] = bad
    torch.save(whole, tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=rf"bad.pth: not loaded: it carries \S*{call}, which would have to be executed"
    ):
        load_released(tmp_path / "bad.pth")
    assert not touched.exists()
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert touched.exists(), "the file is harmless, so this test proves nothing"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_numbers_of_an_optimiser_are_no_obstacle(tmp_path, zipped):
    before = set(torch.serialization.get_safe_globals())
    state = {
        "param_groups": [{"lr": np.float64(0.003), "betas": (0.9, 0.99), "n": np.int64(3)}],
        "state": {0: {"step": 5, "exp_avg": torch.zeros(2)}},
    }
    torch.save(
        dict(
            model_state={"a": torch.arange(3.0)},
            epoch=80,
            it=37120,
            accumulated_iter=5,
            optimizer_state=state,
            version="pcdet",
        ),
        tmp_path / "c.pth",
        _use_new_zipfile_serialization=zipped,
    )
    assert (
        torch.equal(model_state(tmp_path / "c.pth")["a"], torch.arange(3.0))
        and set(torch.serialization.get_safe_globals()) == before
    )
    torch.save(dict(model_state={"a": np.float64(3)}), tmp_path / "c.pth")
    with pytest.raises(ValueError, match="c.pth: its weights hold what is no named tensor: a"):
        model_state(tmp_path / "c.pth")


def test_damaged_files_are_named(tmp_path):
    whole = write(tmp_path / "whole.pth", {"a": torch.zeros(1000)}).read_bytes()
    rng = np.random.default_rng(0)
    for n, text in enumerate(
        [
            b"",
            b"hello",
            whole[:100],
            whole[:-50],
            rng.bytes(400),
            b"\x80\x02.",
            b"\x80\x02]q\x00.",
            b"PK\x03\x04" + rng.bytes(50),
        ]
    ):
        (tmp_path / f"{n}.pth").write_bytes(text)
        with pytest.raises(ValueError, match=f"/{n}.pth: "):
            model_state(tmp_path / f"{n}.pth")
    with pytest.raises(FileNotFoundError, match="none.pth"):
        model_state(tmp_path / "none.pth")
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth: no 'model_state' in it.*state_dict"):
        model_state(tmp_path / "other.pth")


# --- the other way, and from a shell ---

SMALL = RELEASE.override(
    "teacher.channels=[4, 4, 8, 16]",
    "teacher.out_channels=8",
    "bev.layers=[1, 2]",
    "bev.filters=[16, 16]",
    "bev.up_filters=[16, 8]",
    "student.reduced=8",
    "student.aspp=16",
    "student.collapse=16",
    "student.blocks=2",
    "space.depth_bins=20",
)


@pytest.mark.parametrize("encoder", ["plain", "residual"])
def test_teacher_there_and_back(tmp_path, encoder):
    cfg = SMALL.override(f"teacher.encoder={encoder}")
    torch.manual_seed(0)
    net = lidar(cfg)
    save_released(cfg, "teacher", net, tmp_path / "a.pth")
    range_ = [
        f"space.{k}={json.dumps(v)}"
        for k, v in vars(cfg.space).items()
        if k in ("low", "high", "lidar_voxel", "bev_cell")
    ]
    back, role, again = load_released(tmp_path / "a.pth", *range_)
    same(net, again)
    assert back.teacher == cfg.teacher and back.bev == cfg.bev and back.space.low == cfg.space.low
    save_released(back, role, again, tmp_path / "b.pth")
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    write(tmp_path / "1.pth", spconv1(model_state(tmp_path / "a.pth")))
    same(net, load_released(tmp_path / "1.pth", *range_)[2])


def test_only_what_the_layout_holds_is_written(tmp_path):
    for name in ("paper", "release"):
        cfg = recipe(name=name, scale="smoke")
        with torch.device("meta"):
            net = camera(cfg)
        with pytest.raises(ValueError, match="s.pth: the released layout has no place for .*student.backbone=resnet18"):
            save_released(cfg, "student", net, tmp_path / "s.pth")
    assert not list(tmp_path.iterdir())


def test_convert_from_a_shell(tmp_path, capsys):
    "In, looked through, out again: the same bits."
    from PIL import Image

    torch.manual_seed(0)
    net = camera(SMALL)
    save_released(SMALL, "student", net, tmp_path / "s.pth")
    assert cli.main(["convert", str(tmp_path / "s.pth"), "--out", str(tmp_path / "ours")]) == 0
    said = capsys.readouterr().out
    assert (
        "a student" in said
        and "left out: global_step" in said
        and "space.depth_bins=20" in said
        and "not in the file, left as built: nothing" in said
    )
    cfg, role, again = load_converted(tmp_path / "ours")
    same(net, again)
    assert role == "student" and cfg.student == SMALL.student
    assert cli.main(["convert", "--to-released", str(tmp_path / "ours"), "--out", str(tmp_path / "back.pth")]) == 0
    assert (tmp_path / "back.pth").read_bytes() == (tmp_path / "s.pth").read_bytes()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 320, 3), dtype=np.uint8)).save(tmp_path / "p.png")
    row = lambda name, m: f"{name}: " + " ".join(f"{v:.6e}" for v in np.ravel(m)) + "\n"
    P2, V = (
        [[185.9, 0, 157, 11], [0, 185.9, 44, 0.06], [0, 0, 1, 0.003]],
        [[0, -1, 0, 0], [0, 0, -1, -0.08], [1, 0, 0, -0.27]],
    )
    (tmp_path / "c.txt").write_text(
        "".join(row(f"P{i}", P2) for i in range(4))
        + row("R0_rect", np.eye(3))
        + row("Tr_velo_to_cam", V)
        + row("Tr_imu_to_velo", V)
    )
    code = cli.main(
        [
            "detect",
            str(tmp_path / "p.png"),
            "--calib",
            str(tmp_path / "c.txt"),
            "--weights",
            str(tmp_path / "ours"),
            "--out",
            str(tmp_path / "found"),
        ]
    )
    assert code == 0 and (tmp_path / "found/p.txt").exists(), capsys.readouterr().err
    (tmp_path / "ours" / "record.json").write_text("{}")
    assert (
        cli.main(["convert", str(tmp_path / "s.pth"), "--out", str(tmp_path / "ours")]) == 2
        and "the folder of a run" in capsys.readouterr().err
    )
