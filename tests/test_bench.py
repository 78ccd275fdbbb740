"Benchmarks measure the same function twice: at a size that takes no time, the variants agree and every row is whole."

import pandas as pd
import pytest
import torch

from cmkd.cost import gpu, networks as bench
from cmkd.cost.measure import measure, with_probe
from cmkd.cost.memory import STEPS, faces, first_steps
from cmkd.data.sets import open_sets
from cmkd.files import root
from cmkd.methods import recipe
from cmkd.train.step import Learner
from cmkd.world.write import STREET, write

SMALL = (
    "space.low=[2, -20.48, -3]",
    "space.high=[42.96, 20.48, 1]",
    "space.image_voxel=[0.64, 0.64, 1]",
    "space.bev_cell=1.28",
    "space.lidar_voxel=[0.16, 0.16, 0.1]",
    "student.backbone=resnet18",
    "data.image_size=[96, 320]",
)


def test_variants_of_the_student_agree():
    plain, *others = (bench.student_case(v, *SMALL)() for v in ("plain", "fused", "folded", "folded, bf16"))
    for maps, tolerance in zip(others, (1e-4, 1e-4, 0.1), strict=True):
        for k in ("cls", "box", "dir"):
            torch.testing.assert_close(getattr(maps, k).float(), getattr(plain, k), rtol=tolerance, atol=tolerance)


def test_onnx_runtime_agrees():
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    plain, other = bench.student_case("folded", *SMALL)(), bench.onnx_case(*SMALL)()
    for k in ("cls", "box", "dir"):
        torch.testing.assert_close(getattr(other, k), getattr(plain, k), rtol=1e-3, atol=1e-3)


def test_memory_was_foretold():
    "Every published run of the embedded world: what `cmkd memory` says is within 15 % of the peak in its record."
    path = root() / "results" / "bench" / "memory.csv"
    peaks = pd.read_csv(path).pivot(index="part", columns="variant", values="peak_mb")
    assert len(peaks) >= 20 and ((peaks.foretold / peaks.recorded - 1).abs() < 0.15).all(), (
        peaks.foretold / peaks.recorded
    ).sort_values()


def test_memory_counts_what_is_kept():
    "A run sees each frame and its mirror once they were drawn, and never more than it draws."
    assert (
        faces(100, 50, 0.5) == 50
        and faces(100, 100, 0.5) == 100
        and faces(100, 10_000, 0.5) == pytest.approx(200)
        and faces(100, 10_000, 0.0) == 100
    )


def test_the_probe_does_the_first_steps_of_every_leg(tmp_path):
    write(tmp_path, STREET, dict(train=8, val=2, unlabelled=4), progress=False)
    cfg = recipe(scale="smoke").override("feature_stage.steps=3", "feature_stage.batch=2", "full_stage.steps=20")
    probe = first_steps(cfg, "student", tmp_path)
    assert (probe.draws, probe.drawn) == (3 * 2 + 20 * 4, 3 * 2 + STEPS * 4) and probe.shown > 0 and probe.peak > 50
    assert len(open_sets(cfg.data, tmp_path).seen()) == 12


def test_every_row_carries_the_probe():
    "One convolution in fp32 and bf16, from the same run."
    rows = with_probe(pd.DataFrame(dict(part=["a", "b"])))
    assert (rows.probe_fp32 > 0).all() and (rows.probe_bf16 > 0).all() and rows.probe_fp32.nunique() == 1


def test_release_stands_beside_paper():
    plain, fused = (
        bench.student_case(v, *SMALL, "student.backbone_args={}", name="paper")() for v in ("plain", "fused")
    )
    torch.testing.assert_close(fused.cls, plain.cls, rtol=1e-4, atol=1e-4)
    assert recipe(name="release").student.lift == "fused"


def test_rows_of_a_part():
    costs = {"plain": measure(lambda: sum(range(200_000)), 2), "fast": measure(lambda: None, 2)}
    first, second = bench.against("toy", costs)
    assert (
        list(first) == ["part", "variant", "n", "cpu_median", "cpu_least", "cpu_most", "peak_mb", "note"]
        and first["note"] == ""
        and "times fewer CPU seconds" in second["note"]
    )


def test_a_process_of_its_own():
    "Memory is counted from before the first call: the network itself and torch, some 400 MB, are not in it."
    cost = bench.apart(bench.student_case, "folded", *SMALL, repeats=1)
    assert 0 < cost["peak_mb"] < 250 and cost["cpu_least"] > 0


@pytest.mark.parametrize("variant", ["plain", "fused"])
def test_a_step_trains(variant):
    call = bench.step_case(variant, *SMALL)
    learner = next(c.cell_contents for c in call.__closure__ if isinstance(c.cell_contents, Learner))
    bias = learner.network.head.conv_cls.bias
    before = bias.clone()
    taken = call()
    assert not torch.equal(before, bias) and set(taken.losses) == {"feature", "cls", "box", "direction"}


@pytest.mark.parametrize("name", bench.BACKBONES.values())
def test_every_backbone_of_table_8_fits(name):
    "Levels at 1/4 and 1/8 of each, on the meta device."
    from cmkd.layers.image import ImageBranch

    with torch.device("meta"):
        maps = ImageBranch(recipe().override(f"student.backbone={name}").student, 80).eval()(
            torch.zeros(1, 3, 192, 320), torch.tensor([[192, 320]])
        )
    assert maps.features.shape == (1, 64, 48, 80) and maps.logits.shape == (1, 81, 48, 80)


def test_maps_that_say_nothing_are_not_compared():
    "A difference is relative to the largest entry; two constant maps would agree whatever the card did."
    there = torch.tensor([1.0, -4.0])
    assert gpu.off(torch.tensor([1.0, -3.0]), there) == 0.25
    with pytest.raises(ValueError, match="nothing to compare"):
        gpu.off(torch.ones(3), torch.ones(3))


def test_networks_of_random_weights_say_something():
    "What is compared between a card and the CPU is alive from the first map to the head."
    torch.manual_seed(0)
    cfg = recipe().override(*SMALL)
    for make in (gpu.lidar, gpu.camera):
        taps = gpu.alive(make(cfg))(gpu.sweep_and_picture(cfg))
        assert len(gpu.taps_off(taps, taps)) == 4 and not any(gpu.taps_off(taps, taps).values())


def test_a_bench_without_a_card_is_refused_before_work(monkeypatch):
    from cmkd.doors import tables

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tables, "of_runs", lambda *a: pytest.fail("work began"))
    with pytest.raises(ValueError, match="no graphics card"):
        tables.bench("gpu")
