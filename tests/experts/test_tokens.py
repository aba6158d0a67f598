"""Rows of embeddings are paired by token: whatever an expert's ids are, it merges as if they were the base's."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch import nn

from mergeready.errors import MismatchError
from mergeready.experts import dense, open_expert
from mergeready.experts.tokens import RowsInOrder
from mergeready.merging import merge, merge_adapters
from mergeready.weights.state_dict import StateDictSource
from tests.models import perturb, tiny_llama

TOKENS = [f"w{i}" for i in range(60)]
ROWS = 64  # four rows of padding
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def write_tokenizer(folder: Path, ids: Mapping[str, int]) -> None:
    Tokenizer(models.WordLevel(dict(ids), unk_token="w0")).save(str(folder / "tokenizer.json"))


def numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def saved(model: nn.Module, folder: Path, ids: Mapping[str, int]) -> Path:
    model.save_pretrained(folder)
    write_tokenizer(folder, ids)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tiny_llama(), tmp_path / "base", numbered(TOKENS))


def fine_tuned(seed: int = 1) -> nn.Module:
    return perturb(tiny_llama(), seed)


def with_rows(model: nn.Module, rows: torch.Tensor) -> nn.Module:
    """The model with other rows in embeddings and head: row i is what row ``rows[i]`` was, a new one where −1."""
    model = copy.deepcopy(model)
    for module in (model.model.embed_tokens, model.lm_head):
        old = module.weight.detach()
        new = torch.randn(len(rows), old.shape[1], generator=torch.Generator().manual_seed(9))
        new[rows >= 0] = old[rows[rows >= 0]]
        module.weight = nn.Parameter(new)
    model.config.vocab_size = len(rows)
    return model


def deltas(folder: Path, base: Path, *, strict: bool = True) -> dict[str, torch.Tensor]:
    vector = open_expert(folder, base, strict=strict).vector
    return {name: dense(vector[name]) for name in vector}


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_equal_ids_are_left_alone(base: Path, tmp_path: Path) -> None:
    expert = open_expert(saved(fine_tuned(), tmp_path / "x", numbered(TOKENS)), base)
    assert (expert.added_tokens, expert.notes) == ({}, ())


def test_other_ids_are_paired_by_token(base: Path, tmp_path: Path) -> None:
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([shuffled, torch.arange(60, 64)])
    ids = {TOKENS[old]: new for new, old in enumerate(shuffled.tolist())}
    straight = saved(fine_tuned(), tmp_path / "straight", numbered(TOKENS))
    folder = saved(with_rows(fine_tuned(), rows), tmp_path / "shuffled", ids)
    same(deltas(folder, base), deltas(straight, base))
    assert "tokens have other ids" in open_expert(folder, base).notes[0]


def test_padding_is_no_difference(base: Path, tmp_path: Path) -> None:
    """Fewer rows, more rows: as long as all tokens are there, the base's rows decide."""
    straight = deltas(saved(fine_tuned(), tmp_path / "straight", numbered(TOKENS)), base)
    for count in (60, 62, 128):
        rows = torch.arange(count)
        rows[rows >= ROWS] = -1
        folder = saved(with_rows(fine_tuned(), rows), tmp_path / str(count), numbered(TOKENS))
        found = deltas(folder, base)
        for name in straight:
            kept = min(count, ROWS) if name in (EMBEDDING, HEAD) else len(straight[name])
            assert torch.equal(found[name][:kept], straight[name][:kept])
            assert not found[name][kept:].any()


def test_tokens_added_in_the_padding_are_known(base: Path, tmp_path: Path) -> None:
    folder = saved(fine_tuned(), tmp_path / "x", numbered([*TOKENS, "<law>", "<code>"]))
    expert = open_expert(folder, base)
    assert expert.added_tokens == {"<law>": 60, "<code>": 61}
    assert dense(expert.vector[EMBEDDING])[60:62].any()


