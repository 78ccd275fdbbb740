"Tables: what is published has a record, what was not run is a dash, and a notebook runs with what it was asked."
import json
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from cmkd.data.sets import Data
from cmkd.files import root
from cmkd.ledger import notebooks, pages, tables
from cmkd.ledger.claims import answered, read_claims
from cmkd.ledger.record import Run, load
from cmkd.ledger.statistics import additive, ap_grid, compared, half_width, holm, per_class, side_by_side, summary
from cmkd.methods import recipe

NUMBER = dict(cls="Car", metric="3D", recall="R40", difficulty="moderate")
# two-sided 95 % quantiles of Student's t, 1 to 9 degrees of freedom, as every book prints them
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def fake(seed, ap, scale="mini", row="x") -> Run:
    cfg = recipe(scale=scale).override(f"seed={seed}")
    aps = {"Car/3D/R40/0.5/moderate": ap, "Car/3D/R40/0.7/moderate": None}
    told = dict(name="n", role="student", scale=scale, seed=seed, config=cfg.flat(), ap=aps)
    return Run(Path(f"{scale}-student-{row}{seed}"), told)


# --- statistics ---


def test_seeds_by_hand():
    long = tables.rows(dict(a=[fake(0, 1.), fake(1, 2.), fake(2, 6.)], b=[fake(0, 4.)]), "t04")
    s = summary(tables.pick(long, iou=.5)).set_index("row")
    spread = pytest.approx(7**.5)                                     # deviations -2 -1 3: (4 + 1 + 9)/2
    assert s.loc["a", "value"] == 3 and s.loc["a", "std"] == spread and s.loc["a", "n_seeds"] == 3
    assert s.loc["a", "run_id"] == "mini-student-x0;mini-student-x1;mini-student-x2"
    assert np.isnan(s.loc["b", "std"])


def test_interval_is_students():
    for n, t in enumerate(T975, 2):
        d = pd.Series(np.random.default_rng(n).normal(size=n))
        assert half_width(d) == pytest.approx(t*d.std()/n**.5, rel=2e-4)
    assert np.isnan(half_width(pd.Series([1.]))) and half_width(pd.Series([2., 2.])) == 0
    wide = [half_width(pd.Series(np.tile([0., 2.], n))) for n in (5, 50, 500)]
    assert wide == sorted(wide)[::-1], "more seeds, a narrower interval"


def test_comparisons_line_up_by_draw():
    "Only draws that all rows have, whatever their order; a row that was not run is no difference."
    base, more = [fake(0, 1.), fake(1, 5.), fake(2, 9.)], [fake(2, 12.), fake(0, 3.), fake(7, 90.)]
    grid = ap_grid(dict(base=base, more=more, never=[]), iou=.5, **NUMBER)
    assert list(grid.columns) == [0, 1, 2, 7] and grid.loc["more", 2] == 12
    model = additive(grid)
    c, never = compared(model, grid, dict(more=1, base=-1)), compared(model, grid, dict(never=1, base=-1))
    assert c.draws == 2 and c.mean == pytest.approx(2.5) and c.pair == pytest.approx(12.706*.5, rel=1e-3)
    assert np.isnan([never.mean, never.half, never.p]).all() and never.draws == 0


def test_the_additive_model_is_what_anova_says():
    "Whole grids: row means, and the residual mean square of a two-way layout; a hole: as numpy solves it."
    values = np.random.default_rng(3).normal(size=(5, 4))
    grid = pd.DataFrame(values, index=list("abcde"))
    model, left = additive(grid), values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    assert model.df == 12 and model.sigma**2 == pytest.approx((left**2).sum()/12)
    c = compared(model, grid, dict(b=1, a=-1))
    assert c.mean == pytest.approx(values[1].mean() - values[0].mean())
    assert c.half == pytest.approx(2.1788*model.sigma*(2/4)**.5, rel=1e-4)
    four = compared(model, grid, dict(b=1, a=-1, c=-1, d=1))
    assert four.half == pytest.approx(2**.5*c.half)
    holed = grid.copy()
    holed.iloc[1, 3] = np.nan
    whole = compared(additive(holed), holed, dict(b=1, a=-1))
    assert whole.draws == 3 and additive(holed).df == 11 and whole.half > c.half*additive(holed).sigma/model.sigma


