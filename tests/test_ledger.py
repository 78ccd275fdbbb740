"The ledger: records are whole, honest and found again; tables and their notebooks are strict."
import hashlib
import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from cmkd.config import recipe
from cmkd.core import Boxes, Calibration, Frame, root
from cmkd.data.dataset import FrameSet
from cmkd.data.world import WorldConfig, write
from cmkd.ledger import notebooks, runs, tables
from cmkd.ledger.runs import fit_all, fit_or_load, load, locked, run_name
from cmkd.train.loop import Progress
from cmkd.train.stages import Sets

CFG = recipe(scale="smoke")
RIG = Calibration(P2=[[186, 0, 160, 0], [0, 186, 45, 0], [0, 0, 1, 0]], R0_rect=np.eye(3), Tr_velo_to_cam=[[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0]])


class Street(FrameSet):
    "Two frames with one car each."
    name, labelled = "toy", True
    def __init__(self, split, ids=("0", "1")): self.split, self.ids = split, tuple(ids)
    def frame(self, i): return Frame(self.ids[i], np.zeros((96, 320, 3), np.uint8), np.zeros((1, 4), np.float32), RIG, Boxes([[12 + i, 1, -1, 4, 1.6, 1.5, 0]], ["Car"]))


@pytest.fixture
def toy(monkeypatch, tmp_path):
    "The ledger with stand-ins for training and detection; says what was trained."
    made = []
    def fit(cfg, role, sets, folder, teacher=None, depth=None, progress=True, **_):
        made.append((role, teacher and teacher.read_text(), depth and depth.read_text()))
        (folder/"weights.safetensors").write_text(f"{role} {cfg.seed}"); (folder/"checkpoint.pt").write_text("")
        return Progress(cpu_seconds=100., wall_seconds=50.)
    monkeypatch.setattr(runs, "fit", fit)
    monkeypatch.setattr(runs, "open_sets", lambda cfg, folder: Sets(Street("train"), Street("val", ("2", "3")), Street("un", ("4", "5")) if cfg.data.unlabelled else None))
    monkeypatch.setattr(runs, "load_model", lambda cfg, role, weights: role)
    monkeypatch.setattr(runs, "detect_set", lambda model, cfg, frames, progress=True, per_class=False: {f.id: replace(f.objects, scores=np.full(1, .5 if per_class else 1.)) for f in map(frames.frame, range(len(frames)))})
    return lambda cfg=CFG, role="student", **k: fit_or_load(cfg, role, "toy", tmp_path, progress=False, **k), made, tmp_path


def test_a_run_is_made_once_after_its_parents(toy):
    make, made, store = toy
    run = make()
    assert [m[0] for m in made] == ["teacher", "depth", "student"] and made[-1][1:] == ("teacher 0", "depth 0")
    assert make().record == run.record and len(made) == 3
    make(CFG.override("seed=1"))
    assert [m[0] for m in made[3:]] == ["depth", "student"], "a new seed has its own depth run and the same teacher"
    alone = CFG.override("pretrain=false", "load_head=false", "distill.feature=false", "distill.response=hard", "data.unlabelled=")
    make(alone); assert made[-1] == ("student", None, None) and len(made) == 6


def test_what_a_record_holds(toy):
    make, _, store = toy
    run = make(); r = run.record
    assert r["name"] == run.folder.name == run_name(CFG, "student") and run.config == CFG
    assert r["seeds"] == dict(run=0, teacher=0) and set(r["parents"]) == {"teacher", "depth"} and r["selection"] == "last"
    assert r["data"]["train"]["count"] == 2 and set(r["data"]) == {"train", "val", "unlabelled"} and set(load(store/run_name(CFG, "teacher")).record["data"]) == {"train", "val"}
    assert r["versions"]["torch"] and r["hardware"]["cores"] and set(r["git"]) == {"commit", "dirty"}
    assert r["cost"]["train_cpu_seconds"] == 100. and r["cost"]["peak_memory_mb"] > 0, "seconds of earlier sessions count"
    assert r["finished"] >= r["started"] and "ap" in r and not (run.folder/"checkpoint.pt").exists()
    assert not any(str(v).startswith("/") for v in json.dumps(r).split('"')), "a record names no path of this machine"


