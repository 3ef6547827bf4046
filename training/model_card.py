"""The model card of an export: what it is, how to use it, and what it was measured to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

_TERMS = """\
`recipe.yaml` says how it was trained, on a vision tower that stays as it was in its base model. The terms of the base
model and of the data it was trained on hold for it."""


class _Text(NamedTuple):
    """What is a family's own: the kind of task, what the model does, how to use it, and its thresholds."""

    pipeline_tag: str
    about: str
    command: str
    python: str
    thresholds: str


def model_card(name: str, checkpoint: str, config: Any, is_counting: bool, figures: str | None) -> str:
    """In Markdown, with the head that a model hub reads.

    Args:
        name: of the run.
        config: of its model.
        figures: scores as a table in Markdown; None where it was not scored.
    """
    text = _counting(config) if is_counting else _dialog(config)
    source = config.vision["model"]
    base = Path(source).name if Path(source).is_dir() else source
    return f"""---
library_name: dst
base_model: {base}
pipeline_tag: {text.pipeline_tag}
---
# {name}, checkpoint {checkpoint}

{text.about}

{_TERMS}

## Use

    {text.command}

or in Python:

    from pathlib import Path
{text.python}

{text.thresholds}

## Scores

{figures or "It was not scored before the export." + chr(10)}"""


def _dialog(config: Any) -> _Text:
    gap = (
        f", at least {config.min_gap_ticks / config.tick_hz:g} s after its last words"
        if config.min_gap_ticks
        else ""
    )
    return _Text(
        pipeline_tag="video-text-to-text",
        about=f"""\
A proactive video assistant, made with `dst`: {config.tick_hz:g} times a second it sees a picture, knows which step of a
plan is not started, in progress or completed, and decides by itself when to speak.""",
        command="dst stream --run FOLDER --video kitchen.mp4 --plan plan.yaml",
        python="""\
    from schemas.task import Task
    from training.assistant import Assistant

    assistant = Assistant.load(Path("FOLDER"), Task("Make tea", ("boil water", "pour it over the leaves")))
    events = assistant.step(frame, seconds)  # RGB uint8 [H, W, 3], since the stream began""",
        thresholds=f"""\
It speaks from a probability of {config.speaking_threshold:.3f} on{gap}, and updates the state from
{config.dst_update_threshold:.3f} on: chosen on the validation part.""",
    )


def _counting(config: Any) -> _Text:
    goals: list[str] = config.goals
    return _Text(
        pipeline_tag="image-text-to-text",
        about=f"""\
A counter, made with `dst`: it marks what it is asked for in a picture, one object after the other, until it believes
that all are marked, or has made {config.max_marks} marks. It was trained on {len(goals)} categories, such as
{", ".join(goals[:3])}.""",
        command=f'dst count --run FOLDER --image picture.jpg --what "{goals[0]}"',
        python=f"""\
    from training.counting.counter import Counter

    found = Counter.load(Path("FOLDER")).count("picture.jpg", "{goals[0]}")
    print(found.count, found.marks)  # x and y in pixels""",
        thresholds=f"It is done from a probability of {config.done_threshold:.2f} on: chosen on the validation part.",
    )
