"Every lesson as a class meets it: a projector's 1280 x 720, every control moved by the keyboard."
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from lab import lab, needs_browser, page, run_all  # noqa: E402
from test_lesson import CALM, FAULTS  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
LESSONS = sorted(p for p in (ROOT/"nbs/learn").glob("*.ipynb") if not p.name.startswith("01_"))
SHOWN = """plot => JSON.stringify(plot.data.map(t => [t.x, t.y, t.z].map(v => v ? Array.from(v).flat() : 0)))
                   + plot.querySelector('.gtitle').textContent"""
MOVED = f"([plot, said]) => ({SHOWN})(plot) != said"
OUTSIDE = """plot => Math.max(...[...plot.querySelectorAll('.main-svg')].map(s => s.getBoundingClientRect().right))
                     - plot.closest('.jp-OutputArea-output').getBoundingClientRect().right"""


@pytest.mark.browser
def test_every_control_of_every_lesson_moves_its_figure(tmp_path):
    api, chromium = needs_browser()
    for name in ("work", "home"): (tmp_path/name).mkdir()
    for lesson in LESSONS: shutil.copy(lesson, tmp_path/"work")
    moved = {}
    with lab(tmp_path/"work", tmp_path/"home") as (address, token):
        for lesson in LESSONS:
            with page(api, chromium, (1280, 720)) as (p, errors):
                p.goto(f"{address}/lab/tree/{lesson.name}?token={token}&reset")
                run_all(p)
                p.wait_for_function(CALM, timeout=120_000)
                assert p.locator(FAULTS).count() == 0, (lesson.name, p.locator(FAULTS).first.inner_text())
                outs = p.locator(".jp-OutputArea-output:has(.noUi-handle), .jp-OutputArea-output:has(select)")
                for k in range(outs.count()):
                    out = outs.nth(k)
                    out.scroll_into_view_if_needed()
                    plot = out.locator(".js-plotly-plot")
                    plot.locator(".gtitle").wait_for(state="attached", timeout=30_000)
                    assert plot.evaluate(OUTSIDE) <= 0, f"{lesson.name}: a figure is wider than its cell"
                    handles, menus = out.locator(".noUi-handle"), out.locator("select")
                    for j in range(handles.count()):
                        said = plot.evaluate(SHOWN)
                        key = "ArrowLeft" if handles.nth(j).get_attribute("aria-valuenow") == \
                            handles.nth(j).get_attribute("aria-valuemax") else "ArrowRight"
                        handles.nth(j).press(key)
                        p.wait_for_function(MOVED, arg=[plot.element_handle(), said], timeout=20_000)
                        moved[lesson.name] = moved.get(lesson.name, 0) + 1
                    for j in range(menus.count()):
                        said = plot.evaluate(SHOWN)
                        menus.nth(j).select_option(index=1)
                        p.wait_for_function(MOVED, arg=[plot.element_handle(), said], timeout=20_000)
                        moved[lesson.name] = moved.get(lesson.name, 0) + 1
                    out.screenshot(path=tmp_path/f"{lesson.stem}-{k}.png")
                assert not errors, (lesson.name, errors)
    print(moved)
    assert set(moved) == {lesson.name for lesson in LESSONS} and min(moved.values()) >= 1
