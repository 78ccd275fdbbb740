"The ledger: runs are made once, records are whole and honest, and found again."

import hashlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cmkd.config import usual
from cmkd.core import Boxes, Frame, View
from cmkd.data.dataset import FrameSet
from cmkd.data.sets import Sets
from cmkd.doors.experiment import Experiment
from cmkd.files import locked
from cmkd.ledger import runs
from cmkd.ledger.record import Run, command, config_of, load, run_name
from cmkd.ledger.runs import begun_from, fit_all, fit_or_load
from cmkd.ledger.tables import ap_table
from cmkd.methods import hash_of, recipe
from cmkd.reading import sha256, write_sealed
from cmkd.train.loop import Progress
from cmkd.train.roles import Spent
from cmkd.world.rays import WorldConfig
from cmkd.world.write import write

CFG = recipe(scale="smoke")
CAMERA = [[186, 0, 160, 0], [0, 186, 45, 0], [0, 0, 1, 0]]
FORWARD = [[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]


class Street(FrameSet):
    "Two frames with one car each."

    name, labelled, metric, height_scale = "toy", True, "kitti", 1.0

    def __init__(self, split, ids=("0", "1")):
        self.split, self.ids = split, tuple(ids)

    def frame(self, i):
        view = View(CAMERA, FORWARD, np.zeros((96, 320, 3), np.uint8))
        return Frame(
            self.ids[i], (view,), np.zeros((1, 4), np.float32), Boxes([[12 + i, 1, -1, 4, 1.6, 1.5, 0]], ["Car"])
        )

    def evidence(self, i, frame):
        return self.ids[i].encode()


class Toy:
    "Makes runs in `store` with stand-ins for training and detection; `made` says what was trained."

    def __init__(self, store):
        self.store, self.made = store, []

    def __call__(self, cfg=CFG, role="student", **more):
        return fit_or_load(cfg, role, "toy", self.store, progress=False, **more)

    def fit(self, role, cfg, work, folder, every=60.0, progress=True):
        self.made.append((role.name, *(p.parent.name for _, p in sorted(work.parents.items()))))
        save_file({"w": torch.full((2,), float(cfg.seed))}, folder / "weights.safetensors")
        (folder / "checkpoint.safetensors").write_text("")
        return Spent(Progress(cpu_seconds=100.0, wall_seconds=50.0), {"sweeps": 7})


@pytest.fixture
def toy(monkeypatch, tmp_path):
    made = Toy(tmp_path)
    sets = lambda data, folder, progress=False: Sets(
        Street("train"), Street("val", ("2", "3")), Street("un", ("4", "5")) if data.unlabelled else None
    )

    def given_back(cfg, role, weights, val, progress=True):
        role = replace(
            role,
            detect=lambda cfg, net, frames, **_: {
                f.id: replace(f.objects, scores=np.ones(1))
                for f in map(frames.frame, range(len(frames)))
            },
        )
        return real(cfg, role, weights, val, progress)

    real = runs.judge
    monkeypatch.setattr(runs, "fit", made.fit)
    monkeypatch.setattr(runs, "open_sets", sets)
    monkeypatch.setattr(runs, "load_network", lambda role, cfg, weights: nn.Identity())
    monkeypatch.setattr(runs, "judge", given_back)
    return made


def test_a_run_is_made_once_after_its_parents(toy):
    run = toy()
    assert [m[0] for m in toy.made] == ["teacher", "depth", "student"]
    assert toy.made[-1][1:] == (run_name(CFG, "depth"), run_name(CFG, "teacher"))
    assert toy().record == run.record and len(toy.made) == 3
    toy(CFG.override("seed=1"))
    assert [m[0] for m in toy.made[3:]] == ["depth", "student"], "a new seed has its own depth run and the same teacher"
    alone = CFG.override(
        "pretrain=false", "load_head=false", "distill.feature=false", "distill.response=hard", "data.unlabelled="
    )
    toy(alone)
    assert toy.made[-1] == ("student",) and len(toy.made) == 6


def test_methods_share_a_teacher_and_no_student(toy):
    hint = recipe(method="hint", scale="smoke")
    toy()
    run = toy(hint)
    assert [m[0] for m in toy.made] == ["teacher", "depth", "student", "student"]
    assert (
        run.record["method"] == "hint"
        and run.record["parents"] == toy().record["parents"]
        and run.name != run_name(CFG, "student")
    )


def test_what_a_record_holds(toy):
    run = toy()
    r = run.record
    assert (
        r["name"] == run.folder.name == run_name(CFG, "student")
        and run.config == CFG
        and r["hash"] == hash_of(CFG, "student")
    )
    assert (
        r["method"] == "cmkd"
        and r["seeds"] == {"seed": 0, "teacher.seed": 0}
        and set(r["parents"]) == {"teacher", "depth"}
    )
    assert (
        r["selection"] == "last"
        and r["data"]["train"]["count"] == 2
        and set(r["data"]) == {"train", "val", "unlabelled"}
    )
    assert set(load(toy.store / run_name(CFG, "teacher")).record["data"]) == {"train", "val"}
    assert r["versions"]["torch"] and r["hardware"]["cores"] and set(r["git"]) == {"commit", "dirty"}
    assert r["cost"]["train_cpu_seconds"] == 100.0 and r["cost"]["peak_memory_mb"] > 0, (
        "seconds of earlier sessions count"
    )
    assert r["cost"]["sweeps"] == 7, "and what the training counted"
    assert r["finished"] >= r["started"] and "ap" in r and not (run.folder / "checkpoint.safetensors").exists()
    assert not any(str(v).startswith("/") for v in json.dumps(r).split('"')), "a record names no path of this machine"


def test_depth_runs_carry_no_number(toy):
    "Depth pre-training detects nothing: its record has no AP."
    assert toy(role="depth").record["ap"] == {} and toy(role="teacher").record["ap"]


def test_truth_detected_is_truth(toy):
    "The labels given back as detections: AP of two cars is what KITTI's curve allows; far cars are not false."
    ap = toy().record["ap"]
    assert (
        ap["Car/3D/R40/0.7/moderate"] == ap["Car/3D/R40/0.5/moderate"] > 0 and ap["Cyclist/3D/R40/0.5/moderate"] is None
    )


def test_a_cut_leaves_no_record(toy, monkeypatch):
    make, store = toy, toy.store
    with monkeypatch.context() as m:
        m.setattr(runs, "judge", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            make(role="teacher")
    folder = store / run_name(CFG, "teacher")
    assert not (folder / "record.json").exists() and (folder / "checkpoint.safetensors").exists()
    assert load(folder) is None
    assert make(role="teacher").record["ap"]


def test_a_half_written_record_never_shows(toy, monkeypatch):
    make, store = toy, toy.store
    with monkeypatch.context() as m:
        replace = os.replace
        m.setattr(
            os,
            "replace",
            lambda a, b: (
                (_ for _ in ()).throw(OSError("disk full")) if Path(b).name == "record.json" else replace(a, b)
            ),
        )
        with pytest.raises(OSError):
            make(role="teacher")
    assert sorted(p.name for p in (store / run_name(CFG, "teacher")).iterdir()) == [
        "begun_from.json",
        "checkpoint.safetensors",
        "lock",
        "weights.safetensors",
    ]


def test_a_run_goes_on_only_with_what_it_began_with(tmp_path):
    "A checkpoint of other data or other parents is refused; without a checkpoint the note is simply renewed."
    begun_from(tmp_path, dict(data="a", parents={}))
    begun_from(tmp_path, dict(data="b", parents={}))
    (tmp_path / "checkpoint.safetensors").write_bytes(b"")
    begun_from(tmp_path, dict(data="b", parents={}))
    with pytest.raises(ValueError, match="begun from other data"):
        begun_from(tmp_path, dict(data="b", parents={"teacher": "x"}))


def test_initial_weights_are_recorded(toy, monkeypatch, tmp_path):
    "A run that begins with COCO weights says with which; without the file it does not begin at all."
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    cfg = CFG.override("student.initial=coco.pth")
    assert run_name(cfg, "depth") != run_name(CFG, "depth") and run_name(cfg, "teacher") == run_name(CFG, "teacher")
    with pytest.raises(FileNotFoundError, match=r"data.weights.coco.pth: not here.*--set student.initial="):
        toy(cfg=cfg, role="depth")
    (tmp_path / "data" / "weights").mkdir(parents=True)
    (tmp_path / "data" / "weights" / "coco.pth").write_bytes(b"weights")
    assert toy(cfg=cfg, role="depth").record["initial"] == dict(
        name="coco.pth", sha256=hashlib.sha256(b"weights").hexdigest()
    )
    assert toy(cfg=cfg).record["initial"] is None and toy(role="depth").record["initial"] is None


def published() -> list[Run]:
    here = Path(runs.__file__).parents[2] / "results" / "runs"
    return [load(p.parent) for p in sorted(here.glob("mini-*/record.json"))]


def test_published_runs_are_found_again():
    "The config in a record gives the name of its folder, and of its parents' folders, which are there too."
    records = published()
    assert len(records) > 30
    names = {run.name for run in records}
    for run in records:
        cfg, role = config_of(run.record), run.record["role"]
        assert run_name(cfg, role) == run.name and run.record["hash"] == hash_of(cfg, role), run.name
        flat, kept = json.loads(json.dumps(cfg.flat())), run.record["config"]
        later = {k: v for k, v in flat.items() if k not in kept}         # fields that came after it: at their defaults
        assert {k: flat[k] for k in kept} == kept and not set(later) - set(usual(type(cfg))), run.name
        assert all(usual(type(cfg))[k] == v for k, v in later.items()), run.name
        for parent, made in run.record["parents"].items():
            assert made["name"] == run_name(cfg, parent) and made["name"] in names, run.name
            above = load(run.folder.parent / made["name"])
            assert above.record["weights_sha256"] == made["weights_sha256"], run.name


def test_other_data_is_an_error(toy, monkeypatch):
    make = toy
    make()
    monkeypatch.setattr(
        runs,
        "open_sets",
        lambda *_, **__: Sets(Street("train", ("0", "9")), Street("val", ("2", "3")), Street("un", ("4", "5"))),
    )
    with pytest.raises(
        ValueError, match="made from other data: train was 2 frames.*here it is 2 frames.*remove the folder"
    ):
        make()


def test_other_frames_to_judge_on_train_nothing(toy, monkeypatch):
    "No gradient depends on val: a run whose val was corrected, or is another split, is judged again."
    first = toy()
    val = Street("val", ("2", "9"))
    monkeypatch.setattr(
        runs, "open_sets", lambda *_, **__: Sets(Street("train"), val, Street("un", ("4", "5")))
    )
    again = toy()
    assert len(toy.made) == 3 and again.name == first.name
    assert again.record["data"]["val"]["ids_sha256"] != first.record["data"]["val"]["ids_sha256"]
    assert load(first.folder).record == first.record, "the record itself stays"
    val.split = "late"
    assert toy(CFG.override("data.val=late")).record["config"]["data.val"] == "late" and len(toy.made) == 3


def test_a_record_says_how_many_objects_counted(toy):
    "Two cars far away on small pictures: some difficulties count none, and the table of the run says so."
    run = toy()
    objects = run.record["objects"]
    assert set(objects) == {f"{c}/{d}" for c in CFG.data.classes for d in ("easy", "moderate", "hard")}
    assert objects["Cyclist/easy"] == 0 and 0 < objects["Car/hard"] <= 2
    shown = str(ap_table(run, "a note"))
    assert "a note" in shown and "no Cyclist counts as easy" in shown
    assert f"{objects['Car/hard']} Car count as hard, so AP R40 reaches" in shown


def test_a_student_is_tied_to_its_parents(toy):
    run = toy()
    teacher = load(run.folder.parent / run.record["parents"]["teacher"]["name"])
    shutil.rmtree(teacher.folder)
    assert toy().record == run.record, "a record whose parents are not here still has its numbers"
    teacher.folder.mkdir()
    save_file({"w": torch.full((2,), 7.0)}, teacher.folder / "weights.safetensors")
    write_sealed(
        teacher.folder / "record.json",
        teacher.record | dict(weights_sha256=sha256(teacher.folder / "weights.safetensors")),
    )
    with pytest.raises(ValueError, match="its teacher was smoke-teacher.*there they are.*bring that teacher back"):
        toy()


def test_a_published_record_is_never_written_over(toy, monkeypatch):
    "Weights made again lie under the run's name if they are the record's, and apart from it if they are not."
    run = toy(role="teacher")
    kept = (run.folder / "record.json").read_bytes()
    run.weights.unlink()
    assert toy(role="teacher", weights=True).folder == run.folder

    def other(role, cfg, work, folder, every=60.0, progress=True):
        made = toy.fit(role, cfg, work, folder, every, progress)
        save_file({"w": torch.full((2,), 9.0)}, folder / "weights.safetensors")
        return made

    run.weights.unlink()
    monkeypatch.setattr(runs, "fit", other)
    again = toy(role="teacher", weights=True)
    assert again.folder == run.folder.parent / "remade" / run.name
    assert (run.folder / "record.json").read_bytes() == kept and not list(run.folder.glob("*.safetensors"))
    student = toy()
    assert student.record["parents"]["teacher"]["weights_sha256"] == again.record["weights_sha256"]
    assert toy().record == student.record


def test_a_deleted_record_comes_back_as_it_was_published(toy):
    "Made again with the same weights and numbers, git's record stands: nothing is changed in git's eyes."
    run = toy(role="teacher")
    asked = dict(cwd=run.folder.parent, check=True, capture_output=True, text=True)
    git = lambda *words: subprocess.run(["git", *words], **asked)
    git("init", "-q")
    git("add", "--force", f"{run.name}/record.json")
    git("-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-qm", "published")
    kept = (run.folder / "record.json").read_bytes()
    shutil.rmtree(run.folder)
    assert toy(role="teacher").record == run.record and (run.folder / "record.json").read_bytes() == kept
    assert not git("status", "--porcelain", "-uno").stdout
    (run.folder / "record.json").unlink()
    write_sealed(run.folder / "record.json", {**run.record, "ap": {"Car/3D/R40/0.5/moderate": 1.0}})
    git("-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-qam", "other numbers")
    shutil.rmtree(run.folder)
    assert toy(role="teacher").record["ap"] == run.record["ap"], "other numbers are not dressed as the published ones"


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda r: r["ap"].update({"Car/3D/R40/0.7/moderate": 99.0}), "its seal is broken"),
        (lambda r: r.pop("ap"), "its seal is broken"),
        (lambda r: r["config"].update({"seed": 5}), "its seal is broken"),
        (lambda r: r.pop("seal"), "its seal is broken"),
    ],
)
def test_an_edited_record_is_an_error(toy, change, told):
    run = toy()
    path = run.folder / "record.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"record.json.*{told}"):
        toy()


