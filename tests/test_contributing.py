"CONTRIBUTING.md as a newcomer follows it: every example moves in by one line, and works."
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from cmkd.core import Boxes, Found
from cmkd.data.facts import manifest
from cmkd.data.sets import KINDS, open_sets
from cmkd.distill.roles import camera
from cmkd.distill.store import packed, unpacked
from cmkd.evaluate.metrics import METRICS
from cmkd.layers.head import HeadMaps
from cmkd.ledger.runs import judge
from cmkd.methods import METHODS, config_from, hash_of, recipe, role_of
from cmkd.taps import Taps, joined, leaves, rebuilt
from cmkd.train.roles import Work, fit

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT/"CONTRIBUTING.md").read_text()
COUNTS = tuple(f"data.{s}_frames=0" for s in ("train", "val", "unlabelled"))
DATA = ("data.kind=parking", "data.world=0", "data.flip=0", *COUNTS)
SHORT = ("pretrain=false", "student.initial=", "checkpoint_seconds=0")
STEPS = tuple(f"{s}_stage.{k}=2" for s in ("teacher", "full") for k in ("steps", "batch"))


def example(name: str, monkeypatch) -> ModuleType:
    "The code under the mark <!-- name -->, as a module."
    code = re.search(rf"<!-- {name} -->\n```python\n(.*?)```", PAGE, re.S)[1]
    module = ModuleType("example_" + name.replace(" ", "_"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, f"CONTRIBUTING.md, {name}", "exec"), module.__dict__)
    return module


@pytest.fixture
def parking(monkeypatch):
    monkeypatch.setitem(KINDS, "parking", example("a data set", monkeypatch).Parking)


def small(method: str):
    return recipe(method, scale="smoke").override(*DATA, *SHORT, *STEPS)


def train(cfg, role: str, folder: Path, **parents: Path) -> Path:
    work = Work(f"{role}/0", open_sets(cfg.data, folder), parents, device="cpu")
    fit(role_of(cfg, role), cfg, work, folder/role, 60., False)
    return folder/role/"weights.safetensors"


def test_a_method_moves_in(parking, tmp_path, monkeypatch):
    "On a data set that moved in, too: two cameras, one car a frame."
    monkeypatch.setitem(METHODS, "cosine", example("a method", monkeypatch).METHOD)
    cfg, theirs = small("cosine"), small("cmkd")
    assert hash_of(cfg, "teacher") == hash_of(theirs, "teacher"), "CMKD's teacher is this method's, too"
    assert hash_of(cfg, "student") != hash_of(cfg.override("distill.weight=2"), "student"), "it reads its own group"
    assert config_from(cfg.flat()) == cfg
    teacher = train(cfg, "teacher", tmp_path)
    before, after = camera(cfg).state_dict(), load_file(train(cfg, "student", tmp_path, teacher=teacher))
    assert before.keys() == after.keys()
    heads = {k: torch.equal(v, after[k]) for k, v in load_file(teacher).items() if k.startswith("head.")}
    assert heads and all(heads.values()), "the teacher's head came along"
    log = (tmp_path/"student"/"metrics.csv").read_text().splitlines()
    assert "cosine" in log[0].split(",") and len(log) == 3


def test_a_data_set_moves_in(parking, tmp_path):
    sets = open_sets(small("cmkd").data, tmp_path)
    assert (len(sets.train), len(sets.val), sets.unlabelled is None) == (4, 4, False)
    assert sets.unlabelled.frame(0).objects is None and len(sets.train.frame(0).views) == 2
    assert manifest(sets.train) == manifest(open_sets(small("cmkd").data, tmp_path).train)
    with pytest.raises(ValueError, match="'garage'; it must be one of 'kitti', 'world', 'nuscenes', 'parking'"):
        small("cmkd").override("data.kind=garage")


def test_a_metric_moves_in(parking, tmp_path, monkeypatch):
    monkeypatch.setitem(METRICS, "found", example("a metric", monkeypatch).METRIC)
    monkeypatch.setattr(KINDS["parking"], "metric", "found")
    cfg = small("cmkd")
    val = open_sets(cfg.data, tmp_path).val
    found = {frame_id: val.frame(i).objects for i, frame_id in enumerate(val.ids)}
    found[val.ids[0]] = Boxes(found[val.ids[0]].boxes + [[3, 0, 0, 0, 0, 0, 0]], ["Car"])
    rows = METRICS["found"].score(found, val, ("Car", "Cyclist"))
    assert rows["value"].tolist()[0] == 75 and rows["value"].isna()[1], "three of four cars; no cyclist to find"
    ap = judge(cfg, role_of(cfg, "teacher"), train(cfg, "teacher", tmp_path), val, progress=False)["ap"]
    assert set(ap) == {f"{name}/found/2m/nan/all" for name in cfg.data.classes} and ap["Car/found/2m/nan/all"] >= 0


def test_a_head_moves_in(monkeypatch):
    made = example("a head", monkeypatch)
    monkeypatch.setitem(Taps.__annotations__, "head", HeadMaps | made.CentreMaps | None)
    torch.manual_seed(0)
    head, bev = made.CentreHead(8, 3), torch.randn(2, 8, 5, 6)
    taps = Taps(bev=bev, head=head(bev))
    assert set(leaves(taps)) == {"bev", "head.heat", "head.box"}
    again = rebuilt(unpacked(packed(leaves(taps))))
    assert isinstance(again.head, made.CentreMaps) and torch.equal(again.head.heat, taps.head.heat)
    assert joined([taps, taps]).head.box.shape == (4, 7, 5, 6)
    anchored = rebuilt(leaves(Taps(head=HeadMaps(bev, bev, bev))))
    assert isinstance(anchored.head, HeadMaps), "heads that stood before are what they were"
    found = made.peaks(taps.head, torch.zeros(5, 6, 7))
    assert [len(f) for f in found] == [10, 10] and isinstance(found[0], Found)
    assert (found[0].scores.diff() <= 0).all() and found[0].scores[0] == taps.head.heat[0].sigmoid().max()


def test_the_page_names_rooms_that_are_there():
    for name in re.findall(r"`(nbs/[^`]*\.ipynb)`", PAGE):
        if "NAME" not in name: assert (ROOT/name).is_file(), name
