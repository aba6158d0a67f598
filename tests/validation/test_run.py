from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mergeready.errors import FormatError, OptionError
from mergeready.experts import Base
from mergeready.experts.record import write_record
from mergeready.validation import CHECKS, Report, validate
from mergeready.validation.check import LEVELS, Check, NotCheckedError, passed
from mergeready.validation.run import run_check
from mergeready.validation.subject import Subject
from tests.models import tiny_bert
from tests.validation.experts import (
    edit_json,
    edit_tensors,
    write_adapter,
    write_base,
    write_full,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("world") / "base")


def statuses(report: Report) -> dict[str, str]:
    return {verdict.id: verdict.status for verdict in report.verdicts}


def failed(report: Report) -> set[str]:
    return {verdict.id for verdict in report.verdicts if verdict.status == "failed"}


def test_a_healthy_adapter(base: Path, tmp_path: Path) -> None:
    report = validate(write_adapter(tmp_path / "law"), base, level="base")
    assert failed(report) == {"P503"}  # an adapter that was not trained with us has no record
    assert statuses(report)["B102"] == "not checked"
    assert report.exit_code() == 0
    assert report.headline.endswith("on the levels of behaviour and composition.")
    assert report.facts["format"] == "peft"


def test_a_healthy_full_model(base: Path, tmp_path: Path) -> None:
    report = validate(write_full(tmp_path / "law"), base, level="base")
    assert failed(report) == {"P503"}
    assert statuses(report)["B102"] == "passed"
    assert statuses(report)["F002"] == "not checked"


def test_a_recorded_base_is_compared_exactly(base: Path, tmp_path: Path) -> None:
    law = write_adapter(tmp_path / "law")
    write_record(law, Base.open(base).identity)
    report = validate(law, base, level="base")
    assert not failed(report)
    assert statuses(report)["B102"] == "passed"
    other = validate(law, write_base(tmp_path / "other", seed=5), level="base")
    assert "B102" in failed(other)
    assert statuses(other)["B103"] == "not checked"


def test_without_a_base_only_files_are_checked(tmp_path: Path) -> None:
    report = validate(write_adapter(tmp_path / "law"))
    assert all(v.status == "not checked" for v in report.verdicts if v.level == "base")
    assert report.levels_checked == ["file"]
    assert not report.is_merge_ready
    assert report.exit_code() == 0


def test_levels_are_checked_up_to_the_one_asked_for(base: Path, tmp_path: Path) -> None:
    law = write_full(tmp_path / "law")
    assert {v.level for v in validate(law, base, level="file").verdicts} == {"file"}
    assert {v.level for v in validate(law, base, level="base").verdicts} == {"file", "base"}
    with pytest.raises(OptionError, match="level"):
        validate(law, base, level="deep")  # type: ignore[arg-type]


def test_severities_and_exit_codes(base: Path, tmp_path: Path) -> None:
    law = write_full(tmp_path / "law")
    (law / "README.md").unlink()
    report = validate(law, base, level="base")
    assert failed(report) == {"P501", "P503"}
    assert [report.exit_code(s) for s in ("error", "warning", "info")] == [0, 1, 1]


def test_the_reason_of_many_checks_is_told_once(base: Path, tmp_path: Path) -> None:
    law = write_full(tmp_path / "law")
    weights = law / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    messages = {verdict.id: verdict.message for verdict in validate(law, base, level="base").verdicts}
    assert sum("not a complete safetensors file" in message for message in messages.values()) == 1
    assert "not a complete safetensors file" in messages["F001"]
    assert messages["D200"] == "could not run: see F001"


