"""`expunge audit`: from files to an answer, and a user's mistakes in one line each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from expunge.audits import AUDITS
from expunge.audits.check import LAYERS
from expunge.commands import EnsembleOptions, audit_command
from expunge.errors import InputError
from expunge.schema import TrainConfig
from expunge.weights import Metadata, load_weights, save_weights
from expunge.workspace import DataOptions, open_workspace
from test_cli import Trained, assert_refused, invoke, record_of

SHORT = "linear_probe,prototype,population_mia"


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    """Models of the digits, and one that hides the threes behind its head's bias, of which nobody wrote what it is."""
    trained = Trained(tmp_path_factory.mktemp("audited"))
    hidden = trained.root / "hidden.safetensors"
    state = load_file(trained.weights)
    state["5.bias"][3] -= 50
    save_file(state, hidden)
    return trained, hidden


def words(trained: Trained, unlearned: Path, out: Path, *more: str) -> list[str]:
    given = ["audit", "--original", str(trained.weights), "--unlearned", str(unlearned), "--data", "digits"]
    return [*given, "--model", trained.model, "--out", str(out), *more]


def test_a_hidden_class_is_found_out_and_written_down(judged: tuple[Trained, Path], tmp_path: Path) -> None:
    trained, hidden = judged
    retrained = ("--retrained", str(trained.retrained), "--classes", "3", "--audits", SHORT)
    result = invoke(*words(trained, hidden, tmp_path / "out", *retrained))
    assert result.exit_code == 1, result.output
    record = record_of(tmp_path / "out")
    assert set(record["audits"]) == set(SHORT.split(","))
    assert record["verdict"]["gone_at_the_output"]["answer"] == "yes"
    assert record["verdict"]["gone_inside"]["answer"] == "no"
    assert any("weights untouched" in text for text in record["verdict"]["diagnosis"])
    assert record["metrics"]["gaps"]["forget_accuracy"]["value"] == 0
    assert record["metrics"]["after"]["zero_retrain_forgetting"]["count"] == 37
    assert 0 < record["metrics"]["after"]["tug_of_war"] <= 1
    assert record["model"]["unlearned"] == str(hidden)
    read = record["samples_read"]
    assert set(read) == {"evaluation", "evaluation_training"}  # no method ran, none was handed a sample
    assert (read["evaluation"]["3"], sum(read["evaluation"].values())) == (37, record["data"]["test_samples"])
    assert sum(read["evaluation_training"].values()) == record["data"]["train_samples"]
    assert record["data"]["test_from"] == "cut off"
    assert not any("has no test split" in note for note in record["notes"])  # expunge trained the original, it says
    for shown in ("Gone at the output: yes", "Gone inside: no", "weights untouched", "linear probe", "Not tested"):
        assert shown in result.stdout


def test_a_failed_self_check_of_the_unlearned_model_leaves_with_1(judged: tuple[Trained, Path], tmp_path: Path) -> None:
    """A model that never saw the threes passes; the same with logits a thousand times as far apart does not."""
    trained, _ = judged
    state = load_file(trained.retrained)
    sharpened = tmp_path / "sharpened.safetensors"
    save_file(state | {name: 1000 * state[name] for name in ("5.weight", "5.bias")}, sharpened)
    codes = {}
    for unlearned in (trained.retrained, sharpened):
        given = words(trained, unlearned, tmp_path / unlearned.stem, "--classes", "3", "--audits", "nearest_class_mean")
        codes[unlearned.stem] = invoke(*given).exit_code
        record = record_of(tmp_path / unlearned.stem)
        assert "no" not in {record["verdict"][layer]["answer"] for layer in LAYERS}
        failed = [(check["finding"], check["roles"]) for check in record["self_checks"] if check["ok"] is False]
        assert failed == ([("sharpened answers", ["unlearned"])] if unlearned == sharpened else [])
    assert codes == {trained.retrained.stem: 0, "sharpened": 1}


def test_an_audit_does_not_take_the_place_of_an_erasure(judged: tuple[Trained, Path], tmp_path: Path) -> None:
    trained, hidden = judged
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"provenance": {"kind": "forget"}}), encoding="utf-8")
    result = invoke(*words(trained, hidden, tmp_path, "--classes", "3", "--audits", SHORT, "--overwrite"))
    assert result.exit_code == 2
    assert "is the record of expunge forget: name another --out" in " ".join(result.stderr.split())
    assert json.loads(record.read_text(encoding="utf-8")) == {"provenance": {"kind": "forget"}}


