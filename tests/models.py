"""Tiny models and their fine-tuned relatives, for every test that needs a real architecture."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)


def bert_config(**changes: object) -> BertConfig:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
        "num_labels": 3,
        "initializer_range": 0.3,  # large enough that a small error in any weight shows in the logits
    }
    return BertConfig(**(sizes | changes))


def tiny_bert(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(bert_config()).eval()


def tiny_encoder(seed: int = 0) -> BertModel:
    torch.manual_seed(seed)
    return BertModel(bert_config()).eval()


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Conv1D layers (weights stored transposed, some of them square) and a tied head."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """Rotary embeddings, whose frequencies are floating buffers that no checkpoint holds; no biases."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


class TinyConvNet(nn.Module):
    """Convolutions of both kinds, batch normalisation, and a linear layer without bias."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4, bias=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.point(torch.relu(self.norm(self.conv(x)))).mean((2, 3)))


def token_batch(seed: int = 0, count: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 64, (count, 12), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def perturb(model: nn.Module, seed: int, scale: float = 0.01) -> nn.Module:
    """Move every trainable parameter a little, as fine-tuning would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model
