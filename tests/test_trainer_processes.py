"""transformers' Trainer in two processes, on a Transformer-KAN with an adapter."""

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

STEPS = 6
SIZES = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "kan_hidden_size": 12}
TOKENS = torch.randint(1, 23, (64, 9), generator=torch.Generator().manual_seed(5))


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
            per_device_train_batch_size=8 // processes,
            max_steps=STEPS,
            save_steps=STEPS // 2,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            lr_scheduler_type="cosine",
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in TOKENS],
        optimizers=(create_lotra_optimizer(model, torch.optim.AdamW, lr=1e-2), None),
    )
    assert trainer.accelerator.num_processes == processes
    trainer.train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}


def train_and_resume(folder, processes):
    losses, adapter = train(folder, processes)
    _, resumed = train(folder, processes, folder / f"checkpoint-{STEPS // 2}")
    assert all(torch.equal(adapter[name], resumed[name]) for name in adapter)
    return losses, adapter


def loads_onto_a_numbered_cpu():
    try:
        torch.serialization.default_restore_location(torch.UntypedStorage(1), "cpu:0")
    except RuntimeError:
        return False
    return True


@pytest.mark.processes
@pytest.mark.skipif(
    not loads_onto_a_numbered_cpu(),
    reason="this torch cannot load onto 'cpu:0', as Trainer does in processes",
)
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")  # PEFT 0.21 with transformers 5.23
def test_trainer(tmp_path):
    results = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        results[processes], *_ = fork(train_and_resume, folder, processes, num_processes=processes)
        saved = json.loads((folder / f"checkpoint-{STEPS}" / "adapter_config.json").read_text())
        assert saved["peft_type"] == "LOTRA"
    (losses, adapter), (losses_of_two, adapter_of_two) = results[1], results[2]
    assert min(losses) < losses[0]
    assert losses == approx(losses_of_two, abs=1e-4)  # logged with few digits
    for name, expected in adapter.items():
        assert expected.any()
        torch.testing.assert_close(adapter_of_two[name], expected, atol=1e-10, rtol=1e-8)