def test_an_attack_of_the_large_budget_is_named_so(judged: tuple[Trained, Path], tmp_path: Path) -> None:
    trained, hidden = judged
    result = invoke(*words(trained, hidden, tmp_path / "out", "--classes", "3", "--audits", "u_lira"))
    assert result.exit_code == 2
    assert "u_lira trains many models and runs with --budget large alone" in " ".join(result.stderr.split())


def test_without_a_retrained_model_it_says_so_first(judged: tuple[Trained, Path], tmp_path: Path) -> None:
    trained, hidden = judged
    result = invoke(*words(trained, hidden, tmp_path / "out", "--classes", "3", "--audits", SHORT))
    assert "Without a retrained model" in next(line for line in result.stdout.splitlines() if line.strip())
    assert "retrained" not in record_of(tmp_path / "out")["metrics"]


def test_without_training_data_its_attacks_are_skipped_with_the_reason(
    judged: tuple[Trained, Path], tmp_path: Path
) -> None:
    trained, hidden = judged
    out = tmp_path / "out"
    result = invoke(*words(trained, hidden, out, "--classes", "3", "--audits", SHORT, "--no-training-data"))
    record = record_of(out)
    assert (record["data"]["train_samples"], record["data"]["test_from"]) == (0, "all")
    assert not any(record["samples_read"]["evaluation_training"].values())
    assert not any("has no test split" in note for note in record["notes"])
    assert record["data"]["test_samples"] == 1797  # none of them was trained on, says who asks
    for name in SHORT.split(","):
        assert "training images of the forgotten classes" in record["audits"][name]["skipped"]
    assert "Attacks skipped" in result.stdout


def test_the_classes_are_those_the_weights_say(judged: tuple[Trained, Path], tmp_path: Path) -> None:
    trained, hidden = judged
    told = tmp_path / "told.safetensors"
    network = open_workspace(DataOptions(spec="digits"), trained.model, trained.weights, seed=0).model
    network.load_state_dict(load_file(hidden))
    save_weights(network, told, replace(load_weights(trained.weights)[1], forgotten=("3",)))
    options = DataOptions(spec="digits")
    record = audit_command(
        options, trained.model, trained.weights, told, tmp_path / "out", audits=["nearest_class_mean"]
    ).record
    assert record.classes["forget"] == ["3"]
    with pytest.raises(InputError, match="does not say which classes were to be forgotten: name them with --classes"):
        audit_command(options, trained.model, trained.weights, hidden, tmp_path / "no", audits=["nearest_class_mean"])


def test_weights_of_others_may_have_been_trained_on_what_is_cut_off(
    judged: tuple[Trained, Path], tmp_path: Path
) -> None:
    """Of data without a test split: that an attack on membership fails shows nothing then."""
    trained, _ = judged
    foreign = tmp_path / "foreign.safetensors"
    save_file(load_file(trained.weights), foreign)  # nobody wrote how it was trained

    moved = tmp_path / "moved.safetensors"
    network = open_workspace(DataOptions(spec="digits"), trained.model, trained.weights, seed=0).model
    save_weights(network, moved, replace(load_weights(trained.weights)[1], trained_on="/before"))

    def audit(original: Path, *, training_data: bool = True, called: str | None = None) -> Any:
        return audit_command(
            DataOptions(spec="digits"), trained.model, original, trained.retrained, tmp_path / "out", classes=["3"],
            audits=["nearest_class_mean"], training_data=training_data, called=called, overwrite=True,
        ).record  # fmt: skip

    name = "held-out images unseen"
    record = audit(foreign)
    (check,) = (check for check in record.self_checks if check["name"] == name)
    assert (check["ok"], check["doubts"]) == (None, ("indistinguishable", "rest_intact"))
    assert record.verdict["rest_intact"]["answer"] == "unknown"
    assert record.verdict["rest_intact"]["evidence"][0] == check["sentence"]
    assert name in {check["name"] for check in audit(moved).self_checks}
    for known in (audit(trained.weights), audit(foreign, training_data=False), audit(moved, called="/before")):
        assert name not in {check["name"] for check in known.self_checks}
        assert known.verdict["rest_intact"]["answer"] == "yes"


