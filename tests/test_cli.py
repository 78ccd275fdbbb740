"The command line: help that helps, errors of one line, and no network before one is asked for."
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cmkd import cli
from cmkd.config import RECIPES, SCALES
from cmkd.data.kitti import read_label, write_label
from cmkd.doors import data, networks
from cmkd.doors.experiment import Experiment, street_of
from cmkd.ledger.record import command
from cmkd.methods import recipe
from cmkd.reading import sha256, write_sealed
from cmkd.world.rays import WorldConfig
from cmkd.world.write import WORLDS, write

COMMANDS = ("doctor", "world", "split-leaks", "train", "memory", "evaluate", "detect", "submit", "convert", "export",
            "table", "publish", "run", "bench", "learn", "docs", "clean")
CAR = "Car 0.00 0 1.85 387.63 181.54 423.81 233.12 1.67 1.87 3.69 -16.53 2.39 28.49 1.57"
OPTIONS = {   # every option of every command
    "doctor": {"PATH", "--out"},
    "world": {"OUT", "--frames", "--splits", "--seed", "--max-distance", "--workers"},
    "split-leaks": {"FRAMES", "--val", "--mapping", "--out"},
    "train": {"--role", "--seed"},
    "memory": {"--role"},
    "evaluate": {"--labels", "--detections", "--ids", "--height-scale", "--json", "--allow-missing", "--distance",
                 "--confusion", "--bootstrap"},
    "detect": {"IMAGE", "--calib", "--weights", "--out", "--bf16"},
    "submit": {"RUN", "--data", "--out"},
    "convert": {"PATH", "--to-released", "--out", "--set"},
    "export": {"--weights", "--onnx", "--size"},
    "table": {"NAME", "--draws", "--controls", "--workers", "--as-is"},
    "run": {"--draws", "--controls", "--workers", "--as-is"},
    "learn": {"NAME", "--present", "--port", "--no-browser"},
    "docs": {"--check", "--only", "--workers"},
    "clean": set(),
    "publish": {"NAME", "--data", "--workers", "--as-is"},
    "bench": {"NAME", "--repeats", "--labels", "--ids", "--before", "--publish"},
}
EXPERIMENT = {"--method", "--recipe", "--scale", "--data", "--unlabelled", "--set"}


def run(capsys, *words) -> tuple[int, str, str]:
    code = cli.main([str(w) for w in words])
    got = capsys.readouterr()
    return code, got.out, got.err


def asked(*words) -> dict:
    "What a command would be called with."
    _, bound, _ = cli.app.parse_args(list(words), exit_on_error=False, print_error=False)
    return bound.arguments


def options(name: str) -> list:
    "What a command can be told, as cyclopts knows it."
    return [a for a in cli.app[name].assemble_argument_collection(parse_docstring=True) if a.show]


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, capsys):
    code, text, _ = run(capsys, name, "--help")
    assert code == 0 and f"Usage: cmkd {name}" in text
    said = inspect.getdoc(cli.app[name].default_command)
    for option in options(name):
        assert option.parameter.help, f"cmkd {name}: {option.name} has no help"
        assert option.name.lower().removeprefix("--").split("-")[0] in text.lower()
    assert said.splitlines()[0].rstrip(".") in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_known_here(name):
    shared = EXPERIMENT if name in ("train", "memory", "table", "run") else set()
    assert {option.name for option in options(name)} == OPTIONS[name] | shared


def test_every_command_is_known_here(capsys):
    there = [name for name in cli.app if not name.startswith("-")]
    assert set(COMMANDS) == set(there) and set(OPTIONS) == set(COMMANDS)
    text = run(capsys, "--help")[1]
    assert all(f" {name} " in text for name in COMMANDS) and "--debug" in text


def test_choices_are_those_of_the_config(capsys):
    text = re.sub(r"[│\s]+", " ", run(capsys, "train", "--help")[1])
    assert f"[choices: {', '.join(RECIPES)}]" in text and f"[choices: {', '.join(SCALES)}]" in text


@pytest.mark.parametrize("words", [("--help",), ("train", "--help"), ("bench", "--help"), ("--version",), ("fly",)])
def test_help_imports_no_network(words):
    "In a fresh process: neither torch nor what would bring it along."
    ask = ("import sys; from cmkd.cli import main; main(sys.argv[1:]); "
           "print('heavy:', *sorted({'torch', 'numpy', 'pandas', 'plotly', 'scipy'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", ask, *words], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].split() == ["heavy:"], done.stdout + done.stderr


