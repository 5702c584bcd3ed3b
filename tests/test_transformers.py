"""LoTRA in transformers: the Transformer-KAN of the examples, the mixin's methods, task types, generation, Trainer."""

import copy
import itertools
import json
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import approx, assert_different, assert_equal
from layer_table import lotra_layers
from packaging.version import Version
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

from peft_lotra import (
    LoTRAConfig,
    create_lotra_optimizer,
    extract_adapter,
    fit_gauss_newton,
    infer_coefficients,
    initialize_lotra_weights,
)

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
from chebyshev_kan import ChebyshevKANLayer  # noqa: E402
from transformer_kan import (  # noqa: E402
    TransformerKANConfig,
    TransformerKANForCausalLM,
    TransformerKANForSequenceClassification,
    TransformerKANModel,
)

# PEFT 0.21 calls what transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
needs_mixin = pytest.mark.skipif(
    Version(MIN_PEFT_VERSION) > Version(peft.__version__),
    reason=f"transformers {transformers.__version__} wants peft {MIN_PEFT_VERSION} for `model.add_adapter` and the "
    f"like, and this is {peft.__version__}",
)
needs_loader = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.6"),
    reason="transformers before 5.6: `load_adapter` knows only inner models called `model`, whatever the method",
)
needs_copies = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="transformers before 5.18, `load_adapter` leaves out `modules_to_save` and token rows, whatever the method",
)

SIZES = {
    "vocab_size": 23,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "kan_hidden_size": 12,
    "kan_degree": 3,
    "pad_token_id": 0,
    "num_labels": 3,
}
TOKENS = torch.randint(1, 23, (4, 9), generator=torch.Generator().manual_seed(5))
HEADS = {
    TransformerKANModel: AutoModel,
    TransformerKANForCausalLM: AutoModelForCausalLM,
    TransformerKANForSequenceClassification: AutoModelForSequenceClassification,
}


def make(cls=TransformerKANForCausalLM, **kwargs):
    return cls(TransformerKANConfig(**{**SIZES, **kwargs})).eval()


def run(model, tokens=TOKENS):
    """The logits, or the last hidden state."""
    with torch.no_grad():
        return model(input_ids=tokens)[0]


def lotra(**kwargs):
    return LoTRAConfig(**{"r": 2, "init_weights": False, **kwargs})


@pytest.fixture
def base_path(tmp_path):
    make().save_pretrained(tmp_path / "base")
    torch.manual_seed(1)  # no other model of the test begins as this one did
    return tmp_path / "base"


def load_base(path):
    return AutoModelForCausalLM.from_pretrained(path).eval()


# The model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", HEADS)
def test_the_base_is_saved_and_loaded(cls, tmp_path):
    model = make(cls)
    model.save_pretrained(tmp_path)
    assert_different(run(make(cls)), run(model))
    loaded, info = HEADS[cls].from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is cls
    assert not any(info.values())
    assert_equal(run(loaded.eval()), run(model), 0)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is TransformerKANConfig
    assert all(getattr(config, name) == value for name, value in SIZES.items())
    assert config.bos_token_id is config.eos_token_id is None


def test_every_mlp_is_two_kan_layers():
    model = make()
    layers = [module for module in model.modules() if isinstance(module, ChebyshevKANLayer)]
    assert [(layer.in_features, layer.out_features, layer.degree) for layer in layers] == [
        (16, 12, 3),
        (12, 16, 3),
    ] * 2
    assert not any("c_fc" in name for name, _ in model.named_parameters())
    assert type(model.transformer) is TransformerKANModel
    assert model.lm_head.weight is model.transformer.wte.weight
    assert make(tie_word_embeddings=False).lm_head.weight is not model.transformer.wte.weight
    assert set(model._no_split_modules) == {"GPT2Block"}


def test_the_kan_layers_that_a_file_lacks_are_initialised(tmp_path):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=23, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    gpt2.save_pretrained(tmp_path)
    model = TransformerKANForCausalLM.from_pretrained(tmp_path, config=TransformerKANConfig(**SIZES))
    assert_equal(model.transformer.h[1].attn.c_attn.weight, gpt2.transformer.h[1].attn.c_attn.weight, 0)
    coefficients = model.transformer.h[1].mlp[0].coefficients
    expected = (16 * 4) ** -0.5 / torch.arange(1, 5)
    torch.testing.assert_close(coefficients.std(dim=(0, 1)), expected, rtol=0.3, atol=0)


