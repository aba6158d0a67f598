"""Classifiers whose frozen head CLIP's text encoder makes from the names of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPModel, CLIPPreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from mergeready.recipes.recipe import Recipe


class ZeroShotImageClassifier(CLIPPreTrainedModel):  # type: ignore[misc]  # transformers is not typed
    """CLIP's image encoder and a frozen head.

    ``logits = exp(s) · cos(embedding of the image, embedding of each class's prompt)`` with CLIP's own s.
    Parameters are called as in ``CLIPModel``, which therefore is the base of all such experts.
    The head is no part of the state.

    Args:
        config: The configuration of the whole CLIP model.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        whole = CLIPModel(config)
        self.vision_model, self.visual_projection = whole.vision_model, whole.visual_projection
        self.register_buffer("head", torch.empty(0, config.projection_dim), persistent=False)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Logits, shape (batch, classes)."""
        pooled = self.vision_model(pixel_values=pixel_values).pooler_output
        return ImageClassifierOutput(logits=normalize(self.visual_projection(pooled), dim=-1) @ self.head.T)


@torch.no_grad()
def zero_shot_classifier(folder: str, recipe: Recipe, prompts: Sequence[str]) -> nn.Module:
    """A classifier for one prompt a class.

    Args:
        folder: Folder or hub id of a CLIP model.
        recipe: Says revision and dtype.
        prompts: One text a class.
    """
    revision, dtype = recipe.model.revision, getattr(torch, recipe.model.dtype)
    whole = CLIPModel.from_pretrained(folder, revision=revision, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision)
    tokens = tokenizer(list(prompts), padding=True, truncation=True, max_length=77, return_tensors="pt")
    pooled = whole.text_model(**tokens).pooler_output
    model = ZeroShotImageClassifier(whole.config)
    model.vision_model, model.visual_projection = whole.vision_model, whole.visual_projection
    model.visual_projection.requires_grad_(False)
    model.head = normalize(whole.text_projection(pooled), dim=-1) * whole.logit_scale.exp()
    result: nn.Module = model.to(dtype)
    return result
