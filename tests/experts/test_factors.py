"""Files of Kronecker factors: round trip, sums against dense Kronecker products, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergeready.errors import BaseMismatchError, FormatError, MismatchError, NonFiniteError, OptionError
from mergeready.experts import Base
from mergeready.experts.factors import (
    FactoredLayer,
    KroneckerFactors,
    each_sum,
    is_factors,
    open_factors,
    sum_factors,
)

LAYERS = {"a.weight": FactoredLayer(3, 2, "a.bias"), "b.weight": FactoredLayer(2, 4, None, transposed=True)}


def moment(seed: int, side: int) -> Tensor:
    x = torch.randn(3 * side, side, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / len(x)


def made(seed: int = 0, label: str = "law") -> KroneckerFactors:
    pairs = {
        name: (moment(seed + 2 * i, layer.outputs), moment(seed + 2 * i + 1, layer.columns))
        for i, (name, layer) in enumerate(LAYERS.items())
    }
    return KroneckerFactors.of(pairs, LAYERS, label=label, base=BASE.identity, facts={"examples": 128})


STATE = {"a.weight": torch.ones(3, 2), "a.bias": torch.zeros(3), "b.weight": torch.ones(4, 2)}
BASE = Base.open(STATE)


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    path = made().save(tmp_path / "law.factors.safetensors")
    back = open_factors(path, BASE)
    assert (back.label, back.layers, back.facts, back.base) == (
        "law",
        LAYERS,
        {"examples": 128},
        BASE.identity,
    )
    for name in LAYERS:
        for ours, theirs in zip(back.read(name), made().read(name), strict=True):
            assert torch.equal(ours, theirs)
    assert is_factors(path)
    assert not is_factors(tmp_path / "model.safetensors")


def test_one_tensor_may_serve_several_layers(tmp_path: Path) -> None:
    """As one that holds the inputs of query, key and value does."""
    shared, layers = moment(0, 3), {"query": FactoredLayer(3, 3), "key": FactoredLayer(3, 3)}
    factors = KroneckerFactors.of(dict.fromkeys(layers, (shared, shared)), layers)
    for each in (factors, KroneckerFactors.load(factors.save(tmp_path / "x")), sum_factors([factors])):
        for name in layers:
            assert all(torch.equal(part, shared) for part in each.read(name))


def test_half_the_size_in_bfloat16(tmp_path: Path) -> None:
    path = made().save(tmp_path / "x", torch.bfloat16)
    for name in LAYERS:
        for ours, theirs in zip(KroneckerFactors.load(path).read(name), made().read(name), strict=True):
            assert torch.equal(ours, theirs.bfloat16().float())


def test_nothing_but_second_moments_and_names_is_in_a_file(tmp_path: Path) -> None:
    path = made(label="law").save(tmp_path / "x")
    assert set(load_file(path)) == {f"{kind}/{name}" for name in LAYERS for kind in ("inputs", "outputs")}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert set(metadata) == {"format", "mergeready.factors", "mergeready.about"}
    assert str(tmp_path) not in "".join(metadata.values())


def test_sums_against_dense_products() -> None:
    several = [made(seed) for seed in (0, 10, 20)]
    weights = [0.5, 1.0, 0.25]
    found = sum_factors(several, weights)
    for name in LAYERS:
        pairs = [[f.double() for f in one.read(name)] for one in several]
        exact = torch.kron(
            sum(B for B, _ in pairs), sum(w * A for w, (_, A) in zip(weights, pairs, strict=True))
        )
        torch.testing.assert_close(
            torch.kron(*(f.double() for f in found.read(name))), exact, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_sum_of_equals_is_exact(count: int) -> None:
    found = sum_factors([made()] * count)
    for name in LAYERS:
        exact = count * torch.kron(*made().read(name))
        torch.testing.assert_close(torch.kron(*found.read(name)), exact, rtol=1e-5, atol=1e-6)


def test_a_sum_does_not_change_what_was_added() -> None:
    first = made()
    before = {name: [factor.clone() for factor in first.read(name)] for name in LAYERS}
    sum_factors([first, made(10)])
    assert all(torch.equal(a, b) for n in LAYERS for a, b in zip(before[n], first.read(n), strict=True))


def test_factors_of_different_bases_are_not_added() -> None:
    other = Base.open({name: value + 1 for name, value in STATE.items()})
    pairs = {name: made().read(name) for name in LAYERS}
    stranger = KroneckerFactors.of(pairs, LAYERS, label="stranger", base=other.identity)
    with pytest.raises(BaseMismatchError, match="factors stranger was made for another base"):
        sum_factors([made(), stranger])
    unknown = KroneckerFactors.of(pairs, LAYERS)
    assert sum_factors([unknown, made()]).base == BASE.identity


def test_whole_numbers_hold_no_factors(tmp_path: Path) -> None:
    path = made().save(tmp_path / "x")
    before = path.read_bytes()
    with pytest.raises(OptionError, match=r"`dtype` .* not torch\.int8"):
        made().save(path, torch.int8)
    assert path.read_bytes() == before


def test_a_sum_names_whose_factors_are_broken() -> None:
    several = [made(seed, label=str(seed)) for seed in (0, 10)]
    broken = {name: made(20).read(name) for name in LAYERS}
    for bad, error, message in (
        (torch.full((3, 3), float("nan")), NonFiniteError, r"outputs/a.weight of c holds NaN"),
        (
            torch.eye(3).index_fill(0, torch.tensor([1]), -99.0),
            FormatError,
            "of c is no mean of outer products",
        ),
        (99 * torch.ones(3, 3).triu(), FormatError, "of c is no mean of outer products"),
    ):
        pairs = broken | {"a.weight": (bad, broken["a.weight"][1])}
        with pytest.raises(error, match=message):
            sum_factors([*several, KroneckerFactors.of(pairs, LAYERS, label="c", base=BASE.identity)])


def test_sums_of_more_than_a_piece_and_of_some_layers() -> None:
    layer = FactoredLayer(300, 280)
    several = [KroneckerFactors.of({"w": (moment(s, 300), moment(s + 1, 280))}, {"w": layer}) for s in (0, 2)]
    ((name, found, (B, A)),) = each_sum(several, [1.0, 0.25], lambda name, layer: layer.outputs == 300)
    assert (name, found) == ("w", layer)
    (B0, A0), (B1, A1) = (one.read("w") for one in several)
    assert torch.equal(B, B0 + B1)
    torch.testing.assert_close(A, A0 + 0.25 * A1)
    assert not list(each_sum(several, wanted=lambda name, layer: False))


def test_what_rounding_leaves_counts_as_symmetric() -> None:
    matrix = moment(0, 300)
    noise = torch.randn(300, 300, generator=torch.Generator().manual_seed(1)).clamp(-2, 2)
    nearly = matrix + 2e-3 * matrix.abs().max() * noise
    KroneckerFactors.of({"w": (nearly, nearly.clone())}, {"w": FactoredLayer(300, 300)}).read("w")
    nearly[7, 200] += 0.1 * matrix.abs().max()
    with pytest.raises(FormatError, match="not symmetric"):
        KroneckerFactors.of({"w": (nearly, matrix)}, {"w": FactoredLayer(300, 300)}).read("w")


def test_layers_that_some_lack_are_free_there() -> None:
    short = KroneckerFactors.of({"a.weight": made().read("a.weight")}, {"a.weight": LAYERS["a.weight"]})
    found = sum_factors([made(), short])
    assert set(found.layers) == set(LAYERS)
    assert torch.equal(found.read("b.weight")[1], 0.5 * made().read("b.weight")[1])


def test_the_matrix_of_a_layer() -> None:
    weight, bias = torch.arange(6.0).reshape(3, 2), torch.tensor([7.0, 8.0, 9.0])
    assert torch.equal(LAYERS["a.weight"].matrix(weight, bias), torch.cat([weight, bias[:, None]], 1))
    assert torch.equal(LAYERS["a.weight"].matrix(weight, None)[:, 2], torch.zeros(3))
    assert torch.equal(
        LAYERS["b.weight"].matrix(torch.arange(8.0).reshape(4, 2), None)[1], torch.arange(1.0, 8, 2)
    )


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_file_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    path = made().save(tmp_path / "x")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(FormatError, match="not a complete safetensors file"):
        KroneckerFactors.load(path)


def test_hostile_files_are_refused(tmp_path: Path) -> None:
    path = made().save(tmp_path / "x")
    tensors, metadata = load_file(path), made().metadata()

    def load(**changes: object) -> KroneckerFactors:
        about = metadata | {k: v for k, v in changes.items() if isinstance(v, str)}
        values = tensors | {k: v for k, v in changes.items() if isinstance(v, Tensor)}
        save_file(values, path, about)
        return KroneckerFactors.load(path)

    with pytest.raises(FormatError, match=r"extra belongs to no layer"):
        load(extra=torch.ones(2))
    with pytest.raises(FormatError, match=r"inputs/a.weight is \(2, 2\) of torch.float32, not \(3, 3\)"):
        load(**{"inputs/a.weight": torch.ones(2, 2)})
    with pytest.raises(FormatError, match=r"of torch.int64"):
        load(**{"inputs/a.weight": torch.ones(3, 3, dtype=torch.int64)})
    with pytest.raises(FormatError, match="schema '9'"):
        load(**{"mergeready.factors": "9"})
    for about in ("", "[]", "{}", "[" * 100_000, '{"label":"x","facts":{},"base":null,"layers":{"w":{}}}'):
        with pytest.raises(FormatError, match="does not describe itself"):
            load(**{"mergeready.about": about})
    with pytest.raises(BaseMismatchError):
        load(
            **{
                "mergeready.about": metadata["mergeready.about"].replace(
                    '"fingerprint": "', '"fingerprint": "0'
                )
            }
        )
    with pytest.raises(NonFiniteError, match=r"inputs/a.weight of law holds NaN"):
        load(**{"inputs/a.weight": torch.full((3, 3), float("nan"))}).read("a.weight")
    with pytest.raises(FormatError, match="no mean of outer products"):
        load(**{"outputs/a.weight": torch.eye(3).index_fill(0, torch.tensor([1]), -1.0)}).read("a.weight")
    with pytest.raises(FormatError, match="no mean of outer products"):
        load(**{"outputs/a.weight": torch.ones(3, 3).triu()}).read("a.weight")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(FormatError, match="holds no Kronecker factors"):
        KroneckerFactors.load(path)


def test_a_failed_write_leaves_the_older_file(tmp_path: Path) -> None:
    path = made(label="old").save(tmp_path / "x")
    broken = made()
    broken.source._tensors.pop("inputs/b.weight")  # type: ignore[attr-defined]
    with pytest.raises(KeyError):
        broken.save(path)
    assert KroneckerFactors.load(path).label == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_belongs_to_another_base_is_refused() -> None:
    with pytest.raises(BaseMismatchError):
        open_factors(made(), Base.open({name: t + 1 for name, t in STATE.items()}))
    nameless = KroneckerFactors.of({"a.weight": made().read("a.weight")}, {"a.weight": LAYERS["a.weight"]})
    with pytest.raises(MismatchError, match=r"a.weight"):
        open_factors(nameless, Base.open({"a.weight": torch.ones(3, 2)}))
    with pytest.raises(MismatchError, match=r"a.weight"):
        open_factors(nameless, Base.open({"a.weight": torch.ones(2, 3), "a.bias": torch.ones(3)}))


def test_what_does_not_add_up_is_refused() -> None:
    with pytest.raises(OptionError, match="no factors to add"):
        sum_factors([])
    with pytest.raises(OptionError, match="2 numbers"):
        sum_factors([made(), made()], [1.0])
    with pytest.raises(OptionError, match="none negative"):
        sum_factors([made()], [-1.0])
    other = KroneckerFactors.of(
        {"a.weight": (moment(0, 3), moment(1, 2))}, {"a.weight": FactoredLayer(3, 2)}, label="x"
    )
    with pytest.raises(MismatchError, match=r"a.weight is"):
        sum_factors([made(), other])