def test_the_cache_changes_no_token():
    model = make()
    with_cache = model.generate(TOKENS, max_new_tokens=6, do_sample=False)
    assert_equal(model.generate(TOKENS, max_new_tokens=6, do_sample=False, use_cache=False), with_cache, 0)


# transformers' own methods for adapters ------------------------------------------------------------------------------


@needs_mixin
def test_adapters_of_a_plain_model(base_path):
    model = load_base(base_path)
    base = run(model)
    with pytest.raises(ValueError, match="No adapter loaded"):
        model.set_adapter("first")
    outputs = {}
    for name, config in {"first": lotra(), "second": lotra(r=3, alpha=2.0)}.items():
        model.add_adapter(config, name)
        assert model.active_adapters() == [name]
        trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable == {key for key, _ in model.named_parameters() if key.endswith(f".{name}")}
        outputs[name] = run(model)
        assert_different(outputs[name], base)
    assert_different(outputs["first"], outputs["second"])
    for name in ("first", "second"):
        model.set_adapter(name)
        assert_equal(run(model), outputs[name], 0)
        keys = model.get_adapter_state_dict()
        assert len(keys) == 16
        assert len(lotra_layers(model)) == 4
    model.set_adapter(["first", "second"])
    assert model.active_adapters() == ["first", "second"]
    assert_different(run(model), outputs["second"])
    model.disable_adapters()
    assert_equal(run(model), base, 0)
    model.enable_adapters()
    assert_different(run(model), base)
    with pytest.raises(ValueError, match="Adapter with name first already exists"):
        model.add_adapter(lotra(), "first")
    model.set_adapter("second")
    model.delete_adapter("first")
    assert_equal(run(model), outputs["second"], 0)
    assert list(model.peft_config) == ["second"]
    assert all(list(layer.lotra_core) == ["second"] for layer in lotra_layers(model).values())
    model.delete_adapter("second")
    assert_equal(run(model), base, 0)


@pytest.fixture
def saved(base_path, tmp_path):
    """Output and directory of an adapter that `save_pretrained` of a PeftModel has written."""
    model = get_peft_model(load_base(base_path), lotra(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(2)
    return run(model), tmp_path / "adapter"


@needs_mixin
@needs_loader
def test_the_mixin_saves_the_adapter_alone(base_path, saved, tmp_path):
    model = load_base(base_path)
    model.add_adapter(lotra(), "first")
    model.save_pretrained(tmp_path / "mixin")
    files = {path.name for path in (tmp_path / "mixin").iterdir()}
    assert files - {"generation_config.json"} == {"adapter_config.json", "adapter_model.safetensors"}
    weights, other = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "mixin", saved[1]))
    assert weights.keys() == other.keys()
    assert json.loads((tmp_path / "mixin" / "adapter_config.json").read_text())["peft_type"] == "LOTRA"
    for loaded in (
        PeftModel.from_pretrained(load_base(base_path), tmp_path / "mixin"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "mixin"),
    ):
        assert_different(run(loaded), run(load_base(base_path)))
        assert_equal(run(loaded), run(model), 0)


def _from_dir(base_path, path):
    model = load_base(base_path)
    return model, model.load_adapter(path)


def _from_dir_cheaply(base_path, path):
    model = load_base(base_path)
    return model, model.load_adapter(path, adapter_name="first", low_cpu_mem_usage=True)


def _from_state_dict(base_path, path):
    model = load_base(base_path)
    weights, config = load_file(path / "adapter_model.safetensors"), PeftConfig.from_pretrained(path)
    return model, model.load_adapter(peft_config=config, adapter_state_dict=weights)


def _from_auto_model(base_path, path):
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    return model, info


@needs_loader
@pytest.mark.parametrize("load", [_from_dir, _from_dir_cheaply, _from_state_dict, _from_auto_model])
def test_a_saved_adapter_is_loaded_into_a_plain_model(load, base_path, saved):
    y, path = saved
    model, info = load(base_path, path)
    assert type(model) is TransformerKANForCausalLM
    info = info if isinstance(info, dict) else vars(info)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert_different(run(load_base(base_path)), y)
    assert_equal(run(model), y, 0)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "lotra_" in name)