def test_truth_detected_is_truth(toy):
    "The labels given back as detections are found: AP of a two-car set is what KITTI's curve allows, and far cars are no false positives."
    ap = toy[0]().record["ap"]
    assert ap["Car/3D/R40/0.7/moderate"] == ap["Car/3D/R40/0.5/moderate"] > 0 and ap["Cyclist/3D/R40/0.5/moderate"] is None


def test_a_cut_leaves_no_record(toy, monkeypatch):
    make, made, store = toy
    with monkeypatch.context() as m:
        m.setattr(runs, "judge", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt): make(role="teacher")
    folder = store/run_name(CFG, "teacher")
    assert not (folder/"record.json").exists() and (folder/"checkpoint.pt").exists() and load(folder) is None
    assert make(role="teacher").record["ap"]


def test_a_half_written_record_never_shows(toy, monkeypatch):
    make, _, store = toy
    with monkeypatch.context() as m:
        replace = os.replace
        m.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(OSError("disk full")) if Path(b).name == "record.json" else replace(a, b))
        with pytest.raises(OSError): make(role="teacher")
    assert sorted(p.name for p in (store/run_name(CFG, "teacher")).iterdir()) == ["begun_from.json", "checkpoint.pt", "lock", "weights.safetensors"]


def test_a_run_goes_on_only_with_what_it_began_with(tmp_path):
    "A checkpoint of other data or other parents is refused; without a checkpoint the note is simply renewed."
    runs.begun_from(tmp_path, dict(data="a", parents={}))
    runs.begun_from(tmp_path, dict(data="b", parents={}))
    (tmp_path/"checkpoint.pt").write_bytes(b"")
    runs.begun_from(tmp_path, dict(data="b", parents={}))
    with pytest.raises(ValueError, match="begun from other data"): runs.begun_from(tmp_path, dict(data="b", parents={"teacher": "x"}))


def test_initial_weights_are_recorded(toy, monkeypatch, tmp_path):
    "A run that begins with COCO weights says with which; without the file it does not begin at all."
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    cfg = CFG.override("student.initial=coco.pth")
    assert run_name(cfg, "depth") != run_name(CFG, "depth") and run_name(cfg, "teacher") == run_name(CFG, "teacher")
    with pytest.raises(FileNotFoundError, match=r"data.weights.coco.pth: not here.*--set student.initial="): toy[0](cfg=cfg, role="depth")
    (tmp_path/"data"/"weights").mkdir(parents=True); (tmp_path/"data"/"weights"/"coco.pth").write_bytes(b"weights")
    assert toy[0](cfg=cfg, role="depth").record["initial"] == dict(name="coco.pth", sha256=hashlib.sha256(b"weights").hexdigest())
    assert toy[0](cfg=cfg).record["initial"] is None and toy[0](role="depth").record["initial"] is None


def test_published_runs_keep_their_names():
    "A field that joins the config later leaves the names of the records in git alone."
    here = Path(runs.__file__).parents[2]/"results"/"runs"
    records = [json.loads(p.read_text()) for p in sorted(here.glob("mini-*/record.json"))]
    assert records
    for r in records: assert run_name(runs.config_of(r), r["role"]) == r["name"]


def test_other_data_is_an_error(toy, monkeypatch):
    make, _, store = toy
    make()
    monkeypatch.setattr(runs, "open_sets", lambda cfg, folder: Sets(Street("train"), Street("val", ("2", "9")), Street("un", ("4", "5"))))
    with pytest.raises(ValueError, match="made from other data: val was 2 frames.*remove the folder"): make()


def test_a_leak_is_an_error_before_anything_is_made(toy, monkeypatch):
    make, made, store = toy
    def leak(cfg, folder): raise ValueError("train and val share frame 000005")
    monkeypatch.setattr(runs, "open_sets", leak)
    with pytest.raises(ValueError, match="share"): make()
    assert not made and not list(store.iterdir())


