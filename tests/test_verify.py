"""A record verified and replayed, and each kind of tampering caught and named; also by someone who hashes it anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from expunge import data, provenance, verify
from expunge.commands import RecordOptions, RetainOptions, audit_command, erase, forget_command
from expunge.data import ImageTable, StreamedImages, count_labels, draw, open_source, stage
from expunge.errors import InputError
from expunge.evaluation import environment
from expunge.files import json_text
from expunge.methods import PRESETS
from expunge.models import AllCNN
from expunge.provenance import SAMPLE, SampleHashes, seal, tensors_digest, weights_digests
from expunge.report import html_report
from expunge.schema import IMAGES, Preprocessing, Record
from expunge.verify import Elsewhere, Finding, again, files, place
from expunge.verify.again import relative_distance
from expunge.workspace import DataOptions
from test_cli import SETTINGS, Trained, assert_refused, invoke, record_of, refuse, trained, write_digits

__all__ = ["trained"]  # the fixture, for this file too


class Erased:
    """Two erasures, the second of what the first left, both in one ledger; a copy of it all for each test."""

    def __init__(self, root: Path, trained: Trained) -> None:
        self.root = root
        self.trained = trained

    @property
    def first(self) -> Path:
        return self.root / "first"

    @property
    def second(self) -> Path:
        return self.root / "second"

    @property
    def retain(self) -> Path:
        return self.root / "retain"

    def where(self, **more: Any) -> Elsewhere:
        """Return where a copy has what the record names by its first place."""
        options: dict[str, Any] = {"model": self.trained.model, "retain": str(self.retain)}
        options |= {"parents": (self.root,)}
        return Elsewhere(**options | more)

    def check(self, folder: Path, **more: Any) -> dict[str, list[Finding]]:
        """Return the findings by check; of `second`, with the first's weights for the original's."""
        elsewhere = {"weights": self.first / "unlearned.safetensors"} if folder == self.second else {}
        elsewhere |= more.pop("elsewhere", {})
        found: dict[str, list[Finding]] = {}
        for one in verify.verify(folder, where=self.where(**elsewhere), **more):
            found.setdefault(one.check, []).append(one)
        return found

    def wrong(self, folder: Path, **more: Any) -> list[str]:
        """Return a line for each check that fails."""
        return [
            f"{name}: {one.sentence}"
            for name, findings in self.check(folder, **more).items()
            for one in findings
            if one.ok is False
        ]


def forget(trained: Trained, weights: Path, classes: str, out: Path, **more: Any) -> Record:
    return forget_command(
        DataOptions(spec="digits"), trained.model, weights, [classes], out, settings=SETTINGS, device="cpu", **more
    ).record


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, trained: Trained) -> Path:
    root = tmp_path_factory.mktemp("erased")
    retain = str(write_digits(root / "retain", [0, 1, 2, 4, 6, 7, 8, 9], each=12))
    keep = RecordOptions(ledger=root / "expunge-ledger.sqlite")
    retain_options = RetainOptions(source=retain)
    forget(trained, trained.weights, "3", root / "first", keep=keep, retain=retain_options, retrained=trained.retrained)
    after = root / "first" / "unlearned.safetensors"
    forget(trained, after, "5", root / "second", keep=keep, retain=retain_options)
    return root


@pytest.fixture
def erased(tmp_path: Path, made: Path, trained: Trained) -> Erased:
    return Erased(Path(shutil.copytree(made, tmp_path / "copy")), trained)


def edit(folder: Path, change: Callable[[dict[str, Any]], None], *, hash_anew: bool = False) -> None:
    """Change a record, and make its own hashes and its page true again where the forger knows how."""
    record = record_of(folder)
    change(record)
    record = seal(record) if hash_anew else record
    (folder / "record.json").write_text(json_text(record), encoding="utf-8")
    if hash_anew:
        (folder / "report.html").write_text(html_report(record), encoding="utf-8")


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


# What is kept, and that it holds


def test_a_record_is_verified_replayed_bit_for_bit_and_measured_again(erased: Erased) -> None:
    for folder, parents in ((erased.first, "the first erasure"), (erased.second, "1 earlier record follows, unbroken")):
        found = erased.check(folder, replay=True, audit=True)
        assert not [one for findings in found.values() for one in findings if one.ok is False]
        assert found["replay"] == [Finding("replay", True, "the erasure gives the same weights again, bit for bit")]
        assert "measured again, as recorded to 1e-06" in found["measures"][0].sentence
        assert int(found["measures"][0].sentence.split()[0].replace(",", "")) > 100
        assert found["chain"][0].sentence.startswith(parents)
        assert found["ledger"][0].ok
        assert found["page"] == [Finding("page", True, "report.html is what record.json gives")]
        assert found["signature"][0] == Finding("signature", None, "not signed: who recorded this cannot be told")
    assert [len(erased.check(one)["weights"]) for one in (erased.first, erased.second)] == [3, 2]


def test_what_a_record_holds(erased: Erased) -> None:
    first, second = (record_of(folder)["provenance"] for folder in (erased.first, erased.second))
    assert first["weights"]["original"] == weights_digests(erased.trained.weights)
    assert second["weights"]["original"] == first["weights"]["unlearned"]
    assert second["parent"] == {
        "content_hash": record_of(erased.first)["content_hash"],
        "tensors": first["weights"]["unlearned"]["tensors"],
    }
    assert first["parent"] is None
    assert second["ledger"]["count"] == first["ledger"]["count"] + 1
    assert first["retain_sample"] == {
        "fingerprint": provenance.read_samples(erased.first / SAMPLE).fingerprint,
        "count": 96,
    }
    assert first["code"]["version"] == second["code"]["version"]
    assert len(first["code"]["source"]) == 64
    assert first["configuration"] != second["configuration"]
    assert set(first["parts"]) == set(record_of(erased.first)) - {"provenance", "content_hash"}
    surroundings = record_of(erased.first)["environment"]
    assert surroundings["libraries"]["safetensors"]
    assert surroundings["cpu"]
    page = (erased.second / "report.html").read_text(encoding="utf-8")
    for shown in (record_of(erased.second)["content_hash"], second["parent"]["content_hash"], second["code"]["source"]):
        assert shown in page


def test_through_the_command(erased: Erased, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXPUNGE_LEDGER", raising=False)
    words = ["verify", str(erased.first), "--model", erased.trained.model]
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    assert "record.json is as it was written" in result.stdout
    assert "everything that was checked matches" in result.stdout
    flip(erased.first / "unlearned.safetensors", -1)
    result = invoke(*words, "--json")
    assert result.exit_code == 1
    wrong = [found for found in json.loads(result.stdout) if found["ok"] is False]
    assert [found["check"] for found in wrong] == ["weights"]
    assert "1 check fails" in invoke(*words).stdout
    assert (invoke(*words, "--quiet").exit_code, invoke(*words, "--quiet").stdout) == (1, "")


def test_an_audit_is_verified_and_measured_again(erased: Erased, tmp_path: Path) -> None:
    out = tmp_path / "audit"
    unlearned = erased.first / "unlearned.safetensors"
    audits = ["linear_probe", "prototype"]
    options = DataOptions(spec="digits")
    audit_command(options, erased.trained.model, erased.trained.weights, unlearned, out, audits=audits, device="cpu")
    found = erased.check(out, audit=True)
    assert not [one for findings in found.values() for one in findings if one.ok is False]
    assert "1 earlier record follows" in found["chain"][0].sentence
    assert found["measures"][0].ok
    assert found["page"][0].ok
    assert [one.ok for one in found["weights"]] == [True, True]
    with pytest.raises(InputError, match="an audit erases nothing"):
        erased.check(out, replay=True)
    edit(out, lambda record: record["audits"]["prototype"]["figures"].clear(), hash_anew=True)
    assert "measured again, other than recorded: audits.prototype" in erased.wrong(out, audit=True)[0]


def test_a_record_of_older_code_is_held_to_what_it_has(erased: Erased, tmp_path: Path) -> None:
    def older(record: dict[str, Any]) -> None:
        record["provenance"]["code"]["source"] = "0" * 64
        for side in ("before", "after", "retrained"):
            record["metrics"].get(side, {}).pop("confusion", None)

    edit(erased.first, older, hash_anew=True)
    (found,) = erased.check(erased.first, audit=True)["measures"]
    assert found.ok
    told = "the record lacks what is measured by now: metrics.after.confusion, metrics.before.confusion, "
    assert told + "metrics.retrained.confusion" in found.sentence
    edit(erased.first, lambda record: record["metrics"]["after"].update(retain_accuracy=0.9), hash_anew=True)
    (found,) = erased.check(erased.first, audit=True)["measures"]
    assert found.ok is False
    assert "other than recorded: metrics.after.retain_accuracy; the record lacks" in found.sentence

    out, unlearned, options = tmp_path / "audit", erased.second / "unlearned.safetensors", DataOptions(spec="digits")
    audits = ["prototype", "head_only"]
    audit_command(options, erased.trained.model, erased.trained.weights, unlearned, out, audits=audits, device="cpu")
    edit(out, lambda record: record["audits"].pop("head_only"), hash_anew=True)
    edit(out, older, hash_anew=True)
    edit(out, lambda record: record["verdict"].update(first_line="Said otherwise."), hash_anew=True)
    (found,) = erased.check(out, audit=True)["measures"]
    assert found.ok, found


# Tampering, each kind caught and named


def test_a_weights_byte(erased: Erased) -> None:
    path = erased.first / "unlearned.safetensors"
    flip(path, -1)  # of the last tensor
    assert erased.wrong(erased.first) == [f"weights: {path} was changed: it does not hold the unlearned weights"]


def test_a_byte_of_the_weights_header(erased: Erased) -> None:
    path = erased.first / "unlearned.safetensors"
    path.write_bytes(path.read_bytes().replace(b"expunge 0", b"expunge 1", 1))
    (line,) = erased.wrong(erased.first)
    assert "holds the unlearned weights, but its bytes were changed (its metadata or form)" in line
    path.write_bytes(b"nothing")
    assert "was damaged" in erased.wrong(erased.first)[0]
    path.unlink()
    assert f"{path} is gone" in erased.wrong(erased.first)[0]


def test_weights_swapped(erased: Erased) -> None:
    path = erased.first / "unlearned.safetensors"
    shutil.copy(erased.trained.weights, path)
    assert erased.wrong(erased.first) == [f"weights: {path} was swapped: it holds the original weights"]
    other = erased.root / "other.safetensors"
    shutil.copy(erased.trained.retrained, other)
    (line,) = erased.wrong(erased.second, elsewhere={"weights": other})
    assert "it does not hold the original weights" in line


def test_a_record_edited(erased: Erased) -> None:
    edit(erased.first, lambda record: record["samples_read"]["method"].update({"4": 0}))
    assert erased.wrong(erased.first) == ["record: record.json: samples_read was edited"]
    edit(erased.first, lambda record: record["classes"].update(forget=["4"]))
    lines = erased.wrong(erased.first)
    assert lines[0] == "record: record.json: classes was edited"
    told = "the weights say that 3 was forgotten before, and the record names no earlier one"
    assert lines[-1] == f"chain: the chain is cut: {told}"


def test_a_record_of_a_newer_version_is_called_so(erased: Erased) -> None:
    path = erased.first / "record.json"
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 3'))
    with pytest.raises(InputError, match="is of a newer version of expunge \\(schema_version 3\\)"):
        erased.wrong(erased.first)


def test_any_byte_of_a_record(erased: Erased) -> None:
    path = erased.first / "record.json"
    whole = path.read_bytes()
    for position in range(0, len(whole), 397):
        flip(path, position)
        assert erased.wrong(erased.first)[0].startswith("record: "), position
        path.write_bytes(whole)


def test_half_a_character_and_a_cell_of_a_benchmark(erased: Erased) -> None:
    path = erased.first / "record.json"
    before = path.read_text()
    path.write_text(before.replace('"method"', '"\\ud800": 1, "method"', 1))
    assert erased.wrong(erased.first)[0].startswith("record: record.json was damaged: ")
    path.write_text(before)

    def cell(record: dict[str, Any]) -> None:
        del record["content_hash"]
        record.update(provenance=None, item={"status": "done"})

    edit(erased.first, cell)
    refuse("is a cell of expunge bench, which seals none", None, "verify", str(erased.first))


def test_blanks_and_parts_of_a_record(erased: Erased) -> None:
    path = erased.first / "record.json"
    before = path.read_text()
    path.write_text(before + "\n")
    assert erased.wrong(erased.first) == [
        "record: record.json: its bytes are not as expunge writes them, though its content is"
    ]
    path.write_text(before.replace('  "method"', '  "method": "none",\n  "method"', 1))  # readers take either
    assert "its bytes are not as expunge writes them" in erased.wrong(erased.first)[0]
    path.write_text(before)
    edit(erased.first, lambda record: record.pop("notes"))
    assert "notes is missing" in erased.wrong(erased.first)[0]
    edit(erased.first, lambda record: record.update(notes=[], extra=1))
    assert "extra was added" in " ".join(erased.wrong(erased.first))
    for stripped in ("content_hash", "provenance"):
        path.write_text(before)
        edit(erased.first, lambda record, name=stripped: record.pop(name))  # type: ignore[misc]
        assert "its hashes were stripped" in erased.wrong(erased.first)[0]


def test_a_measure_edited(erased: Erased) -> None:
    def better(record: dict[str, Any]) -> None:
        record["metrics"]["after"]["retain_accuracy"] = 0.999

    edit(erased.first, better)
    assert erased.wrong(erased.first) == ["record: record.json: metrics was edited"]
    edit(erased.first, better, hash_anew=True)  # now the record is whole in itself
    (line,) = erased.wrong(erased.first)
    assert line.endswith("entry 1, of this record, is missing or is of other content")
    assert "measures: measured again, other than recorded: metrics.after.retain_accuracy" in erased.wrong(
        erased.first, audit=True
    )
    assert "the chain is cut: the earlier record" in " ".join(erased.wrong(erased.second))


def test_an_outcome_that_was_edited_and_a_ledger_denied(erased: Erased) -> None:
    def better(record: dict[str, Any]) -> None:
        record["checks"].update(kept=not record["checks"]["kept"])
        record["provenance"]["ledger"] = None

    edit(erased.first, better, hash_anew=True)
    ledger, measures = erased.wrong(erased.first, audit=True)
    assert ledger.startswith("ledger: the run was entered in no ledger, says the record, but entry 1 of ")
    assert measures == "measures: measured again, other than recorded: checks.kept"
    (erased.root / "expunge-ledger.sqlite").unlink()
    (found,) = erased.check(erased.first)["ledger"]
    assert found == Finding("ledger", None, "the run was entered in no ledger")


def test_what_an_erasure_read_and_how_it_went_is_replayed(erased: Erased) -> None:
    def better(record: dict[str, Any]) -> None:
        record["samples_read"]["method"]["4"] += 1
        record["cost"]["steps"] -= 1
        record["checks"]["signals"] = not record["checks"]["signals"]
        record["calibration"]["rounds"] += 1

    edit(erased.first, better, hash_anew=True)
    changed = ["calibration.rounds", "checks.signals", "cost.steps", "samples_read.method.4"]
    (line,) = [one for one in erased.wrong(erased.first, replay=True) if one.startswith("replay")]
    assert line == f"replay: the record tells otherwise of it: {', '.join(changed)}"


def test_a_replay_has_the_settings_of_the_record_whatever_the_preset_has_by_now(
    erased: Erased, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = PRESETS["unsir"]["default"]

    def other() -> Any:
        made = default()
        return replace(made, noise_share=0.4, impair=replace(made.impair, lr=0.1, clip_value=1.0))

    monkeypatch.setitem(PRESETS["unsir"], "default", other)
    found = erased.check(erased.first, replay=True)["replay"]
    assert [one.sentence for one in found] == ["the erasure gives the same weights again, bit for bit"]

    def later(record: dict[str, Any]) -> None:
        record["config"]["of_then"] = 3

    edit(erased.first, later, hash_anew=True)
    assert again.settings_of(record_of(erased.first))[1] == ["the setting of_then"]


def test_a_record_of_several_processes_is_not_called_wrong(erased: Erased, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(erased.first, lambda record: record["environment"].update(processes=2), hash_anew=True)
    edit(erased.first, lambda record: record.update(seed=5), hash_anew=True)
    monkeypatch.setattr(again, "REPLAY_TOLERANCE", 0.1)  # as far off as other draws are
    (found,) = erased.check(erased.first, replay=True)["replay"]
    assert "processes 2 -> 1: a model with dropout draws otherwise in several processes" in found.sentence
    assert found.ok is None


def test_the_chain_cut(erased: Erased) -> None:
    def unlink(record: dict[str, Any]) -> None:
        record["provenance"]["parent"] = None

    gone = erased.root / "elsewhere"
    gone.mkdir()
    (line,) = erased.wrong(erased.second, elsewhere={"parents": (gone,)})
    assert line.startswith("chain: the chain is cut: the earlier record")
    assert line.endswith(f"is not in {gone}, or was edited (name its folder with --parents)")
    assert not [one for one in verify.verify(erased.second) if one.check == "chain" and not one.ok]  # found beside it
    edit(erased.second, unlink)
    assert "record: record.json: provenance or content_hash was edited" in erased.wrong(erased.second)
    edit(erased.second, unlink, hash_anew=True)
    told = "the weights say that 3 was forgotten before, and the record names no earlier one"
    assert f"chain: the chain is cut: {told}" in erased.wrong(erased.second)


def test_a_record_that_was_not_at_hand_is_said(erased: Erased, trained: Trained, tmp_path: Path) -> None:
    lonely = tmp_path / "lonely.safetensors"
    shutil.copy(erased.first / "unlearned.safetensors", lonely)
    record = forget(trained, lonely, "5", tmp_path / "out")
    assert record.provenance is not None
    assert record.provenance["parent"]["content_hash"] is None
    assert any("the record of that is not beside them" in note for note in record.notes)
    found = erased.check(tmp_path / "out")
    assert (found["chain"][0].ok, found["ledger"][0].ok) == (None, None)
    assert "the chain begins here" in found["chain"][0].sentence


def test_the_retain_sample_changed(erased: Erased) -> None:
    path = erased.first / SAMPLE
    whole = path.read_text()
    content = json.loads(whole)
    content["hashes"] = content["hashes"][1:]
    path.write_text(json.dumps(content))
    told = f"{SAMPLE} was changed: its hashes are not those of the sample that was handed over"
    assert erased.wrong(erased.first) == [f"retain sample: {told}"]
    path.write_text(whole + " ")
    assert erased.wrong(erased.first) == [f"retain sample: {SAMPLE} was changed, though its hashes were not"]
    path.write_text("nothing")
    assert "is no list of retain hashes" in erased.wrong(erased.first)[0]
    path.write_text(whole)
    # the data, not the record
    Image.new("L", (8, 8), 77).save(erased.retain / "7" / "7.png")
    lines = erased.wrong(erased.first, replay=True)
    assert "replay: the retain sample is another than was handed over: 1 images of 96 gone, 1 new" in lines
    assert any("the erasure gives other weights" in line for line in lines)
    path.unlink()  # withheld: nothing is wrong, and less is known
    found = erased.check(erased.first)
    assert [one.ok for one in found["retain sample"]] == [None]


def forge(folder: Path) -> None:
    path = folder / "report.html"
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace("unknown", "yes"), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != before


def test_a_forged_page(erased: Erased, monkeypatch: pytest.MonkeyPatch) -> None:
    path = erased.first / "report.html"
    forge(erased.first)
    told = "page: report.html is not what record.json gives: make it again with expunge report"
    assert erased.wrong(erased.first) == [told]
    assert invoke("report", str(erased.first)).exit_code == 0
    assert erased.check(erased.first)["page"][0].ok
    path.write_bytes(path.read_bytes() + b" ")
    assert erased.wrong(erased.first) == [told]
    here = provenance.code_digests()
    monkeypatch.setattr(files, "code_digests", lambda: here | {"source": "0" * 64})
    (found,) = erased.check(erased.first)["page"]
    assert (found.ok, "made by other code; expunge report makes it again" in found.sentence) == (None, True)
    path.unlink()
    (found,) = erased.check(erased.first)["page"]
    assert (found.ok, found.sentence) == (None, "report.html is not here: expunge report makes it")


def test_a_page_with_pictures_or_of_an_edited_record(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    keep = RecordOptions(include_images=True)
    forget(trained, trained.weights, "3", out, keep=keep, retain=RetainOptions(per_class=20))

    def page() -> Finding:
        (found,) = [one for one in verify.verify(out) if one.check == "page"]
        return found

    assert page().ok  # with its pictures
    shown = (out / "report.html").read_bytes()
    assert invoke("report", str(out)).exit_code == 0
    assert (out / "report.html").read_bytes() != shown
    assert page().ok  # and without
    forge(out)
    assert page().ok is False
    (out / "report.html").write_bytes(shown)
    (out / IMAGES).unlink()
    told = f"report.html was not checked: it may show pictures, and {IMAGES} does not give them"
    assert page() == Finding("page", None, told)
    edit(out, lambda record: record.update(seed=5))
    assert page() == Finding("page", None, "report.html was not checked: record.json was edited")
    assert invoke("report", str(out)).exit_code == 1
    assert page().ok  # which says so itself


def test_a_page_that_cannot_be_made_is_one_line(erased: Erased, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> str:
        raise IndexError("no such part")

    monkeypatch.setattr(files, "html_report", fail)
    told = "page: report.html cannot be compared: record.json gives no page (no such part)"
    assert erased.wrong(erased.first) == [told]


def test_the_configuration_changed(erased: Erased) -> None:
    def other(record: dict[str, Any]) -> None:
        record["config"]["settings"] = ["noise_per_class=8"]
        record["seed"] = 1

    edit(erased.first, other)
    lines = erased.wrong(erased.first)
    assert lines[:2] == ["record: record.json: config was edited", "record: record.json: seed was edited"]
    assert lines[2].startswith("configuration: ")
    record = record_of(erased.first)
    edit(erased.first, lambda record: record["config"].update(settings=list(SETTINGS)), hash_anew=True)
    assert record["seed"] == 1  # hashed anew with another seed: only doing it again tells
    (entry, line) = erased.wrong(erased.first, replay=True)
    assert entry.startswith("ledger: ")
    assert "should give the same bits" in line


# The rest of what it says


def test_an_image_is_looked_up_without_the_data(erased: Erased, tmp_path: Path) -> None:
    inside = next((erased.retain / "7").iterdir())
    outside = tmp_path / "outside.png"
    Image.new("L", (8, 8), 77).save(outside)
    shutil.copy(inside, tmp_path / "inside.png")
    shutil.rmtree(erased.retain)
    found = erased.check(erased.first, image=tmp_path / "inside.png")["image"]
    assert found == [Finding("image", True, f"{tmp_path / 'inside.png'} was in the retain sample, as 7")]
    assert "was not in the retain sample, pixel for pixel" in erased.wrong(erased.first, image=outside)[0]
    with pytest.raises(InputError, match="no image at"):
        erased.check(erased.first, image=tmp_path / "none.png")
    (tmp_path / "a.pt").write_bytes(b"hello")
    with pytest.raises(InputError, match=r"cannot decode .*a.pt: expected an image, as PNG or JPEG$"):
        erased.check(erased.first, image=tmp_path / "a.pt")


def test_hashes_of_one_image_differ_between_records(erased: Erased) -> None:
    first, second = (provenance.read_samples(folder / SAMPLE) for folder in (erased.first, erased.second))
    assert first.salt != second.salt
    assert not set(first.hashes) & set(second.hashes)  # though the sample is the same
    assert first.fingerprint != second.fingerprint
    assert SampleHashes(first.salt, first.hashes).fingerprint == first.fingerprint


def test_elsewhere_a_replay_may_be_a_little_off_and_says_what_differs(
    erased: Erased, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = environment

    def other(model: nn.Module) -> dict[str, Any]:
        return real(model) | {"cpu": "VSX"}

    run = erase

    def nudged(*arguments: Any, **more: Any) -> Any:
        done = run(*arguments, **more)
        with torch.no_grad():
            next(done.unlearned.parameters()).mul_(factor)
        return done

    monkeypatch.setattr(again, "environment", other)
    monkeypatch.setattr(again, "erase", nudged)
    factor = 1.0001
    (found,) = erased.check(erased.first, replay=True)["replay"]
    assert found.ok
    assert "different here, which alone can change bits: cpu" in found.sentence
    assert "-> VSX" in found.sentence
    factor = 9.0
    (found,) = erased.check(erased.first, replay=True)["replay"]
    assert found.ok is False
    monkeypatch.setattr(again, "environment", real)
    factor = 1.0001
    (found,) = erased.check(erased.first, replay=True)["replay"]
    assert found.ok is False
    assert "should give the same bits" in found.sentence


def test_other_code_is_said(erased: Erased, monkeypatch: pytest.MonkeyPatch) -> None:
    here = provenance.code_digests()
    monkeypatch.setattr(place, "code_digests", lambda: here | {"source": "0" * 64})
    (found,) = erased.check(erased.first)["code"]
    assert (found.ok, "made by other code" in found.sentence) == (None, True)


def test_mistakes_are_one_line(erased: Erased, tmp_path: Path) -> None:
    refuse("with a record.json; got", None, "verify", str(tmp_path / "none"))
    words = ["verify", str(erased.first)]
    refuse("whose code would be run: confirm it with --model", None, *words, "--replay")
    words += ["--model", erased.trained.model]
    missing = str(tmp_path / "none.safetensors")
    refuse("name the original weights with --weights", None, *words, "--replay", "--weights", missing)
    refuse("no data at '/no/such/folder'", None, *words, "--replay", "--data", "/no/such/folder")
    refuse("no ledger at", None, *words, "--ledger", missing)
    refuse("cannot read the key", None, *words, "--key", missing)


def test_a_folder_may_be_moved(made: Path, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `expunge demo` leaves it, with the other weights in it, by relative paths that lead nowhere from inside."""

    def stray(record: dict[str, Any]) -> None:
        record["model"] |= {"weights": "gone/o.safetensors", "retrained": "gone/r.safetensors"}

    folder = Path(shutil.copytree(made / "first", tmp_path / "inside" / "moved"))
    edit(folder, stray, hash_anew=True)
    monkeypatch.chdir(folder)

    def weights(**more: Any) -> list[str]:
        found = verify.verify(Path(), **more)
        return [one.sentence for one in found if one.check == "weights"]

    assert [sentence[:42] for sentence in weights()[1:]] == [
        "the original weights are not at gone/o.saf", "the retrained weights are not at gone/r.sa",
    ]  # fmt: skip
    shutil.copy(trained.retrained, folder / "o.safetensors")  # other weights of that name
    shutil.copy(trained.retrained, folder / "r.safetensors")
    assert "the original weights are not at gone/o.saf" in weights()[1]
    shutil.copy(trained.weights, folder.parent / "o.safetensors")
    assert weights()[1:] == [
        "o.safetensors is the original model's, byte for byte", "r.safetensors is the retrained model's, byte for byte"
    ]  # fmt: skip
    replayed = verify.verify(Path(), replay=True, where=Elsewhere(model=trained.model))
    assert [one.ok for one in replayed if one.check == "replay"] == [True]


