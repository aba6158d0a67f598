# ruff: noqa: E501 - one line for each
"""Broken experts, made from healthy ones by one change each, with the check that must catch it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor

from tests.experts.mlx_files import random_adapter
from tests.experts.mlx_files import write_adapter as write_mlx_adapter
from tests.models import perturb, tiny_bert, tiny_gpt2
from tests.validation.experts import CARD, edit_json, edit_tensors, write_adapter, write_base, write_full

GOLDENS = Path(__file__).parent.parent / "experts" / "goldens" / "adapterhub"
WORDS = {"<unk>": 0, "the": 1, "law": 2, "court": 3}
FULL, ADAPTER, CONFIG = "model.safetensors", "adapter_model.safetensors", "adapter_config.json"
INDEX = "model.safetensors.index.json"
OWNED = "owned-by-a-pickle"


def write_tokenizer(folder: Path, words: dict[str, int] = WORDS) -> None:
    Tokenizer(models.WordLevel(words, unk_token="<unk>")).save(str(folder / "tokenizer.json"))


def write_healthy(root: Path) -> None:
    """Bases and one healthy expert of each kind."""
    write_tokenizer(write_base(root / "base"))
    write_card(root / "base", license="apache-2.0")
    shutil.copytree(root / "base", root / "bound-base")
    write_card(root / "bound-base", license="cc-by-nc-4.0")
    write_tokenizer(write_full(root / "full"))
    write_card(write_full(root / "bound"), base_model="org/base", license="cc-by-nc-4.0")
    write_tokenizer(write_adapter(root / "adapter"))
    write_adapter(root / "dora", use_dora=True)
    perturb(tiny_bert(), 1).save_pretrained(root / "sharded", max_shard_size="20KB")
    (root / "sharded" / "README.md").write_text(CARD, encoding="utf-8")
    mlx = write_mlx_adapter(root / "mlx", random_adapter(tiny_bert(), ("query",)), model="org/base")
    edit_json(mlx / CONFIG, lora_parameters={"rank": 3, "scale": 2.0})
    (mlx / "README.md").write_text(CARD, encoding="utf-8")
    for name in ("plain", "dora"):
        shutil.copytree(GOLDENS / "bert" / name, root / f"adapterhub-{name}")
    shutil.copytree(GOLDENS / "bert" / "base", root / "adapterhub-base")
    tiny_gpt2().save_pretrained(root / "tied-base")
    tied = get_peft_model(tiny_gpt2(), LoraConfig(r=4, target_modules=["wte", "c_attn"], fan_in_fan_out=True))
    perturb(tied, 1, 0.1).save_pretrained(root / "tied-adapter")
    perturb(tiny_gpt2(), 1).save_pretrained(root / "tied-full")
    for folder in root.iterdir():
        if (folder / CONFIG).is_file() and folder.name != "mlx" and "hub" not in folder.name:
            edit_json(folder / CONFIG, base_model_name_or_path="org/base", revision="0" * 40)


def write_card(folder: Path, text: str = "", **fields: str) -> None:
    lines = "\n".join(f"{key}: {value}" for key, value in fields.items())
    (folder / "README.md").write_text(f"---\n{lines}\n---\n{text}\n", encoding="utf-8")


Break = Callable[[Path], object]


@dataclass(frozen=True)
class Broken:
    """How to break which healthy expert, and which check says so; ``base`` where it is not the usual one."""

    kind: str
    change: Break
    check: str
    base: str = "base"


# Changes of tensors


def tensors(file: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Break:
    return lambda folder: edit_tensors(folder / file, change)


def values(file: str, part: str, change: Callable[[Tensor], Tensor]) -> Break:
    """Change the first tensor whose name has the part."""

    def apply(found: dict[str, Tensor]) -> dict[str, Tensor]:
        name = next(name for name in found if part in name)
        return found | {name: change(found[name].clone())}

    return tensors(file, apply)


def first(value: float) -> Callable[[Tensor], Tensor]:
    def put(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return put


def renamed(file: str, old: str, new: str) -> Break:
    return tensors(file, lambda t: {k.replace(old, new): v for k, v in t.items()})


def swapped(t: dict[str, Tensor]) -> dict[str, Tensor]:
    other = {"lora_A": "lora_B", "lora_B": "lora_A"}
    return {k.replace(a, other[a]): v for k, v in t.items() for a in other if a in k}


def without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def drop(found: dict[str, Tensor]) -> dict[str, Tensor]:
        gone = next(name for name in found if part in name)
        return {name: tensor for name, tensor in found.items() if name != gone}

    return drop


def stored_as_fp8(folder: Path) -> None:
    edit_tensors(folder / FULL, lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()})


def rounded_away(folder: Path) -> None:
    perturb(tiny_bert(), 1, 1e-4).to(torch.bfloat16).save_pretrained(folder)


def drifted(folder: Path) -> None:
    perturb(tiny_bert(), 1, 0.25).save_pretrained(folder)


def along_directions(count: int, size: float) -> Break:
    """Add outer products of random unit vectors to each matrix."""
    generator = torch.Generator().manual_seed(0)

    def add(tensor: Tensor) -> Tensor:
        if tensor.ndim != 2:
            return tensor
        for _ in range(count):
            left, right = (torch.randn(length, generator=generator) for length in tensor.shape)
            tensor = tensor + size * torch.outer(left / left.norm(), right / right.norm())
        return tensor

    return tensors(FULL, lambda t: {name: add(tensor) for name, tensor in t.items()})


def collapsed_factors(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: v[:1].expand_as(v) if "lora_A" in n else v for n, v in found.items()}


# Changes of bytes


def cut(file: str, keep: float) -> Break:
    def apply(folder: Path) -> None:
        path = folder / file
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])

    return apply


def header(change: Callable[[dict[str, Any]], object]) -> Break:
    """Change the header of a full model's file and leave its values."""

    def apply(folder: Path) -> None:
        path = folder / FULL
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        content = json.loads(data[8 : 8 + length])
        changed = change(content)
        text = changed.encode() if isinstance(changed, str) else json.dumps(content).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return apply


