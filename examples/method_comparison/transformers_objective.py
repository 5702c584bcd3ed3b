"""A Transformer-KAN's sizes, and an objective on tokens, trained by transformers' Trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from objectives import Data, Supervised
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import IterableDataset
from transformer_kan import TransformerKANConfig
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments


def transformer_config(task: Any, vocabulary: int, **others: Any) -> TransformerKANConfig:
    """From a task's `hidden`, `kan_hidden`, `layers`, `heads`, `basis` and `length`."""
    return TransformerKANConfig(
        vocab_size=vocabulary,
        hidden_size=task.hidden,
        num_hidden_layers=task.layers,
        num_attention_heads=task.heads,
        max_position_embeddings=task.length,
        kan_hidden_size=task.kan_hidden,
        kan_degree=task.basis - 1,
        use_cache=False,
        **others,
    )


class OnTokens(Supervised):
    """The model's own loss on tokens x and labels y, and a metric of its logits and y; `pad` is the token that only
    fills up."""

    def __init__(
        self,
        training: Data,
        test: Data,
        metric_fn: Callable[[Tensor, Tensor], Tensor],
        batch: int,
        seed: int,
        pad: int | None = None,
    ) -> None:
        super().__init__(training, test, None, metric_fn, batch, seed)  # the loss is the model's
        self.pad = pad

    def inputs(self, x: Tensor) -> dict[str, Tensor]:
        return {"input_ids": x} if self.pad is None else {"input_ids": x, "attention_mask": (x != self.pad).long()}

    def loss(self, model: nn.Module, step: int) -> Tensor:
        x, y = self.drawn(step)
        return model(**self.inputs(x), labels=y).loss

    def train(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler,
        steps: int,
        goes_on: Callable[[int], bool],
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:  # nothing is saved, but Trainer makes its folder
            arguments = TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=self.batch,
                max_grad_norm=0.0,  # the other tasks do not clip either
                use_cpu=self.training.x.device.type == "cpu",
                average_tokens_across_devices=False,  # else a mean loss is multiplied by the number of processes
                dataloader_pin_memory=False,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            callbacks, data = [_AfterSteps(goes_on)], _Batches(self, steps)
            trainer = Trainer(
                model, arguments, train_dataset=data, callbacks=callbacks, optimizers=(optimizer, schedule)
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()

    def second_order(self) -> dict[str, Any]:
        """All samples where they have classes, the batch of a step where they have tokens: these have many outputs."""
        tokens = self.training.y.ndim > 1

        def outputs(net: Callable[..., Any], batch: Data) -> tuple[Tensor, Tensor]:
            x, y = batch
            logits = net(**self.inputs(x)).logits
            return (logits[:, :-1], y[:, 1:]) if tokens else (logits, y)

        data = (lambda iteration: tuple(self.drawn(iteration))) if tokens else tuple(self.training)
        return {"residual_fn": outputs, "data": data, "loss": "cross_entropy"}

    def details(self, model: nn.Module) -> dict[str, float]:
        return {}  # the training data may be every window of a long text

    def _on(self, model: nn.Module, data: Data, rows: int = 128) -> float:
        outputs = torch.cat([model(**self.inputs(x)).logits for x in data.x.split(rows)])
        return self.metric_fn(outputs, data.y).item()


class _Batches(IterableDataset):
    """The samples of all steps, in their order."""

    def __init__(self, objective: OnTokens, steps: int) -> None:
        self.objective, self.steps = objective, steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for step in range(self.steps):
            for x, y in zip(*self.objective.drawn(step), strict=True):
                yield {**self.objective.inputs(x), "labels": y}


class _AfterSteps(TrainerCallback):
    def __init__(self, goes_on: Callable[[int], bool]) -> None:
        self.goes_on = goes_on

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= not self.goes_on(state.global_step)