def test_what_was_checked_is_told_where_a_replay_cannot_start(erased: Erased, tmp_path: Path) -> None:
    words = ["verify", str(erased.first), "--model", erased.trained.model, "--replay"]
    words += ["--weights", str(tmp_path / "none.safetensors")]
    result = invoke(*words)
    assert_refused(result.exit_code, result.stderr, "name the original weights with --weights")
    assert "record.json is as it was written" in result.stdout
    assert "code: made by the code that is installed here" in result.stdout
    assert {one["check"] for one in json.loads(invoke(*words, "--json").stdout)} >= {"record", "weights", "ledger"}
    assert invoke(*words, "--quiet").stdout == ""


def test_a_record_hashed_anew_without_parts_is_no_traceback(erased: Erased) -> None:
    def strip(record: dict[str, Any]) -> None:
        record["provenance"]["weights"] = {}

    edit(erased.first, strip, hash_anew=True)
    assert "record: record.json lacks a part that expunge writes" in erased.wrong(erased.first)[0]

    def outnumber(record: dict[str, Any]) -> None:  # as many paths as hashes are expected
        record["provenance"] |= {"kind": "audit", "weights": weights | {"retrained": []}}
        record["model"] |= {"original": "a", "unlearned": "b", "retrained": ["c"]}

    weights = record_of(erased.second)["provenance"]["weights"]
    edit(erased.second, outnumber, hash_anew=True)
    assert "record: record.json lacks a part that expunge writes" in erased.wrong(erased.second)[0]
    edit(erased.second, lambda record: record.update(data=None))
    assert erased.wrong(erased.second)[0].startswith("record: ")