@needs_loader
def test_a_second_adapter_is_loaded_beside_the_first(base_path, saved, tmp_path):
    y, path = saved
    other = get_peft_model(load_base(base_path), lotra(r=3))
    other.save_pretrained(tmp_path / "other")
    model = load_base(base_path)
    model.load_adapter(path, adapter_name="first")
    info = model.load_adapter(tmp_path / "other", adapter_name="second", is_trainable=True)
    assert not info.unexpected_keys
    # transformers looks for the method's name in the keys, so that it reports the first adapter's, as with LoRA
    assert not [key for key in info.missing_keys if not key.endswith(".first")]
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {key for key in trainable if "lotra_" in key} == {k for k, _ in model.named_parameters() if ".second" in k}
    for name, expected in (("first", y), ("second", run(other)), ("first", y)):
        for layer in lotra_layers(model).values():
            layer.set_adapter(name)
        assert_different(run(model), run(load_base(base_path)))
        assert_equal(run(model), expected, 0)


def test_auto_peft_classes(base_path, saved, tmp_path):
    y, path = saved
    model = AutoPeftModelForCausalLM.from_pretrained(path)
    assert_different(run(load_base(base_path)), y)
    assert_equal(run(model), y, 0)
    with pytest.raises(ValueError, match="Cannot use `AutoPeftModel` with a task type"):
        AutoPeftModel.from_pretrained(path)
    # without a task type, the class and its module are saved and have to be allowed
    other = get_peft_model(load_base(base_path), lotra())
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="'transformer_kan' which is not in the import allowlist"):
        AutoPeftModel.from_pretrained(tmp_path / "other")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "other", import_allowlist=["transformer_kan"])
    assert_different(run(loaded), y)
    assert_equal(run(loaded), run(other), 0)


@needs_mixin
@needs_loader
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # of LoRA's tuner
def test_a_lora_adapter_of_the_attention_beside_one_of_the_kan_layers(base_path, tmp_path):
    model = load_base(base_path)
    base = run(model)
    model.add_adapter(lotra(), "kan")
    kan = run(model)
    model.add_adapter(
        LoraConfig(target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True, lora_alpha=64), "attention"
    )
    model.set_adapter(["kan", "attention"])
    both = run(model)
    assert_different(both, kan)
    for name in ("kan", "attention"):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
    loaded = load_base(base_path)
    for name in ("kan", "attention"):
        info = loaded.load_adapter(tmp_path / name, adapter_name=name)
        assert not [*info.missing_keys, *info.unexpected_keys]
    loaded.set_adapter(["kan", "attention"])
    assert_equal(run(loaded), both, 0)
    loaded.delete_adapter("attention")
    assert_equal(run(loaded), kan, 0)
    loaded.delete_adapter("kan")
    assert_equal(run(loaded), base, 0)


def test_trained_tokens_of_the_tied_embedding(base_path, tmp_path):
    config = lotra(task_type="CAUSAL_LM", trainable_token_indices=[3, 5])
    model = get_peft_model(load_base(base_path), config)
    before = run(model)
    (rows,) = (p for name, p in model.named_parameters() if name.endswith("trainable_tokens_delta.default"))
    torch.nn.init.normal_(rows)
    y = run(model)
    assert_different(y, before)
    model.save_pretrained(tmp_path / "adapter")
    assert_equal(run(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), y, 0)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert_equal(run(merged), y)


def resized(path):
    model = load_base(path)
    torch.manual_seed(3)
    model.resize_token_embeddings(29, mean_resizing=False)
    return model


RESIZED = "ignore:Setting `save_embedding_layers` to `True` as the embedding layer has been resized:UserWarning"


