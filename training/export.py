"""A trained run as one folder that runs elsewhere: weights, vision tower, tokenizer, thresholds, and a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pipeline.vision import PARTS, load_weights, vision_sha256
from schemas.errors import UserError
from schemas.files import replacing_folder, write_text
from training.checkpoint import EXPORTED, STATE, WEIGHTS, checkpoint_of, let_read, tower_of
from training.counting.counter import threshold_of
from training.counting.evaluate import markdown_table
from training.counting.model import CountingSmolVLMConfig
from training.counting.recipe import CountingRecipe
from training.evaluate import Reports
from training.gate import Thresholds
from training.model import DSTSmolVLMConfig
from training.model_card import model_card
from training.recipe import Recipe
from training.report import table_markdown
from training.runs import is_counting_run

_FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def export(run: Path, out: Path, checkpoint: str | None = None) -> str | None:
    """Write the folder, in place of an earlier export, or not at all.

    The vision tower lies in a file of its own, in the type it is stored in at its source: so it has the same hash.

    Args:
        run: of either family.
        checkpoint: None takes the family's best.

    Returns:
        What its model card lacks, None where it lacks nothing.

    Raises:
        UserError: not a run, no such checkpoint or one without thresholds, the vision tower is not to be had, or
            ``out`` is something else.
    """
    is_counting = is_counting_run(run)
    checkpoint = checkpoint or (CountingRecipe if is_counting else Recipe).best
    folder = checkpoint_of(run, checkpoint)
    config = (CountingSmolVLMConfig if is_counting else DSTSmolVLMConfig).from_pretrained(folder)
    (threshold_of if is_counting else Thresholds.of)(config)
    if not config.vision or "compute" not in config.vision:
        raise UserError(
            f"{folder} does not say which vision tower it was trained with; train it again to export it"
        )
    tower = tower_of(config.vision)
    if vision_sha256(tower) != config.vision["sha256"]:
        raise UserError(
            f"{tower} holds another vision tower than {folder} was trained with; put that one there"
        )
    if out.exists() and any(out.iterdir()) and not (out / EXPORTED).is_file():
        raise UserError(f"{out} is there and is no export; give another --out")
    scores = Reports(run, checkpoint, "test").file("metrics.json")
    figures = None
    if scores.is_file():
        metrics = json.loads(scores.read_text(encoding="utf-8"))
        figures = (markdown_table if is_counting else table_markdown)(metrics)
    with replacing_folder(out) as temporary:
        for file in folder.iterdir():
            if not file.match(WEIGHTS) and file.name != STATE:
                shutil.copy(file, temporary)
        _write_weights(folder, tower, temporary)
        shutil.copy(tower / "preprocessor_config.json", temporary)
        shutil.copy(run / "recipe.yaml", temporary)
        config.with_vision = True
        config.save_pretrained(temporary)
        let_read(temporary)
        write_text(temporary / EXPORTED, json.dumps({"run": run.name, "checkpoint": checkpoint}) + "\n")
        if figures is not None:
            shutil.copy(scores, temporary / "metrics.json")
        card = model_card(run.name, checkpoint, config, is_counting, figures)
        write_text(temporary / "README.md", card)
    if figures is None:
        return (
            f"the model card has no scores, since {scores} is not there; run 'dst evaluate' and export again"
        )
    return None


def _write_weights(folder: Path, tower: Path, out: Path) -> None:
    """The language model with its heads, and the tower beside it, with the index by which transformers finds both."""
    from safetensors.torch import load_file, save_file

    model = {
        name: tensor for file in sorted(folder.glob(WEIGHTS)) for name, tensor in load_file(file).items()
    }
    found = load_weights(tower)
    vision = {f"{prefix}{key}": t for prefix, part in PARTS.items() for key, t in found[part].items()}
    places: dict[str, str] = {}
    for file, tensors in zip(_FILES, (model, vision), strict=True):
        save_file(tensors, out / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    size = sum(tensor.nbytes for tensors in (model, vision) for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    write_text(out / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