def test_a_record_of_the_last_version_loads(golden):
    "It has no seal, and its name was made by a rule that counted val."
    run = load(golden / "form1" / "mini-teacher-fa30ab64f1")
    assert run.ap(iou=0.5) > 50 and run.config.scale == "mini" and run.record["format"] == 1


def test_a_record_belongs_to_its_config(toy):
    run = toy()
    record = run.record | dict(config=run.record["config"] | {"seed": 5})
    write_sealed(run.folder / "record.json", record)
    with pytest.raises(ValueError, match="its config belongs to smoke-student"):
        toy()
    path = run.folder / "record.json"
    for broken in ("", "{", "[]", "null", '{"name": 1}'):
        path.write_text(broken)
        with pytest.raises(ValueError, match="record.json"):
            load(run.folder)


def test_a_leak_is_an_error_before_anything_is_made(toy, monkeypatch):
    make, made, store = toy, toy.made, toy.store

    def leak(data, folder, progress=False):
        raise ValueError("train and val share frame 000005")

    monkeypatch.setattr(runs, "open_sets", leak)
    with pytest.raises(ValueError, match="share"):
        make()
    assert not made and not list(store.iterdir())


def test_weights(toy):
    make, made, store = toy, toy.made, toy.store
    run = make()
    kept = run.weights.read_bytes()
    run.weights.write_text("tampered")
    with pytest.raises(ValueError, match="not the weights that record.json describes; remove"):
        make()
    (run.folder / "weights.safetensors").unlink()
    again = make()
    assert again.record == run.record and len(made) == 3, "a record without weights still has its numbers"
    with pytest.raises(FileNotFoundError, match="cmkd train --recipe paper --scale smoke --role student"):
        _ = again.weights
    assert make(weights=True).weights.read_bytes() == kept and len(made) == 4
    run.folder.rename(store / "smoke-student-0000000000")
    with pytest.raises(ValueError, match="must keep its name"):
        load(store / "smoke-student-0000000000")