@pytest.mark.filterwarnings(RESIZED)
@pytest.mark.parametrize(("load", "whole"), [(load_base, True), (resized, "auto"), (resized, True)])
def test_whole_embeddings_are_not_saved_with_an_adapter(load, whole, base_path, tmp_path):
    """PEFT would write them, of a resized vocabulary unasked, and loading would put them in the base's place."""
    model = get_peft_model(load(base_path), lotra(task_type="CAUSAL_LM"))
    message = r"with the base model's \['base_model.model.transformer.wte.weight'\]"
    with pytest.raises(ValueError, match=message + ".*`save_embedding_layers=False`"):
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=whole)
    assert not list((tmp_path / "adapter").glob("adapter_*"))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(load(base_path), tmp_path / "adapter")
    assert_different(run(loaded), run(load(base_path)))
    assert_equal(run(loaded), run(model), 0)


@pytest.mark.filterwarnings(RESIZED, "ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    "kwargs", [{"modules_to_save": ["wte", "lm_head"]}, {"trainable_token_indices": [3, 25, 28]}], ids=str
)
def test_trained_embeddings_of_a_resized_vocabulary(kwargs, base_path, tmp_path):
    """PEFT would write the frozen originals too."""
    model = get_peft_model(resized(base_path), lotra(task_type="CAUSAL_LM", **kwargs))
    tokens = torch.arange(29)[None]
    before = run(model, tokens)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lotra_" not in name:
            torch.nn.init.normal_(parameter)
    y = run(model, tokens)
    assert_different(y, before)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(resized(base_path), tmp_path / "adapter")
    assert_equal(run(loaded, tokens), y, 0)


@needs_copies
@pytest.mark.parametrize(
    "kwargs",
    [{"modules_to_save": ["ln_f"]}, {"trainable_token_indices": [3, 5]}],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_what_is_trained_beside_the_adapter_is_loaded_into_a_plain_model(kwargs, base_path, tmp_path):
    model = get_peft_model(load_base(base_path), lotra(**kwargs))
    beside = [p for name, p in model.named_parameters() if p.requires_grad and "lotra_" not in name]
    without = run(model)
    for parameter in beside:
        torch.nn.init.normal_(parameter)
    assert_different(run(model), without)
    model.save_pretrained(tmp_path / "adapter")
    plain = load_base(base_path)
    info = plain.load_adapter(tmp_path / "adapter")
    # the tied head's token rows are the embedding's, and reported nevertheless, as with LoRA
    assert not [key for key in [*info.missing_keys, *info.unexpected_keys] if "lm_head" not in key]
    assert_equal(run(plain), run(model), 0)


# Task types ----------------------------------------------------------------------------------------------------------


def test_sequence_classification_trains_and_saves_the_head(tmp_path):
    base = make(TransformerKANForSequenceClassification)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    y0 = run(base)
    head = base.score.weight.detach().clone()
    model = get_peft_model(base, LoTRAConfig(r=2, task_type="SEQ_CLS"))
    assert_equal(run(model), y0, 0)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trainable if "lotra_" not in name} == {
        "base_model.model.score.modules_to_save.default.weight"
    }
    optimizer = create_lotra_optimizer(model, torch.optim.SGD, lr=0.5)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(parameter) for parameter in model.parameters() if parameter.requires_grad
    }
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
    y = run(model)
    assert_different(y, y0)
    assert_different(model.base_model.model.score.modules_to_save["default"].weight, head)
    assert_equal(model.base_model.model.score.original_module.weight, head, 0)
    model.save_pretrained(tmp_path / "adapter")
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 17
    torch.manual_seed(3)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert_equal(run(loaded), y, 0)
    with model.disable_adapter():
        assert_equal(run(model), y0, 0)
    # a second one gets a head of its own
    model.add_adapter("second", LoTRAConfig(r=1, task_type="SEQ_CLS"))
    model.set_adapter("second")
    assert_equal(run(model), y0, 0)
    rows = ["default", "second", "__base__", "default"]
    mixed = model.eval()(input_ids=TOKENS, adapter_names=rows).logits
    for row, expected in zip(mixed, (y[0], y0[1], y0[2], y[3]), strict=True):
        assert_equal(row, expected)
    model.set_adapter("default")
    merged = model.merge_and_unload()
    assert type(merged) is TransformerKANForSequenceClassification
    assert_equal(run(merged), y)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generation(num_beams, base_path):
    kwargs = {"max_new_tokens": 8, "do_sample": False, "num_beams": num_beams}
    base = load_base(base_path)
    plain = base.generate(TOKENS, **kwargs)
    model = get_peft_model(copy.deepcopy(base), lotra(task_type="CAUSAL_LM", alpha=4.0), adapter_name="first")
    model.add_adapter("second", lotra(task_type="CAUSAL_LM", alpha=4.0))
    by_adapter = {"__base__": plain}
    for name in ("first", "second"):
        model.set_adapter(name)
        by_adapter[name] = model.generate(input_ids=TOKENS, **kwargs)
    for one, other in itertools.combinations(by_adapter.values(), 2):
        assert not torch.equal(one, other)
    names = ["second", "__base__", "first", "second"]
    mixed = model.eval().generate(input_ids=TOKENS, adapter_names=names, **kwargs)
    assert_equal(mixed, torch.stack([by_adapter[name][row] for row, name in enumerate(names)]), 0)
    with model.disable_adapter():
        assert_equal(model.generate(input_ids=TOKENS, **kwargs), plain, 0)
    model.set_adapter("first")
    merged = model.merge_and_unload()
    assert type(merged) is TransformerKANForCausalLM
    assert_equal(merged.generate(TOKENS, **kwargs), by_adapter["first"], 0)