def test_experts_that_gave_one_row_to_two_tokens_are_refused(base: Path, tmp_path: Path) -> None:
    law = saved(fine_tuned(1), tmp_path / "law", numbered([*TOKENS, "<law>"]))
    code = saved(fine_tuned(2), tmp_path / "code", numbered([*TOKENS, "<code>"]))
    with pytest.raises(MismatchError, match=r"row 60 is '<law>' in \S*law, '<code>' in \S*code.*resize"):
        merge(base, [law, code], output=tmp_path / "out")
    again = saved(fine_tuned(3), tmp_path / "again", numbered([*TOKENS, "<code>", "<law>"]))
    with pytest.raises(MismatchError, match=r"'<law>' is row 60 in \S*law, 61 in \S*again"):
        merge(base, [law, again], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(
        base,
        [law, saved(fine_tuned(4), tmp_path / "twin", numbered([*TOKENS, "<law>"]))],
        output=tmp_path / "ok",
    )


def test_tokens_beyond_the_base_are_refused_or_left_out(base: Path, tmp_path: Path) -> None:
    names = [*TOKENS, "<a>", "<b>", "<c>", "<d>", "<law>", "<code>"]
    rows = torch.cat([torch.arange(ROWS), torch.full((2,), -1)])
    folder = saved(with_rows(fine_tuned(), rows), tmp_path / "x", numbered(names))
    with pytest.raises(
        MismatchError, match=r"no rows for: <law>, <code>\. Add them to the base's.*strict=False"
    ):
        open_expert(folder, base)
    expert = open_expert(folder, base, strict=False)
    assert "stay out: <law>, <code>" in expert.notes[0]
    same(
        deltas(folder, base, strict=False),
        deltas(saved(fine_tuned(), tmp_path / "s", numbered(TOKENS)), base),
    )


def test_the_advised_way_keeps_them(base: Path, tmp_path: Path) -> None:
    """On a base with room for the tokens of both, rows are paired by token although the ids differ."""
    law = with_rows(fine_tuned(1), torch.cat([torch.arange(60), torch.tensor([-1])]))
    code = with_rows(fine_tuned(2), torch.cat([torch.arange(60), torch.tensor([-1])]))
    law_folder = saved(law, tmp_path / "law", numbered([*TOKENS, "<law>"]))
    code_folder = saved(code, tmp_path / "code", numbered([*TOKENS, "<code>"]))
    wide = with_rows(tiny_llama(), torch.cat([torch.arange(60), torch.full((6,), -1)]))
    wide_folder = saved(wide, tmp_path / "wide", numbered([*TOKENS, "<law>", "<code>"]))
    merged = merge(wide_folder, [law_folder, code_folder], output=tmp_path / "out")
    result = type(law).from_pretrained(merged)
    for row, model in ((60, law), (61, code)):
        for get in (lambda m: m.model.embed_tokens.weight, lambda m: m.lm_head.weight):
            torch.testing.assert_close(get(result)[row], get(model)[60], rtol=1e-5, atol=1e-6)


def test_a_renamed_token_is_another_token(base: Path, tmp_path: Path) -> None:
    """A reserved token that was given a meaning: the base's own meaning of the row stays."""
    ids = {("<law>" if token == "w7" else token): index for token, index in numbered(TOKENS).items()}
    folder = saved(fine_tuned(), tmp_path / "x", ids)
    with pytest.raises(MismatchError, match="no rows for: <law>"):
        open_expert(folder, base)
    assert not deltas(folder, base, strict=False)[EMBEDDING][7].any()


def test_an_adapter_that_reads_other_embeddings_is_refused(base: Path, tmp_path: Path) -> None:
    model = perturb(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])), 1, 0.1)
    folder = saved(model, tmp_path / "x", numbered(TOKENS))
    assert len(open_expert(folder, base).vector) == 2
    write_tokenizer(folder, numbered([*TOKENS[1:], TOKENS[0]]))
    with pytest.raises(MismatchError, match=r"numbers tokens otherwise.*'w0', 'w1'"):
        open_expert(folder, base)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]},
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["lm_head"],
            "trainable_token_indices": {"embed_tokens": [1, 3]},
        },
    ],
    ids=["embedding", "head", "rows"],
)
@pytest.mark.parametrize("copies", [True, False])
def test_changes_by_token_number_are_refused_where_numbers_differ(
    options: Mapping[str, object], copies: bool, base: Path, tmp_path: Path
) -> None:
    """Factors and trained rows have no whole rows that could be put in order."""
    model = perturb(get_peft_model(tiny_llama(), LoraConfig(**options)), 1, 0.1)
    model.save_pretrained(tmp_path / "x", save_embedding_layers=copies)
    write_tokenizer(tmp_path / "x", numbered([*TOKENS, "<law>"]))
    assert open_expert(tmp_path / "x", base).added_tokens == {"<law>": 60}
    write_tokenizer(tmp_path / "x", numbered([*TOKENS[1:], TOKENS[0]]))
    with pytest.raises(MismatchError, match="numbers tokens otherwise"):
        open_expert(tmp_path / "x", base)
    write_tokenizer(tmp_path / "x", numbered(["<law>", *TOKENS[1:]]))
    with pytest.raises(MismatchError, match=r"by token number: base_model\S*(lora_|token_adapter)"):
        open_expert(tmp_path / "x", base, strict=False)