def test_thresholds_of_ones_own(base: Path, tmp_path: Path) -> None:
    law = write_full(tmp_path / "law")
    mine = tmp_path / "mine.yaml"
    mine.write_text("D201: {relative_norm: 1.0e-6}", encoding="utf-8")
    report = validate(law, base, level="base", thresholds=mine)
    [drift] = [v for v in report.verdicts if v.id == "D201"]
    assert (drift.status, drift.threshold) == ("failed", 1e-6)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("D201: {relativ_norm: 1}", OptionError, "D201.relativ_norm"),
        ("X999: {a: 1}", OptionError, "X999.a"),
        ("D201: {relative_norm: much}", OptionError, "no numbers"),
        ("D201: 3", FormatError, "must map"),
        ("- a", FormatError, "must map"),
        ("a: [", FormatError, "is not YAML"),
    ],
)
def test_bad_thresholds(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(error, match=message):
        validate(write_full(tmp_path / "law"), thresholds=tmp_path / "mine.yaml")


def test_the_report_is_json(base: Path, tmp_path: Path) -> None:
    content = json.loads(json.dumps(validate(write_full(tmp_path / "law"), base).to_json(), allow_nan=False))
    assert content["schema"] == 1
    assert {v["id"] for v in content["verdicts"]} == {c.id for c in CHECKS}


def test_checks_are_in_order_and_say_what_to_do() -> None:
    levels = [LEVELS.index(c.level) for c in CHECKS]
    assert levels == sorted(levels)
    assert all(c.fix.endswith(".") and not c.title.endswith(".") for c in CHECKS)
    assert len({c.id for c in CHECKS}) == len(CHECKS)


def test_a_check_that_lacks_something_is_not_checked(tmp_path: Path) -> None:
    subject = Subject(write_full(tmp_path / "law"))

    def lacks(subject: Subject, limits: object) -> object:
        raise NotCheckedError("no moon")

    def breaks(subject: Subject, limits: object) -> object:
        raise OSError("disk on fire")

    about = {"id": "X1", "level": "file", "severity": "error", "title": "x", "fix": "y."}
    assert run_check(Check(**about, run=lacks), subject, {}).message == "no moon"
    assert run_check(Check(**about, run=breaks), subject, {}).message == "could not run: disk on fire"
    assert run_check(Check(**about, run=breaks), subject, {}).status == "not checked"
    fine = run_check(Check(**about, run=lambda s, limits: passed("well")), subject, {})
    assert (fine.status, fine.fix) == ("passed", "")


def test_an_expert_of_the_hub_is_called_by_its_id(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the commit that its folder is called after."""
    snapshot, peer = write_full(tmp_path / "0123abcd"), write_full(tmp_path / "code", seed=2)
    monkeypatch.setattr("mergeready.validation.subject.resolve_folder", lambda *_, **__: snapshot)
    pairs = validate("org/law", base, peers=[peer]).pairs
    assert pairs is not None
    assert pairs.labels == ["org/law", "code"]


def test_an_expert_is_no_peer_of_its_own(base: Path, tmp_path: Path) -> None:
    """Merged with itself it keeps all that it gained."""
    law, code = write_full(tmp_path / "law"), write_full(tmp_path / "code", seed=2)
    (tmp_path / "again").symlink_to(law)
    for peer in (law, str(law) + "/", tmp_path / "again"):
        with pytest.raises(OptionError, match="is the expert itself"):
            validate(law, base, peers=[code, peer])


def test_nothing_to_validate(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        validate(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match="is a file"):
        validate(tmp_path / "file")


def others_of_the_change(report: Report) -> set[str]:
    """What is said by checks of the change, which need one that is there."""
    found = [v for v in report.verdicts if v.id in ("D201", "D202", "D203", "D204", "D205")]
    return {v.message for v in found if v.status == "not checked"}


class TestWhatIsWrong:
    def test_nan(self, base: Path, tmp_path: Path) -> None:
        law = write_full(tmp_path / "law")

        def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            tensors["classifier.weight"][0, 0] = float("nan")
            return tensors

        edit_tensors(law / "model.safetensors", spoil)
        report = validate(law, base, level="base")
        assert {"F003", "D200"} <= failed(report)
        found = {v.id: v for v in report.verdicts}
        assert found["F003"].where == ("classifier.weight",)
        assert "diverged" in found["D200"].fix
        assert "is its base" not in found["D200"].fix
        assert others_of_the_change(report) == {"D200 failed"}

    def test_names_cannot_rewrite_the_terminal(self, base: Path, tmp_path: Path) -> None:
        law = write_adapter(tmp_path / "law")
        edit_tensors(law / "adapter_model.safetensors", lambda t: t | {"\x1b[2Jx": torch.ones(2)})
        edit_json(law / "adapter_config.json", base_model_name_or_path="org/\ud800")
        verdicts = {v.id: v for v in validate(law, base, level="base").verdicts}
        assert "\\x1b[2Jx is not a name of this format" in verdicts["F002"].message
        assert "\\ud800" in verdicts["B101"].message
        assert all(
            c.isprintable() or c == "\n" for v in verdicts.values() for c in v.message + "".join(v.where)
        )

    def test_untrained(self, base: Path, tmp_path: Path) -> None:
        law = write_adapter(tmp_path / "law")
        edit_tensors(
            law / "adapter_model.safetensors", lambda t: {k: v * ("lora_A" in k) for k, v in t.items()}
        )
        [found] = [v for v in validate(law, base, level="base").verdicts if v.id == "F004"]
        assert (found.status, found.severity) == ("failed", "error")

    def test_a_module_that_no_loss_reaches_is_a_warning(self, base: Path, tmp_path: Path) -> None:
        """As the pooler of an encoder whose tokens are averaged: the rest of the adapter is as good as any."""
        law = write_adapter(tmp_path / "law")
        name = "layer.1.attention.self.value.lora_B"
        edit_tensors(
            law / "adapter_model.safetensors", lambda t: {k: v * (name not in k) for k, v in t.items()}
        )
        report = validate(law, base, level="base")
        [found] = [v for v in report.verdicts if v.id == "F004"]
        assert (found.status, found.severity, found.value) == ("failed", "warning", 1)
        assert "does the loss depend on them" in found.fix
        assert (report.exit_code("error"), report.exit_code("warning")) == (0, 1)

    def test_exchanged_factors(self, base: Path, tmp_path: Path) -> None:
        law = write_adapter(tmp_path / "law")

        def exchange(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {
                k.replace("lora_A", "@").replace("lora_B", "lora_A").replace("@", "lora_B"): v
                for k, v in tensors.items()
            }

        edit_tensors(law / "adapter_model.safetensors", exchange)
        assert "F002" in failed(validate(law, base, level="base"))

    def test_half_a_pair(self, base: Path, tmp_path: Path) -> None:
        law = write_adapter(tmp_path / "law")
        edit_tensors(law / "adapter_model.safetensors", lambda t: dict(list(t.items())[1:]))
        assert "F002" in failed(validate(law, base, level="base"))

    def test_another_base_of_equal_shapes(self, base: Path, tmp_path: Path) -> None:
        other = write_base(tmp_path / "other", seed=8)
        report = validate(write_full(tmp_path / "law"), other, level="base")
        assert "B102" in failed(report)
        assert report.exit_code() == 1

    def test_the_base_itself(self, base: Path) -> None:
        report = validate(base, base, level="base")
        assert "D200" in failed(report)
        assert others_of_the_change(report) == {"D200 failed"}
        assert "is its base" in next(v.fix for v in report.verdicts if v.id == "D200")

    def test_the_base_itself_in_16_bits(self, tmp_path: Path) -> None:
        tiny_bert().to(torch.bfloat16).save_pretrained(tmp_path)
        report = validate(tmp_path, tmp_path, level="base")
        assert "D200" in failed(report)
        assert next(v.message for v in report.verdicts if v.id == "D204") == "D200 failed"

    def test_a_residual_base(self, base: Path, tmp_path: Path) -> None:
        law = write_adapter(tmp_path / "law")
        edit_json(law / "adapter_config.json", init_lora_weights="pissa")
        report = validate(law, base, level="base")
        assert "F006" in failed(report)
        assert "pissa" in next(v.message for v in report.verdicts if v.id == "F006")

    def test_pickles_are_named_and_not_opened(self, base: Path, tmp_path: Path) -> None:
        law = write_full(tmp_path / "law")
        (law / "pytorch_model.bin").write_bytes(
            b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR."
        )
        report = validate(law, base, level="base")
        assert failed(report) == {"F005", "P503"}
        assert not (tmp_path / "owned").exists()

    def test_private_texts(self, base: Path, tmp_path: Path) -> None:
        law = write_adapter(tmp_path / "law")
        edit_json(law / "adapter_config.json", base_model_name_or_path="/home/me/base")
        token = "hf_" + "a" * 34
        (law / "README.md").write_text(f"{token} or me@example.org", encoding="utf-8")
        [verdict] = [v for v in validate(law, base, level="file").verdicts if v.id == "F007"]
        assert verdict.where == (
            "a local path in adapter_config.json",
            "an access token in README.md",
            "an e-mail address in README.md",
        )
        assert token not in json.dumps(verdict.to_json())

    def test_a_lost_shape(self, base: Path, tmp_path: Path) -> None:
        law = write_full(tmp_path / "law")
        edit_tensors(
            law / "model.safetensors",
            lambda t: {k: (v[:2] if k == "classifier.bias" else v) for k, v in t.items()},
        )
        assert "B103" in failed(validate(law, base, level="base"))

    def test_rounding(self, base: Path, tmp_path: Path) -> None:
        """The estimate without the unrounded weights is near what rounding did."""
        fine, coarse = (
            write_full(tmp_path / "a", amount=1e-4),
            write_full(tmp_path / "b", dtype=torch.bfloat16, amount=1e-4),
        )
        [verdict] = [v for v in validate(coarse, base, level="base").verdicts if v.id == "D204"]
        assert verdict.status == "failed"
        assert verdict.value is not None
        from tests.merging.worlds import tensors_of

        exact, rounded, start = tensors_of(fine), tensors_of(coarse), tensors_of(base)
        lost = sum(float((rounded[n].double() - t.double()).square().sum()) for n, t in exact.items())
        held = sum(float((rounded[n].double() - start[n].double()).square().sum()) for n in exact)
        assert verdict.value == pytest.approx((lost / held) ** 0.5, rel=0.25)

    def test_an_outlier(self, base: Path, tmp_path: Path) -> None:
        law = write_full(tmp_path / "law")
        name = "bert.encoder.layer.1.output.dense.weight"
        edit_tensors(
            law / "model.safetensors",
            lambda t: {k: v + (0.3 * torch.randn_like(v) if k == name else 0) for k, v in t.items()},
        )
        [verdict] = [v for v in validate(law, base, level="base").verdicts if v.id == "D201"]
        assert verdict.where == (name,)


def test_pickles_that_were_not_downloaded_are_not_called_absent(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    law = write_full(tmp_path / "0123abcd")
    assert statuses(validate(law, level="file"))["F005"] == "passed"
    monkeypatch.setattr("mergeready.validation.subject.resolve_folder", lambda *_, **__: law)
    assert statuses(validate("org/law", level="file"))["F005"] == "not checked"
