import copy
import importlib
import pickle
import sys

import pytest
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils.peft_types import PeftType

import peft_lotra
from peft_lotra import LoTRAConfig, LoTRAModel, registration


def test_lotra_is_a_method_of_peft():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LOTRA] is LoTRAConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LOTRA] is LoTRAModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LOTRA] == LoTRAModel.prefix == "lotra_"


def test_the_enum_member_is_a_real_one():
    member = PeftType.LOTRA
    assert isinstance(member, PeftType)
    assert member is PeftType("LOTRA") is PeftType["LOTRA"]
    assert member == "LOTRA" == member.value
    assert member.name == "LOTRA"
    assert member in list(PeftType)
    assert repr(member) == "<PeftType.LOTRA: 'LOTRA'>"
    assert len(PeftType) == len(set(PeftType))
    assert pickle.loads(pickle.dumps(member)) is member is copy.deepcopy(member)
    assert {PeftType.LOTRA: 1}[member] == 1


def test_extending_and_registering_twice_does_nothing():
    members = list(PeftType)
    assert registration.extend_peft_type("LOTRA") is PeftType.LOTRA
    assert registration.extend_peft_type("LORA") is PeftType.LORA
    registration.register(LoTRAConfig, LoTRAModel)
    importlib.import_module("peft_lotra")
    assert list(PeftType) == members


def test_importing_afresh_in_the_same_process(monkeypatch):
    """What notebooks do: the modules are dropped and imported again."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft_lotra"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        fresh = importlib.import_module("peft_lotra")
        assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LOTRA] is fresh.LoTRAConfig is not LoTRAConfig
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "peft_lotra"]:
            del sys.modules[name]  # monkeypatch puts back those of before
        registration.register(LoTRAConfig, LoTRAModel)


def test_another_method_of_the_name_is_an_error(monkeypatch):
    class Other:
        pass

    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.LOTRA, Other)
    with pytest.raises(RuntimeError, match="PEFT already has a method called LOTRA, .*Other"):
        registration.register(LoTRAConfig, LoTRAModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LOTRA] is Other


def test_public_names_have_docstrings():
    for name in peft_lotra.__all__:
        assert getattr(peft_lotra, name).__doc__
