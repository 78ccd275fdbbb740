"What a figure shows must be where geometry says."
import base64

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest

from cmkd import draw
from cmkd.core import Boxes, Frame, Pinhole, View
from cmkd.draw import (
    COLOURS,
    LIVE,
    MOST,
    clip_near,
    draw_3d,
    draw_bev,
    draw_frame,
    draw_image,
    draw_map,
    png_of,
    png_uri,
    save,
    show,
    start_painter,
)
from cmkd.geometry import Grid

POSE = [[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
RIG = Pinhole([[100, 0, 160, 0], [0, 100, 48, 0], [0, 0, 1, 0]], POSE)
IMAGE = np.random.default_rng(0).integers(0, 255, (96, 320, 3), np.uint8)
VIEW = View(RIG.camera, RIG.lidar_to_cam, IMAGE)
STREET = Grid((0.0, -16.0, -3.0), (40.0, 16.0, 1.0), (0.8, 0.4, 4.0))


def car(*box):
    return Boxes([box], ["Car"])


def ends(trace):
    "The (K, 2, 2) lines of a trace with gaps."
    return np.stack([trace.x, trace.y], 1).reshape(-1, 3, 2)[:, :2]


def test_box_straight_ahead_projects_where_geometry_says():
    lines = ends(draw_image(IMAGE, RIG, car(10, 0, 0, 4, 2, 1, 0)).data[0])
    assert lines.shape == (14, 2, 2)
    # rear face 8 m away: half width 1 m -> 12.5 px, half height .5 m -> 6.25 px; front face 12 m away
    np.testing.assert_allclose(
        [lines.reshape(-1, 2).min(0), lines.reshape(-1, 2).max(0)], [[147.5, 41.75], [172.5, 54.25]], atol=1e-4
    )
    front = lines[12:].reshape(-1, 2)
    np.testing.assert_allclose(
        [front.min(0), front.max(0)], [[160 - 100 / 12, 48 - 50 / 12], [160 + 100 / 12, 48 + 50 / 12]], atol=1e-4
    )


def test_cross_follows_the_heading():
    lines = ends(draw_image(IMAGE, RIG, car(10, 0, 0, 4, 2, 1, np.pi)).data[0])
    assert np.ptp(lines[12:].reshape(-1, 2)[:, 0]) == pytest.approx(25, abs=1e-4)  # the near face, 8 m away


def test_box_behind_draws_nothing():
    fig = draw_image(IMAGE, RIG, {"truth": car(-10, 0, 0, 4, 2, 1, 0)})
    assert len(fig.data[0].x) == 0


@pytest.mark.parametrize("x,y", [(0.0, 3.0), (1.0, 0.0), (0.5, -2.0)])
def test_box_across_the_image_plane_does_not_wrap(x, y):
    lines = ends(draw_image(IMAGE, RIG, car(x, y, -1, 4, 1, 1, 0)).data[0])
    assert 0 < len(lines) < 14
    assert np.isfinite(lines).all()
    assert (lines[..., 1] >= 48).all()  # the box lies below the camera: so does every line
    if y > 1:
        assert (lines[..., 0] <= 160).all()  # and on its own side
    if y < -1:
        assert (lines[..., 0] >= 160).all()


def test_clipping_keeps_lines_and_order():
    lines = np.random.default_rng(1).normal(size=(500, 2, 3))
    cut = clip_near(lines, 0.1)
    kept = lines[(lines[..., 2] >= 0.1).any(1)]
    assert cut.shape == kept.shape and (cut[..., 2] >= 0.1 - 1e-12).all()
    whole = (kept[..., 2] >= 0.1).all(1)
    np.testing.assert_array_equal(cut[whole], kept[whole])
    cross = np.cross(cut - kept[:, :1], (kept[:, 1:] - kept[:, :1]))
    assert np.abs(cross).max() < 1e-9  # still on the same line


def test_left_is_left_and_ahead_is_up():
    for fig in (draw_bev(np.array([[10.0, 5.0, 0]]), grid=STREET), draw_map(np.zeros((80, 50)), STREET)):
        left, right = fig.layout.xaxis.range
        assert left == 16 and right == -16
        assert tuple(fig.layout.yaxis.range) == (0, 40)
        assert fig.layout.yaxis.scaleanchor == "x"
    fig = draw_bev(np.array([[10.0, 5.0, 0]]))
    assert fig.layout.xaxis.autorange == "reversed" and fig.data[0].x[0] == 5 and fig.data[0].y[0] == 10


def test_heat_lies_on_its_cells():
    heat = np.zeros(STREET.shape[1:])
    heat[50, 10] = 1  # y = -16 + 50.5*.4, x = 10.5*.8
    trace = draw_bev(grid=STREET, heat=heat).data[0]
    row, column = np.argwhere(trace.z == 1)[0]
    assert trace.y0 + row * trace.dy == pytest.approx(8.4) and trace.x0 + column * trace.dx == pytest.approx(4.2)
    with pytest.raises(ValueError, match="cells"):
        draw_bev(grid=STREET, heat=heat.T)
    with pytest.raises(ValueError, match="grid"):
        draw_bev(heat=heat)


def test_points_on_the_picture():
    fig = draw_image(IMAGE, RIG, points=np.array([[10.0, 1, 0], [10, 30, 0], [-10, 0, 0]]))
    np.testing.assert_allclose([fig.data[0].x, fig.data[0].y, fig.data[0].marker.color], [[150], [48], [10]], atol=1e-5)


def test_figures_stay_small_and_say_the_same_twice():
    points = np.random.default_rng(2).uniform(1, 40, (120000, 4)).astype(np.float32)
    frame = Frame("a", (VIEW,), points, car(10, 0, 0, 4, 2, 1, 0))
    for make in (lambda: draw_bev(points), lambda: draw_3d(points), lambda: draw_frame(frame)):
        fig = make()
        assert sum(len(t.x) for t in fig.data if t.mode == "markers") <= MOST
        assert len(fig.to_json()) < 300_000
        assert fig.to_json() == make().to_json()


def test_picture_is_png_and_pixels_are_centred():
    fig = draw_image(IMAGE, scale=0.5)
    picture = fig.layout.images[0]
    assert picture.source.startswith("data:image/png;base64,")
    assert (picture.x, picture.y, picture.sizex, picture.sizey) == (-0.5, -0.5, 320, 96)
    assert len(png_uri(IMAGE, 0.5)) < len(png_uri(IMAGE)) / 2


def test_roles_have_their_colours_everywhere():
    b, frame = car(10, 0, 0, 4, 2, 1, 0), Frame("a", (VIEW,), np.zeros((1, 4), np.float32))
    three = dict.fromkeys(COLOURS, b)
    for fig in (draw_image(IMAGE, RIG, three), draw_bev(boxes=three), draw_3d(boxes=three), draw_frame(frame, three)):
        assert {t.name: t.line.color for t in fig.data if t.mode == "lines"} == COLOURS
    assert not [t for t in draw_frame(frame).data if t.mode == "lines" and t.name]  # unlabelled: no boxes, no error


def test_no_side_effect_on_other_figures():
    assert pio.templates.default != "cmkd"
    assert go.Figure().layout.template.layout.font.family is None


def test_saved_without_kaleido(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "kaleido", None)
    out = save(draw_bev(np.zeros((3, 4))), tmp_path / "f07.5_x")
    assert out.png is None and out.csv is None and "kaleido" in out.note
    assert [p.name for p in tmp_path.iterdir()] == ["f07.5_x.json"]


def test_an_older_picture_does_not_stay_beside_new_numbers(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "kaleido", None)
    (tmp_path / "f.png").write_bytes(b"of other numbers")
    assert save(draw_bev(np.zeros((3, 4))), tmp_path / "f").png is None
    assert not (tmp_path / "f.png").exists()


def test_a_picture_of_the_same_figure_stays(tmp_path, monkeypatch):
    "Where nobody can draw it anew, what is published must not go because a table was read again."
    fig = draw.bars(["a"], [1.], "one")
    draw.save(fig, tmp_path/"f")
    (tmp_path/"f.png").write_bytes(b"drawn")
    monkeypatch.setattr(draw, "save_png", lambda fig, path: path.unlink(missing_ok=True) or "no png")
    assert draw.save(fig, tmp_path/"f").png and (tmp_path/"f.png").read_bytes() == b"drawn"
    assert not draw.save(draw.bars(["a"], [2.], "two"), tmp_path/"f").png and not (tmp_path/"f.png").exists()


def test_shown_live_in_words_and_where_it_is_kept_as_a_picture(monkeypatch):
    import sys

    fig = draw_bev(np.zeros((3, 4)))
    monkeypatch.setenv("CMKD_PICTURES", "0")
    data, told = show(fig, "Three points.")._repr_mimebundle_()
    assert data.keys() == {LIVE, "text/plain"} and data["text/plain"] == "Three points." and not told
    monkeypatch.setenv("CMKD_PICTURES", "1")
    monkeypatch.setattr("cmkd.draw.png_of", lambda *_: (b"a picture", ""))
    data, told = show(fig, "Three points.")._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == b"a picture" and told == {"image/png": {"alt": "Three points."}}
    monkeypatch.undo()
    monkeypatch.setenv("CMKD_PICTURES", "1")
    monkeypatch.setitem(sys.modules, "kaleido", None)
    assert "image/png" not in show(fig, "Three points.")._repr_mimebundle_()[0]


def test_one_browser_draws_all_pictures(monkeypatch):
    import sys
    from types import SimpleNamespace

    begun = []
    fake = SimpleNamespace(Kaleido=lambda n: None, start_sync_server=lambda **_: begun.append(1),
                           calc_fig_sync=lambda fig, opts: repr(opts).encode())
    monkeypatch.setitem(sys.modules, "kaleido", fake)
    start_painter.cache_clear()
    fig = draw_bev(np.zeros((3, 4)))
    first, second = png_of(fig), png_of(fig)
    start_painter.cache_clear()
    assert first == second and b"'width': 620" in first[0] and begun == [1]


def test_no_browser_no_picture_and_the_reason(monkeypatch):
    import sys
    from types import SimpleNamespace

    def none(n): raise RuntimeError("no Chrome here")
    monkeypatch.setitem(sys.modules, "kaleido", SimpleNamespace(Kaleido=none))
    start_painter.cache_clear()
    assert png_of(draw_bev(np.zeros((3, 4)))) == (b"", "no png: no Chrome here")

