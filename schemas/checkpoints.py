"""Where a model's files are: a local folder, or a name on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from schemas.errors import UserError

DEFAULT_MODEL = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
DEFAULT_EMBEDDING = "sentence-transformers/all-mpnet-base-v2"
"""The sentence model that published scores of dialogues were matched with."""
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt"]


def checkpoint_folder(name: str) -> Path:
    """The local folder of a checkpoint, fetched from the hub where ``name`` is not a folder.

    Raises:
        UserError: not a folder, and the hub does not give it.
    """
    folder = Path(name)
    if (folder / "config.json").is_file():
        return folder
    if folder.is_dir():
        raise UserError(f"{folder} is a folder without config.json; give a Hugging Face checkpoint")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"the model {name!r} is neither a local folder nor could it be fetched from the hub "
            f"({type(error).__name__}); copy its folder here and give its path (to cache-features with --model, to "
            "train with --set model.init=), or make a random one with 'dst init-model --preset tiny --out models/tiny'"
        ) from None