def test_nothing_to_tell_noise_from_has_no_interval():
    one = ap_grid(dict(base=[fake(0, 1.)], more=[fake(0, 3.)]), iou=.5, **NUMBER)
    c = compared(additive(one), one, dict(more=1, base=-1))
    assert c.mean == pytest.approx(2) and np.isnan(c.half) and np.isnan(c.p)


def test_holm_by_hand():
    assert holm([.04, .01, .03, .005]) == pytest.approx([.06, .03, .06, .02])      # times 1, 3, 2, 4; never falling
    assert holm([]) == [] and holm([.9, .8]) == [1., 1.]


def test_claims_were_written_down_with_what_the_paper_says():
    claims = read_claims()
    assert len(claims) >= 22 and set(claims.direction) == {"more", "less", "little"}
    assert (claims.smallest == 1).all(), "one smallest effect, stated before the runs"
    bad = claims[(claims.direction == "more") & (claims.paper_difference < 0)]
    assert not len(bad), "a claim of more, and the paper prints less"


def test_a_claim_of_rows_that_were_not_run_is_a_dash():
    found = answered(read_claims("t08"), {}, "mini")
    assert found.verdict.tolist() == [""] and np.isnan(found.ours).all() and found.draws.tolist() == [0]
    assert "—" in str(tables.Shown(found)) and "nan" not in str(tables.Shown(found))


def test_what_was_not_run_is_a_dash():
    long = tables.rows(dict(base=[fake(0, 1.)], Pre=[]), "t04")
    paper, ours = tables.pick(tables.paper_rows("t04"), **NUMBER), tables.pick(long, iou=.5, **NUMBER)
    t = side_by_side(paper, ours, ["base", "Pre", "mine"], {"Pre": "base", "mine": "base"})
    shown = tables.Shown(t)
    assert shown.cells()[2][1:5] == ["13.48", "—", "—", "0"] and shown.cells()[3][1:3] == ["—", "—"]
    assert "—" in shown._repr_html_() and "nan" not in (shown._repr_html_() + str(shown)).lower()


def test_classes_stand_as_the_rows_name_them():
    "No list of classes is asked: another data set has others."
    long = tables.rows(dict(a=[fake(0, 1.)]), "t04")
    other = pd.concat([long.assign(cls=c, iou=i) for c, i in (("Tram", .5), ("Car", .5), ("Car", .7), ("Bus", .25))])
    other = other.drop_duplicates(["cls", "iou"])
    assert list(per_class(other.assign(value=1.), ["a"]).columns) == ["Tram 0.5", "Car 0.7", "Car 0.5", "Bus 0.25"]


# --- published ---


def test_smoke_is_never_published(tmp_path):
    long = tables.rows(dict(base=[fake(0, 1., "smoke")]), "t04")
    with pytest.raises(ValueError, match="never published"): pages.save_table("cmkd_t04-mini", long, folder=tmp_path)
    name = pages.saved_name("cmkd_t04", recipe(scale="smoke"))
    assert "smoke" in pages.save_table(name, long, folder=tmp_path).name
    assert tables.banner("smoke") and not tables.banner("mini")
    published = [*(root()/"results"/"tables").glob("*.csv")]
    assert published and not [p.name for p in published if "smoke" in p.name]
    for p in published:
        frame = pd.read_csv(p, dtype=str)
        assert "scale" not in frame or "smoke" not in frame["scale"].tolist(), p.name


def test_names_tell_what_is_not_usual():
    "Two experiments never share a file."
    cfg = recipe(scale="mini")
    others = (replace(cfg, data=Data()), recipe("hint", scale="mini"), recipe(name="release", scale="mini"), recipe())
    names = [pages.saved_name("t", c) for c in (cfg, *others)] + [pages.saved_name("t", cfg, ("seed=1",))]
    names += [pages.saved_name("t", cfg, **asked) for asked in (dict(draws=2), dict(draws=3), dict(controls=True))]
    assert names[0] == "t-mini" and len(set(names)) == len(names)
    assert pages.saved_name("t", cfg, draws=0, controls=False) == "t-mini"


