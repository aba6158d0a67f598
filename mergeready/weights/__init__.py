"""Tensors in and out: folders of safetensors, state dicts and live modules behind one interface."""

from mergeready.weights.module import ModuleSource, module_parameters
from mergeready.weights.open import WeightsLike, open_weights
from mergeready.weights.safetensors_folder import SafetensorsFolder
from mergeready.weights.source import TensorInfo, WeightSource
from mergeready.weights.state_dict import StateDictSource
from mergeready.weights.writer import FolderWriter

__all__ = [
    "FolderWriter",
    "ModuleSource",
    "SafetensorsFolder",
    "StateDictSource",
    "TensorInfo",
    "WeightSource",
    "WeightsLike",
    "module_parameters",
    "open_weights",
]