def test_the_other_functions_of_the_package(base_path):
    found = infer_coefficients(load_base(base_path), TOKENS)
    assert sorted(found) == [f"transformer.h.{block}.mlp.{layer}.coefficients" for block in (0, 1) for layer in (0, 1)]
    model = get_peft_model(load_base(base_path), LoTRAConfig(r=2, coefficients=found, task_type="CAUSAL_LM"))
    initialize_lotra_weights(model, lambda: model(input_ids=TOKENS, labels=TOKENS).loss.backward(), progressbar=False)
    assert_equal(run(model), run(load_base(base_path)), 0)


@pytest.mark.filterwarnings("ignore:.*fitted by heart:UserWarning")  # 4 rows of tokens
def test_a_finetuned_model_as_an_adapter():
    # `torch.vmap` does not go through the other attentions, nor through the warning about padding without a mask.
    base = make(attn_implementation="eager", pad_token_id=None)
    full = copy.deepcopy(base)
    for name, parameter in full.named_parameters():
        if name.endswith("coefficients"):
            torch.nn.init.normal_(parameter, std=0.3)
    config = LoTRAConfig(r=3, task_type="CAUSAL_LM")
    errors = {}
    for inputs in (None, TOKENS):
        model, _ = extract_adapter(copy.deepcopy(base), full, config, inputs=inputs, iterations=8, progressbar=False)
        errors[inputs is not None] = (run(model) - run(full)).norm() / (run(base) - run(full)).norm()
    assert errors[True] < errors[False]


@pytest.mark.filterwarnings("ignore:.*fitted by heart:UserWarning")  # 4 rows of tokens
def test_next_tokens_by_second_order_steps():
    model = get_peft_model(make(attn_implementation="eager", pad_token_id=None), lotra(task_type="CAUSAL_LM"))
    labels = TOKENS.masked_fill(torch.arange(9) < 3, -100)  # a prompt

    def next_tokens(net, batch):
        tokens, labels = batch
        return net(input_ids=tokens).logits[:, :-1], labels[:, 1:]

    before = model(input_ids=TOKENS, labels=labels).loss.item()
    result = fit_gauss_newton(
        model, next_tokens, (TOKENS, labels), loss="cross_entropy", iterations=3, progressbar=False
    )
    after = model(input_ids=TOKENS, labels=labels).loss.item()
    assert result.losses[0] == approx(before, rel=1e-5)
    assert result.losses[-1] == approx(after, rel=1e-5)
    assert after < before - 1e-3


# Trainer -------------------------------------------------------------------------------------------------------------


def counting(stride):
    """Rows that count up in steps of `stride`, from each token, modulo the vocabulary."""
    rows = [(start + stride * torch.arange(8)) % 22 + 1 for start in range(22)]
    return [{"input_ids": row, "labels": row} for row in rows]


