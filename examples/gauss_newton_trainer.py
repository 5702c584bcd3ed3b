"""A second-order optimizer in transformers' Trainer: `GaussNewton` on handwritten digits.

    python examples/gauss_newton_trainer.py

A Chebyshev KAN that knows the digits 0 to 4 learns 5 to 9 with an adapter of a tenth of its size. The loss is a
cross-entropy. There is no rate to choose. Trainer resumes from its checkpoints. The command takes less than a minute.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from chebyshev_kan import ChebyshevKAN
from command_line import check_seed, exit_code, make_output_dir, new_parser, positive_int, ratio
from peft import get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from peft_lotra import GaussNewton, LoTRAConfig

CLASSES = 5


class Digits(Dataset):
    """Images of 64 values in [−1, 1], and labels in 0, …, 4, of five digits from `first` on. Every third is a test."""

    def __init__(self, first: int, test: bool = False) -> None:
        images, digits = load_digits(return_X_y=True)
        rows = [row for row, digit in enumerate(digits) if first <= digit < first + CLASSES]
        rows = [row for number, row in enumerate(rows) if (number % 3 == 2) == test]
        self.images = torch.tensor(images[rows] / 8 - 1, dtype=torch.float32)
        self.labels = torch.tensor(digits[rows] - first)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"images": self.images[index], "labels": self.labels[index]}


class Classifier(nn.Module):
    """(N, 64) → logits (N, 5), and their cross-entropy if labels are given."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = ChebyshevKAN((64, 32, CLASSES), degree=3)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.kan(images / 4)
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


class OnTrainersBatch(GaussNewton):
    """GaussNewton whose step uses the batch that `training_step` saw last. Trainer calls `step()` without a batch."""

    batch: Any = None

    def step(self, closure: None = None) -> float:
        return super().step(self.batch)


class GaussNewtonTrainer(Trainer):
    """Trainer for an `OnTrainersBatch`. It computes the loss before the step, and makes no backward pass."""

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        self.optimizer.optimizer.batch = inputs = self._prepare_inputs(inputs)  # accelerate wraps the optimizer
        with torch.no_grad():
            return self.compute_loss(model, inputs)


def outputs_and_targets(net: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return net(images=batch["images"])["logits"], batch["labels"]


def base() -> Classifier:
    """A classifier of the digits 0 to 4, trained by Adam."""
    classifier, digits = Classifier(), Digits(0)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        classifier(digits.images, digits.labels)["loss"].backward()
        optimizer.step()
    return classifier


def accuracy(model: nn.Module, first: int) -> float:
    digits, device = Digits(first, test=True), next(model.parameters()).device
    with torch.no_grad():
        answers = model(images=digits.images.to(device))["logits"].argmax(dim=1)
    return (answers.cpu() == digits.labels).double().mean().item()


def run(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    classifier, digits = base(), Digits(CLASSES)
    print(f"Base: {accuracy(classifier, 0):.1%} of its own digits")
    model = get_peft_model(
        classifier, LoTRAConfig(coefficients={"coefficients": "i o d"}, compression_ratio=args.compression_ratio)
    )
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        str(args.output_dir),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=(len(digits) + 1) // 2,
        lr_scheduler_type="constant",  # the optimizer's rate is 1
        max_grad_norm=0,  # there are no gradients to clip
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="epoch",
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=args.seed,
    )
    optimizer = OnTrainersBatch(model, outputs_and_targets, loss="cross_entropy", weight_decay=1e-3)
    trainer = GaussNewtonTrainer(model, arguments, train_dataset=digits, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output_dir))
    print(f"Adapter: {accuracy(model, CLASSES):.1%} of the new digits")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--compression-ratio", type=ratio, default=0.1, help="trained numbers over coefficients")
    add("--epochs", type=positive_int, default=8, help="of two steps each")
    add("--seed", type=int, default=0, help="of base, adapter and batches")
    add("--output-dir", type=Path, default=Path("outputs/gauss_newton_trainer"), help="checkpoints")
    args = parser.parse_args(argv)
    check_seed(parser, args)
    make_output_dir(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_code(
        lambda: run(parse_arguments(argv)), "Checkpoints are kept; the same command goes on from the last one."
    )


if __name__ == "__main__":
    sys.exit(main())