def test_a_reader_never_writes_where_what_is_published_lies(tmp_path, monkeypatch):
    "Whatever was asked for goes to results/mine; the published place takes the usual settings alone."
    monkeypatch.setattr(pages, "root", lambda: tmp_path)
    cfg, long = recipe(scale="mini"), tables.rows(dict(base=[fake(0, 1.)]), "t04")
    for asked in (dict(), dict(draws=5), dict(controls=True)):
        mine = pages.pages("t", cfg, **asked)
        page = mine.page("T", "words", tables.Shown(long[["value"]]))
        wrote = [mine.table(long), mine.figure(go.Figure()).json, page]
        assert all(p.is_relative_to(tmp_path/"results"/"mine") and p.exists() for p in wrote)
    for bad in (dict(draws=5), dict(controls=True), dict(overrides=("seed=1",))):
        with pytest.raises(ValueError, match="only the usual settings are published"):
            pages.pages("t", cfg, publish=True, **bad)
    with pytest.raises(ValueError, match="never smoke"): pages.pages("t", recipe(scale="smoke"), publish=True)
    assert sorted(p.name for p in (tmp_path/"results").iterdir()) == ["mine"]
    published = pages.pages("t", cfg, publish=True).page("T", "a *word*", tables.Shown(long[["value"]], "Title"))
    page = (tmp_path/"results"/"published"/"t-mini.html").read_text()
    assert published.parent.name == "tables" and "<em>word</em>" in page and "Title" in page
    assert "src=\"http" not in page and "href" not in page, "one file, without a network"


def aps_of(run: Run, split: str) -> dict:
    "What a run reaches on a split: its record's, or what was judged beside it."
    if run.record["config"]["data.val"] == split: return run.record["ap"]
    return json.loads((run.folder/f"ap-{split}.json").read_text())["ap"]


def test_published_numbers_have_a_record():
    "Every run that a table of ours names is there, with its record and its number."
    for path in (root()/"results"/"tables").glob("*.csv"):
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        if "source" not in frame or "smoke" in path.name: continue        # a list of fields or costs, not of APs
        for r in frame[frame.source == "ours"].itertuples():
            runs = [load(root()/"results"/"runs"/i) for i in r.run_id.split(";")]
            key = f"{r.cls}/{r.metric}/{r.recall}/{float(r.iou):g}/{r.difficulty}"
            found = [aps_of(run, r.split)[key] for run in runs]
            if not r.value: continue
            mean = np.mean([v for v in found if v is not None])
            assert float(r.value) == pytest.approx(mean, abs=1e-3), (path.name, r)


def test_paper_numbers_are_the_transcription(shared):
    "Each table of CMKD: the same numbers as the transcription beside the data, no more and no fewer."
    names = {"cmkd_test_per_class_resolved.csv": "test_per_class"}
    names |= {f"001_table{i}.csv": f"t{i:02d}" for i in range(1, 11)}
    names |= {f"000_table{i}.csv": f"s{i:02d}" for i in range(1, 4)}
    for file, table in names.items():
        theirs = pd.read_csv(shared/"tables"/file)
        numeric = [c for c in theirs.columns if any(k in c for k in ("ap", "AP", "fps", "memory")) and c != "gap"]
        numbers = theirs[numeric].to_numpy(float).ravel()
        ours = tables.paper_rows(table).value.to_numpy(float)
        assert sorted(numbers[~np.isnan(numbers)]) == pytest.approx(sorted(ours[~np.isnan(ours)])), file
        assert np.isnan(ours).sum() == np.isnan(numbers).sum(), file


def test_table_4_of_the_paper():
    t = tables.paper_rows("t04").set_index(["row", "difficulty"]).value
    assert t["base", "moderate"] == 8.52 and t["Pre + Feat", "easy"] == 22.20
    assert t["Pre + Feat + Res + Un", "hard"] == 19.44
    assert set(tables.paper_rows("t02").iou) == {.5} and tables.paper_rows("t03").dataset.unique().tolist() == ["Waymo"]