def test_weights(toy):
    make, made, store = toy
    run = make(); kept = run.weights.read_text()
    run.weights.write_text("tampered")
    with pytest.raises(ValueError, match="not the weights that record.json describes; remove"): make()
    (run.folder/"weights.safetensors").unlink()
    again = make()
    assert again.record == run.record and len(made) == 3, "a record without weights still has its numbers"
    with pytest.raises(FileNotFoundError, match="cmkd train --recipe paper --scale smoke --role student"): again.weights
    assert make(weights=True).weights.read_text() == kept and len(made) == 4
    run.folder.rename(store/"smoke-student-0000000000")
    with pytest.raises(ValueError, match="must keep its name"): load(store/"smoke-student-0000000000")


def hold(folder, ready, seconds):
    with locked(folder): ready.set(); time.sleep(seconds)


def test_lock_waits_for_the_living_and_not_for_the_dead(tmp_path, capsys):
    for end in ("let go", "killed"):
        ready = multiprocessing.get_context("spawn").Event()
        other = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path, ready, 1. if end == "let go" else 600.)); other.start()
        assert ready.wait(60)
        if end == "killed": os.kill(other.pid, signal.SIGKILL); other.join()
        began = time.perf_counter()
        with locked(tmp_path): waited = time.perf_counter() - began
        said = capsys.readouterr().err
        if end == "let go": assert waited > .2 and f"process {other.pid} is at work" in said; other.join()
        else: assert waited < 5 and not said


def test_commands_repeat_a_run():
    cfg = recipe(scale="mini").override("seed=2", "student.rates=[1, 2]", 'student.backbone_args={"a": 1}')
    text = runs.command(cfg, "student")
    import shlex
    from cmkd.cli import config_of, parser
    assert config_of(parser().parse_args(shlex.split(text)[1:])) == cfg


# tables

def fake(seed, ap, scale="mini", row="x"):
    cfg = recipe(scale=scale).override(f"seed={seed}")
    return runs.Run(Path(f"{scale}-student-{row}{seed}"), dict(name="n", role="student", scale=scale, seed=seed, config=runs.flat(cfg), ap={"Car/3D/R40/0.5/moderate": ap, "Car/3D/R40/0.7/moderate": None}))


def test_seeds_by_hand():
    long = tables.rows(dict(a=[fake(0, 1.), fake(1, 2.), fake(2, 6.)], b=[fake(0, 4.)]), "t04")
    s = tables.summary(tables.pick(long, iou=.5)).set_index("row")
    assert s.loc["a", "value"] == 3 and s.loc["a", "std"] == pytest.approx(7**.5) and s.loc["a", "n_seeds"] == 3      # deviations -2 -1 3: (4 + 1 + 9)/2
    assert s.loc["a", "run_id"] == "mini-student-x0;mini-student-x1;mini-student-x2"
    assert np.isnan(s.loc["b", "std"])


def test_what_was_not_run_is_a_dash():
    long = tables.rows(dict(base=[fake(0, 1.)], Pre=[]), "t04")
    number = dict(cls="Car", metric="3D", recall="R40", difficulty="moderate")
    t = tables.side_by_side(tables.pick(tables.paper_rows("t04"), **number), tables.pick(long, iou=.5, **number), ["base", "Pre", "mine"], {"Pre": "base", "mine": "base"})
    shown = tables.Shown(t)
    assert shown.cells()[2][1:5] == ["13.48", "—", "—", "0"] and shown.cells()[3][1:3] == ["—", "—"]
    assert "—" in shown._repr_html_() and "nan" not in (shown._repr_html_() + str(shown)).lower()


def test_smoke_is_never_published(tmp_path):
    long = tables.rows(dict(base=[fake(0, 1., "smoke")]), "t04")
    with pytest.raises(ValueError, match="never published"): tables.save_table("cmkd_t04-mini", long, folder=tmp_path)
    assert "smoke" in tables.save_table(tables.saved_name("cmkd_t04", CFG), long, folder=tmp_path).name
    assert tables.banner("smoke") and not tables.banner("mini")
    assert not [p for p in (root()/"results"/"tables").glob("*.csv") if "smoke" not in p.name and "smoke" in pd.read_csv(p, dtype=str).get("scale", pd.Series(dtype=str)).tolist()]


