"""Every layout through the harness that third parties use, `peft_lotra.testing`: nothing here says how to adapt them
but the description of the coefficients."""

import kan_layers as layers
import pytest
import torch
from kan import KANLayer as PyKANLayer

from peft_lotra.testing import KANLayerTests


class _Vectors(KANLayerTests):
    ranks = (2, 2, 3)

    def make_sample(self):
        return torch.rand(9, 3) * 1.8 - 0.9


class _Images(KANLayerTests):
    def make_sample(self):
        return torch.rand(2, 4, 5, 6) * 1.8 - 0.9


class TestPyKAN(_Vectors):
    def make_layer(self):
        return PyKANLayer(in_dim=3, out_dim=4, num=4, k=3)


class TestEfficientKAN(_Vectors):
    def make_layer(self):
        return layers.KANLinear(3, 4)


class TestFastKAN(_Vectors):
    def make_layer(self):
        return layers.FastKANLayer(3, 4, num_grids=5)


class TestChebyKAN(_Vectors):
    dtypes = (torch.float64, torch.float32, torch.bfloat16)

    def make_layer(self):
        return layers.ChebyKANLayer(3, 4, degree=4)


class TestMatrixInputBasis(_Vectors):
    coefficients = {"weight": {"layout": "o (i d)", "sizes": {"d": 4}}}

    def make_layer(self):
        return layers.MatrixKANLayer(3, 4, order="i d")


class TestMatrixBasisInput(_Vectors):
    coefficients = {"weight": {"layout": "o (d i)", "sizes": {"d": 4}}}

    def make_layer(self):
        return layers.MatrixKANLayer(3, 4, order="d i")


@pytest.mark.parametrize("order", ["i o d", "i d o", "o i d", "o d i", "d i o", "d o i"])
class TestOrders(_Vectors):
    @pytest.fixture(autouse=True)
    def _order(self, order):
        self.order, self.coefficients = order, {"coeffs": order}

    def make_layer(self):
        return layers.EinsumKANLayer(3, 4, order=self.order)


@pytest.mark.parametrize(("order", "layout"), [("o i", "d1 o i d2"), ("i o", "d1 i o d2")])
class TestFourierKAN(_Vectors):
    """Two slices of the tensor, each used once."""

    @pytest.fixture(autouse=True)
    def _order(self, order, layout):
        self.order, self.coefficients = order, {"fouriercoeffs": layout}

    def make_layer(self):
        return layers.NaiveFourierKANLayer(3, 4, order=self.order)


class TestPacked(_Vectors):
    """Only a part of the parameter is the coefficient tensor."""

    coefficients = {"weight": {"layout": "o (i d)", "sizes": {"d": 6}, "slice": ":, :18"}}

    def make_layer(self):
        return layers.PackedKANLayer(3, 4)


class TestTwoTensors(_Vectors):
    """One module, two coefficient tensors: nested adapters."""

    coefficients = {"rbf_weight": {"layout": "(i d) o", "sizes": {"d": 5}}, "cheby_weight": "i o d"}

    def make_layer(self):
        return layers.TwoTensorKANLayer(3, 4)


class TestTuple(_Vectors):
    coefficients = {"cheby_coeffs": "i o d"}

    def make_layer(self):
        return layers.TupleKANLayer(3, 4, degree=4)


class TestScaleInAnotherOrder(_Vectors):
    coefficients = {"coeffs": {"layout": "i o d", "scale": "gain", "scale_layout": "o i"}}

    def make_layer(self):
        return layers.PreActivatedKANLayer(3, 4)


class TestConvolution(_Images):
    coefficients = {"spline_conv.weight": {"layout": "o (i d) h w", "sizes": {"d": 4}}}

    def make_layer(self):
        return layers.ConvKANLayer(4, 3)


class TestGroupedConvolution(_Images):
    coefficients = {"poly_weights": {"layout": "g o (d i) h w", "sizes": {"d": 4}}}

    def make_layer(self):
        return layers.GroupedPolyConvKANLayer(4, 6, groups=2)


class TestOneParameterPerGroup(_Images):
    coefficients = {f"poly_weights.{g}": {"layout": "o (d i) h w", "sizes": {"d": 4}} for g in range(2)}

    def make_layer(self):
        return layers.GroupedPolyConvKANLayer(4, 6, groups=2, per_group=True)


class TestUnfoldedConvolution(_Images):
    coefficients = {
        "spline_weight": {
            "layout": "g o (i h w) d",
            "sizes": {"h": 3, "w": 3},
            "scale": "spline_scaler",
            "scale_layout": "g o (i h w)",
        }
    }

    def make_layer(self):
        return layers.UnfoldConvKANLayer(4, 6, groups=2)
