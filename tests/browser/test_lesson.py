"The first lesson as a reader meets it: in JupyterLab, in a browser, moved by the keyboard."
import shutil
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from lab import lab, needs_browser, page, run_all  # noqa: E402

LESSON = Path(__file__).resolve().parents[2]/"nbs/learn/01_pixels_to_ground.ipynb"
READ = """plot => ({
    bars: Array.from(plot.data.find(t => t.name == 'belief').y),
    paths: [...plot.querySelectorAll('.bars .point path')].map(p => p.getAttribute('d')),
    cells: plot.data.find(t => t.name == 'lifted').zmax,
    title: plot.querySelector('.gtitle').textContent})"""
NEW_TITLE = "([plot, said]) => plot.querySelector('.gtitle').textContent != said"
CALM = "!document.querySelector('.jp-Notebook').textContent.includes('[*]')"
FAULTS = ", ".join(f"[data-mime-type='application/vnd.jupyter.{kind}']" for kind in ("error", "stderr"))


@pytest.mark.browser
def test_sliders_move_the_figure(tmp_path):
    api, chromium = needs_browser()
    (tmp_path/"work").mkdir()
    (tmp_path/"home").mkdir()
    shutil.copy(LESSON, tmp_path/"work")
    with lab(tmp_path/"work", tmp_path/"home") as (address, token), page(api, chromium) as (p, errors):
        p.goto(f"{address}/lab/tree/{LESSON.name}?token={token}&reset")
        run_all(p)
        out = p.locator(".jp-OutputArea-output:has(.noUi-handle)").first
        out.locator(".js-plotly-plot .bars .point path").first.wait_for(state="attached", timeout=60_000)
        out.scroll_into_view_if_needed()
        plot, handle = out.locator(".js-plotly-plot"), out.locator(".noUi-handle").nth(2)
        before = plot.evaluate(READ)
        took = []
        for _ in range(8):                                      # towards a blurrier belief
            said, start = plot.evaluate(READ)["title"], time.perf_counter()
            handle.press("ArrowRight")
            p.wait_for_function(NEW_TITLE, arg=[plot.element_handle(), said], timeout=10_000)
            took.append(time.perf_counter() - start)
        after = plot.evaluate(READ)
        p.screenshot(path=tmp_path/"lesson.png")
        print(f"\n{1e3*sorted(took)[4]:.0f} ms from key to picture; {before['title']} -> {after['title']}")
        print(tmp_path/"lesson.png")
        assert abs(sum(before["bars"]) - 1) < 1e-3 and abs(sum(after["bars"]) - 1) < 1e-3
        assert max(after["bars"]) < max(before["bars"]) and after["cells"] < before["cells"]
        assert after["paths"] != before["paths"]                # drawn, not only known
        assert "T = 1.00" in before["title"] and "T = 1.00" not in after["title"]

        out.locator(".noUi-handle").nth(0).press("PageUp")      # another pixel
        p.wait_for_function(NEW_TITLE, arg=[plot.element_handle(), after["title"]], timeout=10_000)
        told = p.locator(".jp-OutputArea-output pre", has_text="not yet: it returns nothing")
        told.wait_for(state="attached", timeout=30_000)
        p.wait_for_function(CALM, timeout=60_000)
        assert p.locator(FAULTS).count() == 0
    assert not errors, errors