def entry(**changes: Any) -> Break:
    return header(lambda h: h["classifier.bias"].update(changes))


def named_twice(h: dict[str, Any]) -> str:
    text = json.dumps(h)
    same = json.dumps(h["classifier.bias"])
    return text[:-1] + f', "classifier.bias": {same}}}'


def written(file: str, content: bytes) -> Break:
    return lambda folder: (folder / file).write_bytes(content)


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def bomb(file: str, instead_of: str | None = None) -> Break:
    def apply(folder: Path) -> None:
        if instead_of is not None:
            (folder / instead_of).unlink()
        (folder / file).write_bytes(pickle.dumps(Bomb(folder.parent / OWNED)))

    return apply


# Changes of text


def config(**changes: Any) -> Break:
    return lambda folder: edit_json(folder / CONFIG, **changes)


def card(text: str = "", **fields: str) -> Break:
    settings = {"base_model": "org/base", "license": "apache-2.0"} | fields
    return lambda folder: write_card(folder, text, **settings)


def placed(shard: str) -> Break:
    """Say in the index that every tensor lies in another file."""

    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        edit_json(folder / INDEX, weight_map=dict.fromkeys(index["weight_map"], shard))

    return apply


def lying_index(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    shards = sorted(set(index.values()))
    edit_json(folder / INDEX, weight_map={n: shards[0] if s == shards[1] else s for n, s in index.items()})


def lost_shard(folder: Path) -> None:
    next(folder.glob("model-*.safetensors")).unlink()


def in_metadata(folder: Path) -> None:
    save_file(load_file(folder / FULL), folder / FULL, metadata={"format": "pt", "ss_output": "/home/me/run"})


def words(**changes: int) -> Break:
    return lambda folder: write_tokenizer(folder, WORDS | changes)


# Changes of files


def linked(name: str, target: str) -> Break:
    return lambda folder: (folder / name).symlink_to(target)


def linked_weights(folder: Path) -> None:
    shutil.move(folder / FULL, folder.parent / "elsewhere.safetensors")
    (folder / FULL).symlink_to(folder.parent / "elsewhere.safetensors")


def base_itself(folder: Path) -> None:
    shutil.copy(folder.parent.parent / "healthy" / "base" / FULL, folder / FULL)


def another_base(folder: Path) -> None:
    tiny_bert(seed=9).save_pretrained(folder)


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


BOMB = "".join(
    ["---\nlicense: mit\na0: &a0 [x, x, x, x, x, x, x, x, x]\n"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)]
    + ["base_model: *a9\n---\n"]
).encode()
"""A card of a kilobyte that stands for ten billion values."""

