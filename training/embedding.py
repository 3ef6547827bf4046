"""How alike utterances are in meaning, by a sentence model: the cosine of their embeddings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.checkpoints import DEFAULT_EMBEDDING, checkpoint_folder
from schemas.errors import UserError
from training.matched import BAG_OF_WORDS, Similarity

LOCAL_MARK = " (sha256 "
"""In the name of a model that was taken from a folder."""
BATCH = 64
POSITIONS_AFTER_PADDING = ("mpnet", "roberta", "xlm-roberta", "camembert")
"""Architectures whose first position is the one behind the number of the padding token."""


def similarity_of(name: str, device: str = "cpu") -> Similarity:
    """The similarity called ``name``: ``bag-of-words``, or a `SentenceModel` by its folder or its name on the hub.

    Raises:
        UserError: there is no such sentence model.
    """
    return BAG_OF_WORDS if name == BAG_OF_WORDS.name else SentenceModel(name, device)


class SentenceModel:
    """Cosines of embeddings as sentence-transformers makes them: mean over the tokens, in float32.

    Each text is embedded once. Other texts beside it change its embedding by no more than rounding does. A text of
    nothing but space is like no text at all: its cosines are 0.

    Args:
        name: a local folder, or a name on the Hugging Face hub.

    Raises:
        UserError: the model is not there, is not whole, or pools in another way.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        folder = _folder(name)
        _check_pooling(folder)
        self._tokenizer, self._model = _load(folder)
        self._model.to(device).eval()
        self._device = device
        self._max_tokens = _max_tokens(folder, self._tokenizer, self._model.config)
        self._vectors: dict[str, NDArray[np.float64]] = {}
        local = Path(name).is_dir()
        self.name = f"{folder.resolve().name}{LOCAL_MARK}{_sha256(folder)[:12]})" if local else name

    def __call__(self, said: Sequence[str], meant: Sequence[str]) -> NDArray[np.float64]:
        """Cosines ``[G, R]`` in [-1, 1]."""
        self._embed({*said, *meant} - self._vectors.keys())
        left, right = (np.stack([self._vectors[text] for text in texts]) for texts in (said, meant))
        return np.clip(left @ right.T, -1.0, 1.0)

    def _embed(self, texts: set[str]) -> None:
        import torch

        ordered = sorted(texts, key=lambda text: (len(text), text))  # so that there is little padding
        for start in range(0, len(ordered), BATCH):
            batch = ordered[start : start + BATCH]
            tokens = self._tokenizer(
                batch, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
            ).to(self._device)
            with torch.inference_mode():
                hidden = self._model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1)
            mean = ((hidden * mask).sum(1) / mask.sum(1)).cpu().double()
            unit = (mean / mean.norm(dim=1, keepdim=True)).numpy()
            unit[[not text.strip() for text in batch]] = 0.0
            self._vectors.update(zip(batch, unit, strict=True))


def _folder(name: str) -> Path:
    if Path(name).is_dir():
        return checkpoint_folder(name)
    try:
        return checkpoint_folder(name)
    except UserError:
        raise UserError(
            f"the sentence model {name!r} is neither a local folder nor could it be fetched from the hub; "
            "copy its folder here and give its path with --embedding, or match by words with --embedding bag-of-words"
        ) from None


def _check_pooling(folder: Path) -> None:
    """Raise where sentence-transformers would do more than take the mean over tokens and normalise it."""
    for module in _json(folder / "modules.json") or []:
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Pooling":
            config = _json(folder / module["path"] / "config.json") or {}
            ways = {key for key, value in config.items() if key.startswith("pooling_mode") and value}
            known = ways == {"pooling_mode_mean_tokens"} or config.get("pooling_mode") == "mean"
        else:
            known = kind in ("Transformer", "Normalize")
        if not known:
            raise UserError(
                f"{folder} is a sentence model with another {kind} than the mean over tokens; "
                f"give one that takes the mean with --embedding, such as {DEFAULT_EMBEDDING}"
            )


def _load(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and model of a folder."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # what is missing is checked here
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, loading = AutoModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder} cannot be read as a sentence model ({type(error).__name__}); copy it again, "
            "with its tokenizer and model.safetensors"
        ) from None
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} tensors of its model, such as {missing[0]}; copy it again"
        )
    return tokenizer, model


def _max_tokens(folder: Path, tokenizer: Any, config: Any) -> int:
    """How many tokens of a text are read, as sentence-transformers would: what lies behind is cut off."""
    limits = [tokenizer.model_max_length]
    if positions := getattr(config, "max_position_embeddings", None):
        lost = config.pad_token_id + 1 if config.model_type in POSITIONS_AFTER_PADDING else 0
        limits.append(positions - lost)
    if own := (_json(folder / "sentence_bert_config.json") or {}).get("max_seq_length"):
        limits.append(own)
    return int(min(limits))


def _json(path: Path) -> Any | None:
    """A file's contents, None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{path} is not JSON; copy the sentence model again") from None


def _sha256(folder: Path) -> str:
    """Hash of all weights: of one file, what ``sha256sum`` says."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