@pytest.mark.parametrize("words, says", [
    (("doctor", "/nowhere"), "/nowhere: no such folder"),
    (("world", "/tmp/x", "--splits", "train"), "--splits train=500"),
    (("world", "/tmp/x", "--splits", "train=0"), "at least one frame"),
    (("train", "--data", "/nowhere"), "has no ImageSets/"),
    (("train", "--scale", "full"), "--scale full is for real data: add --data PATH"),
    (("train", "--method", "hind"), "method is 'hind'; it must be one of 'cmkd'"),
    (("train", "--role", "pupil"), "role is 'pupil'; it must be one of 'teacher', 'depth', 'student'"),
    (("memory", "--role", "pupil"), "role is 'pupil'"),
    (("export", "--weights", "/nowhere", "--onnx", "/tmp/x.onnx"), "no finished run and no converted checkpoint"),
    (("bench", "evaluate", "--labels", "/nowhere"), "/nowhere: no label files there"),
    (("bench", "lift", "--before", "efb61ce"), "--before COMMIT goes with cmkd bench row"),
    (("bench", "lift", "--labels", "/nowhere"), "--labels DIR goes with cmkd bench evaluate"),
    (("bench", "evaluate", "--ids", "/nowhere"), "--ids FILE with --labels"),
    (("train", "--set", "distil.quality=false"), "no field 'distil.quality'"),
    (("train", "--set", "seed=x"), "not a"),
    (("train", "--scale", "full"), "--data"),
    (("evaluate", "--labels", "/nowhere", "--detections", "/nowhere"), "/nowhere"),
    (("detect", "a.png", "--calib", "a.txt", "--weights", "/nowhere"), "cmkd train"),
    (("convert", "/nowhere.pth", "--out", "/tmp/x"), "/nowhere.pth"),
    (("convert", __file__, "--out", "/tmp/x"), "test_cli.py: not loaded"),
    (("convert", "--to-released", "/nowhere", "--out", "/tmp/x.pth"), "cmkd train"),
    (("convert", "--to-released", "/nowhere", "--out", "/tmp/x.pth", "--set", "seed=1"), "has its config"),
    (("table", "cmkd_t99"), "cmkd_t04_both_distillations"),
    (("table", "paper_vs_relaese"), "did you mean paper_vs_release"),
    (("table", "cmkd_t04", "--data", "/nowhere"), "cmkd doctor /nowhere"),
    (("table", "cmkd_t04", "--method", "hint"), "declares no parameter method"),
    (("learn", "44"), "there are: 1 pixels_to_ground"),
])
def test_bad_input_is_one_line_and_code_2(words, says, capsys):
    code, out, err = run(capsys, *words)
    assert code == 2 and err.count("\n") == 1 and err.startswith(f"cmkd {words[0]}: ")
    assert says in err and "Traceback" not in err


@pytest.mark.parametrize("words, says", [
    ((), "cmkd: a command is missing; see cmkd --help"),
    (("fly",), 'cmkd: Unknown command "fly"'),
    (("train", "--recipe", "mine"), 'cmkd train: Invalid value "mine" for --recipe. Choose from: "paper", "release"'),
    (("train", "--seeds", "1"), "cmkd train: Unknown option: "),
    (("train", "student"), "cmkd train: "),
    (("train", "--seed", "one"), "cmkd train: Invalid value for --seed: unable to convert \"one\""),
    (("evaluate",), "cmkd evaluate: "),
    (("world",), "cmkd world: "),
    (("convert", "a.pth"), "cmkd convert: "),
    (("export", "--weights", "a", "--onnx", "b", "--size", "96"), "cmkd export: "),
    (("bench", "fly"), 'cmkd bench: Invalid value "fly" for NAME. Choose from: "evaluate"'),
    (("--debug=3", "train"), "cmkd: Invalid value for --debug"),
])
def test_bad_grammar_is_one_line_and_code_2(words, says, capsys):
    "It says where help is."
    code, _, err = run(capsys, *words)
    assert code == 2 and err.count("\n") == 1 and err.startswith(says) and "--help" in err


def test_debug_shows_where():
    for words in (["--debug", "doctor", "/nowhere"], ["doctor", "/nowhere", "--debug"]):
        with pytest.raises(FileNotFoundError): cli.main(words)