# --- notebooks ---


def book(path: Path, *code, tags=("parameters",)) -> Path:
    made = [nbformat.v4.new_code_cell(c, id=f"c{i}") for i, c in enumerate(code)]
    made[0].metadata.tags = list(tags)
    kernel = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=dict(kernelspec=kernel)), path)
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


WRONG = ((dict(seed=1), KeyError), (dict(seeds="1"), TypeError), (dict(seeds=1.), TypeError),
         (dict(seeds=True), TypeError), (dict(name=1), TypeError), (dict(flag=1), TypeError),
         (dict(lr="0.1"), TypeError))


def test_unknown_names_and_wrong_types_stop_before_anything_runs(tmp_path):
    mark, out = tmp_path/"ran", tmp_path/"out.ipynb"
    path = book(tmp_path/"a.ipynb", "seeds = 1\nlr = 0.1\nname = 'x'\nflag = False", f"open({str(mark)!r}, 'w')")
    for bad, kind in WRONG:
        with pytest.raises(kind): notebooks.run_notebook(path, bad, out)
    untagged = book(tmp_path/"b.ipynb", "seeds = 1", tags=())
    with pytest.raises(ValueError, match="0 cells"): notebooks.run_notebook(untagged, {}, out)
    with pytest.raises(FileNotFoundError, match="c.ipynb: no such file; name a notebook"):
        notebooks.run_notebook(tmp_path/"c.ipynb", {}, out)
    assert not mark.exists() and not out.exists()


def test_what_ran_is_what_was_asked(tmp_path, monkeypatch):
    used, path, count, data = (tmp_path/name for name in ("used.txt", "a.ipynb", "count", "data"))
    used.write_text("1")
    work = (f"from cmkd.ledger.notebooks import outcome\nopen({str(count)!r}, 'a').write('x')\n"
            "print(seeds, lr, words)")
    book(path, "seeds = 1\nlr = 0.1\nwords = []", work, f"outcome('the table', {str(used)!r})")
    (data/"ImageSets").mkdir(parents=True)
    train = data/"ImageSets"/"train.txt"
    train.write_text("1\n")

    def go(**more):
        asked = dict(seeds=2, words=["a=[1, 2]"]) | more
        return notebooks.run_notebook(path, asked, tmp_path/"out.ipynb", [data])

    def times(): return len(count.read_text())

    out = go()
    assert notebooks.printed(out) == "the table" and "2 0.1 ['a=[1, 2]']" in out.read_text()
    go()
    assert times() == 1
    train.write_text("1\n")
    go()
    assert times() == 1, "the same list written again is no change"
    used.write_text("2")
    go()
    assert times() == 2, "a file that it stands on has changed"
    go(lr=1)
    assert times() == 3, "another parameter"
    (data/"new.bin").write_bytes(b"1")
    go(lr=1)
    assert times() == 4, "other data"
    out.write_text(out.read_text() + " ")
    go(lr=1)
    assert times() == 5, "somebody edited the result"
    real = notebooks.assigned
    other = lambda source, p: real(source, p) | (dict(seeds=7) if "# Parameters" in source else {})
    monkeypatch.setattr(notebooks, "assigned", other)
    with pytest.raises(RuntimeError, match="asked were"): go(lr=2)


def test_a_failing_notebook_keeps_the_last_good_one(tmp_path):
    path = book(tmp_path/"a.ipynb", "fail = False", "assert not fail, 'on purpose'")
    out = notebooks.run_notebook(path, {}, tmp_path/"out.ipynb")
    good, says = out.read_text(), "stopped with AssertionError: on purpose .*out.failed.ipynb"
    with pytest.raises(RuntimeError, match=says): notebooks.run_notebook(path, dict(fail=True), out)
    assert out.read_text() == good and (tmp_path/"out.failed.ipynb").exists() and not list(tmp_path.glob(".*"))
    assert notebooks.run_notebook(path, {}, out) == out and out.read_text() == good