def test_notes_of_the_measures_are_kept(judged: tuple[Trained, Path], tmp_path: Path) -> None:
    trained, _ = judged
    lost = tmp_path / "lost.safetensors"
    state = load_file(trained.weights)
    state["5.bias"][[3, 7]] -= 50
    save_file(state, lost)
    notes = audit_command(
        DataOptions(spec="digits"), trained.model, trained.weights, lost, tmp_path / "out", classes=["3"],
        audits=["nearest_class_mean"],
    ).record.notes  # fmt: skip
    assert any(note.startswith("of the classes that stay fell 7 from") for note in notes), notes
    assert "the train images of --data are taken for those the original was trained on" in notes
    assert len(notes) == len(set(notes))


def test_what_else_the_unlearned_weights_forgot_is_not_counted_as_retained(
    judged: tuple[Trained, Path], tmp_path: Path
) -> None:
    """Three and five are gone from the model, and it is asked of the five: the three is no collapse of the rest."""
    trained, _ = judged
    options = DataOptions(spec="digits")
    network = open_workspace(options, trained.model, trained.weights, seed=0).model
    state = load_file(trained.weights)
    state["5.bias"][[3, 5]] -= 50
    network.load_state_dict(state)
    both, reference, other = (tmp_path / f"{name}.safetensors" for name in ("both", "reference", "other"))
    said = load_weights(trained.weights)[1]
    save_weights(network, both, replace(said, forgotten=("3", "5")))
    save_weights(network, reference, replace(said, never_seen=("3", "5")))  # as from expunge train --without 3,5
    save_weights(network, other, replace(said, never_seen=("5",)))

    def audit(*retrained: Path, unlearned: Path = both) -> Any:
        return audit_command(
            options, trained.model, trained.weights, unlearned, tmp_path / "out", classes=["5"], retrained=retrained,
            audits=["nearest_class_mean"], overwrite=True,
        ).record  # fmt: skip

    record = audit(reference)
    assert (record.classes["forget"], record.classes["forgotten_before"]) == (["5"], ["3"])
    assert record.verdict["rest_intact"]["answer"] == "yes"
    assert not any("collapse" in text for text in record.verdict["diagnosis"])
    assert not any(check["finding"] == "poorly trained" for check in record.self_checks)
    assert "for the unlearned weights say they were forgotten or never seen: 3" in " ".join(record.notes)
    assert "disagree" not in " ".join(record.notes)
    record = audit(other, other)
    assert record.classes["forgotten_before"] == ["3"]
    told = [note for note in record.notes if "disagree" in note]
    assert len(told) == 1
    assert "the first say 3, the second nothing; what the first say is not counted as retained" in told[0]
    record = audit(reference, unlearned=other)  # whose file says that it never saw the five, and no more
    assert record.classes["forgotten_before"] == []
    assert "the first say nothing, the second 3" in " ".join(record.notes)
    strange = tmp_path / "strange.safetensors"
    save_weights(network, strange, Metadata(forgotten=("eleven",)))
    with pytest.raises(InputError, match="say they forgot eleven, which is no class of the model"):
        audit(unlearned=strange)