def hold(folder, ready, seconds):
    with locked(folder):
        ready.set()
        time.sleep(seconds)


def test_lock_waits_for_the_living_and_not_for_the_dead(tmp_path, capsys):
    for end in ("let go", "killed"):
        ready = multiprocessing.get_context("spawn").Event()
        other = multiprocessing.get_context("spawn").Process(
            target=hold, args=(tmp_path, ready, 1.0 if end == "let go" else 600.0)
        )
        other.start()
        assert ready.wait(60)
        if end == "killed":
            os.kill(other.pid, signal.SIGKILL)
            other.join()
        began = time.perf_counter()
        with locked(tmp_path):
            waited = time.perf_counter() - began
        said = capsys.readouterr().err
        if end == "let go":
            assert waited > 0.2 and f"{tmp_path.name}: another process is at work here" in said
            other.join()
        else:
            assert waited < 5 and not said


@pytest.mark.parametrize(
    "method, role, changes",
    [
        ("cmkd", "student", ("seed=2", "student.rates=[1, 2]", 'student.backbone_args={"a": 1}')),
        (
            "cmkd",
            "teacher",
            (
                'data.classes=["Car"]',
                "head.sizes=[[3.9, 1.6, 1.56]]",
                "head.bottoms=[-1.73]",
                "head.positive=[0.5]",
                "head.negative=[0.3]",
            ),
        ),
        ("hint", "student", ("distill.tap=bev2d",)),
    ],
)
def test_commands_repeat_a_run(method, role, changes):
    cfg = recipe(method=method, scale="mini").override(*changes)
    words = shlex.split(command(cfg, role))
    assert words[:2] == ["cmkd", "train"]
    options, sets = {}, []
    for name, value in zip(words[2::2], words[3::2], strict=True):
        if name == "--set":
            sets.append(value)
        else:
            options[name.removeprefix("--")] = value
    assert options.pop("role") == role
    assert Experiment(**options, sets=tuple(sets)).config() == cfg