def test_published_numbers_have_a_record():
    "Every run that a table of ours names is there, with its record and its number."
    for path in (root()/"results"/"tables").glob("*.csv"):
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        if "source" not in frame: continue                               # a list of fields or costs, not of APs
        for r in frame[(frame.source == "ours")].itertuples():
            if "smoke" in path.name: continue
            made = [load(root()/"results"/"runs"/i) for i in r.run_id.split(";")]
            aps = [m.record["ap"] if m.record["config"]["data.val"] == r.split else json.loads((m.folder/f"ap-{r.split}.json").read_text())["ap"] for m in made]
            found = [ap[f"{r.cls}/{r.metric}/{r.recall}/{float(r.iou):g}/{r.difficulty}"] for ap in aps]
            if r.value: assert float(r.value) == pytest.approx(np.mean([v for v in found if v is not None]), abs=1e-3), (path.name, r)


def test_paper_numbers_are_the_transcription(shared):
    "Each table of CMKD: the same numbers as the transcription beside the data, no more and no fewer."
    names = {f"001_table{i}.csv": f"t{i:02d}" for i in range(1, 11)} | {f"000_table{i}.csv": f"s{i:02d}" for i in range(1, 4)} | {"cmkd_test_per_class_resolved.csv": "test_per_class"}
    for file, table in names.items():
        theirs = pd.read_csv(shared/"tables"/file)
        numbers = theirs[[c for c in theirs.columns if any(k in c for k in ("ap", "AP", "fps", "memory")) and c != "gap"]].to_numpy(float).ravel()
        ours = tables.paper_rows(table).value.to_numpy(float)
        assert sorted(numbers[~np.isnan(numbers)]) == pytest.approx(sorted(ours[~np.isnan(ours)])), file
        assert np.isnan(ours).sum() == np.isnan(numbers).sum(), file


def test_table_4_of_the_paper():
    t = tables.paper_rows("t04").set_index(["row", "difficulty"]).value
    assert t["base", "moderate"] == 8.52 and t["Pre + Feat", "easy"] == 22.20 and t["Pre + Feat + Res + Un", "hard"] == 19.44
    assert set(tables.paper_rows("t02").iou) == {.5} and tables.paper_rows("t03").dataset.unique().tolist() == ["Waymo"]


# notebooks

def book(path: Path, *code, tags=("parameters",)) -> Path:
    made = [nbformat.v4.new_code_cell(c, id=f"c{i}") for i, c in enumerate(code)]
    made[0].metadata.tags = list(tags)
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python"))), path)
    return path


@pytest.mark.parametrize("source, says", [
    ("import os\nscale = 'smoke'", "holds only 'name = literal' lines"),
    ("scale = None", "has no type"),
    ("a = b = 1", "holds only"),
    ("n = 1 + x", "holds only"),
    ("n = 1  # such as m=2", "papermill cannot read the parameter n"),
])
def test_parameter_cells_that_are_refused(tmp_path, source, says):
    with pytest.raises(ValueError, match=says): notebooks.declared(book(tmp_path/"a.ipynb", source))


def test_unknown_names_and_wrong_types_stop_before_anything_runs(tmp_path):
    mark = tmp_path/"ran"; path = book(tmp_path/"a.ipynb", "seeds = 1\nlr = 0.1\nname = 'x'\nflag = False", f"open({str(mark)!r}, 'w')")
    for bad, kind in ((dict(seed=1), KeyError), (dict(seeds="1"), TypeError), (dict(seeds=1.), TypeError), (dict(seeds=True), TypeError), (dict(name=1), TypeError), (dict(flag=1), TypeError), (dict(lr="0.1"), TypeError)):
        with pytest.raises(kind): notebooks.run_notebook(path, bad, tmp_path/"out.ipynb")
    with pytest.raises(ValueError, match="0 cells"): notebooks.run_notebook(book(tmp_path/"b.ipynb", "seeds = 1", tags=()), {}, tmp_path/"out.ipynb")
    with pytest.raises(FileNotFoundError, match="no such notebook"): notebooks.run_notebook(tmp_path/"c.ipynb", {}, tmp_path/"out.ipynb")
    assert not mark.exists() and not (tmp_path/"out.ipynb").exists()


