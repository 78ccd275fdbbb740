"The site as a reader meets it who has no network; and a lesson on a projector."
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from lab import free_port, needs_browser, page  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
LOADED = "() => [...document.querySelectorAll('article img')].every(i => i.alt.length > 10 && i.naturalWidth > 0)"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A front page, a lesson, a table and a room of the library, served on the loopback."
    from cmkd.doors.site import built, kept_copies
    names = ("index", "learn/02_depth_bins", "tables/cmkd_t03_waymo", "0_ground/07_boxes", "0_ground/06_geometry")
    books = [ROOT/"nbs"/f"{name}.ipynb" for name in names]
    index = built(books, kept_copies(books, 1), tmp_path_factory.mktemp("site"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=index.parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.mark.browser
def test_the_site_needs_no_network(site, tmp_path):
    api, chromium = needs_browser()
    with page(api, chromium, (1280, 720)) as (p, errors):
        outside = []
        p.route("**/*", lambda r: r.continue_() if r.request.url.startswith((site, "data:", "blob:")) else
                (outside.append(r.request.url), r.abort()))
        for at in ("index", "learn/02_depth_bins", "tables/cmkd_t03_waymo", "0_ground/06_geometry"):
            p.goto(f"{site}/{at}.html")
            p.wait_for_load_state("networkidle")
            p.screenshot(path=tmp_path/f"{Path(at).stem}.png")
            assert p.locator("article h1").count() == 1 and p.evaluate(LOADED), at
            wide = p.evaluate("() => document.documentElement.scrollWidth - window.innerWidth")
            assert wide <= 0, f"{at}: {wide} px wider than the window"
        assert p.locator("article math").count() and p.locator("article h2:has-text('Reference')").count() == 1
        assert not p.locator("article").inner_text().count("$$")
        p.goto(f"{site}/learn/02_depth_bins.html")
        assert p.locator("article img").count() >= 1, "the lesson's figure is a picture"
        p.keyboard.press("f")                                                  # as a reader would
        p.locator("input.md-search__input").press_sequentially("DepthBins")
        found = p.locator(".md-search-result__item a", has_text="geometry")
        found.first.wait_for(timeout=20_000)
        assert not errors and not outside, (errors, outside)


def test_a_broken_link_stops_the_site(tmp_path):
    from cmkd.doors import site
    book, copy = ROOT/"nbs"/"0_ground"/"07_boxes.ipynb", tmp_path/"07_boxes.ipynb"
    copy.write_text(book.read_text().replace("](08_draw.ipynb)", "](08_drawn.ipynb)"))
    front = ROOT/"nbs"/"index.ipynb"
    assert site.built([front, book], {front: front, book: book}, tmp_path/"a").exists()
    with pytest.raises(RuntimeError, match="mkdocs: WARNING.*08_drawn.ipynb"):
        site.built([front, book], {front: front, book: copy}, tmp_path/"b")


@pytest.mark.browser
def test_a_lesson_on_a_projector(tmp_path):
    "Voila: figures and sliders, no code; the address asks for a token."
    pytest.importorskip("voila", reason="voila is not installed: pip install 'cmkd[present]'")
    api, chromium = needs_browser()
    port = free_port()
    command = [sys.executable, "-c", "import sys; from cmkd.cli import main; sys.exit(main())", "learn", "2",
               "--present", "--no-browser", "--port", str(port)]
    served = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
    try:
        told = ""
        while not (at := re.search(r"http://127\.0\.0\.1:\d+/\S*token=\w+", told)):
            line = served.stdout.readline()
            assert line, f"voila ended: {told}"
            told += line
        with page(api, chromium, (1280, 720)) as (p, errors):
            p.goto(at[0], timeout=120_000)
            p.locator(".noUi-handle, .widget-slider").first.wait_for(timeout=120_000)
            p.locator(".js-plotly-plot .gtitle").first.wait_for(state="attached", timeout=60_000)
            p.screenshot(path=tmp_path/"voila.png", full_page=True)
            assert p.locator(".jp-InputArea-editor:visible").count() == 0, "no code on a projector"
            icons = "fontawesome"            # Voila asks a CDN for icons, and does without
            assert not [e for e in errors if icons not in e], errors
    finally:
        served.terminate()
        served.wait(20)
