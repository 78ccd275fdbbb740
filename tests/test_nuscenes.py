"nuScenes' metrics: the devkit's numbers, to the ninth digit."
import json

import numpy as np
import pytest

from cmkd.evaluate.nuscenes import (
    CATEGORIES,
    DISTANCES,
    ERRORS,
    RACK,
    RANGE,
    Detection,
    counted,
    evaluate,
    found_of,
    pairs_within,
    table_of,
    taken,
)


class Case:
    "Samples, what is true and what was found, and what the devkit says."

    def __init__(self, folder):
        read = lambda name: json.loads((folder/f"{name}.json").read_text())
        samples = read("n_ground_truth")["samples"]
        self.tokens, self.ego = [s["token"] for s in samples], np.array([s["ego"] for s in samples])
        rows = [dict(sample=i, name=CATEGORIES.get(c, c), xyz=t, wlh=s, rotation=r, velocity=v or (np.nan, np.nan),
                     attribute=a, score=np.nan, points=lidar + radar)
                for i, x in enumerate(samples) for c, t, s, r, v, a, lidar, radar in x["annotations"]]
        self.racks = table_of([r for r in rows if r["name"] == RACK])
        self.truth = table_of([r for r in rows if r["name"] in RANGE])
        self.results, self.expected = read("n_results")["results"], read("n_expected")
        self.found = found_of(self.results, self.tokens)


@pytest.fixture(scope="module")
def case(golden) -> Case: return Case(golden)


@pytest.fixture(scope="module")
def said(case) -> Detection: return evaluate(case.truth, case.found, case.ego, case.racks)


def test_what_is_counted(case):
    before, after = case.expected["boxes_before_filter"], case.expected["boxes_after_filter"]
    assert (len(case.truth), len(case.found)) == (before["gt"], before["predictions"])
    for table, key in ((case.truth, "gt"), (case.found, "predictions")):
        names = counted(table, case.ego, case.racks).name.tolist()
        assert {n: names.count(n) for n in RANGE} == after[key]


def test_every_number_of_the_devkit(case, said):
    for name in RANGE:
        for d in DISTANCES:
            assert said.ap[name][d] == pytest.approx(case.expected["label_aps"][name][str(d)], abs=1e-9), (name, d)
        for k in ERRORS:
            want = case.expected["label_tp_errors"][name][k]
            want = np.nan if want is None else want
            assert said.errors[name][k] == pytest.approx(want, abs=1e-9, nan_ok=True), (name, k)
    assert said.mean_ap == pytest.approx(case.expected["mean_ap"], abs=1e-9)
    assert said.mean_errors == pytest.approx(case.expected["tp_errors"], abs=1e-9)
    assert said.nds == pytest.approx(case.expected["nd_score"], abs=1e-9)


def test_curves(case, said):
    for name, curves in case.expected["curves_at_2m"].items():
        ours = said.curves[name][2.]
        np.testing.assert_allclose(ours.precision, curves["precision"], atol=1e-8)
        key = next(k for k in curves if k != "precision" and k.startswith("conf"))
        np.testing.assert_allclose(ours.score, curves[key], atol=1e-8)


def test_a_split_of_ones_own(case, said):
    "Any samples; those that are missing or too many are an error that names one."
    few = case.tokens[3:9]
    here = lambda table: table.rows(np.isin(table.sample, range(3, 9)))
    assert evaluate(here(case.truth), here(case.found), case.ego, case.racks).nds != said.nds
    with pytest.raises(ValueError, match="1 of 7 samples are missing, e.g. other"):
        found_of(case.results, [*few, "other"])
    with pytest.raises(ValueError, match="is not among those judged"): found_of(case.results, few)
    with pytest.raises(ValueError, match="501 boxes"): found_of({"a": [{}]*501}, ["a"])


def test_greedy_by_the_book():
    "Against the plain double loop on crowded samples full of ties."
    r = np.random.default_rng(0)
    for _ in range(40):
        n, m = r.integers(1, 9, 2)
        at = lambda k: [(float(x), float(y), 0.) for x, y in r.integers(0, 5, (k, 2))]
        row = dict(name="car", wlh=(2, 4, 1.5), rotation=(1, 0, 0, 0), velocity=(0, 0), attribute="", points=3)
        row |= dict(sample=0)
        truth = table_of([dict(row, xyz=p, score=np.nan) for p in at(n)])
        found = table_of([dict(row, xyz=p, score=float(s)) for p, s in zip(at(m), r.integers(1, 4, m)/4, strict=True)])
        found = found.rows(np.lexsort((np.arange(m), found.score))[::-1])
        for distance in DISTANCES:
            free, want = set(range(n)), {}
            for i in range(m):
                near = [(float(np.linalg.norm(found.xyz[i, :2] - truth.xyz[j, :2])), j) for j in sorted(free)]
                if near and min(near)[0] < distance:
                    want[i] = min(near)[1]
                    free.discard(want[i])
            assert taken(pairs_within(truth, found, max(DISTANCES)), distance, n) == want
