"""KAN layers of libraries that PyPI has, as they are, through the harness; more in `test_registered_libraries.py`."""

import pytest
import torch
from convkan import ConvKAN
from inkan import KANLayer as InKANLayer

from peft_lotra.testing import KANLayerTests


@pytest.mark.parametrize("options", [{}, {"groups": 2, "stride": 2, "kernel_size": (3, 2)}])
class TestConvKAN(KANLayerTests):
    """Coefficients and their scale belong to an inner layer, the patches flattened into its inputs."""

    @pytest.fixture(autouse=True)
    def _options(self, options):
        self.options = options

    def make_layer(self):
        return ConvKAN(4, 6, padding=1, **self.options)

    def make_sample(self):
        return torch.rand(2, 4, 5, 6) * 1.8 - 0.9


@pytest.mark.parametrize("contraction", ["dense", "direct"])
class TestInKAN(KANLayerTests):
    """Coefficients and residual weights in one parameter, contracted as a matrix or looked up as an embedding."""

    @pytest.fixture(autouse=True)
    def _contraction(self, contraction):
        self.contraction = contraction

    def make_layer(self):
        return InKANLayer(3, 4, contraction=self.contraction, compile_basis=False)

    def make_sample(self):
        return torch.rand(9, 3) * 1.8 - 0.9
