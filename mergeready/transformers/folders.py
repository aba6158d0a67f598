"""What of an expert's and its base's folders an evaluation loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mergeready.errors import OptionError
from mergeready.experts.peft_config import CONFIG_NAME
from mergeready.weights.open import resolve_folder


def model_folder(expert: str | Path, base: str | Path) -> Path:
    """Where a whole model of the expert's architecture lies: in its own folder, or an adapter's in its base's."""
    own = resolve_folder(expert)
    return resolve_folder(base) if (own / CONFIG_NAME).is_file() else own


def load_tokenizer(expert: str | Path, base: str | Path) -> Any:
    """The expert's tokenizer, or its base's where it has none. No code of either folder is run.

    Raises:
        OptionError: If there is none that loads.
    """
    own = resolve_folder(expert)
    folder = own if (own / "tokenizer_config.json").is_file() else resolve_folder(base)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise OptionError(f"neither the expert nor {folder} has a tokenizer that loads: {error}") from error
