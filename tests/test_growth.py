"""What grows with the number of layers, or of adapters that a model holds: counted calls of functions, not seconds."""

import sys
from pathlib import Path

import pytest
from kan_layers import ChebyKANLayer
from peft import get_peft_model
from torch import nn

import peft_lotra
from peft_lotra import LoTRAConfig, hotswap_adapter

PACKAGE = str(Path(peft_lotra.__file__).parent)


def calls(function, within=PACKAGE):
    """How many functions in files below `within` are called."""
    count = 0

    def see(frame, event, _):
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(within)

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


def net(layers):
    return nn.Sequential(*[ChebyKANLayer(3, 3, 2) for _ in range(layers)])


CONFIG = {"r": 1, "coefficients": {"cheby_coeffs": "i o d"}}
CHANGES = {
    "hotswap_adapter": lambda model, folder: hotswap_adapter(model, folder, "default"),
    "load_adapter": lambda model, folder: model.load_adapter(folder, "new"),
    "add_adapter": lambda model, folder: model.add_adapter("new", LoTRAConfig(**CONFIG)),
    "set_adapter": lambda model, folder: model.set_adapter("default"),
    "delete_adapter": lambda model, folder: model.delete_adapter("a0"),
}


@pytest.fixture
def growth(tmp_path):
    """How many more functions below a path a change calls if the model holds 20 adapters more."""

    def counted(change, held, within):
        model = get_peft_model(net(2), LoTRAConfig(**CONFIG))
        model.save_pretrained(tmp_path)
        for k in range(held - 1):
            model.add_adapter(f"a{k}", LoTRAConfig(**CONFIG))
        return calls(lambda: CHANGES[change](model, tmp_path), within)

    def difference(change, within=PACKAGE):
        counted(change, 3, within)  # what is cached
        few, many = (counted(change, held, within) for held in (3, 23))
        assert few > 5
        return many - few

    return difference


@pytest.mark.filterwarnings("ignore:the coefficients under the adapter:UserWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_other_adapters_are_not_visited(change, growth):
    assert growth(change) == 0


def test_a_hot_swap_visits_no_other_adapter_in_torch_or_peft(growth):
    assert growth("hotswap_adapter", within="") == 0


@pytest.mark.parametrize("declared", [True, False])
def test_linear_in_the_layers(declared):
    config = CONFIG if declared else {"r": 1}
    counts = []
    for layers in (2, 8, 16, 32):
        model = []
        made = calls(lambda n=layers, model=model: model.append(get_peft_model(net(n), LoTRAConfig(**config))))
        added = calls(lambda model=model: model[0].add_adapter("new", LoTRAConfig(**config)))
        counts.append((made, added))
    for _, few, some, many in zip(*counts, strict=True):
        assert many - some <= 1.02 * 2 * (some - few)