@pytest.fixture(scope="module")
def counter_path(tmp_path_factory):
    """A base that has learnt to count by ones."""
    torch.manual_seed(6)
    model, path = make(), tmp_path_factory.mktemp("counter")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rows = torch.stack([row["input_ids"] for row in counting(1)])
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.5
    model.save_pretrained(path)
    return path


def trainer(model, path, lr=2e-2, **kwargs):
    """Trains an adapter to count by twos, and evaluates it on what the base can do, which it unlearns."""
    arguments = {"max_steps": 6, "per_device_train_batch_size": 11, "logging_steps": 1, "save_strategy": "no"}
    return Trainer(
        model,
        TrainingArguments(path, use_cpu=True, report_to=[], disable_tqdm=True, seed=3, **{**arguments, **kwargs}),
        train_dataset=counting(2),
        eval_dataset=counting(1),
        optimizers=(create_lotra_optimizer(model, torch.optim.AdamW, lr=lr), None),
    )


def losses(job):
    return [entry["loss"] for entry in job.state.log_history if "loss" in entry]


def adapted(counter_path, **kwargs):
    torch.manual_seed(4)
    return get_peft_model(load_base(counter_path), LoTRAConfig(r=3, task_type="CAUSAL_LM", **kwargs))


def adapter_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lotra_" in name}


def test_trainer_trains_the_adapter_alone(counter_path, tmp_path):
    model = adapted(counter_path)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    job = trainer(model, tmp_path / "run", lr=3e-2, max_steps=20, save_strategy="steps", save_steps=20)
    job.train()
    assert losses(job)[-1] < losses(job)[0] / 2
    for name, parameter in model.named_parameters():
        if "lotra_" in name:
            assert_different(parameter.detach(), before[name])
        else:
            assert_equal(parameter.detach(), before[name], 0)
    checkpoint = tmp_path / "run" / "checkpoint-20"
    assert not {"model.safetensors", "pytorch_model.bin"} & {path.name for path in checkpoint.iterdir()}
    weights = load_file(checkpoint / "adapter_model.safetensors")
    assert len(weights) == 16
    assert all("lotra_" in key for key in weights)
    model.eval()
    assert_equal(run(PeftModel.from_pretrained(load_base(counter_path), checkpoint)), run(model), 0)


