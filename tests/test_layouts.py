"""Every layer of the table through the harness that third parties use, `peft_lotra.testing`."""

import pytest
from layer_table import LAYERS

from peft_lotra.testing import KANLayerTests


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
