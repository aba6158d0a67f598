from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertForSequenceClassification, BertModel, ViTConfig, ViTModel

from mergeready.errors import HistoryError
from mergeready.experts import Base, LiveExpert
from mergeready.experts.open import open_expert
from mergeready.training.base_of_run import base_of_run
from tests.models import TinyConvNet, perturb, tiny_bert, tiny_encoder, tiny_gpt2
from tests.training.small import Net, expert, state_of


def begin(model: nn.Module, folder: Path, base: object = None) -> Base | None:
    return base_of_run(model, base, folder, step=0, recorded=None)  # type: ignore[arg-type]


def resume(model: nn.Module, folder: Path, recorded: str | None) -> Base | None:
    return base_of_run(model, None, folder, step=7, recorded=recorded)


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    tiny_bert().save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


class TestGiven:
    @pytest.mark.parametrize("step", [0, 7])
    def test_it_is_taken_as_it_is(self, tmp_path: Path, step: int) -> None:
        base = Base.open(Net())
        assert base_of_run(expert(0), base, tmp_path, step=step, recorded="other") is base
        opened = base_of_run(expert(0), state_of(Net()), tmp_path, step=step, recorded=None)
        assert opened is not None
        assert opened.identity == base.identity
        assert list(tmp_path.iterdir()) == []


