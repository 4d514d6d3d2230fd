"""Plots: what is drawn, and what is refused."""

import sys

import pytest
import torch

from diffopt.visual import plot_adaptation, plot_curves, plot_images


@pytest.fixture
def values():
    return torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) + 0.5


def test_adaptation_draws_means_and_bands(values):
    figure = plot_adaptation({"many": values, "one": values[0].requires_grad_()}, log=True)
    axes = figure.axes[0]
    torch.testing.assert_close(torch.tensor(axes.lines[0].get_ydata()), values.double().mean(0))
    assert [line.get_label() for line in axes.lines] == ["many", "one"]
    assert len(axes.collections) == 1
    assert axes.get_yscale() == "log"


def test_adaptation_on_given_axes(values):
    figure = plot_adaptation({"a": values})
    assert plot_adaptation({"b": values}, axes=figure.axes[0]) is figure
    assert len(figure.axes[0].lines) == 2


def test_curves_have_a_panel_a_task(values, tmp_path):
    x = torch.linspace(0.0, 1.0, 5)
    figure = plot_curves(x, {"truth": values, "adapted": 0.9 * values}, points=(values, values), columns=2)
    assert len(figure.axes) == 3
    assert [len(axes.lines) for axes in figure.axes] == [3, 3, 3]
    figure.savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_images_have_a_row_a_task():
    figure = plot_images(torch.rand(2, 3, 4, 4), torch.tensor([[0, 1, 2], [2, 1, 0]]))
    assert [axes.get_title() for axes in figure.axes] == ["0", "1", "2", "2", "1", "0"]


@pytest.mark.parametrize(
    ("draw", "kind", "message"),
    [
        (lambda v: plot_adaptation({}), ValueError, "an entry a method"),
        (lambda v: plot_adaptation({"a": [1.0]}), TypeError, r"losses\['a'\].* must be a tensor"),
        (lambda v: plot_adaptation({"a": v[None]}), ValueError, "1 or 2 dimensions"),
        (lambda v: plot_curves(v, {}), ValueError, "an entry a function"),
        (lambda v: plot_curves(v[0, :3], {"a": v}), ValueError, "got .3,.: x"),
        (lambda v: plot_curves(v, {"a": v, "b": v[:2]}), ValueError, "must have shape"),
        (lambda v: plot_curves(v, {"a": v}, points=(v, v[:2])), ValueError, "`points` must be"),
        (lambda v: plot_curves(v, {"a": v}, columns=0), ValueError, "positive int"),
        (lambda v: plot_images(v), ValueError, "4 dimensions"),
        (lambda v: plot_images(torch.ones(2, 3, 4, 4), v), ValueError, "`labels` must have shape"),
    ],
)
def test_what_does_not_fit_raises(values, draw, kind, message):
    with pytest.raises(kind, match=message):
        draw(values)


def test_without_matplotlib_the_error_names_the_extra(values, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"diffopt\[plot\]"):
        plot_images(torch.ones(1, 1, 2, 2))