def test_a_bug_is_not_dressed_as_bad_input(monkeypatch):
    monkeypatch.setattr(Experiment, "config", lambda self: [].nothing)
    with pytest.raises(AttributeError): cli.main(["train"])


def test_a_stop_is_code_130(monkeypatch, capsys):
    def stopped(self): raise KeyboardInterrupt
    monkeypatch.setattr(Experiment, "config", stopped)
    code, _, err = run(capsys, "train")
    assert code == 130 and "the same command goes on from the last checkpoint" in err


def test_the_shell_gets_the_code(tmp_path):
    "The installed command, from the words of a shell to the code it ends with."
    binary = Path(sys.executable).with_name("cmkd")
    for words, code in ((["--help"], 0), (["doctor", "/nowhere"], 2), (["fly"], 2)):
        assert subprocess.run([binary, *words], capture_output=True).returncode == code, words


def test_words_are_read_as_they_are_meant():
    one = asked("train", "--set", "seed=3", "--unlabelled", "", "--set", "student.rates=[1, 2]", "--method", "hint")
    meant = dict(method="hint", unlabelled="", sets=("seed=3", "student.rates=[1, 2]"))
    assert one["experiment"] == Experiment(**meant)
    assert asked("train", "--unlabelled=")["experiment"] == Experiment(unlabelled="")
    assert asked("train", "--role", "teacher", "--seed", "2") == dict(role="teacher", seed=2)
    assert asked("world", "o", "--splits", "train=1", "val=2")["splits"] == ("train=1", "val=2")
    assert asked("export", "--weights", "a", "--onnx", "b", "--size", "96", "320")["size"] == (96, 320)
    folders = ("evaluate", "--labels", "a", "--detections", "b")
    assert "confusion" not in asked(*folders) and asked(*folders, "--confusion")["confusion"] == ()
    assert asked(*folders, "--confusion", ".5")["confusion"] == (.5,)
    assert asked(*folders, "--confusion", "--distance")["distance"] is True and data.SCORE == .3


def test_commands_repeat_a_run():
    "What a record tells a reader to type gives the config of the run."
    mini = recipe(scale="mini").override("seed=2", "student.rates=[1, 2]", 'student.backbone_args={"a": 1}')
    for cfg in (mini, recipe("hint", scale="smoke").override("distill.tap=bev2d")):
        call = asked(*shlex.split(command(cfg, "student"))[1:])
        assert call["experiment"].config() == cfg and call["role"] == "student"


def test_a_seed_goes_to_the_role_that_has_one(monkeypatch):
    "--seed is the run's own: a teacher's is teacher.seed."
    from cmkd.ledger import runs
    seen = []
    class Stop(Exception): pass
    def fit_or_load(cfg, role, data, **_):
        seen.append((role, cfg.seed, cfg.teacher.seed))
        raise Stop
    monkeypatch.setattr(runs, "fit_or_load", fit_or_load)
    monkeypatch.setattr(Experiment, "folder", lambda self: Path("x"))
    for role in ("teacher", "depth", "student"):
        with pytest.raises(Stop): networks.train(role=role, seed=5)
    assert seen == [("teacher", 0, 5), ("depth", 5, 0), ("student", 5, 0)]


def test_bench_names_ids_without_labels(tmp_path, capsys):
    (tmp_path/"000000.txt").write_text(CAR + "\n")
    (tmp_path/"ids").write_text("000007\n")
    code, _, err = run(capsys, "bench", "evaluate", "--labels", tmp_path, "--ids", tmp_path/"ids")
    assert code == 2 and "none of these frames has a label file" in err


def test_bench_keeps_the_machine_and_the_probe(tmp_path, capsys, monkeypatch):
    "The file says what made it and what a fixed convolution cost then; the print is the numbers alone."
    from cmkd.ledger import pages
    monkeypatch.setattr(pages, "root", lambda: tmp_path)
    labels = tmp_path/"label_2"
    labels.mkdir()
    for i in range(2): (labels/f"{i:06d}.txt").write_text(CAR + "\n")
    (tmp_path/"ids").write_text("000001\n")
    code, out, _ = run(capsys, "bench", "evaluate", "--labels", labels, "--ids", tmp_path/"ids", "--repeats", 1)
    text = (tmp_path/"results"/"mine"/"bench"/"evaluate.csv").read_text()
    assert code == 0 and "one thread of" in out and "probe_fp32" not in out
    head = text.splitlines()[0].split(",")
    assert {"part", "cpu_median", "cpu", "threads", "torch", "command", "probe_fp32", "probe_bf16"} <= set(head)
    assert "cmkd bench evaluate --repeats 1 --labels label_2 --ids ids" in text
    assert not (tmp_path/"results"/"bench").exists(), "what is published stays"