# --- side by side ---


def test_side_by_side_gives_the_same_bits(tmp_path):
    "Two students with teacher and depth run, two processes at a time and one after another; nothing is made twice."
    write(tmp_path / "street", WorldConfig(seed=1, max_distance=27.0), dict(train=8, val=2), progress=False)
    cfg = recipe(scale="smoke").override(
        "data.unlabelled=", "teacher_stage.steps=2", "depth_stage.steps=2", "full_stage.steps=2"
    )
    jobs = [(cfg, "student"), (cfg.override("distill.feature_weight=3"), "student")]
    together = fit_all(jobs, tmp_path / "street", tmp_path / "a", workers=2, progress=False)
    alone = fit_all(jobs, tmp_path / "street", tmp_path / "b", workers=1, progress=False)
    assert [r.record["weights_sha256"] for r in together] == [r.record["weights_sha256"] for r in alone] and together[
        0
    ].name == alone[0].name
    assert (
        len(list((tmp_path / "a").iterdir())) == 4
        and together[0].record["weights_sha256"] != together[1].record["weights_sha256"]
    )
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("record.json")}
    fit_all(jobs, tmp_path / "street", tmp_path / "a", workers=2, progress=False)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("record.json")}


def test_an_error_in_a_process_is_told(tmp_path):
    write(tmp_path / "street", WorldConfig(seed=1, max_distance=27.0), dict(train=8, val=2), progress=False)
    cfg = recipe(scale="smoke").override(
        "data.unlabelled=", "teacher_stage.steps=2", "depth_stage.steps=2", "full_stage.batch=64"
    )
    with pytest.raises(ValueError, match="fewer than one batch of 64"):
        fit_all(
            [(cfg, "student"), (cfg.override("seed=1"), "student")],
            tmp_path / "street",
            tmp_path / "a",
            workers=2,
            progress=False,
        )
