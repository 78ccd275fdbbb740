"The command line: help that helps, errors of one line."
import json
import shutil
import tarfile

import numpy as np
import pytest

from cmkd import cli
from cmkd.data.kitti import read_label, write_label
from cmkd.ledger.runs import WORLDS

COMMANDS = ("doctor", "world", "train", "memory", "evaluate", "detect", "convert", "export", "table", "run", "bench")
CAR = "Car 0.00 0 1.85 387.63 181.54 423.81 233.12 1.67 1.87 3.69 -16.53 2.39 28.49 1.57"


def run(capsys, *words) -> tuple[int, str, str]:
    code = cli.main([str(w) for w in words]); got = capsys.readouterr()
    return code, got.out, got.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as e: cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0 and f"usage: cmkd {command}" in text
    options = [a for p in cli.parser()._subparsers._group_actions for a in p.choices[command]._actions if a.dest != "help"]
    assert all(a.help for a in options), f"cmkd {command}: an option without help"


def test_every_command_is_known_here():
    assert set(COMMANDS) == set(cli.parser()._subparsers._group_actions[0].choices)


@pytest.mark.parametrize("words, says", [
    (("doctor", "/nowhere"), "/nowhere: no such folder"),
    (("world", "/tmp/x", "--splits", "train"), "--splits train=500"),
    (("world", "/tmp/x", "--splits", "train=0"), "at least one frame"),
    (("train", "--data", "/nowhere"), "has no ImageSets/"),
    (("train", "--scale", "full"), "--scale full is for real data: add --data PATH"),
    (("export", "--weights", "/nowhere", "--onnx", "/tmp/x.onnx"), "no finished run and no converted checkpoint"),
    (("bench", "evaluate", "--labels", "/nowhere"), "/nowhere: no label files there"),
    (("bench", "lift", "--before", "efb61ce"), "--before COMMIT goes with cmkd bench row"),
    (("train", "--set", "distil.quality=false"), "no field 'distil.quality'"),
    (("train", "--set", "seed=x"), "not a"),
    (("train", "--scale", "full"), "--data"),
    (("evaluate", "--labels", "/nowhere", "--detections", "/nowhere"), "/nowhere"),
    (("detect", "a.png", "--calib", "a.txt", "--weights", "/nowhere"), "cmkd train"),
    (("convert", "/nowhere.pth", "--out", "/tmp/x"), "/nowhere.pth"),
    (("convert", __file__, "--out", "/tmp/x"), "test_cli.py: not loaded"),
    (("convert", "--to-released", "/nowhere", "--out", "/tmp/x.pth"), "cmkd train"),
    (("table", "cmkd_t99"), "cmkd_t04_both_distillations"),
    (("table", "cmkd_t04", "--data", "/nowhere"), "cmkd doctor /nowhere"),
])
def test_bad_input_is_one_line_and_code_2(words, says, capsys):
    code, out, err = run(capsys, *words)
    assert code == 2 and err.count("\n") == 1 and err.startswith(f"cmkd {words[0]}: ") and says in err and "Traceback" not in err


@pytest.mark.parametrize("words", [(), ("fly",), ("train", "--recipe", "mine"), ("evaluate",), ("world",), ("convert", "a.pth")])
def test_bad_grammar_is_code_2(words, capsys):
    with pytest.raises(SystemExit) as e: cli.main(list(words))
    assert e.value.code == 2 and "usage" in capsys.readouterr().err


def test_debug_shows_where():
    with pytest.raises(FileNotFoundError): cli.main(["--debug", "doctor", "/nowhere"])


def test_a_bug_is_not_dressed_as_bad_input(monkeypatch):
    monkeypatch.setattr(cli, "config_of", lambda args: [].nothing)
    with pytest.raises(AttributeError): cli.main(["train"])


def test_bench_names_ids_without_labels(tmp_path, capsys):
    (tmp_path/"000000.txt").write_text(CAR + "\n"); (tmp_path/"ids").write_text("000007\n")
    code, _, err = run(capsys, "bench", "evaluate", "--labels", tmp_path, "--ids", tmp_path/"ids")
    assert code == 2 and "none of these frames has a label file" in err


