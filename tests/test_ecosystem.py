"""Libraries around PEFT, each in one test that is skipped where it is not installed."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from peft_lotra import LoTRAConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("fp32"),
    pytest.mark.filterwarnings("ignore"),  # their own
]


def test_diffusers_saves_through_a_peft_model(tmp_path):
    """`load_lora_adapter` makes a LoRA of every file, so `save_lora_adapter` refuses others."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.configuration_utils import register_to_config
    from diffusers.loaders import PeftAdapterMixin
    from peft import LoraConfig

    class Tiny(diffusers.ModelMixin, diffusers.ConfigMixin, PeftAdapterMixin):
        @register_to_config
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.last(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    base, x = Tiny(), torch.randn(3, 4)
    model = copy.deepcopy(base)
    model.add_adapter(LoTRAConfig(r=2, target_modules="all-linear", init_weights=False), "own")
    assert not torch.equal(model(x), base(x))
    with pytest.raises(ValueError, match="adapt the model by `get_peft_model"):
        model.save_lora_adapter(tmp_path / "own", adapter_name="own")
    assert not (tmp_path / "own").exists()
    model.add_adapter(LoraConfig(r=2, target_modules=["first"]), "lora")
    model.save_lora_adapter(tmp_path / "lora", adapter_name="lora")
    assert list((tmp_path / "lora").iterdir())
    wrapped = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, target_modules="all-linear", init_weights=False))
    wrapped.save_pretrained(tmp_path / "whole")
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "whole")(x), wrapped(x))


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, pad_token_id=0))


def tokenizer_of(directory):
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    directory.mkdir(exist_ok=True)
    (directory / "vocab.txt").write_text("\n".join(words))
    return BertTokenizer(str(directory / "vocab.txt"))


def test_trl_trains_and_saves(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    base = tiny_gpt2()
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 5, 6, 7, 8, 9]] * 8})
    trainer = trl.SFTTrainer(
        copy.deepcopy(base),
        trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none",
            use_cpu=True, max_length=16, save_strategy="no", bf16=False, gradient_checkpointing=False,
        ),
        train_dataset=rows,
        processing_class=tokenizer_of(tmp_path / "tokenizer"),
        peft_config=LoTRAConfig(r=2, target_modules="all-linear"),
    )  # fmt: skip
    assert trainer.train().training_loss < 5
    trainer.save_model(str(tmp_path / "saved"))
    tokens = torch.tensor([[1, 5, 6]])
    loaded = PeftModel.from_pretrained(base, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, trainer.model.eval()(tokens).logits)


def test_lightning_trains_and_resumes(tmp_path):
    lightning = pytest.importorskip("lightning")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(32, 3)
    rows = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, target_modules="all-linear"))

        def training_step(self, batch, _):
            return nn.functional.mse_loss(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.02)

    def fit(module, epochs, checkpoint=None):
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = lightning.Trainer(
            max_epochs=epochs, default_root_dir=tmp_path, enable_checkpointing=False, **options
        )
        trainer.fit(module, rows, ckpt_path=checkpoint)
        return trainer

    torch.manual_seed(1)
    first = Module()
    start = copy.deepcopy(first.state_dict())
    trainer = fit(first, 2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    assert any(not torch.equal(value, start[key]) for key, value in first.state_dict().items())
    resumed, whole = Module(), Module()
    fit(resumed, 4, tmp_path / "two.ckpt")
    whole.load_state_dict(start)
    fit(whole, 4)
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())
    first.model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    assert torch.equal(loaded(x), first.model(x))


def test_sentence_transformers_add_and_load_adapters(tmp_path):
    sentences = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, intermediate_size=32)).save_pretrained(tmp_path / "bert")
    tokenizer_of(tmp_path / "bert").save_pretrained(tmp_path / "bert")

    def model():
        words = Transformer(str(tmp_path / "bert"))
        return sentences.SentenceTransformer(modules=[words, Pooling(16)], device="cpu")

    texts = ["a b c", "d e"]
    adapted, base = model(), model()
    adapted.add_adapter(LoTRAConfig(r=2, target_modules="all-linear", init_weights=False), "own")
    expected = adapted.encode(texts, convert_to_tensor=True)
    assert not torch.allclose(expected, base.encode(texts, convert_to_tensor=True), atol=1e-4)
    adapted.save_pretrained(str(tmp_path / "saved"))
    again = model()
    again.load_adapter(str(tmp_path / "saved"))
    torch.testing.assert_close(again.encode(texts, convert_to_tensor=True), expected)
