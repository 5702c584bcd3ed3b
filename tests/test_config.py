import re

import pytest
import torch
from kan_layers import ChebyKAN
from peft import PeftConfig
from peft.utils.peft_types import PeftType

from peft_lotra import (
    LoTRAConfig,
    create_lotra_optimizer,
    extract_adapter,
    fit_gauss_newton,
    infer_coefficients,
    initialize_lotra_weights,
    verify_coefficients,
)
from peft_lotra.analysis import update_spectrum


def test_defaults():
    config = LoTRAConfig()
    assert config.peft_type is PeftType.LOTRA
    assert (config.r, config.compression_ratio, config.alpha, config.init_weights) == (None, None, 1.0, True)


def test_survives_json(tmp_path):
    config = LoTRAConfig(
        r=[4, 3, 2],
        alpha=2,
        target_modules={"b", "a"},
        exclude_modules=["c"],
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        rank_pattern={"layers.0": 2, "layers.1": [1, 2, 3], "layers.2": {"w": (1, 1, 1)}},
        alpha_pattern={"layers.0": 0.5},
        modules_to_save=["head"],
        coefficients={"w": "i o d", "v.weight": {"layout": "o (i d)", "sizes": {"d": 8}}},
        init_weights=False,
    )
    assert config.r == (4, 3, 2)
    assert config.target_modules == {"a", "b"}
    assert config.to_dict()["target_modules"] == ["a", "b"]
    config.save_pretrained(tmp_path)
    for loaded in (LoTRAConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert type(loaded) is LoTRAConfig
        assert loaded == config
        assert loaded.peft_type is PeftType.LOTRA


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"r": 0}, ValueError, "`r` should be a positive integer value, or a list of three (input, output, basis)"),
        ({"r": -1}, ValueError, "but the value passed is -1"),
        ({"r": 2.0}, ValueError, "but the value passed is 2.0"),
        ({"r": True}, ValueError, "but the value passed is True"),
        ({"r": (1, 2)}, ValueError, "but the value passed is (1, 2)"),
        ({"r": (1, 2, 0)}, ValueError, "but the value passed is (1, 2, 0)"),
        ({"r": "8"}, ValueError, "but the value passed is '8'"),
        ({"r": 1, "compression_ratio": 0.1}, ValueError, "give `r` or `compression_ratio`, not both: got r=1, compr"),
        (
            {"compression_ratio": 0},
            ValueError,
            "`compression_ratio` should be a number in (0, 1] but the value passed",
        ),
        ({"compression_ratio": 1.5}, ValueError, "but the value passed is 1.5"),
        ({"compression_ratio": float("nan")}, ValueError, "but the value passed is nan"),
        ({"compression_ratio": "0.1"}, ValueError, "but the value passed is '0.1'"),
        ({"alpha": float("inf")}, ValueError, "`alpha` should be a finite number but the value passed is inf"),
        ({"alpha": None}, ValueError, "`alpha` should be a finite number but the value passed is None"),
        ({"alpha_pattern": {"a": "x"}}, ValueError, "`alpha_pattern['a']` should be a finite number"),
        ({"alpha_pattern": {"a": {"w": None}}}, ValueError, "`alpha_pattern['a']['w']` should be a finite number"),
        ({"alpha_pattern": []}, TypeError, "`alpha_pattern` should be a mapping from names but the value passed is"),
        ({"rank_pattern": {"a": 0}}, ValueError, "`rank_pattern['a']` should be a positive integer value"),
        ({"rank_pattern": {"a": {"w": 0}}}, ValueError, "`rank_pattern['a']['w']` should be a positive integer"),
        ({"rank_pattern": 3}, TypeError, "`rank_pattern` should be a mapping"),
        (
            {"rank_pattern": {3: 1}},
            TypeError,
            "`rank_pattern` should be a mapping from names but the value passed is {3",
        ),
        ({"target_modules": 3}, TypeError, "`target_modules` should be a list of names of modules, or a regular"),
        ({"target_modules": ["a", 3]}, TypeError, "but the value passed is ['a', 3]"),
        ({"exclude_modules": [None]}, TypeError, "`exclude_modules` should be a list of names of modules, or a"),
        ({"modules_to_save": "head"}, TypeError, "`modules_to_save` should be a list of names of modules, but the"),
        ({"modules_to_save": {"head": 2}}, TypeError, "but the value passed is {'head': 2}"),
        ({"layers_to_transform": "1"}, TypeError, "`layers_to_transform` should be a list of indices of layers, or"),
        ({"layers_to_transform": [0, True]}, TypeError, "but the value passed is [0, True]"),
        ({"layers_to_transform": 0, "layers_pattern": 3}, TypeError, "`layers_pattern` should be a list of names"),
        ({"coefficients": ["w"]}, TypeError, "`coefficients` should be a mapping"),
        ({"coefficients": {"w": "i o"}}, ValueError, "`coefficients['w']`: layout 'i o' lacks the axes ['d']"),
        ({"coefficients": {"w": 1}}, TypeError, "`coefficients['w']`: coefficients are described by a layout or"),
        (
            {"init_weights": "gaussian"},
            ValueError,
            "`init_weights` should be True or False but the value passed is 'g",
        ),
        ({"target_modules": "a.*", "layers_to_transform": 1}, ValueError, "`layers_to_transform` cannot be used when"),
        ({"target_modules": "a.*", "layers_pattern": "b"}, ValueError, "`layers_pattern` cannot be used when"),
        (
            {"target_modules": "layers.("},
            ValueError,
            "`target_modules`: 'layers.(' is not a regular expression (missing ), unterminated subpattern at position "
            "7); if it is meant as a name, give 'layers\\\\.\\\\('",
        ),
        (
            {"exclude_modules": "*"},
            ValueError,
            "`exclude_modules`: '*' is not a regular expression (nothing to repeat at",
        ),
        ({"exclude_modules": "a{99999999999}"}, ValueError, "'a{99999999999}' is not a regular expression (the repet"),
        (
            {"layers_to_transform": 0, "layers_pattern": ["a", "["]},
            ValueError,
            "`layers_pattern`: '[' is not a regular expression (",
        ),
        ({"layers_pattern": "layers"}, ValueError, "When `layers_pattern` is specified, `layers_to_transform` must"),
    ],
)
def test_errors(kwargs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        LoTRAConfig(**kwargs)


X = torch.rand(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: infer_coefficients("kan.pt", X),
            "`model` should be a torch.nn.Module but the value passed is 'kan.pt'",
        ),
        (lambda: verify_coefficients(3, X), "`model` should be a torch.nn.Module but the value passed is 3"),
        (lambda: verify_coefficients(ChebyKAN([3, 2]), X, coefficients=["w"]), "`coefficients` should be a mapping"),
        (lambda: update_spectrum(None, ChebyKAN([3, 2])), "`base` should be a torch.nn.Module but"),
        (lambda: update_spectrum(ChebyKAN([3, 2]), None), "`finetuned` should be a torch.nn.Module but"),
        (
            lambda: extract_adapter(ChebyKAN([3, 2]), 3, LoTRAConfig(r=1)),
            "`finetuned` should be a torch.nn.Module but",
        ),
        (lambda: initialize_lotra_weights(3, lambda: None), "`model` should be a torch.nn.Module but"),
        (lambda: create_lotra_optimizer(3, torch.optim.SGD, lr=1.0), "`model` should be a torch.nn.Module but"),
        (lambda: fit_gauss_newton(3, lambda net, x: net(x), X), "`model` should be a torch.nn.Module but"),
    ],
)
def test_arguments_of_another_type_are_named(call, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        call()
