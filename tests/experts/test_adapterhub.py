"""AdapterHub adapters against the logits that the `adapters` library computed with them; see goldens/."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from mergeready.errors import FormatError, MismatchError, NonFiniteError, NotTrainedError, UnsupportedError
from mergeready.experts import LowRank, dense, open_expert
from mergeready.experts.adapterhub import AdapterHubConfig, spread_blocks
from mergeready.merging import merge

GOLDENS = Path(__file__).parent / "goldens" / "adapterhub"
VARIANTS = sorted(p.parent for p in GOLDENS.glob("*/*/adapter.safetensors") if p.parent.name != "written")
REFUSED = sorted(path.name for path in (GOLDENS / "refused").iterdir())
each = pytest.mark.parametrize("folder", VARIANTS, ids=lambda path: f"{path.parent.name}-{path.name}")


def base_of(folder: Path) -> nn.Module:
    kind = AutoModelForSequenceClassification if folder.parent.name == "bert" else AutoModelForCausalLM
    return kind.from_pretrained(folder.parent / "base").eval()


def golden(folder: Path) -> tuple[Tensor, Tensor]:
    stored = load_file(folder.parent / "logits.safetensors")
    return stored["input_ids"], stored[folder.name]


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "adapter"))


def edit(folder: Path, inner: dict[str, Any] | None = None, **outer: Any) -> None:
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text()) | outer
    if inner:
        fields["config"] |= inner
    path.write_text(json.dumps(fields))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter.safetensors")


def test_there_are_goldens() -> None:
    assert len(VARIANTS) == 11
    ids, base = golden(GOLDENS / "bert" / "base")
    torch.testing.assert_close(logits(base_of(GOLDENS / "bert" / "x"), ids), base, rtol=1e-5, atol=1e-5)


@each
def test_folded_weights_give_the_library_s_own_logits(folder: Path) -> None:
    ids, expected = golden(folder)
    base = base_of(folder)
    assert not torch.allclose(logits(base, ids), expected, atol=1e-2)
    torch.testing.assert_close(logits(merge(base, [folder]), ids), expected, rtol=1e-5, atol=1e-5)


@each
def test_the_base_may_be_a_folder(folder: Path) -> None:
    base = base_of(folder)
    on_disk, live = open_expert(folder, folder.parent / "base"), open_expert(folder, base)
    assert (on_disk.format, on_disk.base_checked) == ("adapterhub", "nothing")
    assert set(on_disk.vector) == set(live.vector)
    for name in live.vector:
        assert torch.equal(dense(on_disk.vector[name]), dense(live.vector[name]))


@each
def test_slices_equal_the_whole(folder: Path) -> None:
    vector = open_expert(folder, folder.parent / "base").vector
    for name, info in vector.infos.items():
        whole = dense(vector[name]).reshape(-1)
        for start, stop in [(0, 1), (info.numel // 3, info.numel - 1), (info.numel // 2, info.numel)]:
            torch.testing.assert_close(
                vector.flat(name, start, stop), whole[start:stop], rtol=1e-5, atol=1e-7
            )


@each
def test_half_of_it_is_half_of_the_change(folder: Path) -> None:
    base = base_of(folder)
    start, one, half = (
        dict(m.named_parameters()) for m in (base, *(merge(base, [folder], scale=s) for s in (1, 0.5)))
    )
    for name, value in start.items():
        exact = value.double() + 0.5 * (one[name].double() - value.double())
        torch.testing.assert_close(half[name].double(), exact, rtol=1e-5, atol=1e-6)


def test_factors_stay_low_rank_where_they_are() -> None:
    for model, variant, rank in (("bert", "plain", 4), ("gpt2", "fused-qv", 8), ("gpt2", "fused-k", 4)):
        vector = open_expert(GOLDENS / model / variant, GOLDENS / model / "base").vector
        assert all(isinstance(vector[n], LowRank) and vector[n].rank() == rank for n in vector)


def test_dora_changes_biases_as_well() -> None:
    """The library multiplies the whole output of the layer, bias included."""
    vector = open_expert(GOLDENS / "bert" / "dora", GOLDENS / "bert" / "base").vector
    assert {name.rpartition(".")[2] for name in vector} == {"weight", "bias"}
    llama = open_expert(GOLDENS / "llama" / "dora", GOLDENS / "llama" / "base").vector
    assert {name.rpartition(".")[2] for name in llama} == {"weight"}


def test_before_version_1_1_alpha_did_not_count(tmp_path: Path) -> None:
    folder = copied(GOLDENS / "bert" / "plain", tmp_path)
    norms = {}
    for version in ("adapters.1.0.1", "adapters.1.1.0", "adapters.2.0.0"):
        edit(folder, version=version)
        vector = open_expert(folder, GOLDENS / "bert" / "base").vector
        norms[version] = sum(vector[name].norm() for name in vector)
    assert norms["adapters.1.1.0"] == pytest.approx(3 * norms["adapters.1.0.1"])
    assert norms["adapters.2.0.0"] == norms["adapters.1.1.0"]


def test_an_older_library_is_refused_unless_alpha_is_r(tmp_path: Path) -> None:
    folder = copied(GOLDENS / "bert" / "plain", tmp_path)
    edit(folder, version="3.2.1")
    with pytest.raises(UnsupportedError, match=r"`version` is '3\.2\.1'.*set α to r"):
        open_expert(folder, GOLDENS / "bert" / "base")
    edit(folder, {"alpha": 4})
    assert len(open_expert(folder, GOLDENS / "bert" / "base").vector) == 4


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_change_of_weights_is_refused_with_its_reason(name: str) -> None:
    reasons = {
        "ia3": "multiplies",
        "vera": "VeRA",
        "gating": "depend on the input",
        "bottleneck": "bottleneck adapter",
        "prefix": "keys and values",
        "union": "several kinds",
    }
    assert set(REFUSED) == set(reasons)
    with pytest.raises(UnsupportedError, match=reasons[name]):
        open_expert(GOLDENS / "refused" / name, GOLDENS / "bert" / "base")


def test_a_model_s_prefix_may_be_missing_in_the_base() -> None:
    base = AutoModel.from_pretrained(GOLDENS / "bert" / "base").eval()
    vector = open_expert(GOLDENS / "bert" / "plain", base).vector
    assert set(vector) <= set(dict(base.named_parameters()))


def test_pickle_needs_a_flag(tmp_path: Path) -> None:
    folder = copied(GOLDENS / "bert" / "plain", tmp_path)
    torch.save(load_file(folder / "adapter.safetensors"), folder / "pytorch_adapter.bin")
    (folder / "adapter.safetensors").unlink()
    base = base_of(GOLDENS / "bert" / "plain")
    with pytest.raises(FormatError, match="can run code"):
        open_expert(folder, base)
    opened = open_expert(folder, base, allow_pickle=True).vector
    straight = open_expert(GOLDENS / "bert" / "plain", base).vector
    assert all(torch.equal(dense(opened[n]), dense(straight[n])) for n in straight)


def test_its_own_head_stays_out_unless_strict(tmp_path: Path) -> None:
    folder = copied(GOLDENS / "bert" / "plain", tmp_path)
    save_file({"heads.task.1.weight": torch.zeros(2, 16)}, folder / "model_head.safetensors")
    with pytest.raises(MismatchError, match=r"lacks: heads\.task\.1\.weight"):
        open_expert(folder, GOLDENS / "bert" / "base")
    assert open_expert(folder, GOLDENS / "bert" / "base", strict=False).extra == ("heads.task.1.weight",)


KEY = "bert.encoder.layer.0.attention.self.query.loras.task.lora_B"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop(KEY), FormatError, r"only one of two LoRA factors: .*query\.lora_A"),
        (lambda t: t[KEY].fill_(float("nan")), NonFiniteError, r"query\.loras\.task\.lora_B"),
        (
            lambda t: t.update({KEY: torch.ones(9, 4)}),
            MismatchError,
            r"do not make blocks qv of its \(16, 16\)",
        ),
        (lambda t: t.update({KEY.replace("task", "other"): t.pop(KEY)}), FormatError, "no LoRA of 'task'"),
        (lambda t: t.update({"a.adapters.task.down": torch.ones(1)}), FormatError, "a.adapters.task.down"),
        (lambda t: [t.update({k: v * 0}) for k, v in list(t.items()) if "_B" in k], NotTrainedError, "never"),
        (lambda t: t.clear(), FormatError, "holds no tensors"),
    ],
)
def test_broken_files_are_refused(
    change: Callable[[dict[str, Tensor]], object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = copied(GOLDENS / "bert" / "plain", tmp_path)
    rewrite(folder, change)
    with pytest.raises(error, match=message):
        open_expert(folder, GOLDENS / "bert" / "base")


def test_another_model_is_refused_with_all_its_targets() -> None:
    with pytest.raises(
        MismatchError, match=r"query\.weight is not in the base.*value\.weight is not in the base"
    ):
        open_expert(GOLDENS / "bert" / "plain", GOLDENS / "llama" / "base")


def test_blocks_are_those_of_a_grouped_convolution() -> None:
    """The library's own formulation: a grouped convolution whose result is padded with zeros."""
    generator = torch.Generator().manual_seed(0)
    for used in ("q", "k", "v", "qv", "kv", "qkv"):
        n = len(used)
        A, B = torch.randn(2 * n, 5, generator=generator), torch.randn(4 * n, 2, generator=generator)
        grouped = torch.nn.functional.conv1d(A.unsqueeze(0), B.unsqueeze(-1), groups=n).squeeze(0)
        padded = torch.zeros(12, 5)
        padded[torch.tensor([block in used for block in "qkv"]).repeat_interleave(4)] = grouped
        torch.testing.assert_close(spread_blocks(B, used, 12) @ A, padded)


def test_a_configuration_that_only_names_its_kind_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="its `config` is 'pfeiffer'"):
        AdapterHubConfig({"config": "pfeiffer", "version": "adapters.1.0.0"}, "x")


def test_base_and_expert_are_left_as_they_were() -> None:
    base = base_of(GOLDENS / "bert" / "plain")
    before = copy.deepcopy(base.state_dict())
    merge(base, [GOLDENS / "bert" / "dora"])
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
