"""Axes with plain numbers, and medians with bands."""

import math

import fluids_pictures
import pytest
from matplotlib.figure import Figure
from pictures import COLOURS, band, by_step, plain, plain_log, shades
from scripts import call


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1, "1"), (0.03, "0.03"), (0.001, "0.001"), (2e-4, "2e-4"), (1.5e-6, "1.5e-6"), (20000.0, "20,000")],
)
def test_plain(value, text):
    assert plain(value) == text


@pytest.mark.parametrize(
    ("limits", "texts"),
    [
        ((1e-5, 1), ["1e-5", "1e-4", "0.001", "0.01", "0.1", "1"]),
        ((0.009, 0.4), ["0.01", "0.03", "0.1", "0.3"]),
        ((450, 4600), ["500", "1,000", "2,000"]),
        ((2.0, 2.35), ["2", "2.1", "2.2", "2.3"]),
    ],
)
def test_plain_log(limits, texts):
    axes = Figure().subplots()
    axes.set(yscale="log", ylim=limits)
    plain_log(axes.yaxis)
    axes.figure.canvas.draw()
    assert [tick.get_text() for tick in axes.get_yticklabels()] == texts
    assert not axes.yaxis.get_minorticklocs().size


def test_band_of_courses():
    courses = [[(0, 0.0, 1.0), (5, 2.0, 0.5), (10, 4.0, 0.2)], [(0, 0.0, 3.0), (5, 4.0, math.inf)]]
    times, values = by_step(courses)
    assert (times, values) == ([0.0, 3.0], [[1.0, 3.0], [0.5, math.inf]])
    axes = Figure().subplots()
    band(axes, times, values, "label", "C0")
    (line,), (area,) = axes.lines, axes.collections
    assert list(line.get_ydata()) == [2.0, math.inf]
    assert area.get_paths()[0].get_extents().ymax == 3.0


def test_diagram_of_the_method(tmp_path):
    call("method_diagram", "--output", tmp_path / "method.png")
    assert (tmp_path / "method.png").stat().st_size > 10_000


def test_a_colour_has_one_meaning():
    assert len(set(COLOURS.values())) == len(COLOURS)
    assert {*fluids_pictures.DRAWN.values(), "LoRA"} <= COLOURS.keys()
    dark, *_, light = (sum(colour[:3]) for colour in shades(4))
    assert dark < light
