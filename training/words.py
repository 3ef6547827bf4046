"""Scores of the words of utterances that were matched and mean the same: BLEU and METEOR."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from schemas.errors import UserError

ORDERS = (1, 2, 3, 4)


def are_installed() -> bool:
    """Whether the packages are there that texts are scored with; they are not imported."""
    return all(find_spec(package) is not None for package in ("sacrebleu", "nltk"))


def text_scores(pairs: Sequence[tuple[str, str]]) -> dict[str, float | None]:
    """``bleu_1`` to ``bleu_4`` and ``meteor`` of all pairs together, shares in [0, 1]; None where there is no pair.

    BLEU is sacrebleu's of the whole corpus, with n-grams of up to that order; it is 0 where nothing said has so many
    words. METEOR is the mean of the pairs' scores. It asks for long runs of equal words and so stays below 1 for
    equal texts too, most of all short ones: ``1 - 0.5 / words ** 3``.

    Args:
        pairs: each what was said, and what should have been.

    Raises:
        UserError: the packages are not installed, or WordNet is broken.
    """
    _need_packages()
    if not pairs:
        return {**{f"bleu_{order}": None for order in ORDERS}, "meteor": None}
    said, meant = zip(*pairs, strict=True)
    return {**{f"bleu_{order}": _bleu(said, meant, order) for order in ORDERS}, "meteor": _meteor(pairs)}


def about_texts() -> dict[str, str]:
    """What is told with the scores: BLEU's signature with sacrebleu's version, METEOR's name, nltk's version.

    METEOR that knows no synonyms, since WordNet is not there, has a name of its own: ``METEOR-exact-stem``.

    Raises:
        UserError: the packages are not installed, or WordNet is broken.
    """
    _need_packages()
    from sacrebleu.metrics import BLEU

    signature = BLEU(references=[["one text"]]).get_signature()  # which names how many truths each text has
    return {
        "bleu": str(signature),
        "meteor": "METEOR-exact-stem" if _wordnet() is None else "METEOR",
        "nltk": version("nltk"),
    }


def _need_packages() -> None:
    if not are_installed():
        raise UserError("BLEU and METEOR need sacrebleu and nltk; install them with: pip install 'dst[eval]'")


def _bleu(said: Sequence[str], meant: Sequence[str], order: int) -> float:
    from sacrebleu.metrics import BLEU

    percent = BLEU(max_ngram_order=order).corpus_score(list(said), [list(meant)]).score
    return min(1.0, percent / 100)  # its exp(log(100)) is a little more than 100


def _meteor(pairs: Sequence[tuple[str, str]]) -> float:
    from nltk.translate.meteor_score import single_meteor_score

    wordnet = _wordnet() or SimpleNamespace(synsets=lambda word: ())
    scores = [single_meteor_score(_split(meant), _split(said), wordnet=wordnet) for said, meant in pairs]
    return float(sum(scores) / len(scores))


def _split(text: str) -> list[str]:
    return re.findall(r"\w+", text)  # METEOR makes small letters of them


def _wordnet() -> Any | None:
    """nltk's WordNet, None where it was never downloaded."""
    from nltk.corpus import wordnet
    from nltk.corpus.reader.wordnet import WordNetError

    try:
        wordnet.ensure_loaded()
    except LookupError:
        return None
    except (OSError, AssertionError, WordNetError) as error:
        raise UserError(
            f"nltk's WordNet cannot be read ({type(error).__name__}); "
            "get it again with: python -m nltk.downloader wordnet"
        ) from None
    return wordnet
