"""Tiny random models, for recipes whose real model is too large to try the recipe with."""

from __future__ import annotations

import os
import shutil
import string
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch

from mergeready.errors import OptionError
from mergeready.weights.atomic import new_folder


def text() -> Path:
    """A BERT of two layers that reads characters.

    Returns:
        Its folder, made once a machine. This holds for all of these functions.
    """
    from transformers import BertConfig, BertModel

    return _made(
        "bert", lambda: BertModel(BertConfig(vocab_size=_WORDS, **_SIZES, max_position_embeddings=160))
    )


def llama() -> Path:
    """A Llama of two layers that reads characters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {"num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    return _made("llama", lambda: LlamaForCausalLM(LlamaConfig(vocab_size=_WORDS, **_SIZES, **config)))


def vit() -> Path:
    """A vision transformer of two layers for pictures of 32 pixels."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    size = {"height": 32, "width": 32}
    return _made(
        "vit",
        lambda: ViTModel(ViTConfig(image_size=32, patch_size=8, **_SIZES)),
        ViTImageProcessor(size=size),
    )


def clip() -> Path:
    """A CLIP of two layers a tower, for pictures of 32 pixels."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = CLIPConfig(
        text_config={**_SIZES, **special, "vocab_size": _WORDS, "max_position_embeddings": 77},
        vision_config={**_SIZES, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    size = {"shortest_edge": 32}
    crop = {"height": 32, "width": 32}
    return _made("clip", lambda: CLIPModel(config), CLIPImageProcessor(size=size, crop_size=crop))


_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
_WORDS = len(_CHARACTERS) + 4
_CHAT = """{% for message in messages %}{{ message['role'] }}: \
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}</s>{% endgeneration %}\
{% else %}{{ message['content'] }}
{% endif %}{% endfor %}\
{% if add_generation_prompt %}assistant: {% endif %}"""
"""Chats as lines; what assistants say is marked, so that it can be learned alone."""
_VERSION = 3


def _made(name: str, build: Any, processor: Any = None) -> Path:
    folder = Path(gettempdir()) / f"mergeready-tiny-{_VERSION}-{_user()}" / name
    if folder.is_dir():
        if folder.stat().st_uid != _user():
            raise OptionError(f"{folder} belongs to somebody else; delete it.")
        return folder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
    own = folder.with_name(f"{name}-{os.getpid()}")
    with new_folder(own, overwrite=True) as temporary:
        model.save_pretrained(temporary)
        if processor is not None:
            processor.save_pretrained(temporary)
        if name != "vit":
            _tokenizer().save_pretrained(temporary)
    try:
        own.rename(folder)
    except OSError:
        shutil.rmtree(own)
        if not folder.is_dir():
            raise
        # Another rank was faster, and its folder is being read already.
    return folder


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


def _tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    pad, end, start, unknown = special = ["<pad>", "</s>", "<s>", "<unk>"]
    tokenizer = Tokenizer(
        WordLevel({c: i for i, c in enumerate([*special, *_CHARACTERS])}, unk_token=unknown)
    )
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=end,
        bos_token=start,
        unk_token=unknown,
        model_max_length=160,
        chat_template=_CHAT,
    )
