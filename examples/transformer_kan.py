"""A Transformer-KAN for transformers: GPT-2 whose MLP blocks are two KAN layers.

>>> import transformer_kan  # registers the classes with AutoConfig and AutoModel..., and the KAN layers with LoTRA
>>> config = TransformerKANConfig(
...     vocab_size=103, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
...     kan_hidden_size=64, kan_degree=4,
... )
>>> base = TransformerKANForCausalLM(config)  # base(input_ids, labels=input_ids).loss, base.generate(input_ids)
>>> model = get_peft_model(base, LoTRAConfig(compression_ratio=0.1, task_type="CAUSAL_LM"))
>>> AutoModelForCausalLM.from_pretrained("directory of a saved base, or of an adapter")

For `TransformerKANForSequenceClassification`, give the config `num_labels` and `pad_token_id`. It classifies by the
last token that is not padding. Everything else (attention, cache, generation, checkpointing, Trainer) is GPT-2's own.
"""

from __future__ import annotations

from typing import Any

from chebyshev_kan import ChebyshevKANLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

from peft_lotra import register_kan_layer


class TransformerKANConfig(GPT2Config):
    """GPT-2's configuration with the sizes of the KAN layers.

    Args:
        kan_hidden_size: the number of features between the two KAN layers of a block.
        kan_degree: the highest Chebyshev degree; there are n_d = kan_degree + 1 basis functions per input.
        kwargs: arguments of GPT-2's configuration: `vocab_size`, `hidden_size`, `num_hidden_layers`,
            `num_attention_heads`, `max_position_embeddings`, `num_labels`, `pad_token_id`, … Unlike in GPT-2, there
            are no special tokens and no dropout by default.
    """

    model_type = "transformer_kan"

    def __init__(self, kan_hidden_size: int = 64, kan_degree: int = 4, **kwargs: Any) -> None:
        tokens = {"bos_token_id": None, "eos_token_id": None}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        super().__init__(**{**tokens, **dropout, **kwargs})
        self.kan_hidden_size, self.kan_degree = kan_hidden_size, kan_degree


class TransformerKANModel(GPT2Model):
    """input_ids (batch, t) → last_hidden_state (batch, t, hidden_size)"""

    config_class = TransformerKANConfig

    def __init__(self, config: TransformerKANConfig) -> None:
        super().__init__(config)
        n, hidden, degree = config.hidden_size, config.kan_hidden_size, config.kan_degree
        for block in self.h:
            block.mlp = nn.Sequential(ChebyshevKANLayer(n, hidden, degree), ChebyshevKANLayer(hidden, n, degree))

    def _init_weights(self, module: nn.Module) -> None:
        # transformers also calls this after loading. The flag says that the loaded file had this layer.
        super()._init_weights(module)
        if isinstance(module, ChebyshevKANLayer) and not getattr(module.coefficients, "_is_hf_initialized", False):
            module.reset_parameters()


class _WithHead:
    """Replaces the model under one of GPT-2's heads by a TransformerKANModel."""

    config_class = TransformerKANConfig

    def __init__(self, config: TransformerKANConfig) -> None:
        super().__init__(config)
        self.transformer = TransformerKANModel(config)
        self.post_init()


class TransformerKANForCausalLM(_WithHead, GPT2LMHeadModel):
    """input_ids (batch, t) → logits (batch, t, vocab_size), with the transposed embedding (`tie_word_embeddings`)"""


class TransformerKANForSequenceClassification(_WithHead, GPT2ForSequenceClassification):
    """input_ids (batch, t) → logits (batch, num_labels)"""

    # The loss is a mean over the batch. From the **kwargs of GPT-2's forward, Trainer would conclude that the loss is
    # divided by `num_items_in_batch`, and would multiply loss and gradients by the number of processes.
    accepts_loss_kwargs = False


register_kan_layer(ChebyshevKANLayer, {"coefficients": "i o d"})
AutoConfig.register(TransformerKANConfig.model_type, TransformerKANConfig, exist_ok=True)
AutoModel.register(TransformerKANConfig, TransformerKANModel, exist_ok=True)
AutoModelForCausalLM.register(TransformerKANConfig, TransformerKANForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    TransformerKANConfig, TransformerKANForSequenceClassification, exist_ok=True
)
