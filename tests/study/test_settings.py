from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mergeready.errors import FormatError, OptionError
from mergeready.study.cells import cells_of
from mergeready.study.settings import StudySettings, load_study, parse_study
from tests.study import toy


def content(**changes: object) -> dict[str, object]:
    return {**yaml.safe_load(toy.YAML % "module"), **changes}


def test_every_offender_is_named_with_its_key_and_a_fix() -> None:
    wrong = content(
        train={"learnin_rate": 0.1, "batch_size": 0},
        arms={"plain": {"schedule": {"kind": "cosin"}}},
        methods={"tie": {}, "ties": {"densty": 0.2}},
        setps=[1],
    )
    with pytest.raises(OptionError) as caught:
        parse_study(wrong, "toy.yaml")
    message = str(caught.value)
    assert message.startswith("toy.yaml: ")
    for part in (
        "`arms.plain.learnin_rate` is unknown, did you mean `learning_rate`?",
        "`arms.plain.batch_size`: Input should be greater than or equal to 1 (given: 0)",
        "`arms.plain.schedule.kind`: Input should be 'constant', 'linear', 'cosine' or 'plateau' (given: 'cosin')",
        "`methods.tie`: there is no merge method 'tie'; known are ",
        "`methods.ties`: ties has no parameter densty; it has ",
        "`setps` is unknown, did you mean `steps`?",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"zzz": 1}, "arms, axes, counts, max_evaluations, methods, metric, name,"),
        ({"arms": {"schedule": {"zzz": 1}}}, "adapter, batch_size, checkpoints, clip_norm,"),
        ({"arms": {"a": {"schedule": {"zzz": 1}}}}, "factor, kind, patience, warmup_steps"),
    ],
)
def test_an_unknown_key_is_answered_with_those_of_its_place(changes: dict[str, object], keys: str) -> None:
    with pytest.raises(OptionError, match=f"zzz` is unknown; known keys there are {keys}"):
        parse_study(content(**changes))


def test_unordered_steps_and_names_that_are_no_file_names_are_refused() -> None:
    with pytest.raises(OptionError, match=r"`steps` must rise, as in \[2, 4\]; 'a/b' cannot name a file"):
        parse_study(content(steps=[4, 2], arms={"a/b": {}}))


@pytest.mark.parametrize("text", ["- a list", "a: [", ""])
def test_files_that_are_no_study_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises((FormatError, OptionError), match=r"study\.yaml"):
        load_study(path)


def test_axes_multiply_arms_and_the_innermost_choice_wins() -> None:
    made = parse_study(
        content(
            train={"learning_rate": 0.1, "batch_size": 4},
            arms={"small": {"batch_size": 2}},
            axes={
                "schedule": {"constant": None, "cosine": {"schedule": {"kind": "cosine"}}},
                "rate": {"slow": {"learning_rate": 0.01}, "same": {}},
            },
        )
    )
    assert list(made.arms) == [
        "small+constant+slow",
        "small+constant+same",
        "small+cosine+slow",
        "small+cosine+same",
    ]
    arm = made.arms["small+cosine+slow"]
    assert (arm.batch_size, arm.schedule.kind, arm.learning_rate) == (2, "cosine", 0.01)
    assert made.arms["small+constant+same"].learning_rate == 0.1


def test_without_arms_there_is_one_and_axes_alone_name_theirs() -> None:
    plain = content()
    del plain["arms"]
    assert list(parse_study(plain).arms) == ["plain"]
    assert list(parse_study({**plain, "axes": {"stop": {"early": {"stop": {"patience": 2}}}}}).arms) == [
        "early"
    ]


def test_methods_may_be_names_or_labels_with_parameters() -> None:
    assert list(parse_study(content(methods=["ties", "average"])).methods) == ["ties", "average"]
    made = parse_study(content(methods={"thin": {"method": "ties", "density": 0.1, "scales": [1.0]}}))
    choice = made.methods["thin"]
    assert (choice.make().describe()["density"], choice.scales) == (0.1, [1.0])


def test_cells_cover_every_combination_once() -> None:
    made: StudySettings = parse_study(content(counts=[2, 3]))
    cells = list(cells_of(made, 3))
    # arms × seeds × (steps and pick) × (expert, and methods × counts)
    assert len(cells) == len(set(cells)) == 2 * 2 * 4 * (1 + 2 * 2)
    with pytest.raises(OptionError, match="`counts` names 3 experts, but there are 2 tasks"):
        list(cells_of(made, 2))