class TestAtTheStart:
    def test_the_folder_that_the_model_was_loaded_from(self, tmp_path: Path, pretrained: Path) -> None:
        base = begin(BertForSequenceClassification.from_pretrained(pretrained), tmp_path / "run")
        assert base is not None
        assert base.folder == pretrained
        assert not (tmp_path / "run").exists()

    def test_also_in_another_dtype(self, tmp_path: Path, pretrained: Path) -> None:
        model = BertForSequenceClassification.from_pretrained(pretrained, dtype=torch.bfloat16)
        base = begin(model, tmp_path / "run")
        assert base is not None
        assert base.folder == pretrained

    def test_peers_fit_the_snapshot_of_a_model_that_files_call_otherwise(self, tmp_path: Path) -> None:
        """As of one that was loaded by its hub id."""
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        ViTModel(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(tmp_path / "vit")
        model = ViTModel.from_pretrained(tmp_path / "vit")
        model.config._name_or_path = "org/vit"
        base = begin(model, tmp_path / "run")
        assert base is not None
        assert base.folder == tmp_path / "run" / "base"
        live = LiveExpert(model, base)
        assert (live.extra, live.missing) == ((), ())
        perturb(model, 1).save_pretrained(tmp_path / "peer")
        peer = open_expert(tmp_path / "peer", base)
        assert set(peer.vector) == set(base.source.infos)

    def test_also_with_a_new_head(self, tmp_path: Path) -> None:
        tiny_encoder().save_pretrained(tmp_path / "encoder")
        model = BertForSequenceClassification.from_pretrained(tmp_path / "encoder")
        base = begin(model, tmp_path / "run")
        assert base is not None
        assert base.folder == tmp_path / "encoder"
        assert "classifier.weight" in LiveExpert(model, base).extra

    def test_a_snapshot_if_the_model_is_another_by_now(
        self, tmp_path: Path, pretrained: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = perturb(BertForSequenceClassification.from_pretrained(pretrained), 1, 0.1)
        with caplog.at_level(logging.INFO, "mergeready"):
            base = begin(model, tmp_path / "run")
        assert base is not None
        assert base.folder == tmp_path / "run" / "base"
        for name, value in state_of(model).items():
            assert torch.equal(base.source.read(name), value)
        assert any("the model differs from" in message for message in caplog.messages)
        assert any("writing the base of this run" in message for message in caplog.messages)

    def test_a_snapshot_if_a_single_parameter_is_another(self, tmp_path: Path, pretrained: Path) -> None:
        model = BertForSequenceClassification.from_pretrained(pretrained)
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.weight *= 1.1
        base = begin(model, tmp_path / "run")
        assert base is not None
        assert base.folder == tmp_path / "run" / "base"

    def test_a_snapshot_if_shapes_are_others(self, tmp_path: Path, pretrained: Path) -> None:
        model = BertForSequenceClassification.from_pretrained(pretrained)
        model.resize_token_embeddings(70)
        base = begin(model, tmp_path / "run")
        assert base is not None
        assert base.folder == tmp_path / "run" / "base"

    def test_a_snapshot_if_the_folder_holds_nothing_readable(self, tmp_path: Path, pretrained: Path) -> None:
        model = BertForSequenceClassification.from_pretrained(pretrained)
        (pretrained / "model.safetensors").unlink()
        base = begin(model, tmp_path / "run")
        assert base is not None
        assert base.folder == tmp_path / "run" / "base"

    @pytest.mark.parametrize("make", [Net, TinyConvNet, tiny_gpt2, tiny_bert])
    def test_a_snapshot_of_any_model_is_its_base(self, tmp_path: Path, make: Callable[[], nn.Module]) -> None:
        model = make()
        base = begin(model, tmp_path)
        assert base is not None
        assert base.folder == tmp_path / "base"
        assert base.identity == Base.open(model).identity
        start = state_of(model)
        perturb(model, 1)
        live = LiveExpert(model, base)
        assert (live.extra, live.missing) == ((), ())
        for name, info in base.source.infos.items():
            assert torch.equal(base.source.read(name), start[name]), info

    def test_a_new_run_takes_the_place_of_an_old_snapshot(self, tmp_path: Path) -> None:
        begin(Net(), tmp_path)
        base = begin(Net(seed=5), tmp_path)
        assert base is not None
        assert base.identity == Base.open(Net(seed=5)).identity

    def test_a_wrapped_model(self, tmp_path: Path) -> None:
        class DistributedDataParallel(nn.Module):
            def __init__(self, module: nn.Module) -> None:
                super().__init__()
                self.module = module

        base = begin(DistributedDataParallel(Net()), tmp_path)
        assert base is not None
        assert base.identity == Base.open(Net()).identity


class TestResumed:
    def test_the_snapshot_is_found_again(self, tmp_path: Path) -> None:
        base = begin(Net(), tmp_path)
        assert base is not None
        again = resume(expert(0), tmp_path, base.identity.fingerprint)
        assert again is not None
        assert again.identity == base.identity

    def test_the_folder_of_origin_is_found_again(self, tmp_path: Path, pretrained: Path) -> None:
        model = BertForSequenceClassification.from_pretrained(pretrained)
        base = begin(model, tmp_path / "run")
        assert base is not None
        again = resume(perturb(model, 1), tmp_path / "run", base.identity.fingerprint)
        assert again is not None
        assert again.folder == pretrained

    def test_behind_the_snapshot_of_another_run(self, tmp_path: Path, pretrained: Path) -> None:
        begin(Net(), tmp_path / "run")
        fingerprint = Base.open(pretrained).identity.fingerprint
        model = BertForSequenceClassification.from_pretrained(pretrained)
        again = resume(model, tmp_path / "run", fingerprint)
        assert again is not None
        assert again.folder == pretrained

    def test_trained_weights_are_never_taken_for_a_base(self, tmp_path: Path, pretrained: Path) -> None:
        """The folder of origin was overwritten by a later save: its fingerprint is another."""
        model = BertForSequenceClassification.from_pretrained(pretrained)
        base = begin(model, tmp_path / "run")
        assert base is not None
        perturb(model, 1).save_pretrained(pretrained)
        with pytest.raises(HistoryError, match=r"Pass `base`: the folder or hub id of the pretrained model"):
            resume(model, tmp_path / "run", base.identity.fingerprint)

    def test_without_a_recorded_base_nothing_is_certain(self, tmp_path: Path) -> None:
        begin(Net(), tmp_path)
        with pytest.raises(HistoryError, match="Pass `base`"):
            resume(expert(0), tmp_path, None)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]

    def test_a_lost_snapshot(self, tmp_path: Path) -> None:
        base = begin(Net(), tmp_path)
        assert base is not None
        shutil.rmtree(tmp_path / "base")
        with pytest.raises(HistoryError, match="Pass `base`"):
            resume(expert(0), tmp_path, base.identity.fingerprint)

    def test_an_origin_that_holds_no_weights_any_more(self, tmp_path: Path, pretrained: Path) -> None:
        model = BertForSequenceClassification.from_pretrained(pretrained)
        base = begin(model, tmp_path / "run")
        assert base is not None
        (pretrained / "model.safetensors").unlink()
        with pytest.raises(HistoryError, match="Pass `base`"):
            resume(model, tmp_path / "run", base.identity.fingerprint)


@pytest.mark.parametrize("step", [0, 7])
def test_a_peft_model_carries_its_base(tmp_path: Path, step: int) -> None:
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"]))
    assert base_of_run(model, None, tmp_path, step=step, recorded=None) is None
    assert list(tmp_path.iterdir()) == []


def test_a_hub_id_that_is_no_folder_here_is_no_origin(tmp_path: Path) -> None:
    model = BertModel(tiny_encoder().config)
    model.config._name_or_path = "some/where"
    base = begin(model, tmp_path)
    assert base is not None
    assert base.folder == tmp_path / "base"
