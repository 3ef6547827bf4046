"""BLEU and METEOR against values worked by hand, and against sacrebleu asked in another way."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nltk.data
import pytest
import sacrebleu
from nltk.corpus import wordnet

from schemas.errors import UserError
from training.words import about_texts, are_installed, text_scores


@pytest.fixture(autouse=True)
def nltk_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder nltk looks for corpora in: an empty one, whatever this machine has."""
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    wordnet._unload()
    yield tmp_path
    wordnet._unload()


def write_wordnet(folder: Path) -> Path:
    """WordNet's files with one meaning, of the nouns bolt and screw."""
    corpus = folder / "corpora" / "wordnet"
    corpus.mkdir(parents=True)
    for part in ("adj", "adv", "noun", "verb"):
        for name in (f"index.{part}", f"data.{part}", f"{part}.exc"):
            (corpus / name).write_text("")
    (corpus / "index.sense").write_text("")
    (corpus / "lexnames").write_text("00\tnoun.artifact\t1\n")
    (corpus / "data.noun").write_text("00000000 00 n 02 bolt 0 screw 0 000 | holds parts together  \n")
    (corpus / "index.noun").write_text("bolt n 1 0 1 0 00000000\nscrew n 1 0 1 0 00000000\n")
    return corpus


def test_bleu_of_two_sentences() -> None:
    """8 of 8 words are right, 5 of 6 pairs, 2 of 4 triples, 1 of 3 quadruples; 8 words are said where 11 should be."""
    scores = text_scores(
        [("put the wheel on the axle", "put the front wheel on the axle"), ("turn it", "turn it over now")]
    )
    shares = [8 / 8, 5 / 6, 2 / 4, 1 / 3]
    for order in (1, 2, 3, 4):
        expected = math.exp(1 - 11 / 8) * math.prod(shares[:order]) ** (1 / order)
        assert scores[f"bleu_{order}"] == pytest.approx(expected, abs=1e-12), order


def test_bleu_as_sacrebleu_has_it() -> None:
    """Its own function gives the share of each order, smoothed where nothing is right, and the penalty."""
    said = ["Well done! Now fix the wheel.", "Tighten both screws, please.", "Stop.", ""]
    meant = ["Great. Now fix the cabin.", "Please, tighten both screws.", "Stop there!", "Say something."]
    found = sacrebleu.corpus_bleu(said, [meant])
    assert found.counts[3] == 0
    scores = text_scores(list(zip(said, meant, strict=True)))
    assert scores["bleu_4"] == pytest.approx(found.score / 100)
    for order in (1, 2, 3):
        expected = found.bp * math.prod(share / 100 for share in found.precisions[:order]) ** (1 / order)
        assert scores[f"bleu_{order}"] == pytest.approx(expected, abs=1e-12), order


def test_meteor_by_hand() -> None:
    """(1 - 0.5 * (runs / hits) ** 3) * precision * recall / (0.9 * precision + 0.1 * recall), then the mean."""
    # All four words are found, bolt by its stem, in two runs: "tighten the bolts" and "now".
    turned = ("Tighten the bolts now!", "Now tighten the bolt.")
    assert text_scores([turned])["meteor"] == pytest.approx(1 - 0.5 * (2 / 4) ** 3)
    # Three of three words said, three of six that should be, in two runs: "attach the" and "wheel".
    short = ("attach the wheel", "attach the small wheel to it")
    by_hand = (1 - 0.5 * (2 / 3) ** 3) * 0.5 / (0.9 + 0.05)
    assert text_scores([short])["meteor"] == pytest.approx(by_hand)
    assert text_scores([turned, short])["meteor"] == pytest.approx((0.9375 + by_hand) / 2)
    assert text_scores([("pick up", "put down")])["meteor"] == 0.0


def test_meteor_as_published() -> None:
    """The example of nltk's documentation, where it gives 0.6944."""
    said = "It is a guide to action which ensures that the military always obeys the commands of the party"
    meant = "It is a guide to action that ensures that the military will forever heed Party commands"
    assert text_scores([(said, meant)])["meteor"] == pytest.approx(0.6944, abs=5e-5)


def test_meteor_with_and_without_synonyms(nltk_data: Path) -> None:
    """Without WordNet a screw is no bolt, and the score has another name."""
    pair = ("turn the screw", "turn the bolt")
    assert text_scores([pair])["meteor"] == pytest.approx((1 - 0.5 * (1 / 2) ** 3) * 2 / 3)
    assert about_texts()["meteor"] == "METEOR-exact-stem"
    write_wordnet(nltk_data)
    assert text_scores([pair])["meteor"] == pytest.approx(1 - 0.5 * (1 / 3) ** 3)
    assert about_texts()["meteor"] == "METEOR"


def test_a_wordnet_that_cannot_be_read(nltk_data: Path) -> None:
    """It does not pass for none: the scores would be others than on the machine beside it."""
    (write_wordnet(nltk_data) / "lexnames").unlink()
    with pytest.raises(UserError, match=r"WordNet cannot be read \(OSError\); get it again"):
        text_scores([("a", "b")])


def test_equal_texts() -> None:
    """BLEU is exactly 1; METEOR is short of it by 0.5 / words ** 3."""
    scores = text_scores([("Now fix the front wheel.",) * 2, ("Done with all four of them!",) * 2])
    assert [scores[f"bleu_{order}"] for order in (1, 2, 3, 4)] == [1.0] * 4
    assert scores["meteor"] == pytest.approx(1 - (0.5 / 5**3 + 0.5 / 6**3) / 2)


def test_nothing_to_score() -> None:
    """No pair has no score; a text without words has one of 0."""
    names = ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor"]
    assert text_scores([]) == dict.fromkeys(names)
    assert text_scores([("", "")]) == dict.fromkeys(names, 0.0)
    assert text_scores([("", "Fix the wheel.")]) == dict.fromkeys(names, 0.0)
    long = " ".join(f"word{number}" for number in range(5000))
    assert text_scores([(long, long)])["bleu_4"] == 1.0


def test_what_is_told_of_it() -> None:
    signature = f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert about_texts() == {"bleu": signature, "meteor": "METEOR-exact-stem", "nltk": nltk.__version__}


@pytest.mark.parametrize("package", ["sacrebleu", "nltk"])
def test_a_package_that_is_not_installed(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told where there is nothing to score too, so that a run does not find out at its end."""
    assert are_installed()
    monkeypatch.setitem(sys.modules, package, None)
    assert not are_installed()
    for call in (lambda: text_scores([]), about_texts):
        with pytest.raises(UserError, match=r"pip install 'dst\[eval\]'"):
            call()


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, training.embedding, training.words; training.words.are_installed(); "
        "sys.exit(' '.join({'nltk', 'sacrebleu', 'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
