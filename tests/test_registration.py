import copy
import importlib
import pickle
import subprocess
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


def test_importing_afresh_in_the_same_process():
    """What notebooks do: the modules are dropped and imported again."""
    code = """
import importlib, sys, peft_lotra
for name in [n for n in sys.modules if n.startswith("peft_lotra")]:
    del sys.modules[name]
importlib.import_module("peft_lotra")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