def test_evaluate_tells_what_is_lost(golden, tmp_path, capsys):
    "By distance, by kind of error, and with intervals; without --bootstrap a row has its seven keys."
    with tarfile.open(golden/"m_eval_A.tar.gz") as tar: tar.extractall(tmp_path, filter="data")
    found = next(tmp_path.glob("det*/**/*.txt")).parent
    asked = ("--labels", tmp_path/"label_2", "--detections", found, "--json", tmp_path/"out.json")
    code, out, _ = run(capsys, "evaluate", *asked, "--distance", "--confusion", ".5", "--bootstrap", 20)
    rows = json.loads((tmp_path/"out.json").read_text())
    assert code == 0 and "30–50 m" in out and "every box: 3D, hard, score 0.5 and above" in out and " to " in out
    known = [r for r in rows if r["value"] is not None]
    assert all(r["low"] <= r["high"] for r in known if r["low"] is not None)
    assert any(r["low"] < r["value"] < r["high"] for r in known if r["value"])


def test_evaluate_writes_every_number(tmp_path, capsys):
    labels, found = tmp_path/"label_2", tmp_path/"found"
    labels.mkdir()
    for i in range(3):
        (labels/f"{i:06d}.txt").write_text(CAR + "\n")
        o = read_label(labels/f"{i:06d}.txt")
        object.__setattr__(o, "scores", np.array([.9 - .1*i]))
        write_label(found/f"{i:06d}.txt", o)
    asked = ("evaluate", "--labels", labels, "--detections", found)
    code, out, err = run(capsys, *asked, "--json", tmp_path/"out.json")
    rows = json.loads((tmp_path/"out.json").read_text())
    assert code == 0 and "moderate" in out
    named = {"class", "metric", "recall", "strict", "iou", "difficulty", "value", "objects", "why"}
    assert set(rows[0]) == named
    headline = dict(metric="3D", recall="R40", difficulty="moderate")
    car = [r["value"] for r in rows if r["class"] == "Car" and headline.items() <= r.items()]
    assert len(car) == 2 and car[0] == car[1] > 0
    assert {r["value"] for r in rows if r["class"] == "Cyclist"} == {None}
    (tmp_path/"ids.txt").write_text("000000\n000001\n")
    (found/"000002.txt").unlink()
    assert run(capsys, *asked, "--ids", tmp_path/"ids.txt")[0] == 0
    assert "000002.txt" in run(capsys, *asked)[2]


def test_world_and_doctor(tmp_path, capsys):
    code, out, _ = run(capsys, "world", tmp_path/"w", "--splits", "train=2", "val=1", "--workers", 1)
    assert code == 0 and "3 frames" in out and street_of(tmp_path/"w") == 0
    code, out, _ = run(capsys, "doctor", tmp_path/"w")
    assert code == 0, out
    (tmp_path/"w/training/calib/000001.txt").unlink()
    code, out, _ = run(capsys, "doctor", tmp_path/"w")
    assert code == 1 and "000001.txt" in out
    assert "holds another world" in run(capsys, "world", tmp_path/"w", "--seed", 1)[2]


def test_a_street_of_its_own_is_another_data_set(tmp_path):
    "A folder that the world wrote is asked for as the street that it is; the usual street is not said twice."
    for seed in (1, 3):
        (tmp_path/f"{seed}"/"ImageSets").mkdir(parents=True)
        (tmp_path/f"{seed}"/"world.json").write_text(json.dumps(dict(seed=seed, width=320)))
    usual, other = (Experiment(data=tmp_path/f"{seed}") for seed in (1, 3))
    assert usual.config() == Experiment().config() and usual.changes() == ()
    assert other.config().diff(usual.config()) == [("data.world", 3, 1)] and other.changes() == ("data.world=3",)


