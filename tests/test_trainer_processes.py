"""transformers' Trainer in two processes of accelerate launch, on a Transformer-KAN with an adapter."""

import json

import pytest
import torch
from launching import launch

STEPS = 6

PROGRAM = """
import json, os, sys

import torch
from peft import get_peft_model, get_peft_model_state_dict
from transformer_kan import TransformerKANConfig, TransformerKANForCausalLM
from transformers import Trainer, TrainingArguments, set_seed

from peft_lotra import LoTRAConfig, create_lotra_optimizer

folder, processes, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
SIZES = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "kan_hidden_size": 12}
TOKENS = torch.randint(1, 23, (64, 9), generator=torch.Generator().manual_seed(5))


def train(checkpoint=None):
    set_seed(0)
    base = TransformerKANForCausalLM(TransformerKANConfig(max_position_embeddings=32, **SIZES)).double()
    model = get_peft_model(base, LoTRAConfig(r=3, task_type="CAUSAL_LM"))
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            folder,
            per_device_train_batch_size=8 // processes,
            max_steps=steps,
            save_steps=steps // 2,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            lr_scheduler_type="cosine",
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in TOKENS],
        optimizers=(create_lotra_optimizer(model, torch.optim.AdamW, lr=1e-2), None),
    )
    assert trainer.accelerator.num_processes == processes, trainer.accelerator.num_processes
    trainer.train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, get_peft_model_state_dict(model)


losses, adapter = train()
_, resumed = train(f"{folder}/checkpoint-{steps // 2}")
assert all(torch.equal(adapter[name], resumed[name]) for name in adapter)
if os.environ.get("RANK", "0") == "0":
    torch.save({"losses": losses, "adapter": adapter}, f"{folder}/result.pt")
if processes > 1:
    torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)  # leaving a group whose model is alive can hang
"""


@pytest.mark.processes
def test_trainer(tmp_path):
    results = {}
    for processes, launcher in ((1, "python"), (2, "accelerate")):
        folder = tmp_path / str(processes)
        launch(PROGRAM, folder, processes, STEPS, num_processes=processes, launcher=launcher)
        results[processes] = torch.load(folder / "result.pt")
        saved = json.loads((folder / f"checkpoint-{STEPS}" / "adapter_config.json").read_text())
        assert saved["peft_type"] == "LOTRA"
    one, two = results[1], results[2]
    assert one["losses"][-1] < one["losses"][0]
    assert one["losses"] == pytest.approx(two["losses"], abs=1e-4)  # logged with few digits
    for name, expected in one["adapter"].items():
        assert expected.any()
        torch.testing.assert_close(two["adapter"][name], expected, atol=1e-10, rtol=1e-8)