# Hashes, on their own


def test_a_streamed_sample_has_the_hashes_of_a_staged_one(monkeypatch: pytest.MonkeyPatch) -> None:
    table = draw(open_source("digits").train, per_class=5, seed=0)
    preprocessing = Preprocessing(size=(8, 8), mean=(0.3,), std=(0.38,))
    salt = provenance.new_salt()
    staged = stage(table, preprocessing)
    found, same = provenance.hash_samples(staged, salt=salt)
    assert same is staged
    monkeypatch.setattr(data, "HELD_BYTES", 100)
    streamed = stage(table, preprocessing)
    assert isinstance(streamed.dataset, StreamedImages)
    assert provenance.hash_samples(streamed, salt=salt) == (found, streamed)
    assert len(set(found.hashes)) == 50
    image, label = staged.dataset[0]
    assert provenance.sample_hash(salt, image, int(label)) in found.hashes
    assert provenance.sample_hash(salt, image, int(label) + 1) not in found.hashes


def test_what_cannot_be_decoded_of_a_stream_is_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures: list[Any] = [Image.new("L", (8, 8), shade) for shade in range(9)]
    pictures[2] = pictures[3] = b"no picture"
    table = ImageTable(np.arange(9) % 3, lambda rows: (pictures[row] for row in rows), str)
    monkeypatch.setattr(data, "HELD_BYTES", 100)
    preprocessing = Preprocessing(size=(8, 8), mean=(0.3,), std=(0.38,))
    found, staged = provenance.hash_samples(stage(table, preprocessing, skip_bad=True), salt=provenance.new_salt())
    assert (len(found.hashes), len(staged.dataset), staged.num_bad) == (7, 7, 2)
    assert count_labels(staged.dataset) == {0: 2, 1: 3, 2: 2}