def test_doctor_on_real_frames(shared, tmp_path, capsys):
    assert run(capsys, "doctor", shared/"data"/"kitti", "--out", tmp_path/"report")[0] == 0
    assert (tmp_path/"report"/"summary.json").exists()
    to = tmp_path/"kitti"
    shutil.copytree(shared/"data"/"kitti", to, copy_function=shutil.copyfile)
    for p in [to, *to.rglob("*")]: p.chmod(0o755 if p.is_dir() else 0o644)
    points, label = to/"training/velodyne/000000.bin", to/"training/label_2/000007.txt"
    points.write_bytes(points.read_bytes()[:-7])
    (to/"training/calib/000003.txt").unlink()
    label.write_text("\n".join(" ".join(line.split()[:14]) for line in label.read_text().splitlines()) + "\n")
    code, out, _ = run(capsys, "doctor", to)
    assert code == 1
    assert all(f in out for f in ("velodyne/000000.bin", "calib/000003.txt", "label_2/000007.txt"))


def test_counts_of_the_embedded_world():
    assert sum(WORLDS["mini"].values()) == 4500 and sum(WORLDS["smoke"].values()) == 76


# --- lists of raw frames, and the test server ---


def test_what_raw_frames_share_with_val(shared, capsys, tmp_path):
    "The paper's 42 thousand: counted, and the clean ones written for `data.unlabelled`."
    splits = shared/"data"/"splits"
    words = (splits/"kitti_raw.txt", "--val", splits/"val.txt", "--mapping", splits/"kitti_object_to_raw.json")
    code, out, _ = run(capsys, "split-leaks", *words, "--out", tmp_path/"clean.txt")
    assert code == 0 and "42,378 frames: 3,551 are frames of val, 5,297 more" in out and "33,530 share nothing" in out
    again = run(capsys, "split-leaks", tmp_path/"clean.txt", *words[1:])[1]
    assert "33,530 frames: 0 are frames of val, 0 more" in again
    eigen = run(capsys, "split-leaks", splits/"eigen_clean.txt", *words[1:])[1]
    assert "14,940 frames: 0 are frames of val, 0 more" in eigen


def test_a_list_without_a_clean_frame_is_not_written(capsys, tmp_path):
    drive = "2011_09_26_drive_0005_sync"
    (tmp_path/"raw.txt").write_text(f"{drive}/0000000050\n{drive}/0000000051\n")
    (tmp_path/"val.txt").write_text("000007\n")
    (tmp_path/"map.json").write_text(json.dumps({"000007": ["2011_09_26", drive, "0000000050"]}))
    words = (tmp_path/"raw.txt", "--val", tmp_path/"val.txt", "--mapping", tmp_path/"map.json")
    assert "2 frames: 1 are frames of val, 1 more come from 1 drives" in run(capsys, "split-leaks", *words)[1]
    code, _, err = run(capsys, "split-leaks", *words, "--out", tmp_path/"clean.txt")
    assert code == 2 and "no frame is clean" in err and not (tmp_path/"clean.txt").exists()
    (tmp_path/"map.json").write_text("{}")
    assert "use the mapping of the full data set" in run(capsys, "split-leaks", *words)[2]


def test_an_archive_for_the_test_server(capsys, tmp_path):
    "Every frame of testing/, one file each; a run without training/ labels is asked for none."
    from cmkd.methods import role_of
    from cmkd.train.roles import save_weights
    cfg, kitti, run_folder = recipe(scale="smoke").override("head.score=0"), tmp_path/"kitti", tmp_path/"run"
    write(kitti, WorldConfig(seed=3), dict(test=2), progress=False)
    (kitti/"training").rename(kitti/"testing")
    run_folder.mkdir()
    save_weights(role_of(cfg, "student").build(cfg), run_folder/"weights.safetensors")
    about = dict(role="student", config=cfg.flat(), weights_sha256=sha256(run_folder/"weights.safetensors"))
    write_sealed(run_folder/"config.json", about)
    code, out, err = run(capsys, "submit", run_folder, "--data", kitti, "--out", tmp_path/"s.zip")
    assert code == 0 and "2 frames" in out and "a rehearsal" in out, err
    with zipfile.ZipFile(tmp_path/"s.zip") as z:
        assert z.namelist() == ["000000.txt", "000001.txt"]
        rows = z.read("000000.txt").decode().split("\n")[0].split()
    assert len(rows) == 16 and rows[0] in cfg.data.classes
    (kitti/"ImageSets"/"test.txt").unlink()
    assert "no such split" in run(capsys, "submit", run_folder, "--data", kitti, "--out", tmp_path/"t.zip")[2]