def test_evaluate_tells_what_is_lost(golden, tmp_path, capsys):
    "By distance, by kind of error, and with intervals; without --bootstrap a row has its seven keys."
    with tarfile.open(golden/"m_eval_A.tar.gz") as tar: tar.extractall(tmp_path, filter="data")
    found = next(tmp_path.glob("det*/**/*.txt")).parent
    code, out, _ = run(capsys, "evaluate", "--labels", tmp_path/"label_2", "--detections", found, "--distance", "--confusion", ".5", "--bootstrap", 20, "--json", tmp_path/"out.json")
    rows = json.loads((tmp_path/"out.json").read_text())
    assert code == 0 and "30–50 m" in out and "every box: 3D, hard, score 0.5 and above" in out and " to " in out
    assert all(r["low"] <= r["high"] for r in rows if r["value"] is not None and r["low"] is not None) and any(r["low"] < r["value"] < r["high"] for r in rows if r["value"])


def test_evaluate_writes_every_number(tmp_path, capsys):
    labels, found = tmp_path/"label_2", tmp_path/"found"
    for i in range(3):
        labels.mkdir(exist_ok=True); (labels/f"{i:06d}.txt").write_text(CAR + "\n")
        o = read_label(labels/f"{i:06d}.txt"); object.__setattr__(o, "scores", np.array([.9 - .1*i])); write_label(found/f"{i:06d}.txt", o)
    code, out, err = run(capsys, "evaluate", "--labels", labels, "--detections", found, "--json", tmp_path/"out.json")
    rows = json.loads((tmp_path/"out.json").read_text())
    assert code == 0 and "moderate" in out and set(rows[0]) == {"class", "metric", "recall", "strict", "iou", "difficulty", "value"}
    car = [r["value"] for r in rows if r["class"] == "Car" and r["metric"] == "3D" and r["recall"] == "R40" and r["difficulty"] == "moderate"]
    assert len(car) == 2 and car[0] == car[1] > 0 and {r["value"] for r in rows if r["class"] == "Cyclist"} == {None}
    (tmp_path/"ids.txt").write_text("000000\n000001\n"); (found/"000002.txt").unlink()
    assert run(capsys, "evaluate", "--labels", labels, "--detections", found, "--ids", tmp_path/"ids.txt")[0] == 0
    assert "000002.txt" in run(capsys, "evaluate", "--labels", labels, "--detections", found)[2]


def test_world_and_doctor(tmp_path, capsys):
    code, out, _ = run(capsys, "world", tmp_path/"w", "--splits", "train=2", "val=1", "--workers", 1)
    assert code == 0 and "3 frames" in out and cli.is_world(tmp_path/"w")
    code, out, _ = run(capsys, "doctor", tmp_path/"w")
    assert code == 0, out
    (tmp_path/"w/training/calib/000001.txt").unlink()
    code, out, _ = run(capsys, "doctor", tmp_path/"w")
    assert code == 1 and "000001.txt" in out
    assert "holds another world" in run(capsys, "world", tmp_path/"w", "--seed", 1)[2]


def test_doctor_on_real_frames(shared, tmp_path, capsys):
    assert run(capsys, "doctor", shared/"data"/"kitti", "--out", tmp_path/"report")[0] == 0
    assert (tmp_path/"report"/"summary.json").exists()
    to = tmp_path/"kitti"; shutil.copytree(shared/"data"/"kitti", to, copy_function=shutil.copyfile)
    for p in [to, *to.rglob("*")]: p.chmod(0o755 if p.is_dir() else 0o644)
    points = to/"training/velodyne/000000.bin"; points.write_bytes(points.read_bytes()[:-7])
    (to/"training/calib/000003.txt").unlink()
    label = to/"training/label_2/000007.txt"; label.write_text("\n".join(" ".join(line.split()[:14]) for line in label.read_text().splitlines()) + "\n")
    code, out, _ = run(capsys, "doctor", to)
    assert code == 1 and all(f in out for f in ("velodyne/000000.bin", "calib/000003.txt", "label_2/000007.txt"))


def test_counts_of_the_embedded_world():
    assert sum(WORLDS["mini"].values()) == 3000 and sum(WORLDS["smoke"].values()) == 76