def test_the_hash_of_tensors_is_that_of_no_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AllCNN(3, 1)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    torch.save(dict(reversed(state.items())), tmp_path / "w.pt")
    one, two = weights_digests(tmp_path / "w.safetensors"), weights_digests(tmp_path / "w.pt")
    assert one["tensors"] == two["tensors"] == tensors_digest(model.state_dict())
    assert one["file"] != two["file"]
    channels_last = {
        name: value.to(memory_format=torch.channels_last) if value.ndim == 4 else value for name, value in state.items()
    }
    assert tensors_digest(channels_last) == one["tensors"]
    for name, other in (("name", {"x" + key: value for key, value in state.items()}),
                        ("dtype", {key: value.double() for key, value in state.items()}),
                        ("shape", {key: value.reshape(-1) for key, value in state.items()})):  # fmt: skip
        assert tensors_digest(other) != one["tensors"], name
    tied = {**load_file(tmp_path / "w.safetensors")}
    tied["zz"] = next(iter(tied.values()))
    assert tensors_digest(tied) == one["tensors"]  # as safetensors would store it
    assert len(tensors_digest({"a": torch.empty(0), "b": torch.tensor(1.0, dtype=torch.bfloat16)})) == 64


def test_relative_distance() -> None:
    first = {"a": torch.tensor([3.0, 4.0]), "n": torch.tensor(3)}
    assert relative_distance({"a": torch.tensor([3.0, 3.5]), "n": torch.tensor(9)}, first) == pytest.approx(0.1)
    assert relative_distance({"a": torch.zeros(3)}, first) == float("inf")
    assert relative_distance({}, first) == float("inf")


def test_code_of_another_folder_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "__init__.py").write_text("")
    before = provenance.code_digests()
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    found = provenance.code_digests()
    assert (found["commit"], found["modified"]) == (None, None)
    assert found["source"] != before["source"]


def test_a_replay_trains_in_the_precision_of_the_record_whatever_is_faster_here() -> None:
    record = {"method": "unsir", "config": {"preset": "default"}}
    for precision in ("fp32", "bf16"):
        phases = {"noise": {"precision": precision}, "answers": {"precision": "fp32"}}
        assert again.precision_of(record | {"cost": {"phases": phases}}) == [
            f"impair.precision={precision}",
            f"repair.precision={precision}",
        ]
    older = record | {"cost": {"phases": {"noise": {"seconds": 1.0}}}}  # from before there was a choice
    assert again.precision_of(older) == ["impair.precision=fp32", "repair.precision=fp32"]
