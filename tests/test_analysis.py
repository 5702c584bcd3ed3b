"""Spectra of updates, functions on edges, and pictures of both."""

import copy
import math
import re
import sys

import pytest
import torch
from conftest import approx, assert_different, assert_equal
from kan_layers import ChebyKAN, FastKAN, PackedKANLayer, chebyshev
from layer_table import LAYERS, MODELS, config, full_factors, make, randomize
from peft import get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig
from peft_lotra.analysis import (
    Spectrum,
    activation_curves,
    coefficient_updates,
    effective_coefficients,
    plot_activations,
    plot_spectrum,
    suggest_ranks,
    update_spectrum,
)
from peft_lotra.layers.lotra import adapted_tensors


def unfolded(tensor, mode):
    return tensor.movedim(mode, 0).flatten(1)


@pytest.mark.parametrize("shape", [(6, 5, 4), (9, 1, 3), (4, 3, 2, 3, 3)])
def test_spectrum(shape):
    tensor = torch.randn(shape, dtype=torch.float64)
    spectrum = Spectrum.of(tensor)
    assert spectrum.shape == shape
    for mode, values in enumerate(spectrum.singular_values):
        assert_equal(values, torch.linalg.svdvals(unfolded(tensor, mode)))
    for ranks in ((1, 1, 1), (2, 1, 2), (4, 1, 1), shape[:3]):
        projected, kept, tails = tensor, [], 0.0
        for mode, r in enumerate(ranks):
            U, values, _ = torch.linalg.svd(unfolded(tensor, mode), full_matrices=False)
            projected = torch.tensordot(U[:, :r] @ U[:, :r].T, projected, dims=([1], [mode])).movedim(0, mode)
            kept.append(((values[:r] ** 2).sum() / (values**2).sum()).item())
            tails += values[r:].square().sum().item()
        assert spectrum.energy_kept(ranks) == approx(kept)
        assert spectrum.truncation_error(ranks) == approx((projected - tensor).norm().item(), abs=1e-12)
        assert spectrum.tail_bound(ranks) == approx(math.sqrt(tails))
        # Theorem 1 rests on this; a single mode's tail is what no choice of factors can avoid.
        assert spectrum.truncation_error(ranks) <= spectrum.tail_bound(ranks) + 1e-12
    assert spectrum.truncation_error((1, 1, 1)) > 0.1
    assert spectrum.truncation_error(shape[:3]) == 0


def test_spectrum_of_zero():
    spectrum = Spectrum.of(torch.zeros(3, 2, 2))
    assert spectrum.energy == spectrum.tail_bound((1, 1, 1)) == spectrum.truncation_error((1, 1, 1)) == 0
    assert spectrum.energy_kept((1, 1, 1)) == (1, 1, 1)


@pytest.mark.parametrize("name", MODELS)
def test_updates_are_those_of_the_effective_coefficients(name):
    """Merging an adapter changes A by s · G ×₁ U1 ×₂ U2 ×₃ U3, wherever the library keeps A."""
    base, _ = make(name)
    model = get_peft_model(copy.deepcopy(base), config(name, alpha=0.5))
    randomize(model)
    expected = {}
    for parameter, layer in adapted_tensors(model).items():
        factors = [factor.detach() for factor in full_factors(layer)]
        expected[parameter] = 0.5 * torch.einsum("abc,ia,ob,dc->iod", *factors)
    with pytest.raises(ValueError, match="`finetuned` has LoTRA adapters"):
        coefficient_updates(base, model, LAYERS[name].coefficients(3))
    updates = coefficient_updates(base, model.merge_and_unload(), LAYERS[name].coefficients(3))
    assert list(updates) == list(expected)
    for parameter, update in updates.items():
        assert expected[parameter].any()
        assert_equal(update, expected[parameter])
    spectra = update_spectrum(base, base, LAYERS[name].coefficients(3))
    assert {spectrum.energy for spectrum in spectra.values()} == {0.0}


def test_effective_coefficients_of_a_packed_parameter():
    model = nn.Sequential(PackedKANLayer(3, 2))
    layout = {"weight": {"layout": "o (i d)", "sizes": {"d": 6}, "slice": ":, :18"}}
    (a,) = effective_coefficients(model, layout).values()
    assert_equal(a[1, 0], model[0].weight[0, 6:12])


def test_models_that_differ_in_shape():
    with pytest.raises(ValueError, match=re.escape("differ in the layout or shape of ['layers.1.cheby_coeffs']")):
        update_spectrum(ChebyKAN([3, 4, 2]), ChebyKAN([3, 4, 5]))


def test_suggested_ranks_go_into_a_config():
    base = FastKAN([3, 8, 8, 2])
    finetuned = copy.deepcopy(base)
    for parameter in finetuned.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    budget = 250
    ranks = suggest_ranks(update_spectrum(base, finetuned), budget=budget)
    assert list(ranks) == [f"layers.{k}.spline_linear.weight" for k in range(3)]
    model = get_peft_model(base, LoTRAConfig(rank_pattern=ranks))
    assert model.get_nb_trainable_parameters()[0] <= budget
    assert [layer.r["default"] for layer in model.base_model.model.layers] == list(ranks.values())
    assert set(model.peft_config["default"].rank_pattern) == {"layers.0", "layers.1", "layers.2"}


