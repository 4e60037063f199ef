"""What is looked at: confusion, the map of features, learned images, pictures only where they were asked for."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch import nn

from conftest import Tiny
from expunge.audits import AUDITS, AuditData, Context, Subject
from expunge.audits.feature_map import EACH, laid_on, plane_of
from expunge.data import TensorImages, normalize
from expunge.errors import InputError
from expunge.evaluation import CONFUSION_CLASSES, evaluate
from expunge.journal import Journal
from expunge.metrics import confusion_counts
from expunge.pictures import LARGEST, NOISE_SIDE, as_png, eight_bits, learned_record, lit, noise_picture
from expunge.report import check_record, html_report, read_pictures, read_record
from expunge.report.looks import MOST_DRAWN
from expunge.report.page import page_of
from expunge.report.rerun import rerun
from expunge.schema import IMAGES, Preprocessing, Split
from expunge.verify import verify
from illustrated import illustrated, picture, pictures_of
from test_cli import Trained, invoke, record_of, refuse, trained
from test_report import EVIL, STORED, Page, plain

__all__ = ["trained"]  # the fixture, for this file too


def pixels(text: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


# Confusion


def test_counts_are_those_of_another_implementation() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn((200, 5), generator=generator), torch.randint(0, 5, (200,), generator=generator)
    found = confusion_counts(logits, labels)
    expected = confusion_matrix(labels, logits.argmax(1), labels=range(5))
    assert [[found[row][called] for called in range(5)] for row in range(5)] == expected.tolist()
    assert all(count for row in found.values() for count in row.values())


def test_a_record_holds_what_its_accuracies_are_of(tiny: Tiny) -> None:
    assert tiny.split.test is not None
    metrics = evaluate(tiny.model, tiny.model, tiny.split, retrained=tiny.model).metrics
    for side in ("before", "after", "retrained"):
        rows = metrics[side]["confusion"]
        assert sum(count for row in rows.values() for count in row.values()) == len(tiny.split.test)  # type: ignore[arg-type]
        for name, row in rows.items():
            assert row.get(name, 0) / sum(row.values()) == pytest.approx(metrics[side]["per_class_accuracy"][name])


class Remembers(nn.Module):
    """Answers with what is written in the first pixel, but of one class with another."""

    def __init__(self, num_classes: int, wrong: int) -> None:
        super().__init__()
        self.classes, self.wrong = num_classes, wrong
        self.head = nn.Linear(1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        label = images[:, 0, 0, 0].round().long()
        label = torch.where(label == self.wrong, 0, label)
        return nn.functional.one_hot(label, self.classes).float() + 0 * self.head.weight.sum()


def test_of_many_classes_the_forgotten_and_the_most_changed_are_kept() -> None:
    count = 60
    labels = torch.arange(count).repeat(3)
    test = TensorImages(labels.float().view(-1, 1, 1, 1).expand(-1, 1, 4, 4), labels)
    split = Split(forget_classes=(7, 9), retain=test, test=test)
    record = evaluate(Remembers(count, -1), Remembers(count, 33), split)
    rows = [*record.metrics["after"]["confusion"]]
    assert rows[:3] == ["7", "9", "33"]
    assert len(rows) == 2 + CONFUSION_CLASSES
    assert [*record.metrics["before"]["confusion"]] == rows
    assert record.metrics["after"]["confusion"]["33"] == {"0": 3}
    content = json.loads(json.dumps(record.metrics, sort_keys=True))  # as a file has it
    shown = page_of(
        {"schema_version": 1, "method": "x", "classes": record.classes, "metrics": content}
    )["sections"]["confusion"]  # fmt: skip
    assert shown["heats"][0].columns[:3] == ["7", "9", "33"]
    assert shown["heats"][0].columns[-1] == "others"
    assert (len(shown["heats"][0].rows), shown["hidden"]) == (MOST_DRAWN, count - MOST_DRAWN)
    assert shown["moves"] == [("33", "33", ["3", "0"]), ("33", "0", ["0", "3"])]


# The map of features


def test_the_plane_is_that_of_most_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn((40, 2), generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1.0])
    turn = torch.linalg.qr(torch.randn((7, 7), generator=generator, dtype=torch.float64))[0][:, :2]
    places, kept = plane_of(flat @ turn.T + 5)
    assert kept.mean().item() == pytest.approx(1)
    assert places.square().mean().item() == pytest.approx(1)
    between, wanted = torch.cdist(places, places), torch.cdist(flat, flat)
    ratio = (between / wanted)[wanted > 1e-3]
    assert ratio.min().item() == pytest.approx(ratio.max().item())  # the same picture, turned and scaled
    angle = 1.1
    turned = places @ torch.tensor([[math.cos(angle), math.sin(angle)], [math.sin(angle), -math.cos(angle)]]).double()
    assert torch.allclose(laid_on(turned, places), places, atol=1e-6)
    noisy = flat @ turn.T + torch.randn((40, 7), generator=generator, dtype=torch.float64)
    values = (noisy - noisy.mean(0)).square().sum()
    singular = torch.linalg.svdvals(noisy - noisy.mean(0)).square()
    assert plane_of(noisy)[1].mean().item() == pytest.approx((singular[:2].sum() / values).item())


def test_features_without_a_plane() -> None:
    line, kept = plane_of(torch.tensor([[1.0], [2.0], [4.0]]))
    assert line[:, 1].tolist() == [0, 0, 0]
    assert kept.mean().item() == pytest.approx(1)
    with pytest.raises(InputError, match="are the same"):
        plane_of(torch.ones(5, 3))
    with pytest.raises(InputError, match="NaN or infinite"):
        plane_of(torch.tensor([[1.0, float("nan")], [2.0, 0.0]]))


def test_a_map_holds_each_sample_under_its_class(tiny: Tiny) -> None:
    assert tiny.split.test is not None
    data = AuditData(forget_classes=(3,), test=tiny.split.test, class_names=tiny.split.class_names)
    subject = Subject("original", tiny.model, tiny.split.preprocessing)
    found = AUDITS["feature_map"].run(subject, data, Context(original=subject, seed=0))
    points = found.details["points"]
    counts = {name: len(one["x"]) for name, one in points.items()}
    assert counts["3"] == 37
    assert sum(counts.values()) == 37 + EACH
    assert all(len(one["x"]) == len(one["y"]) for one in points.values())
    assert len(json.dumps(found.details)) < 8_000


# Pictures


def test_pictures_are_small_and_what_was_seen() -> None:
    preprocessing = Preprocessing(size=(8, 8), mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4))
    image = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(eight_bits(normalize(image[None], preprocessing)[0], preprocessing), image)
    assert torch.equal(eight_bits(image, None), image)
    assert np.array_equal(pixels(as_png(image)), image.permute(1, 2, 0).numpy())
    assert np.array_equal(pixels(as_png(image[:1])), image[0].numpy())
    assert pixels(as_png(torch.zeros((3, 400, 200), dtype=torch.uint8))).shape == (LARGEST, LARGEST // 2, 3)
    assert pixels(noise_picture(torch.randn(1, 224, 224), None)).shape == (NOISE_SIDE, NOISE_SIDE)


def test_light_is_where_the_map_is() -> None:
    white = torch.full((1, 8, 8), 255, dtype=torch.uint8)
    places = torch.zeros(4, 4)
    places[0, 0], places[3, 3] = 2.0, -2.0
    shown = lit(white, places)[0]
    assert shown[0, 0] == 255
    assert shown[7, 7] == shown[0, 7] == shown.min() < 40
    assert lit(white, torch.full((4, 4), -1.0)).max() < 40  # looks nowhere


def test_a_method_leaves_a_handful_of_what_it_learned(tiny: Tiny, forgotten: tuple[nn.Module, Journal]) -> None:
    unlearned, journal = forgotten
    assert [(one.kind, len(one.labels)) for one in journal.learned] == [("noise", 3), ("impressions", 3)]
    handed: dict[str, Any] = {}
    arguments = (journal.learned, tiny.model, unlearned, tiny.split.class_names, tiny.split.preprocessing)
    made = learned_record(*arguments, handed)
    assert made == learned_record(*arguments)  # that pictures were asked for changes nothing in the record
    assert made is not None
    assert all(one["class"] == "3" and one["before"] < 0.05 for one in made["noise"])
    assert all(one["before"] > 0.9 and one["after"] < 0.1 and one["start"] != "3" for one in made["impressions"])
    assert all(pixels(one["picture"]).shape == (8, 8) for one in made["noise"])
    assert not any("picture" in one for one in made["impressions"])  # which began as images
    assert [set(one) for one in handed["impressions"].values()] == [{"start", "picture"}] * 3
    assert learned_record([], tiny.model, unlearned, (), None) is None


def test_the_handful_is_small_of_any_number_of_classes() -> None:
    from expunge.methods.unsir import HANDFUL, _handful

    for classes in (1, 2, 5, 30):
        labels = torch.arange(classes).repeat_interleave(4)
        rows = _handful(labels)
        assert 1 <= len(rows) <= HANDFUL
        assert len(set(rows.tolist())) == len(rows)
        assert set(labels[rows].tolist()) == set(range(min(classes, HANDFUL)))


# The page


def test_each_figure_is_also_in_words() -> None:
    record = illustrated(STORED["audit"])
    check_record(record)
    page = Page(html_report(record))
    words = plain(page.words)
    assert "Answers that changed most, in images" in words
    assert "40.0 % of the variance of its features" in words
    assert [one["alt"] for one in page.of("img")] == ["Noise learned about 3"]
    assert "99.1 % 0.4 %" in plain(Page(html_report(record).replace("</td>", " </td>")).words)
    assert "shown only with --include-images" in words
    assert "12 attacks" not in words
    panels = page_of(record)["sections"]["map"]["panels"]
    assert [one.role for one in panels] == ["original", "unlearned", "retrained"]


def test_pictures_are_shown_only_when_handed_over() -> None:
    record = illustrated(STORED["audit"])
    shown, hidden = html_report(record, pictures_of(record)), html_report(record)
    assert len(Page(shown).of("img")) == 1 + 2 + 4
    assert len(Page(hidden).of("img")) == 1
    for one in (picture(5), picture(8), picture(9), picture(2)):
        assert one in shown
        assert one not in hidden
    sneaked = {**record, "pictures": pictures_of(record)}  # a record cannot bring its own
    assert html_report(sneaked) == hidden


def test_a_picture_is_a_png_or_none() -> None:
    record = illustrated(STORED["audit"])
    record["learned"]["noise"][0]["picture"] = EVIL
    check_record(record)
    text = html_report(record, {"impressions": {"1": {"start": f'{picture(3)}" onerror="alert(1)', "picture": EVIL}}})
    assert Page(text).of("img") == []


def test_a_map_of_many_forgotten_classes_has_four_marks() -> None:
    record = illustrated(STORED["audit"])
    names = record["classes"]["all"]
    record["classes"]["forget"] = names[:6]
    shown = page_of(record)["sections"]["map"]
    assert [name for _, name in shown["legend"]] == [*names[:3], "3 more forgotten classes", "classes that stay"]
    assert {kind for panel in shown["panels"] for kind, _ in panel.paths} == {f"tone-{n}" for n in range(1, 5)} | {
        "stay"
    }


# From the commands


def test_pictures_are_kept_vouched_for_and_withheld(tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "out"
    words = trained.arguments(out, "--retain-per-class", "20")
    assert invoke(*words).exit_code in (0, 1)
    without = record_of(out)
    assert not (out / IMAGES).exists()
    assert "include_images" not in without["config"]
    refuse("was made without pictures", None, "report", str(out), "--include-images")
    assert invoke(*words, "--include-images", "--overwrite").exit_code in (0, 1)
    record = read_record(out)
    for part in ("metrics", "learned", "calibration"):
        assert record[part] == without[part]
    assert "--include-images" in (rerun(record) or {})["command"]
    pictures = read_pictures(out, record)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page == html_report(record, pictures)
    start = pictures["impressions"]["1"]["start"]
    assert start in page
    assert invoke("report", str(out)).exit_code == 0
    assert start not in (out / "report.html").read_text(encoding="utf-8")  # asked for each time
    assert invoke("report", str(out), "--include-images").exit_code == 0
    assert start in (out / "report.html").read_text(encoding="utf-8")
    refuse(
        "expected --include-images with --format html", None, "report", str(out), "--include-images", "--format", "md"
    )

    def found() -> tuple[bool | None, str]:
        (one,) = [one for one in verify(out) if one.check == "images"]
        return one.ok, one.sentence

    assert found() == (True, f"{IMAGES} is as it was written")
    whole = (out / IMAGES).read_bytes()
    (out / IMAGES).write_bytes(whole + b" ")
    assert found()[0] is False
    refuse("was changed", None, "report", str(out), "--include-images")
    (out / IMAGES).unlink()
    assert found()[0] is None
    refuse("expected the pictures of the record", None, "report", str(out), "--include-images")
    (out / IMAGES).write_bytes(whole)
    assert invoke(*words, "--overwrite").exit_code in (0, 1)
    assert not (out / IMAGES).exists()  # of the run before
    (out / IMAGES).write_bytes(whole)
    assert found() == (False, f"{IMAGES} was added: the record was made without pictures")


def test_an_audit_shows_where_models_look(tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "out"
    words = ["audit", "--original", str(trained.weights), "--unlearned", str(trained.retrained), "--data", "digits"]
    words += [
        "--model",
        trained.model,
        "--classes",
        "3",
        "--audits",
        "where_it_looks,feature_map",
        "--no-training-data",
    ]
    result = invoke(*words, "--out", str(out), "--include-images", "--retrained", str(trained.retrained))
    assert result.exit_code in (0, 1), result.stderr
    record = read_record(out)
    shown = read_pictures(out, record)["where_it_looks"]
    assert [*shown] == [f"{side} {number}" for side in ("forget", "retain") for number in range(1, 5)]
    assert all(set(one["lit"]) == {"original", "unlearned", "retrained"} for one in shown.values())
    assert {one["class"] for name, one in shown.items() if name.startswith("forget")} == {"3"}
    assert shown["forget 1"]["lit"]["unlearned"] == shown["forget 1"]["lit"]["retrained"]  # the same weights
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert len(page.of("img")) == 8 * 4
    assert "2 attacks" not in plain(page.words)