def test_an_adapter_with_resized_embeddings(base: Path, tmp_path: Path) -> None:
    """PEFT stores embeddings whole where they were resized; their rows are paired by token like a model's."""
    rows = torch.cat([torch.arange(60), torch.tensor([-1, -1])])
    start = with_rows(tiny_llama(), rows)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = perturb(get_peft_model(start, config), 1, 0.1)
    folder = saved(model, tmp_path / "x", numbered([*TOKENS, "<law>"]))
    expert = open_expert(folder, base)
    assert expert.added_tokens == {"<law>": 60}
    trained = model.base_model.model.model.embed_tokens.modules_to_save["default"].weight.detach()
    old = tiny_llama().model.embed_tokens.weight.detach()
    delta = dense(expert.vector[EMBEDDING])
    assert torch.equal(delta[:61], trained[:61] - old[:61])
    assert not delta[62:].any()
    out = merge_adapters(base, [folder], tmp_path / "out").folder
    same(deltas(out, base), deltas(folder, base))


def test_without_tokenizers_shapes_must_agree(base: Path, tmp_path: Path) -> None:
    folder = saved(with_rows(fine_tuned(), torch.arange(60)), tmp_path / "x", numbered(TOKENS))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(MismatchError, match=r"\(60, 32\), in the base \(64, 32\)"):
        open_expert(folder, base)


def test_a_vocabulary_size_in_a_nested_configuration(base: Path, tmp_path: Path) -> None:
    path = base / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({"text_config": {"vocab_size": config.pop("vocab_size")}} | config))
    folder = saved(with_rows(fine_tuned(), torch.arange(60)), tmp_path / "x", numbered(TOKENS))
    assert dense(open_expert(folder, base).vector[EMBEDDING]).shape == (64, 32)


@given(
    order=st.lists(st.integers(-1, 6), min_size=1, max_size=12),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_any_piece_of_any_order(order: list[int], cut: tuple[float, float]) -> None:
    own, other = torch.arange(21.0).reshape(7, 3), -torch.arange(1.0, 3 * len(order) + 1).reshape(-1, 3)
    whole = torch.stack([own[row] if row >= 0 else other[i] for i, row in enumerate(order)]).reshape(-1)
    source = RowsInOrder(
        StateDictSource({"x": own, "y": own.clone()}),
        StateDictSource({"b": other}),
        {"x": "b"},
        torch.tensor(order),
    )
    assert source.infos["x"].shape == (len(order), 3)
    start, stop = sorted(int(c * len(whole)) for c in cut)
    stop = max(stop, start + 1)
    if stop <= len(whole):
        assert torch.equal(source.read_flat("x", start, stop), whole[start:stop])
    assert torch.equal(source.read("y"), own)