# Functions on edges ------------------------------------------------------------------------------------------------


def test_activation_curves():
    layer = ChebyKAN([3, 2]).layers[0].double()
    t = torch.linspace(-1, 1, 7, dtype=torch.float64)
    curves = activation_curves(layer, [(0, 1), (2, 0)], t.new_tensor([0.3, -0.5, 0.1]), t)
    for curve, (i, o), x in zip(curves, [(0, 1), (2, 0)], (0.3, 0.1), strict=True):
        phi = [chebyshev(torch.tanh(z), 3) @ layer.cheby_coeffs[i, o] for z in (t, torch.tensor([x]))]
        assert_equal(curve, phi[0] - phi[1])
    elsewhere = activation_curves(layer, [(0, 1)], torch.tensor([0.3, 0.9, 0.2]), t)
    assert_equal(elsewhere, curves[:1])


def test_activation_curves_leave_the_layer_alone():
    layer = nn.Sequential(nn.Dropout(0.9), ChebyKAN([2, 2]).layers[0], nn.BatchNorm1d(2))
    layer[1].eval()
    before = copy.deepcopy(layer.state_dict())
    first, second = (activation_curves(layer, [(0, 0)], torch.zeros(2), torch.linspace(-1, 1, 5)) for _ in range(2))
    assert_equal(first, second, 0)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert [module.training for module in layer] == [True, False, True]


@pytest.mark.parametrize(
    ("layer", "edges", "message"),
    [
        (ChebyKAN([2, 3]), [(0, 0), (2, 0), (0, -1)], "`edges` has [(2, 0), (0, -1)]; the layer has 2 inputs and 3"),
        (nn.Flatten(0), [(0, 0)], "`layer` should map (1, 2) to (batch, m), got the shape (2,)"),
    ],
)
def test_errors_of_activation_curves(layer, edges, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        activation_curves(layer, edges, torch.zeros(2), torch.linspace(-1, 1, 5))


# Pictures ----------------------------------------------------------------------------------------------------------


def test_plot_spectrum(tmp_path):
    base, finetuned = ChebyKAN([3, 4, 5, 2]), ChebyKAN([3, 4, 5, 2])
    spectra = update_spectrum(base, finetuned) | {"zero": Spectrum.of(torch.zeros(2, 2, 2))}
    figure = plot_spectrum(spectra, ranks=suggest_ranks(spectra, energy=0.9))
    figure.savefig(tmp_path / "spectrum.png")
    assert [axes.get_title() for axes in figure.axes][0] == "layers.0.cheby_coeffs (3, 4, 4)"
    assert len(figure.axes) == 4
    line = figure.axes[1].lines[0].get_ydata()
    assert sum(y**2 for y in line) == approx(1)
    with pytest.raises(ValueError, match="`ranks` names"):
        plot_spectrum(spectra, ranks={"other": 1})
    with pytest.raises(ValueError, match="`spectra` is empty"):
        plot_spectrum({})


def test_spectra_have_one_scale():
    values = torch.diag(torch.tensor([1.0, 0.1, 1e-7])).reshape(3, 3, 1)
    figure = plot_spectrum({"low": Spectrum.of(values), "full": Spectrum.of(torch.ones(2, 2, 2))})
    low, full = figure.axes
    assert low.get_ylim() == full.get_ylim()
    assert 0.05 < low.get_ylim()[0] < 0.1  # what is below rounding does not stretch the scale
    widths = [line.get_linewidth() for line in low.lines]
    assert len(set(widths)) == 3  # equal curves show


def test_plot_activations_before_and_after(tmp_path):
    base, _ = make("efficient-kan")
    model = get_peft_model(copy.deepcopy(base), config("efficient-kan"))
    randomize(model)
    layers = {"base": base.layers[0], "adapted": model.get_submodule("base_model.model.layers.0")}
    figure = plot_activations(layers, [(0, 0), (2, 4)], torch.zeros(3), torch.linspace(-1, 1, 50))
    figure.savefig(tmp_path / "activations.png")
    assert [axes.get_title() for axes in figure.axes] == ["input 0 → output 0", "input 2 → output 4"]
    before, after = (torch.tensor(line.get_ydata()) for line in figure.axes[0].lines)
    assert_different(after, before)
    with pytest.raises(ValueError, match="`layers` should have"):
        plot_activations({}, [(0, 0)], torch.zeros(3), torch.linspace(-1, 1, 50))


def test_plotting_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plot_spectrum draws with matplotlib.*pip install matplotlib"):
        plot_spectrum({"a": Spectrum.of(torch.ones(2, 2, 2))})
