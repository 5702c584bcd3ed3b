"""transformers' Trainer in several processes, on a Transformer-KAN with an adapter."""

import json
import sys

import pytest
import torch
from conftest import approx
from launching import ROOT, fork
from peft import get_peft_model, get_peft_model_state_dict
from transformers import Trainer, TrainingArguments, set_seed

from peft_lotra import LoTRAConfig, create_lotra_optimizer

sys.path.insert(0, str(ROOT / "examples"))

from transformer_kan import TransformerKANConfig, TransformerKANForCausalLM

STEPS = 20
SIZES = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "kan_hidden_size": 12}
TOKENS = torch.randint(1, 23, (60, 9), generator=torch.Generator().manual_seed(5))


def loss_of(outputs, labels, num_items_in_batch):
    """Cross-entropy of the next token, in double precision: transformers' own rounds to single."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def train(folder, processes, checkpoint=None):
    """Losses and the adapter, in double precision."""
    set_seed(0)
    base = TransformerKANForCausalLM(TransformerKANConfig(max_position_embeddings=32, **SIZES)).double()
    model = get_peft_model(base, LoTRAConfig(r=3, task_type="CAUSAL_LM"))
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            folder,
            per_device_train_batch_size=12 // processes,
            max_steps=STEPS,
            save_steps=STEPS // 2,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            lr_scheduler_type="cosine",
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in TOKENS],
        compute_loss_func=loss_of,
        optimizers=(create_lotra_optimizer(model, torch.optim.AdamW, lr=1e-2), None),
    )
    assert trainer.accelerator.num_processes == processes
    trainer.train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}


def loads_onto_a_numbered_cpu():
    try:
        torch.serialization.default_restore_location(torch.UntypedStorage(1), "cpu:0")
    except RuntimeError:
        return False
    return True


pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),  # PEFT 0.21, transformers 5.23
]


def test_any_number_of_processes_trains_the_same(tmp_path):
    results = {}
    for processes in (1, 2, 3, 4):
        folder = tmp_path / str(processes)
        results[processes], *_ = fork(train, folder, processes, num_processes=processes)
        saved = json.loads((folder / f"checkpoint-{STEPS}" / "adapter_config.json").read_text())
        assert saved["peft_type"] == "LOTRA"
    losses, adapter = results.pop(1)
    assert min(losses) < losses[0]
    for losses_of_several, of_several in results.values():
        assert losses == approx(losses_of_several, abs=1e-4)  # logged with few digits
        for name, expected in adapter.items():
            assert expected.any()
            torch.testing.assert_close(of_several[name], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.skipif(
    not loads_onto_a_numbered_cpu(),
    reason="this torch cannot load onto 'cpu:0', as Trainer does in processes",
)
def test_processes_go_on_to_the_same_end(tmp_path):
    _, adapter = fork(train, tmp_path, 2, num_processes=2)[0]
    _, resumed = fork(train, tmp_path, 2, tmp_path / f"checkpoint-{STEPS // 2}", num_processes=2)[0]
    assert all(torch.equal(adapter[name], resumed[name]) for name in adapter)