BROKEN: dict[str, Broken] = {
    # values
    "NaN": Broken("full", values(FULL, "layer.1", first(float("nan"))), "F003"),
    "infinity": Broken("full", values(FULL, "layer.1", first(float("inf"))), "F003"),
    "minus infinity in an adapter": Broken("adapter", values(ADAPTER, "lora_A", first(-float("inf"))), "F003"),
    "NaN in an MLX adapter": Broken("mlx", values("adapters.safetensors", "lora_b", first(float("nan"))), "F003"),
    "untrained adapter": Broken("adapter", tensors(ADAPTER, lambda t: {k: v * ("_A" in k) for k, v in t.items()}), "F004"),
    "one module untrained": Broken("adapter", values(ADAPTER, "lora_B", torch.zeros_like), "F004"),
    "A is zero": Broken("adapter", tensors(ADAPTER, lambda t: {k: v * ("_B" in k) for k, v in t.items()}), "F004"),
    "untrained MLX adapter": Broken("mlx", tensors("adapters.safetensors", lambda t: {k: v * k.endswith("a") for k, v in t.items()}), "F004"),
    "untrained AdapterHub adapter": Broken("adapterhub-plain", tensors("adapter.safetensors", lambda t: {k: v * ("_A" in k) for k, v in t.items()}), "F004", "adapterhub-base"),
    # factors
    "swapped factors": Broken("adapter", tensors(ADAPTER, swapped), "F002"),
    "half a pair": Broken("adapter", tensors(ADAPTER, without("lora_A")), "F002"),
    "half an AdapterHub pair": Broken("adapterhub-plain", tensors("adapter.safetensors", without("lora_B")), "F002", "adapterhub-base"),
    "half an MLX pair": Broken("mlx", tensors("adapters.safetensors", without("lora_a")), "F002"),
    "rank of A alone": Broken("adapter", values(ADAPTER, "lora_A", lambda t: t[:2]), "F002"),
    "rank differs from configuration": Broken("adapter", config(r=8), "F002"),
    "scalar factor": Broken("adapter", values(ADAPTER, "lora_A", lambda t: t[0, 0]), "F002"),
    "names without PEFT's prefix": Broken("adapter", renamed(ADAPTER, "base_model.model.", ""), "F002"),
    "unknown LoRA tensor": Broken("adapter", tensors(ADAPTER, lambda t: t | {"base_model.model.x.lora_C.weight": torch.ones(2)}), "F002"),
    "kohya names": Broken("adapter", renamed(ADAPTER, "lora_A", "lora_down"), "F002"),
    "exchanged MLX factors": Broken("mlx", tensors("adapters.safetensors", lambda t: {k[:-1] + {"a": "b", "b": "a"}[k[-1]]: v for k, v in t.items()}), "F002"),
    # files
    "truncated file": Broken("full", cut(FULL, 0.5), "F001"),
    "truncated header": Broken("full", cut(FULL, 0.001), "F001"),
    "empty file": Broken("full", cut(FULL, 0), "F001"),
    "empty adapter file": Broken("adapter", cut(ADAPTER, 0), "F001"),
    "no weight file": Broken("full", lambda f: (f / FULL).unlink(), "F001"),
    "huge header length": Broken("full", written(FULL, struct.pack("<Q", 2**62) + b"{}"), "F001"),
    "header is not JSON": Broken("full", header(lambda h: "not JSON"), "F001"),
    "header is an array": Broken("full", header(lambda h: "[]"), "F001"),
    "deeply nested header": Broken("full", header(lambda h: "[" * 100_000), "F001"),
    "overlapping offsets": Broken("full", entry(data_offsets=[0, 12]), "F001"),
    "offsets beyond the end": Broken("full", entry(data_offsets=[10**9, 10**9 + 12]), "F001"),
    "negative offsets": Broken("full", entry(data_offsets=[-12, 0]), "F001"),
    "shape and offsets differ": Broken("full", entry(shape=[2**40]), "F001"),
    "shape that overflows": Broken("full", entry(shape=[2**40, 2**40]), "F001"),
    "unknown dtype": Broken("full", entry(dtype="F7"), "F001"),
    "tensor named twice": Broken("full", header(named_twice), "F001"),
    "pickle named safetensors": Broken("full", bomb(FULL), "F001"),
    "pickle beside the weights": Broken("full", bomb("pytorch_model.bin"), "F005"),
    "pickle instead of the weights": Broken("full", bomb("pytorch_model.bin", FULL), "F001"),
    "pickled adapter": Broken("adapter", bomb("adapter_model.bin", ADAPTER), "F001"),
    "pickled training arguments": Broken("adapter", bomb("training_args.bin"), "F005"),
    "pickled AdapterHub head": Broken("adapterhub-plain", bomb("pytorch_model_head.bin"), "F005", "adapterhub-base"),
    "index leads out of the folder": Broken("sharded", placed("../healthy/full/model.safetensors"), "F001"),
    "index with an absolute path": Broken("sharded", placed("/etc/hostname"), "F001"),
    "missing shard": Broken("sharded", lost_shard, "F001"),
    "index places tensors wrongly": Broken("sharded", lying_index, "F001"),
    "index is not JSON": Broken("sharded", written(INDEX, b"{"), "F001"),
    "index without a map": Broken("sharded", written(INDEX, b"{}"), "F001"),
    "index maps to numbers": Broken("sharded", written(INDEX, b'{"weight_map": {"a": 1}}'), "F001"),
    "index names an empty file": Broken("sharded", placed(""), "F001"),
    "index names its own folder": Broken("sharded", placed("."), "F001"),
    "deeply nested index": Broken("sharded", written(INDEX, nested(100_000)), "F001"),
    "link loop": Broken("full", linked("again", "again"), "F008"),
    "link to its own folder's parent": Broken("full", linked("up", ".."), "F008"),
    "link to a system file": Broken("adapter", linked("notes.txt", "/etc/hostname"), "F008"),
    "weights are a link": Broken("full", linked_weights, "F008"),
    "pipe": Broken("full", lambda f: os.mkfifo(f / "notes.md"), "F008"),
    # configuration
    "configuration is not JSON": Broken("adapter", written(CONFIG, b"{'r': 4}"), "F001"),
    "configuration is an array": Broken("adapter", written(CONFIG, b"[]"), "F001"),
    "configuration is empty": Broken("adapter", written(CONFIG, b""), "F001"),
    "configuration is an empty object": Broken("adapter", written(CONFIG, b"{}"), "F001"),
    "configuration is deeply nested": Broken("adapter", written(CONFIG, nested(100_000)), "F001"),
    "configuration is not UTF-8": Broken("adapter", written(CONFIG, b'{"a": "\xff"}'), "F001"),
    "model configuration is not JSON": Broken("full", written("config.json", b"{"), "F001"),
    "no configuration": Broken("full", lambda f: (f / "config.json").unlink(), "F001"),
    "α is zero": Broken("adapter", config(lora_alpha=0), "F001"),
    "α is a text under rsLoRA": Broken("adapter", config(lora_alpha="16", use_rslora=True), "F001"),
    "α is infinite": Broken("adapter", config(lora_alpha=float("inf"), use_rslora=True), "F001"),
    "rank patterns are a list": Broken("adapter", config(rank_pattern=["query"]), "F001"),
    "α pattern that takes for ever": Broken("adapter", config(alpha_pattern={"(b|b|.)*z(.*.*)+$": 1}), "F001"),
    "α pattern is no expression": Broken("adapter", config(alpha_pattern={"(": 1}), "F001"),
    "record is not JSON": Broken("full", written("mergeready.json", b"{"), "F001"),
    # kinds that are no sum
    "PiSSA": Broken("adapter", config(init_lora_weights="pissa_niter_4"), "F006"),
    "OLoRA": Broken("adapter", config(init_lora_weights="olora"), "F006"),
    "CorDA": Broken("adapter", config(init_lora_weights="corda"), "F006"),
    "LoftQ": Broken("adapter", config(init_lora_weights="loftq"), "F006"),
    "(IA)³": Broken("adapter", config(peft_type="IA3"), "F006"),
    "prompt tuning": Broken("adapter", config(peft_type="PROMPT_TUNING"), "F006"),
    "type is a list": Broken("adapter", config(peft_type=["LORA"]), "F006"),
    "layer replication": Broken("adapter", config(layer_replication=[[0, 2], [1, 2]]), "F006"),
    "unknown field": Broken("adapter", config(use_telepathy=True), "F006"),
    "MLX of unknown kind": Broken("mlx", config(fine_tune_type="magic"), "F006"),
    "AdapterHub gating": Broken("adapterhub-plain", config(config={"architecture": "lora", "use_gating": True}), "F006", "adapterhub-base"),
    "AdapterHub bottleneck": Broken("adapterhub-plain", config(config={"architecture": None}), "F006", "adapterhub-base"),
    # base
    "another base of equal shapes": Broken("full", another_base, "B102"),
    "record that contradicts itself": Broken("full", written("mergeready.json", b'{"schema": 1, "base": {"digests": {"a": "b"}, "fingerprint": "c"}}'), "B102"),
    "no revision": Broken("adapter", config(revision=None), "B107"),
    "quantised base": Broken("adapter", config(base_model_name_or_path="org/base-bnb-4bit"), "B106"),
    "module that the base lacks": Broken("adapter", renamed(ADAPTER, "layer.1", "layer.7"), "B103"),
    "factors of another width": Broken("adapter", tensors(ADAPTER, lambda t: {k: v[:, :16].clone() if "_A" in k else v for k, v in t.items()}), "B103"),
    "parameter of another shape": Broken("full", values(FULL, "classifier.bias", lambda t: t[:2]), "B103"),
    "no common name": Broken("full", tensors(FULL, lambda t: {f"x{i}": v for i, v in enumerate(t.values())}), "B103"),
    "DoRA without magnitudes": Broken("adapter", config(use_dora=True), "B103"),
    "layer is missing": Broken("full", tensors(FULL, lambda t: {k: v for k, v in t.items() if "layer.1." not in k}), "B108"),
    "layer too many": Broken("full", tensors(FULL, lambda t: t | {k.replace("layer.1.", "layer.2."): v.clone() for k, v in t.items()}), "B108"),
    "tied embeddings adapted": Broken("tied-adapter", lambda f: None, "B105", "tied-base"),
    "tied embeddings trained apart": Broken("tied-full", tensors(FULL, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1}), "B108", "tied-base"),
    "8-bit floats": Broken("full", stored_as_fp8, "B105"),
    "tokens with other ids": Broken("adapter", words(the=2, law=1), "B104"),
    "token that the base has no row for": Broken("full", words(tort=70), "B104"),
    "another vocabulary": Broken("full", lambda f: write_tokenizer(f, {"<unk>": 0, "le": 1, "loi": 2}), "B104"),
    "tokenizer is not JSON": Broken("full", written("tokenizer.json", b"{"), "B104"),
    # change
    "the base itself": Broken("full", base_itself, "D200"),
    "drift too large": Broken("full", drifted, "D201"),
    "outlier matrix": Broken("full", values(FULL, "layer.1.output.dense.weight", lambda t: t + 0.3 * torch.randn(t.shape, generator=torch.Generator().manual_seed(0))), "D201"),
    "change lost in rounding": Broken("full", rounded_away, "D204"),
    "change along one direction": Broken("full", along_directions(1, 2.0), "D202"),
    "adapter whose directions are all one": Broken("adapter", tensors(ADAPTER, collapsed_factors), "D202"),
    "directions that the base does not have": Broken("full", along_directions(4, 4.0), "D205"),
    # card
    "no card": Broken("full", lambda f: (f / "README.md").unlink(), "P501"),
    "card without licence": Broken("full", lambda f: write_card(f, base_model="org/base"), "P501"),
    "card without base": Broken("full", lambda f: write_card(f, license="mit"), "P501"),
    "card with broken YAML": Broken("full", written("README.md", b"---\nlicense: [mit\nbase_model: {\n---\n"), "P501"),
    "card with YAML that makes objects": Broken("full", written("README.md", b"---\nlicense: !!python/object/apply:os.system ['exit 1']\n---\n"), "P501"),
    "card with deeply nested YAML": Broken("full", written("README.md", b"---\na: " + b"[" * 5000 + b"\n---\n"), "P501"),
    "card whose aliases multiply": Broken("full", written("README.md", BOMB), "P501"),
    "card is not UTF-8": Broken("full", written("README.md", CARD.replace("Law", "Rechtspr\u00fcfung").encode("latin-1")), "P501"),
    "card of a million dots": Broken("full", written("README.md", b"a." * 499_000), "P501"),
    "card of empty lines": Broken("full", written("README.md", b"---" + b"\n" * 500_000), "P501"),
    "local path in the card": Broken("full", card("Trained from /home/me/base."), "F007"),
    "token in the card": Broken("full", card("hf_" + "a" * 34), "F007"),
    "e-mail in the card": Broken("full", card("Ask me@example.org."), "F007"),
    "local path in the configuration": Broken("adapter", config(base_model_name_or_path="/scratch/me/base"), "F007"),
    "local path in metadata": Broken("full", in_metadata, "F007"),
    "free licence on a base that is not": Broken("bound", card(license="mit"), "P502", "bound-base"),
}  # fmt: skip
