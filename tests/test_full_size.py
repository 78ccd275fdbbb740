"The paper's own size on one real frame: slow, and the proof that a laptop can take a step."

import json
import subprocess
import sys

import pytest

STEP = """
import json, sys, time
from pathlib import Path
import torch
from safetensors.torch import save_file
from cmkd.data.sets import open_sets
from cmkd.cost.measure import peak_memory_mb
from cmkd.distill.roles import lidar
from cmkd.machine import seed_everything
from cmkd.methods import recipe, role_of
from cmkd.train.roles import Work, fit, save_weights

cfg = recipe().override(
    *("data.train_frames=1", "data.val_frames=1", "pretrain=false", "student.initial="),
    *("feature_stage.epochs=0", "feature_stage.batch=1"),
    *("full_stage.epochs=0", "full_stage.steps=1", "full_stage.batch=1"))
out, data = Path(sys.argv[1]), Path(sys.argv[2])
seed_everything("teacher")
save_weights(lidar(cfg), out/"teacher.safetensors")
start = time.process_time()
work = Work("student/0", open_sets(cfg.data, data), dict(teacher=out/"teacher.safetensors"), device="cpu")
at = fit(role_of(cfg, "student"), cfg, work, out/"run", progress=False).progress
peak = peak_memory_mb()*2**20
print(json.dumps(dict(rows=at.rows, cpu=time.process_time() - start, peak=peak)))
"""


@pytest.mark.slow
def test_one_step_of_the_paper_student(shared, tmp_path):
    "R101 at 375 x 1242, 25 x 376 x 280 voxels, both losses against a teacher at full size: one step within 12 GB."
    done = subprocess.run(
        [sys.executable, "-c", STEP, tmp_path, shared / "data" / "kitti"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    (row,) = found["rows"]
    print(found)
    assert found["peak"] < 12e9 and row["grad_norm"] > 0 and {"feature", "cls", "box", "direction"} <= set(row)