def test_two_retrained_models_give_a_noise_floor(judged: tuple[Trained, Path], tmp_path: Path) -> None:
    trained, hidden = judged
    record = audit_command(
        DataOptions(spec="digits"), trained.model, trained.weights, hidden, tmp_path, classes=["3"],
        retrained=[trained.retrained, trained.retrained], audits=["nearest_class_mean"],
    ).record  # fmt: skip
    figure = record.audits["nearest_class_mean"]["figures"]["head input"]
    assert figure["noise_floor"]["value"] == 0  # the same model twice
    assert figure["retrained 2"] == figure["retrained"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--classes", "3", "--audits", "telepathy"), "unknown audit 'telepathy': expected some of linear_probe"),
        (("--classes", "12"), "class index 12 is out of range: expected 0 to 9"),
        (("--classes", "3", "--budget", "huge"), "expected --budget default or large, got 'huge'"),
        (("--classes", "3", "--members", "5"), "--members means nothing without --budget large"),
        (("--classes", "3", "--method", "unsir"), "--method means nothing without --budget large"),
        (("--classes", "3", "--label-column", "a"), "--label-column means nothing to 'digits'"),
        (("--classes", "3", "--retrained", "nowhere.safetensors"), "nowhere.safetensors"),
        ((), "does not say which classes were to be forgotten"),
    ],
)
def test_mistakes_are_one_line(
    judged: tuple[Trained, Path], tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    trained, hidden = judged
    out = tmp_path / "out"
    result = invoke(*words(trained, hidden, out, "--quiet", *more))
    assert_refused(result.exit_code, result.stderr, message, out)


def test_weights_that_do_not_fit_are_refused(judged: tuple[Trained, Path], tmp_path: Path) -> None:
    trained, _ = judged
    options = DataOptions(spec="digits")

    def audit(unlearned: Path, *retrained: Path) -> None:
        audit_command(
            options, trained.model, trained.weights, unlearned, tmp_path / "out", classes=["3"], retrained=retrained
        )

    with pytest.raises(InputError, match="was trained with a class to forget"):
        audit(trained.weights, trained.weights)
    other = tmp_path / "other.safetensors"
    state = load_file(trained.weights)
    save_file({name: value for name, value in state.items() if name != "5.bias"}, other)
    with pytest.raises(InputError, match=r"5\.bias"):
        audit(other)
    network = open_workspace(options, trained.model, trained.weights, seed=0).model
    named = tmp_path / "named.safetensors"
    save_weights(network, named, Metadata(class_names=tuple("abcdefghij")))
    with pytest.raises(InputError, match="are not those of the original weights"):
        audit(named)


def test_each_model_is_shown_images_as_it_takes_them(judged: tuple[Trained, Path], tmp_path: Path) -> None:
    """The original with its mean moved into its first layer is the original, for who reads what its weights say."""
    trained, _ = judged
    options = DataOptions(spec="digits")
    workspace = open_workspace(options, trained.model, trained.weights, seed=0)
    metadata, state = load_weights(trained.weights)[1], load_file(trained.weights)
    assert metadata.preprocessing is not None
    # the first convolution pads with zeros, so only the scale can be moved without changing borders
    state["0.weight"] = state["0.weight"] * 2
    wider = tuple(2 * value for value in metadata.preprocessing.std)
    workspace.model.load_state_dict(state)
    moved = tmp_path / "moved.safetensors"
    save_weights(workspace.model, moved, replace(metadata, preprocessing=replace(metadata.preprocessing, std=wider)))
    metrics = audit_command(
        options, trained.model, trained.weights, moved, tmp_path / "out", classes=["3"], audits=["nearest_class_mean"]
    ).record.metrics
    assert metrics["after"]["per_class_accuracy"] == metrics["before"]["per_class_accuracy"]


def test_ensembles_are_trained_once_and_judged(judged: tuple[Trained, Path], tmp_path: Path) -> None:
    trained, hidden = judged
    recipe = TrainConfig(epochs=1, lr=0.01, batch_size=64)
    many = EnsembleOptions(members=3, method="unsir", preset="fast", recipe=recipe)

    def audit() -> Any:
        return audit_command(
            DataOptions(spec="digits"), trained.model, trained.weights, hidden, tmp_path, classes=["3"],
            audits=["nearest_class_mean"], ensembles=many, overwrite=True,
        ).record  # fmt: skip

    record = audit()
    assert 0 <= record.audits["u_lira"]["figures"]["u_lira"]["unlearned"]["value"] <= 1
    assert 0 <= record.audits["forgetting_quality"]["figures"]["forgetting quality"]["unlearned"]["value"] <= 1
    assert not any("u_lira" in text for text in record.verdict["not_tested"])
    files = sorted((tmp_path / "ensembles").glob("*.safetensors"))
    assert len(files) == 6
    times = [file.stat().st_mtime_ns for file in files]
    assert audit().audits["u_lira"]["figures"] == record.audits["u_lira"]["figures"]
    assert [file.stat().st_mtime_ns for file in files] == times  # none was made again


def test_every_audit_says_what_it_is() -> None:
    assert all(audit.says and audit.source and audit.targets for audit in AUDITS.values())
