"""Prototypes of experts against singular vectors by torch.linalg.svd, for weights stored either way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from mergeready.errors import FormatError, OptionError
from mergeready.experts import Base, LiveExpert, open_expert
from mergeready.experts.delta import Dense, LowRank, Rows
from mergeready.experts.fingerprint import Fingerprint
from mergeready.metrics.router import arrow_scores, prototype, routed_layers
from mergeready.metrics.take_fingerprint import take_fingerprint
from tests.cli.commands import run
from tests.experts.test_fingerprint import altered
from tests.experts.test_svd import matrix
from tests.merging.worlds import adapted
from tests.models import perturb, tiny_bert, tiny_gpt2, tiny_llama


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(change: Tensor, *, inputs_first: bool = False) -> Tensor:
    left, _, right = torch.linalg.svd(change.double(), full_matrices=False)
    return left[:, 0] if inputs_first else right[0]


def parallel(a: Tensor, b: Tensor) -> float:
    return float((a.double() @ b.double()).abs())


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 6), st.integers(0, 99), st.booleans())
@settings(max_examples=30, deadline=None)
def test_it_is_the_first_singular_vector_of_factors(
    rows: int, columns: int, rank: int, seed: int, first: bool
) -> None:
    B, A = normal(rows, rank, seed=seed), normal(rank, columns, seed=seed + 100)
    found = prototype(LowRank(B, A, (rows, columns)), inputs_first=first)
    assert found.shape == (rows if first else columns,)
    assert float(found.norm()) == pytest.approx(1, abs=1e-5)
    assert float(found[found.abs().argmax()]) > 0
    # Singular values may lie close together, vectors are then arbitrary: what counts is how strong the answer is.
    change = (B @ A).double()
    answer = float(((change.T if first else change) @ found.double()).norm())
    assert answer == pytest.approx(float(torch.linalg.matrix_norm(change, 2)), rel=1e-4)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (600, 550)])
@pytest.mark.parametrize("first", [False, True])
def test_it_is_the_first_singular_vector_of_whole_matrices(shape: tuple[int, int], first: bool) -> None:
    change = matrix(0.8 ** torch.arange(30, dtype=torch.float64), *shape).float()
    found = prototype(Dense(change), inputs_first=first)
    assert parallel(found, expected(change, inputs_first=first)) == pytest.approx(1, abs=1e-5)


def test_changed_rows_count_as_the_matrix_they_stand_for() -> None:
    rows = Rows(index=torch.tensor([3, 1]), value=normal(2, 5), shape=(6, 5))
    whole = torch.zeros(6, 5)
    whole[[3, 1]] = normal(2, 5)
    assert parallel(prototype(rows), expected(whole)) == pytest.approx(1, abs=1e-5)


def test_how_layers_are_stored_is_told_by_their_biases() -> None:
    def layers(model: torch.nn.Module) -> dict[str, bool]:
        source = Base.open(model).source
        return routed_layers(source, list(source.infos))

    gpt2 = layers(tiny_gpt2())
    assert len(gpt2) == 2 * 4  # no embeddings of tokens or positions
    assert all(gpt2.values())  # the square ones too
    assert not any(layers(tiny_bert()).values())
    assert "bert.embeddings.position_embeddings.weight" not in layers(tiny_bert())
    llama = layers(tiny_llama())  # without biases
    assert len(llama) == 2 * 7
    assert not any(llama.values())


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_an_adapter_answers_its_prototype_most(make: object, tmp_path: Path) -> None:
    """Through PEFT's own forward pass: no other input of the same length changes a layer's output by more."""
    from peft import LoraConfig, get_peft_model

    base = make()  # type: ignore[operator]
    targets = ["c_proj"] if make is tiny_gpt2 else ["q_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=targets, fan_in_fan_out=make is tiny_gpt2)
    adapted_model = perturb(get_peft_model(make(), config), 3, 0.3)  # type: ignore[operator]
    opened = Base.open(base)
    adapted_model.save_pretrained(tmp_path / "law")
    made = take_fingerprint(open_expert(tmp_path / "law", opened).vector, opened, router=True)
    made = Fingerprint.load(made.save(tmp_path / "law.fingerprint.safetensors"))
    checked = 0
    for name, module in adapted_model.base_model.model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        vector = made.router[f"{name}.weight"]
        B, A = module.lora_B["default"].weight.double(), module.lora_A["default"].weight.double()
        strongest = float(torch.linalg.matrix_norm(B @ A, 2))
        assert float((B @ A @ vector.double()).norm()) == pytest.approx(strongest, rel=1e-3)
        checked += 1
    assert checked == len(made.router) == 4


def test_without_being_asked_there_is_none_and_files_are_as_before(tmp_path: Path) -> None:
    base = Base.open(tiny_bert())
    made = take_fingerprint(open_expert(perturb(tiny_bert(), 1, 0.02), base).vector, base)
    assert not made.router
    path = made.save(tmp_path / "law.fingerprint.safetensors")
    assert set(load_file(path)) == {"norms", "samples"}
    assert not Fingerprint.load(path).router


def test_it_comes_back_from_a_file_and_takes_two_bytes_an_input(tmp_path: Path) -> None:
    base = Base.open(tiny_bert())
    made = take_fingerprint(open_expert(perturb(tiny_bert(), 1, 0.02), base).vector, base, router=True)
    path = made.save(tmp_path / "law.fingerprint.safetensors")
    back = Fingerprint.load(path)
    assert list(back.router) == list(made.router)
    assert all(torch.equal(back.router[name], vector) for name, vector in made.router.items())
    inputs = sum(made.shapes[name][1] for name in made.router)
    assert load_file(path)["router"].nbytes == 2 * inputs


@pytest.mark.parametrize(
    ("tensors", "said"),
    [({"router": torch.ones(3)}, "router is"), ({"router": torch.ones(3, 3)}, "router is")],
)
def test_damaged_files_are_refused(tmp_path: Path, tensors: dict[str, Tensor], said: str) -> None:
    base = Base.open(tiny_bert())
    made = take_fingerprint(open_expert(perturb(tiny_bert(), 1, 0.02), base).vector, base, router=True)
    path = made.save(tmp_path / "law.fingerprint.safetensors")
    altered(path, tensors)
    with pytest.raises(FormatError, match=said):
        Fingerprint.load(path)


def test_names_and_widths_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base = Base.open(tiny_bert())
    made = take_fingerprint(open_expert(perturb(tiny_bert(), 1, 0.02), base).vector, base, router=True)
    for wrong in ({"nowhere.weight": torch.ones(3)}, {next(iter(made.router)): torch.ones(7)}):
        path = Fingerprint(**(vars(made) | {"router": wrong})).save(tmp_path / "x.fingerprint.safetensors")
        with pytest.raises(FormatError, match="router is of"):
            Fingerprint.load(path)


def test_scores_send_inputs_to_the_expert_that_answers_them() -> None:
    base = Base.open(tiny_bert())
    experts = [
        take_fingerprint(
            LiveExpert(adapted(tiny_bert(), seed=seed), base).vector, base, router=True, label=f"e{seed}"
        )
        for seed in (1, 2)
    ]
    name = next(iter(experts[0].router))
    inputs = torch.stack([experts[1].router[name], -3 * experts[0].router[name]])
    scores = arrow_scores(inputs, name, experts)
    assert scores.argmax(dim=1).tolist() == [1, 0]
    assert float(scores[1, 0]) == pytest.approx(3, rel=1e-3)
    assert arrow_scores(inputs, "elsewhere.weight", experts).tolist() == [[0, 0], [0, 0]]
    with pytest.raises(OptionError, match="width 32, not 5"):
        arrow_scores(torch.ones(2, 5), name, experts)
    bare = take_fingerprint(LiveExpert(adapted(tiny_bert(), seed=1), base).vector, base, label="bare")
    with pytest.raises(OptionError, match="bare hold no router artefacts"):
        arrow_scores(inputs, name, [*experts, bare])


def test_from_the_command_line(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    perturb(tiny_bert(), 1, 0.02).save_pretrained(tmp_path / "law")
    path = tmp_path / "law.fingerprint.safetensors"
    done = run("fingerprint", tmp_path / "law", "--base", tmp_path / "base", "--router", "-o", path)
    assert done.exit_code == 0, done.output
    assert Fingerprint.load(path).router
