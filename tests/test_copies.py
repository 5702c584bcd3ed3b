"""Layers that a user has copied into a file: taken for what they look like, verified, and never in silence."""

import copy
import re
import warnings

import pytest
import torch
from conftest import assert_different, assert_equal
from kan_layers import ChebyKANLayer, RadialBasisFunction, chebyshev
from peft import PeftModel, get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, infer_coefficients, register_kan_layer, verify_coefficients
from peft_lotra.coefficients import known_coefficients, registry
from peft_lotra.layers.lotra import adapted_tensors
from peft_lotra.testing import dense_model

X = torch.rand(9, 3, generator=torch.Generator().manual_seed(1)) * 1.8 - 0.9


class FastKANLayer(nn.Module):
    """As somebody has it in a file of their own."""

    def __init__(self, n, m, num_grids=6, transposed=False):
        super().__init__()
        self.layernorm, self.rbf = nn.LayerNorm(n), RadialBasisFunction(num_grids)
        self.spline_linear = nn.Linear(n * num_grids, m, bias=False)
        self.base_linear, self.transposed = nn.Linear(n, m), transposed

    def forward(self, x):
        basis = self.rbf(self.layernorm(x))
        if self.transposed:  # what a copy may have changed
            basis = basis.transpose(-1, -2)
        return self.spline_linear(basis.flatten(-2)) + self.base_linear(torch.relu(x))


MINE, ORIGINAL = f"{__name__}.FastKANLayer", "fastkan.fastkan.FastKANLayer"


@pytest.fixture
def scratch_registry(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


def model():
    torch.manual_seed(0)
    return nn.Sequential(FastKANLayer(3, 5), nn.Tanh(), ChebyKANLayer(5, 4, 3), FastKANLayer(4, 2)).double()


def test_a_copy_is_adapted_with_a_note(tmp_path):
    base, x = model(), X.double()
    note = f"{MINE}, the class of 2 layer(s), is not registered. It has the name and the parameters of {ORIGINAL}, and"
    with pytest.warns(UserWarning, match=re.escape(note)) as notes:
        adapted = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, init_weights=False))
    (text,) = [str(note.message) for note in notes]
    for part in ("{'spline_linear.weight': 'o (i d)'}", "verify_coefficients(model, *sample)"):
        assert part in text
    assert f"register_kan_layer({MINE!r}, {ORIGINAL!r})" in text
    assert list(adapted_tensors(adapted)) == ["0.spline_linear.weight", "2.cheby_coeffs", "3.spline_linear.weight"]
    y = adapted(x)
    assert_different(y, base(x))
    assert_equal(y, dense_model(base, adapted)(x))
    adapted.save_pretrained(tmp_path)  # from here on the layouts are declared: warnings are errors
    assert_equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), y, 0)


@pytest.mark.usefixtures("scratch_registry")
def test_what_the_note_says_ends_it():
    base, x = model(), X.double()
    verified = verify_coefficients(base, x)
    assert str(verified).count("; verified") == 3
    assert get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, coefficients=verified))
    assert get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, coefficients=infer_coefficients(base, x)))
    register_kan_layer(MINE, ORIGINAL)
    assert known_coefficients(base[0])[0].layout.canonical_shape == (3, 5, 6)
    assert get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2))


def test_a_copy_that_was_changed_is_not_verified():
    base = nn.Sequential(FastKANLayer(3, 5, transposed=True))
    with pytest.raises(ValueError, match=re.escape("found 'o (d i)' (n, m, n_d) = (3, 5, 6)")):
        verify_coefficients(base, X)
    assert infer_coefficients(base, X)["0.spline_linear.weight"]["layout"] == "o (d i)"


def test_what_a_copy_lacks_is_named():
    class KANLayer(nn.Module):
        """Has the name of pykan's and inkan's layers, and other parameters."""

        def __init__(self):
            super().__init__()
            self.coeffs = nn.Parameter(torch.zeros(3, 4, 5))

    with pytest.raises(ValueError, match="no KAN layer found") as error:
        get_peft_model(nn.Sequential(KANLayer()), LoTRAConfig())
    message = ".KANLayer has the name of kan.KANLayer.KANLayer, but `coef` is no tensor of this KANLayer, which has"
    assert message in str(error.value)
    assert "infer_coefficients(model, *sample)" in str(error.value)


@pytest.mark.usefixtures("scratch_registry")
def test_a_name_that_fits_several_classes_is_not_taken():
    register_kan_layer("mine.FastKANLayer", {"spline_linear.weight": {"layout": "o (d i)", "sizes": {"d": 6}}})
    with pytest.raises(ValueError, match="it fits several that differ, .*'fastkan.fastkan.FastKANLayer', 'mine.Fast"):
        get_peft_model(nn.Sequential(FastKANLayer(3, 5)), LoTRAConfig())


def test_given_coefficients_go_before_a_copy():
    description = {"layout": "o (d i)", "sizes": {"d": 6}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted = get_peft_model(
            nn.Sequential(FastKANLayer(3, 5)), LoTRAConfig(r=2, coefficients={"spline_linear.weight": description})
        )
    ((_, layer),) = adapted_tensors(adapted).items()
    assert layer.spec.layout.pattern == "o (d i)"


def test_a_known_layer_may_lie_in_one_of_a_known_name():
    class ChebyKANLayer(nn.Module):
        """Not the library's, but around it."""

        def __init__(self):
            super().__init__()
            self.cheby_coeffs = nn.Parameter(torch.zeros(3, 3, 3))
            self.inner = KNOWN(3, 3, 2)

        def forward(self, x):
            return self.inner(x) + torch.einsum("bid,iod->bo", chebyshev(x, 2), self.cheby_coeffs)

    adapted = get_peft_model(nn.Sequential(ChebyKANLayer()), LoTRAConfig(r=2))
    assert list(adapted_tensors(adapted)) == ["0.inner.cheby_coeffs"]


KNOWN = ChebyKANLayer


@pytest.mark.filterwarnings("ignore:.*is taken for a copy:UserWarning")
def test_all_linear_takes_a_copy_s_matrices_with_it():
    class KANLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_weight = nn.Parameter(torch.randn(4, 3))
            self.spline_weight = nn.Parameter(torch.randn(4, 3, 5))

        def forward(self, x):
            return x @ self.base_weight.T + torch.einsum("bid,oid->bo", chebyshev(x, 4), self.spline_weight)

    adapted = get_peft_model(nn.Sequential(KANLinear()), LoTRAConfig(r=2, target_modules="all-linear"))
    assert set(adapted_tensors(adapted)) == {"0.base_weight", "0.spline_weight"}


@pytest.mark.usefixtures("scratch_registry")
@pytest.mark.parametrize(
    ("coefficients", "matrices", "message"),
    [
        ("nowhere.Layer", None, "names the class 'nowhere.Layer', which is not registered: give the name of a regis"),
        (ORIGINAL, {}, f"names the class {ORIGINAL!r}, and `matrices` is given besides"),
    ],
)
def test_names_of_originals_are_checked(coefficients, matrices, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        register_kan_layer(MINE, coefficients, matrices)
    assert MINE not in registry._REGISTRY
