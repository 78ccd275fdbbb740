"Benchmarks measure the same function twice: at a size that takes no time, the variants agree and every row is whole."
import pandas as pd
import pytest
import torch

from cmkd.config import recipe
from cmkd.core import root
from cmkd.evaluate import bench
from cmkd.evaluate.memory import STEPS, faces, short
from cmkd.evaluate.speed import measure

SMALL = ("space.low=[2, -20.48, -3]", "space.high=[42.96, 20.48, 1]", "space.image_voxel=[0.64, 0.64, 1]", "space.bev_cell=1.28", "space.lidar_voxel=[0.16, 0.16, 0.1]",
         "student.backbone=resnet18", "data.image_size=[96, 320]")


def test_variants_of_the_student_agree():
    plain, *others = (bench.student_case(v, *SMALL)() for v in ("plain", "fused", "folded", "folded, bf16"))
    for maps, tolerance in zip(others, (1e-4, 1e-4, .1)):
        for k in ("cls", "box", "dir"): torch.testing.assert_close(getattr(maps, k).float(), getattr(plain, k), rtol=tolerance, atol=tolerance)


def test_onnx_runtime_agrees():
    pytest.importorskip("onnx", reason="onnx is not installed"); pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    plain, other = bench.student_case("folded", *SMALL)(), bench.onnx_case(*SMALL)()
    for k in ("cls", "box", "dir"): torch.testing.assert_close(getattr(other, k), getattr(plain, k), rtol=1e-3, atol=1e-3)


def test_memory_was_foretold():
    "Every published run of the embedded world: what `cmkd memory` says is within 15 % of the peak in its record."
    path = root()/"results"/"bench"/"memory.csv"
    peaks = pd.read_csv(path).pivot(index="part", columns="variant", values="peak_mb")
    assert len(peaks) >= 20 and ((peaks.foretold/peaks.recorded - 1).abs() < .15).all(), (peaks.foretold/peaks.recorded).sort_values()


def test_memory_counts_what_is_kept():
    "A run sees each frame and its mirror once they were drawn, and never more than it draws; the probe cuts only the stages that a run has."
    cfg = recipe(scale="smoke")
    assert short(cfg).full_stage.steps == short(cfg).teacher_stage.steps == STEPS and short(cfg).feature_stage == cfg.feature_stage
    assert faces(100, 50, .5) == 50 and faces(100, 100, .5) == 100 and faces(100, 10_000, .5) == pytest.approx(200) and faces(100, 10_000, 0.) == 100


def test_rows_of_a_part():
    costs = {"plain": measure(lambda: sum(range(200_000)), 2), "fast": measure(lambda: None, 2)}
    first, second = bench.against("toy", costs)
    assert list(first) == ["part", "variant", "n", "cpu_median", "cpu_least", "cpu_most", "peak_mb", "note"] and first["note"] == "" and "times fewer CPU seconds" in second["note"]


def test_a_process_of_its_own():
    "Memory is counted from before the first call: the network itself and torch, some 400 MB, are not in it."
    cost = bench.apart(bench.student_case, "folded", *SMALL, repeats=1)
    assert 0 < cost["peak_mb"] < 250 and cost["cpu_least"] > 0


@pytest.mark.parametrize("variant", ["plain", "fused"])
def test_a_step_trains(variant):
    call = bench.step_case(variant, *SMALL)
    model = next(c.cell_contents for c in call.__closure__ if isinstance(c.cell_contents, torch.nn.Module) and hasattr(c.cell_contents, "lifted"))
    before = model.head.conv_cls.bias.clone(); call()
    assert not torch.equal(before, model.head.conv_cls.bias)


@pytest.mark.parametrize("name", bench.BACKBONES.values())
def test_every_backbone_of_table_8_fits(name):
    "Levels at 1/4 and 1/8 of each, on the meta device."
    from cmkd.layers.image import ImageBranch
    with torch.device("meta"): maps = ImageBranch(recipe().override(f"student.backbone={name}").student, 80).eval()(torch.zeros(1, 3, 192, 320), torch.tensor([[192, 320]]))
    assert maps.features.shape == (1, 64, 48, 80) and maps.logits.shape == (1, 81, 48, 80)