def test_what_ran_is_what_was_asked(tmp_path, monkeypatch):
    used, path = tmp_path/"used.txt", tmp_path/"a.ipynb"; used.write_text("1"); count = tmp_path/"count"
    book(path, "seeds = 1\nlr = 0.1\nwords = []", f"from cmkd.ledger.notebooks import outcome\nopen({str(count)!r}, 'a').write('x')\nprint(seeds, lr, words)", f"outcome('the table', {str(used)!r})")
    data = tmp_path/"data"; (data/"ImageSets").mkdir(parents=True); (data/"ImageSets"/"train.txt").write_text("1\n")
    go = lambda **k: notebooks.run_notebook(path, dict(seeds=2, words=["a=[1, 2]"]) | k, tmp_path/"out.ipynb", [data])
    times = lambda: len(count.read_text())
    out = go()
    assert notebooks.printed(out) == "the table" and "2 0.1 ['a=[1, 2]']" in out.read_text()
    go(); assert times() == 1
    (data/"ImageSets"/"train.txt").write_text("1\n"); go(); assert times() == 1, "the same list written again is no change"
    used.write_text("2"); go(); assert times() == 2, "a file that it stands on has changed"
    go(lr=1); assert times() == 3, "another parameter"
    (data/"new.bin").write_bytes(b"1"); go(lr=1); assert times() == 4, "other data"
    out.write_text(out.read_text() + " "); go(lr=1); assert times() == 5, "somebody edited the result"
    real = notebooks.assigned
    monkeypatch.setattr(notebooks, "assigned", lambda source, p: real(source, p) | (dict(seeds=7) if "# Parameters" in source else {}))
    with pytest.raises(RuntimeError, match="asked were"): go(lr=2)


def test_a_failing_notebook_keeps_the_last_good_one(tmp_path):
    path = book(tmp_path/"a.ipynb", "fail = False", "assert not fail, 'on purpose'")
    out = notebooks.run_notebook(path, {}, tmp_path/"out.ipynb"); good = out.read_text()
    with pytest.raises(RuntimeError, match="stopped with AssertionError: on purpose .*out.failed.ipynb"): notebooks.run_notebook(path, dict(fail=True), out)
    assert out.read_text() == good and (tmp_path/"out.failed.ipynb").exists() and not list(tmp_path.glob(".*"))
    assert notebooks.run_notebook(path, {}, out) == out and out.read_text() == good


# --- side by side ---

def test_side_by_side_gives_the_same_bits(tmp_path):
    "Two students with their teacher and depth run, in two processes at a time and one after another; then nothing is made twice."
    write(tmp_path/"street", WorldConfig(max_distance=27.), dict(train=8, val=2), progress=False)
    cfg = recipe(scale="smoke").override("data.unlabelled=", "teacher_stage.steps=2", "depth_stage.steps=2", "full_stage.steps=2")
    jobs = [(cfg, "student"), (cfg.override("distill.feature_weight=3"), "student")]
    together = fit_all(jobs, tmp_path/"street", tmp_path/"a", workers=2, progress=False)
    alone = fit_all(jobs, tmp_path/"street", tmp_path/"b", workers=1, progress=False)
    assert [r.record["weights_sha256"] for r in together] == [r.record["weights_sha256"] for r in alone] and together[0].name == alone[0].name
    assert len(list((tmp_path/"a").iterdir())) == 4 and together[0].record["weights_sha256"] != together[1].record["weights_sha256"]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/"a").rglob("record.json")}
    fit_all(jobs, tmp_path/"street", tmp_path/"a", workers=2, progress=False)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path/"a").rglob("record.json")}


def test_an_error_in_a_process_is_told(tmp_path):
    write(tmp_path/"street", WorldConfig(max_distance=27.), dict(train=8, val=2), progress=False)
    cfg = recipe(scale="smoke").override("data.unlabelled=", "teacher_stage.steps=2", "depth_stage.steps=2", "full_stage.batch=64")
    with pytest.raises(ValueError, match="fewer than one batch of 64"): fit_all([(cfg, "student"), (cfg.override("seed=1"), "student")], tmp_path/"street", tmp_path/"a", workers=2, progress=False)
