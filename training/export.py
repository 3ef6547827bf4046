"""A trained run as one folder that runs elsewhere: weights, vision tower, tokenizer, thresholds, and a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.vision import PARTS, load_weights, vision_sha256
from schemas.errors import UserError
from schemas.files import replacing_folder, write_text
from training.checkpoint import EXPORTED, STATE, WEIGHTS, checkpoint_of, tower_of
from training.evaluate import Reports
from training.gate import Thresholds
from training.model import DSTSmolVLMConfig
from training.report import table_markdown

_FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def export(run: Path, out: Path, checkpoint: str = "best") -> str | None:
    """Write the folder, in place of an earlier export, or not at all.

    The vision tower lies in a file of its own, in the type it is stored in at its source: so it has the same hash.

    Returns:
        What its model card lacks, None where it lacks nothing.

    Raises:
        UserError: not a run, no such checkpoint or one without thresholds, the vision tower is not to be had, or
            ``out`` is something else.
    """
    folder = checkpoint_of(run, checkpoint)
    config = DSTSmolVLMConfig.from_pretrained(folder)
    Thresholds.of(config)
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
    metrics = json.loads(scores.read_text(encoding="utf-8")) if scores.is_file() else None
    with replacing_folder(out) as temporary:
        for file in folder.iterdir():
            if not file.match(WEIGHTS) and file.name != STATE:
                shutil.copy(file, temporary)
        _write_weights(folder, tower, temporary)
        shutil.copy(tower / "preprocessor_config.json", temporary)
        shutil.copy(run / "recipe.yaml", temporary)
        config.with_vision = True
        config.save_pretrained(temporary)
        write_text(temporary / EXPORTED, json.dumps({"run": run.name, "checkpoint": checkpoint}) + "\n")
        if metrics is not None:
            shutil.copy(scores, temporary / "metrics.json")
        write_text(temporary / "README.md", _card(run, checkpoint, config, metrics))
    if metrics is None:
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


def _card(run: Path, checkpoint: str, config: Any, metrics: dict[str, Any] | None) -> str:
    figures = table_markdown(metrics) if metrics else "It was not scored before the export.\n"
    gap = (
        f", at least {config.min_gap_ticks / config.tick_hz:g} s after its last words"
        if config.min_gap_ticks
        else ""
    )
    return f"""---
library_name: dst
base_model: {Path(config.vision["model"]).name if Path(config.vision["model"]).is_dir() else config.vision["model"]}
pipeline_tag: video-text-to-text
---
# {run.name}, checkpoint {checkpoint}

A proactive video assistant, made with `dst`: {config.tick_hz:g} times a second it sees a picture, knows which step of a
plan is not started, in progress or completed, and decides by itself when to speak. `recipe.yaml` says how it was
trained, on a vision tower that stays as it was in its base model. The terms of the base model and of the data it was
trained on hold for it.

## Use

    dst stream --run FOLDER --video kitchen.mp4 --plan plan.yaml

or in Python:

    from pathlib import Path
    from schemas.task import Task
    from training.assistant import Assistant

    assistant = Assistant.load(Path("FOLDER"), Task("Make tea", ("boil water", "pour it over the leaves")))
    events = assistant.step(frame, seconds)  # RGB uint8 [H, W, 3], since the stream began

It speaks from a probability of {config.speaking_threshold:.3f} on{gap}, and updates the state from
{config.dst_update_threshold:.3f} on: chosen on the validation part.

## Scores

{figures}"""
