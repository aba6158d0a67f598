from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from mergeready.errors import BaseMismatchError, FormatError, OptionError, UnsupportedError
from mergeready.experts import Base, BaseIdentity
from mergeready.weights import StateDictSource
from tests.models import tiny_bert, tiny_gpt2, tiny_llama


def test_each_kind_of_base(tmp_path: Path) -> None:
    model = tiny_bert()
    model.save_pretrained(tmp_path)
    folder = Base.open(tmp_path)
    assert (folder.folder, folder.name, folder.source.label) == (tmp_path, str(tmp_path), str(tmp_path))
    file = Base.open(str(tmp_path / "model.safetensors"))
    assert (file.folder, file.name) == (None, str(tmp_path / "model.safetensors"))
    source = StateDictSource(model.state_dict())
    for weights in (model, model.state_dict(), source):
        opened = Base.open(weights)
        assert (opened.folder, opened.name) == (None, None)
        assert opened.identity == folder.identity == file.identity
    assert Base.open(folder) is folder
    assert Base.open(source).source is source


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        Base.open(tmp_path)
    with pytest.raises(FormatError, match="nobody/nothing-of-this-name"):
        Base.open("nobody/nothing-of-this-name")
    with pytest.raises(OptionError, match="revision"):
        Base.open(tmp_path, revision="main")


def test_pickle_needs_a_flag(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2, 2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match="can run code"):
        Base.open(tmp_path)
    assert Base.open(tmp_path, allow_pickle=True).source.read("x").sum() == 4


def test_eight_bit_floats_are_refused() -> None:
    """Their scales are other tensors, so that adding to them would change something else than the weight."""
    state = {"x": torch.ones(2, 2).to(torch.float8_e4m3fn), "x_scale": torch.ones(1)}
    with pytest.raises(UnsupportedError, match="8-bit floats: x"):
        Base.open(state)


def test_which_embeddings_are_tied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (tiny_gpt2, tiny_llama, tiny_bert):
        make().save_pretrained(tmp_path / make.__name__)
    tied = {"transformer.wte.weight"}
    for form in (tiny_gpt2(), tiny_gpt2().state_dict(), tmp_path / "tiny_gpt2"):
        assert Base.open(form).tied == tied
    for form in (tiny_llama(), tmp_path / "tiny_llama", tiny_bert(), tmp_path / "tiny_bert"):
        assert Base.open(form).tied == set()
    monkeypatch.chdir(
        tmp_path / "tiny_gpt2"
    )  # another model's configuration, which says nothing about this one
    clones = {name: tensor.clone() for name, tensor in tiny_bert().state_dict().items()}
    assert Base.open(clones).tied == set()


SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "embedding_size": 16,
}


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("BertForMaskedLM", "bert.embeddings.word_embeddings.weight"),
        ("BertForPreTraining", "bert.embeddings.word_embeddings.weight"),
        ("T5ForConditionalGeneration", "shared.weight"),
        ("BertModel", None),
        ("BertForTokenClassification", None),
        ("ElectraForPreTraining", None),
    ],
)
def test_which_architectures_tie_their_embeddings(name: str, tied: str | None, tmp_path: Path) -> None:
    """A change of the embeddings is one of the head as well, which folders do not hold apart."""
    kind = getattr(transformers, name)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32} if name.startswith("T5") else {}
    kind(kind.config_class(**SIZES | sizes)).save_pretrained(tmp_path)
    assert Base.open(tmp_path).tied == ({tied} if tied else set())


@pytest.mark.parametrize("config", ["", "[]", "{}", '{"architectures": null}', '{"text_config": null}'])
def test_a_folder_without_a_readable_configuration_ties_nothing(tmp_path: Path, config: str) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    assert Base.open(tmp_path).tied == set()


def named(name: str | None) -> Base:
    return Base(StateDictSource({}), BaseIdentity({}), name=name)


@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("org/model", "org/model"),
        ("org/model", None),
        (None, "org/model"),
        ("org/model", "/home/someone/checkpoints/base"),
        ("org/model", "runs/base/checkpoint-3"),
        ("org/model", "model"),
        ("/data/model", "org/model"),
        (".", "org/model"),
    ],
)
def test_only_two_hub_ids_can_contradict_each_other(name: str | None, declared: str | None) -> None:
    named(name).require_name(declared, "expert")


def test_another_hub_id_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BaseMismatchError, match="expert says that its base is org/other, not org/model"):
        named("org/model").require_name("org/other", "expert")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "other").mkdir(parents=True)
    named("org/model").require_name("org/other", "expert")  # a local folder that looks like an id
