"""`lotra_task`: the task of a family as an argument of the call."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import FULLGRAPH, approx, assert_different, assert_equal
from family_models import LAM, X, at, fill, kan, polynomials
from kan_layers import ChebyKAN, ChebyKANLayer
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import default_collate
from transformers import Pipeline, Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from peft_lotra import LoTRAConfig, adapter_at, at_task, fit_gauss_newton

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from transformer_kan import TransformerKANConfig, TransformerKANForCausalLM

# PEFT 0.21 calls what transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")

VALUES = torch.linspace(1, 1.6, 8, dtype=torch.float64)
TOKENS = torch.randint(1, 23, (4, 9), generator=torch.Generator().manual_seed(5))
NAMES = ["a", "b", "b", "a"]

# Calls ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "task", "argument"),
    [
        (LAM, {"lam": 1.3}, {"lam": 1.3}),
        (LAM, {"lam": 1.3}, 1.3),
        (LAM, {"lam": VALUES}, {"lam": VALUES}),
        (LAM, {"lam": VALUES}, VALUES[:, None]),
        ({**LAM, "mu": (0.0, 2.0)}, {"lam": 1.3, "mu": VALUES}, {"lam": 1.3, "mu": VALUES}),
        (["a", "b"], {"task": "b"}, "b"),
        (["a", "b"], {"task": NAMES * 2}, NAMES * 2),
        (["a", "b"], {"task": NAMES * 2}, {"task": tuple(NAMES * 2)}),
    ],
)
def test_an_argument_is_at_task_around_the_call(family, task, argument):
    base, model = kan(family=family)
    with at_task(model, **task):
        expected = model(X)
    assert_different(expected, base(X))
    assert_equal(model(X, lotra_task=argument), expected, 0)
    with pytest.raises(RuntimeError, match="this pass is at none of them"):
        model(X)  # the next call knows nothing of it


@pytest.mark.parametrize(
    ("family", "argument"), [(LAM, 1.3), pytest.param(["a", "b"], NAMES * 2, marks=pytest.mark.slow)]
)
def test_compiled(family, argument):
    base, model = kan(family=family)
    expected = model(X, lotra_task=argument)
    assert_different(expected, base(X))
    assert_equal(torch.compile(model, backend="eager")(X, lotra_task=argument), expected)


@pytest.mark.slow
def test_compiled_in_one_graph():
    """Numbers break it, when a second one comes."""
    _, model = kan()
    compiled = torch.compile(model, backend="eager", fullgraph=FULLGRAPH)
    for task in (VALUES, VALUES.flip(0), torch.tensor(1.3), torch.tensor(1.5)):
        assert_equal(compiled(X, lotra_task={"lam": task}), model(X, lotra_task=task))


def test_an_argument_goes_before_the_task_around():
    base, model = kan()
    with at_task(model, lam=1.0):
        assert_equal(model(X, lotra_task=1.6), at(base, model, polynomials(1.6))(X))
        assert_equal(model(X, lotra_task=None), at(base, model, polynomials(1.0))(X))


class Recording(ChebyKAN):
    def forward(self, x, **kwargs):
        self.seen = kwargs
        return super().forward(x)


def test_the_base_model_does_not_see_it_and_other_methods_do_not_take_it():
    model = get_peft_model(Recording([3, 4]), LoTRAConfig(r=2, family=LAM))
    model(X, lotra_task=1.3, gain=2)
    assert model.get_base_model().seen == {"gain": 2}
    with model.disable_adapter():
        model(X, lotra_task=1.3)
    assert model.get_base_model().seen == {}
    lora = get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(target_modules=["0"]))
    assert "lotra_task" not in lora.special_peft_forward_args
    with pytest.raises(TypeError, match="lotra_task"):
        lora(X, lotra_task=1.3)
    assert "lotra_task" in copy.deepcopy(model).special_peft_forward_args


def test_a_mixed_batch():
    base, model = kan()
    model.add_adapter("other", LoTRAConfig(r=2))
    fill(model)
    model.eval()
    whole = model(X, lotra_task=VALUES)
    model.set_adapter("other")
    expected = {"default": whole, "other": model(X), "__base__": base(X)}
    names = ["default", "other", "__base__", "default"] * 2
    y = model(X, adapter_names=names, lotra_task=VALUES)
    assert_equal(y, torch.stack([expected[name][k] for k, name in enumerate(names)]))
    with pytest.raises(ValueError, match=re.escape("none of the adapters ['other', '__base__'] is for a family")):
        model(X, adapter_names=["other", "__base__"] * 4, lotra_task=1.3)


@pytest.mark.filterwarnings("ignore:.*fitted by heart:UserWarning")  # eight points
def test_a_residual_with_a_task_for_every_sample():
    _, model = kan(freeze_factors=True)
    lam = VALUES.clone().requires_grad_()
    with at_task(model, lam=lam):
        (expected,) = torch.autograd.grad(model(X).square().sum(), lam)
    assert_equal(torch.autograd.grad(model(X, lotra_task={"lam": lam}).square().sum(), lam)[0], expected)

    def residual(net, batch):
        x, value = batch
        y = net(x, lotra_task={"lam": value})
        return y - torch.sin(x[..., :1] * (value[..., None] if value.dim() else value))

    result = fit_gauss_newton(model, residual, (X, VALUES), iterations=5, progressbar=False)
    assert result.losses[-1] < 0.5 * result.losses[0]


def test_errors():
    base, model = kan()
    plain = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2))
    with pytest.raises(
        ValueError, match=re.escape("`lotra_task` 1.3: none of the adapters ['default'] is for a family")
    ):
        plain(X, lotra_task=1.3)
    for task, error, message in [
        ({"mu": 1.0}, TypeError, "a task of this family is given by ['lam'], but ['mu'] is passed"),
        ("high", TypeError, "`lam` should be a number or a tensor of numbers but the value passed is 'high'"),
        (VALUES[:5], ValueError, "a task for each of 5 samples"),
    ]:
        with pytest.raises(error, match=re.escape(message)):
            model(X, lotra_task=task)
    _, two = kan(family={**LAM, "mu": (0.0, 2.0)})
    with pytest.raises(
        TypeError, match=re.escape("a task of this family is given by ['lam', 'mu'], but 1.3 is passed")
    ):
        two(X, lotra_task=1.3)
    _, named = kan(family=["a", "b"])
    with pytest.raises(ValueError, match=re.escape("`task` 'c' is not one of the family's tasks ['a', 'b']")):
        named(X, lotra_task="c")
    adapter_at(model, "single", lam=1.3)
    with pytest.raises(ValueError, match=re.escape("none of the adapters ['single'] is for a family of tasks")):
        model(X, lotra_task=1.3)


# transformers --------------------------------------------------------------------------------------------------------


def transformer(family=("a", "b"), **kwargs):
    torch.manual_seed(1)
    sizes = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"max_position_embeddings": 32, "kan_hidden_size": 12, "kan_degree": 3, "pad_token_id": 0}
    base = TransformerKANForCausalLM(TransformerKANConfig(**sizes)).eval()
    model = get_peft_model(base, LoTRAConfig(r=2, family=list(family), alpha=2.0, **kwargs))
    fill(model)
    return model.eval()


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generation_at_a_task_for_each_prompt(task_type, how):
    model, how = transformer(task_type=task_type), {"max_new_tokens": 6, "do_sample": False, **how}
    single = [model.generate(input_ids=TOKENS, lotra_task=name, **how) for name in ("a", "b")]
    assert not torch.equal(*single)
    with at_task(model, task="b"):
        assert_equal(model.generate(input_ids=TOKENS, **how), single[1], 0)
    mixed = model.generate(input_ids=TOKENS, lotra_task=NAMES, **how).reshape(4, -1)
    a, b = (tokens.reshape(4, -1) for tokens in single)
    assert_equal(mixed, torch.stack([a[0], b[1], b[2], a[3]]), 0)


def test_sampling_several_sequences_of_each_prompt():
    model = transformer()
    how = {"max_new_tokens": 3, "do_sample": True, "num_return_sequences": 3}
    assert model.generate(input_ids=TOKENS, lotra_task=NAMES, **how).shape == (12, 12)
    model.add_adapter("other", LoTRAConfig(r=2))
    names = ["default", "other", "__base__", "default"]
    assert model.generate(input_ids=TOKENS, lotra_task="a", adapter_names=names, **how).shape == (12, 12)


class TwoParts(nn.Module):
    """Beam search repeats samples behind the encoder."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = ChebyKANLayer(3, 5, 3), ChebyKANLayer(5, 2, 3)

    def get_encoder(self):
        return self.encoder

    def generate(self, x, num_beams=1):
        return self.decoder(self.encoder(x).repeat_interleave(num_beams, 0))


