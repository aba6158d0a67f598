"""Weights out of an ONNX file, without the onnx package.

An ONNX file is a protobuf message; of its many fields only the graph's nodes and tensors are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_NAME, _NODE_OPERATOR = 1, 3, 4
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_BYTES = 1, 2, 8, 9
_FLOAT32 = 1


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field numbers and values of one protobuf message: integers, or bytes for everything nested."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        value: int | memoryview
        if tag & 7 == 0:
            value, at = _varint(data, at)
        else:
            length, at = {1: (8, at), 5: (4, at)}.get(tag & 7) or _varint(data, at)
            value = data[at : at + length]
            at += length
        yield tag >> 3, value


def _messages(data: memoryview, number: int) -> Iterator[memoryview]:
    return (value for field, value in _fields(data) if field == number and isinstance(value, memoryview))


def _texts(data: memoryview, number: int) -> list[str]:
    return [bytes(value).decode() for value in _messages(data, number)]


def _dims(data: memoryview) -> list[int]:
    sizes: list[int] = []
    for field, value in _fields(data):
        if field == _TENSOR_DIMS and isinstance(value, int):
            sizes.append(value)
        elif field == _TENSOR_DIMS and isinstance(value, memoryview):  # packed
            at = 0
            while at < len(value):
                size, at = _varint(value, at)
                sizes.append(size)
    return sizes


def read_float32_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The float32 tensors of an ONNX file.

    Returns:
        The tensors by name, and for each tensor that is the right side of a matrix product the name of the
        product's node: exporters name such tensors by number only, but nodes after their module.

    Raises:
        ValueError: a tensor's bytes do not fit its shape.
    """
    (graph,) = _messages(memoryview(path.read_bytes()), _MODEL_GRAPH)
    tensors: dict[str, Tensor] = {}
    for message in _messages(graph, _GRAPH_INITIALIZER):
        (name,), shape = _texts(message, _TENSOR_NAME), _dims(message)
        raw = bytearray().join(_messages(message, _TENSOR_BYTES))
        if dict(_fields(message)).get(_TENSOR_TYPE) != _FLOAT32:
            continue
        if len(raw) != 4 * math.prod(shape):
            raise ValueError(f"tensor {name} in {path}: {len(raw)} bytes do not fit shape {shape}")
        tensors[name] = torch.frombuffer(raw, dtype=torch.float32).reshape(shape)
    products = {
        _texts(node, _NODE_INPUT)[1]: _texts(node, _NODE_NAME)[0]
        for node in _messages(graph, _GRAPH_NODE)
        if _texts(node, _NODE_OPERATOR) == ["MatMul"]
    }
    return tensors, {tensor: node for tensor, node in products.items() if tensor in tensors}
