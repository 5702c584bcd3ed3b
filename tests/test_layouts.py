"""Every layer of the table through the harness that third parties use, `peft_lotra.testing`."""

import pytest
from layer_table import LAYERS
from rounding import rounding_of

from peft_lotra.testing import KANLayerTests
from peft_lotra.testing.harness import _output


@pytest.mark.parametrize("name", LAYERS)
class TestLayouts(KANLayerTests):
    @pytest.fixture(autouse=True)
    def _row(self, name):
        self.row = LAYERS[name]
        self.coefficients, self.dtypes = self.row.declared, self.row.dtypes

    def make_layer(self):
        return self.row.make()

    def make_sample(self):
        return self.row.sample().float()

    def test_values_in_every_dtype(self):
        for dtype in self.dtypes:
            base, model, x = self._models(dtype)
            rounding = rounding_of(base, model, x)
            rounding.check(_output(model, x))
            rounding.check(_output(model.merge_and_unload(), x))