def test_an_encoder_sees_samples_as_they_are():
    torch.manual_seed(0)
    model = get_peft_model(TwoParts().double(), LoTRAConfig(r=2, family=LAM))
    fill(model)
    y = model.generate(X, num_beams=2, lotra_task=VALUES)
    for k, value in enumerate(VALUES):
        assert_equal(y[2 * k : 2 * k + 2], model.generate(X[k : k + 1], num_beams=2, lotra_task=value))


class Regression(nn.Module):
    def __init__(self, kan):
        super().__init__()
        self.kan = kan

    def forward(self, x, labels=None):
        y = self.kan(x)
        loss = None if labels is None else (y - labels).square().mean()
        return SequenceClassifierOutput(loss=loss, logits=y)


def rows(tasks, values):
    """sin(λ · Σx) at random x."""
    x = torch.rand(len(values), 3, generator=torch.Generator().manual_seed(7))
    y = torch.sin(torch.tensor(values)[:, None] * x.sum(1, keepdim=True))
    return [{"x": a, "labels": b, "lotra_task": task} for a, b, task in zip(x, y, tasks, strict=True)]


@pytest.mark.parametrize(
    ("family", "task_of", "collator"),
    [
        (LAM, lambda value: value, None),
        (LAM, lambda value: {"lam": value}, default_collate),
        (["low", "high"], lambda value: "low" if value < 1.3 else "high", default_collate),
    ],
)
def test_trainer_with_a_column_of_tasks(family, task_of, collator, tmp_path):
    torch.manual_seed(2)
    model = get_peft_model(Regression(ChebyKAN([3, 6, 1])), LoTRAConfig(r=3, family=family))
    values = torch.linspace(1, 1.6, 64).tolist() if isinstance(family, dict) else [1.0, 1.6] * 32
    data = rows([task_of(value) for value in values], values)
    arguments = {"max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 3e-2, "label_names": ["labels"]}
    job = Trainer(
        model,
        TrainingArguments(
            tmp_path, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1,
            remove_unused_columns=False, **arguments,
        ),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collator,
    )  # fmt: skip
    job.train()
    losses = [entry["loss"] for entry in job.state.log_history if "loss" in entry]
    assert losses[-1] < 0.3 * losses[0]
    x, labels = (torch.stack([row[name] for row in data]) for name in ("x", "labels"))
    named = [row["lotra_task"] for row in data]
    with at_task(model, **({"lam": torch.tensor(values)} if isinstance(family, dict) else {"task": named})):
        expected = model(x, labels=labels).loss.item()
    assert job.evaluate()["eval_loss"] == approx(expected, rel=1e-4)


def test_trainer_that_drops_the_column_stops(tmp_path):
    model = get_peft_model(Regression(ChebyKAN([3, 6, 1])), LoTRAConfig(r=3, family=LAM))
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to=[], disable_tqdm=True)
    job = Trainer(model, arguments, train_dataset=rows([1.0] * 8, [1.0] * 8))
    with pytest.raises(RuntimeError, match="this pass is at none of them"):
        job.train()


class Logits(Pipeline):
    def _sanitize_parameters(self):
        return {}, {}, {}

    def preprocess(self, inputs):
        return {"input_ids": inputs[None]}

    def _forward(self, inputs):
        return self.model(**inputs)

    def postprocess(self, outputs):
        return outputs.logits[0]


def test_a_pipeline_is_called_at_a_task():
    model = transformer()
    pipe = Logits(model.get_base_model())
    with at_task(model, task="b"):
        y = pipe(TOKENS[0])
    assert_equal(y, model(TOKENS[:1], lotra_task="b").logits[0])
