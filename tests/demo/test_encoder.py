from __future__ import annotations

import math
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, BertModel

from mergeready.demo import encoder
from mergeready.demo.encoder import (
    MAX_TOKENS,
    ZeroShotClassifier,
    embed_labels,
    encoder_folder,
    load_classifier,
    tokenize,
)
from mergeready.errors import FormatError
from mergeready.experts import Base
from tests.demo.tiny import tiny_base, tiny_classifier


class TestFolder:
    def test_the_installed_weights(self) -> None:
        folder = encoder_folder()
        assert {path.name for path in folder.iterdir()} >= {"model.safetensors", "config.json"}
        assert sum(info.numel for info in Base.open(folder).source.infos.values()) > 20_000_000

    def test_a_missing_package_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> None:
            raise PackageNotFoundError(name)

        monkeypatch.setattr(encoder, "distribution", missing)
        with pytest.raises(FormatError, match=r"not installed; run: pip install 'mergeready\[demo\]'"):
            encoder_folder()

    def install(self, monkeypatch: pytest.MonkeyPatch, *files: Path) -> None:
        listed = [SimpleNamespace(name=path.name, locate=lambda path=path: path) for path in files]
        monkeypatch.setattr(encoder, "distribution", lambda name: SimpleNamespace(files=listed))

    def test_other_weights_are_refused(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        content = bytearray((encoder_folder() / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (tmp_path / "model.safetensors").write_bytes(content)
        self.install(monkeypatch, tmp_path / "model.safetensors")
        with pytest.raises(FormatError, match=r"is not the published all-MiniLM-L6-v2; install .* again"):
            encoder_folder()

    @pytest.mark.parametrize("count", [0, 2])
    def test_a_package_without_the_one_file(
        self, count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        places = [tmp_path / str(i) / "model.safetensors" for i in range(count)]
        self.install(monkeypatch, tmp_path / "config.json", *places)
        with pytest.raises(FormatError, match=f"holds {count} files called model.safetensors instead of one"):
            encoder_folder()


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    """Texts of unlike length, padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 60, (5, 9), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate((9, 1, 4, 7, 2)):
        mask[row, :length] = 1
    return ids * mask, mask


def embeddings(model: ZeroShotClassifier, ids: Tensor, mask: Tensor) -> np.ndarray:
    """Mean-pooled and normalised, text by text without padding, in float64."""
    rows = []
    exact = BertModel(model.config).double().eval()
    exact.load_state_dict(model.bert.state_dict())
    for row in range(len(ids)):
        own = ids[row : row + 1, : int(mask[row].sum())]
        with torch.no_grad():
            states = exact(input_ids=own, attention_mask=torch.ones_like(own)).last_hidden_state[0].numpy()
        mean = states.mean(0)
        rows.append(mean / math.sqrt((mean**2).sum()))
    return np.stack(rows)


def unit_rows(count: int, seed: int = 1) -> Tensor:
    rows = torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("groups", [None, [0, 0, 1, 1, 1, 2, 2]])
def test_logits_and_loss_are_those_of_float64(groups: list[int] | None, batch: tuple[Tensor, Tensor]) -> None:
    """In joint training, only the classes of the label's own task compete."""
    ids, mask = batch
    model = tiny_classifier()
    head = unit_rows(7)
    model.set_head(head, None if groups is None else torch.tensor(groups))
    labels = torch.tensor([0, 3, 1, 6, 4])
    with torch.no_grad():
        output = model(ids, mask, labels)
    logits = 20 * embeddings(model, ids, mask) @ head.double().numpy().T
    np.testing.assert_allclose(output.logits.numpy(), logits, rtol=1e-4, atol=1e-4)
    losses = []
    for row, label in enumerate(labels.tolist()):
        rivals = [c for c in range(7) if groups is None or groups[c] == groups[label]]
        losses.append(math.log(sum(math.exp(logits[row, c]) for c in rivals)) - logits[row, label])
    assert float(output.loss) == pytest.approx(np.mean(losses), rel=1e-4)


def test_without_labels_there_is_no_loss(batch: tuple[Tensor, Tensor]) -> None:
    model = tiny_classifier()
    model.set_head(unit_rows(3))
    output = model(*batch)
    assert output.loss is None
    assert output.logits.shape == (5, 3)


def test_padding_changes_nothing(batch: tuple[Tensor, Tensor]) -> None:
    ids, mask = batch
    model = tiny_classifier()
    more = [torch.cat([part, torch.zeros(5, 4, dtype=torch.long)], dim=1) for part in (ids, mask)]
    with torch.no_grad():
        torch.testing.assert_close(model.encode(ids, mask), model.encode(*more), rtol=1e-4, atol=1e-5)


def test_the_head_is_no_part_of_the_state() -> None:
    model = tiny_classifier()
    before = set(model.state_dict())
    model.set_head(unit_rows(3))
    assert set(model.state_dict()) == before
    assert not any("label" in name for name in before)


class TestWithAFolder:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tiny_base(tmp_path_factory.mktemp("base"))

    def test_a_classifier_holds_the_folders_encoder(self, folder: Path) -> None:
        model = load_classifier(folder)
        for name, value in Base.open(folder).source.infos.items():
            assert torch.equal(model.bert.get_parameter(name), Base.open(folder).source.read(name)), value
        frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen == {"embeddings", "pooler"}

    def test_its_own_save_loads_again(self, folder: Path, tmp_path: Path) -> None:
        model = load_classifier(folder)
        with torch.no_grad():
            model.bert.encoder.layer[0].output.dense.weight += 0.5
        model.save_pretrained(tmp_path)
        again = load_classifier(tmp_path)
        assert all(torch.equal(v, again.state_dict()[n]) for n, v in model.state_dict().items())

    def test_tokens_are_cut(self, folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        short, long = tokenize(tokenizer, ["word1 word2", " ".join(["word3"] * 100)])
        assert short == [3, 4]
        assert long == [5] * MAX_TOKENS

    def test_label_embeddings_are_those_of_the_texts(self, folder: Path) -> None:
        model = load_classifier(folder).train()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found = embed_labels(model, tokenizer, ["word1", "word2 word3 word4"])
        assert model.training
        assert not found.requires_grad
        for row, ids in enumerate(([3], [4, 5, 6])):
            tensor = torch.tensor([ids])
            exact = embeddings(model, tensor, torch.ones_like(tensor))
            np.testing.assert_allclose(found[row].numpy(), exact[0], rtol=1e-3, atol=1e-5)