def test_trainer_resumes_to_the_same_bits(counter_path, tmp_path):
    job = trainer(adapted(counter_path), tmp_path / "run", save_strategy="steps", save_steps=3)
    job.train()
    again = trainer(adapted(counter_path, init_weights=False), tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert losses(again) == losses(job)
    expected = adapter_weights(job.model)
    for name, value in adapter_weights(again.model).items():
        assert_equal(value, expected[name], 0)
    three = adapter_weights(PeftModel.from_pretrained(load_base(counter_path), tmp_path / "run" / "checkpoint-3"))
    assert any(not torch.equal(value, expected[name]) for name, value in three.items())


def test_trainer_loads_the_best_adapter_at_the_end(counter_path, tmp_path):
    job = trainer(
        adapted(counter_path),
        tmp_path / "run",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    job.train()
    by_step = {entry["step"]: entry["eval_loss"] for entry in job.state.log_history if "eval_loss" in entry}
    best = min(by_step, key=by_step.get)
    assert best < 6
    assert by_step[best] < by_step[6]
    assert job.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    last = PeftModel.from_pretrained(load_base(counter_path), tmp_path / "run" / "checkpoint-6")
    best = PeftModel.from_pretrained(load_base(counter_path), job.state.best_model_checkpoint)
    job.model.eval()
    assert_different(run(job.model), run(last))
    assert_equal(run(job.model), run(best), 0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant, counter_path, tmp_path):
    results = {}
    for enabled in (False, True):
        job = trainer(
            adapted(counter_path).double(),
            tmp_path / "run",
            max_steps=3,
            gradient_checkpointing=enabled,
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant} if enabled else None,
        )
        job.train()
        results[enabled] = adapter_weights(job.model), losses(job)
    assert losses(job)[-1] < losses(job)[0]
    assert results[True][1] == results[False][1]
    for name, value in results[True][0].items():
        assert_equal(value, results[False][0][name], 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16(dtype, counter_path, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(counter_path, dtype=dtype)
    model = get_peft_model(base, LoTRAConfig(r=3, task_type="CAUSAL_LM"))
    job = trainer(model, tmp_path, bf16=True, max_steps=20)
    job.train()
    assert losses(job)[-1] < losses(job)[0] / 2
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "lotra_" in name else dtype)


@pytest.mark.parametrize(
    ("cls", "task_type", "divides_itself"),
    [
        (TransformerKANForCausalLM, "CAUSAL_LM", True),
        (TransformerKANForSequenceClassification, "SEQ_CLS", False),
    ],
)
def test_trainer_knows_which_loss_divides_by_the_number_of_items(cls, task_type, divides_itself, tmp_path):
    # If not, loss and gradients are multiplied by the number of processes.
    model = get_peft_model(make(cls).double(), LoTRAConfig(r=2, task_type=task_type))
    assert trainer(model, tmp_path).model_accepts_loss_kwargs is divides_itself
    tokens = TOKENS[:1]
    labels = tokens if divides_itself else torch.tensor([1])
    loss = model(input_ids=tokens, labels=labels).loss
    halved = model(input_ids=tokens, labels=labels, num_items_in_batch=2 * 8).loss
    expected = loss.item() / 2 if divides_itself else loss.item()
    assert halved.item() == approx(expected, rel=64 * torch.finfo(torch.float32).eps)  # transformers' losses are fp32


# What is closed to methods that PEFT does not ship -------------------------------------------------------------------


@needs_mixin
def test_trainer_does_not_resume_a_plain_model_with_an_adapter(counter_path, tmp_path):
    def plain():
        torch.manual_seed(4)
        model = load_base(counter_path)
        model.add_adapter(LoTRAConfig(r=3))
        return model

    job = trainer(plain(), tmp_path / "run", save_strategy="steps", save_steps=6)
    job.train()
    assert losses(job)[-1] < losses(job)[0]
    checkpoint = tmp_path / "run" / "checkpoint-6"
    assert len(load_file(checkpoint / "adapter_model.safetensors")) == 16
    job.model.eval()
    assert_equal(run(PeftModel.from_pretrained(load_base(counter_path), checkpoint)), run(job.model), 0)
    with pytest.raises(ValueError, match="Can't find a checkpoint index"):  # nor of LoRA
        trainer(plain(), tmp_path / "again").train(resume_from_checkpoint=str(checkpoint))


@needs_loader
def test_closed_doors(base_path, saved):
    y, path = saved
    with pytest.raises(ValueError, match="'LOTRA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(load_base(base_path), lotra(), mixed=True)
    model = PeftModel.from_pretrained(load_base(base_path), path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but LOTRA was passed"):
        hotswap_adapter(model, path, "default", "cpu")
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("attention", LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    assert_different(run(load_base(base_path)), y)
    assert_equal(run(model), y, 0)
    plain = load_base(base_path)
    plain.load_adapter(path)
    with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
        plain.load_adapter(path, adapter_name="default", hotswap=True)
    assert_equal(run(plain), y, 0)


@needs_loader
def test_a_damaged_file_is_refused_by_peft_and_reported_by_transformers(base_path, saved):
    _, path = saved
    file = path / "adapter_model.safetensors"
    weights = load_file(file)
    lost, spoilt = "base_model.model.transformer.h.0.mlp.0.lotra_U2", "base_model.model.transformer.h.1.mlp.0.lotra_U2"
    weights[spoilt] = weights[spoilt] * torch.nan
    save_file({key: value for key, value in weights.items() if key != lost}, file)
    with pytest.raises(ValueError, match="it lacks .*h.0.mlp.0.lotra_U2"):
        AutoPeftModelForCausalLM.from_pretrained(path)
    # transformers' own loader reads the file itself, and asks no method
    model = load_base(base_path)
    info = model.load_adapter(path)
    assert set(info.missing_keys) == {"transformer.h.0.mlp.0.lotra_U2.default"}
    assert run(model).isnan().any()


def test_without_the_import(saved, monkeypatch):
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, "LOTRA")
    for load in (PeftConfig, AutoPeftModelForCausalLM, AutoModelForCausalLM):
        with pytest.raises(KeyError, match="LOTRA"):
            load.from_pretrained(saved[1])
