"""The dialogue a plan implies, for recordings nobody wrote one for, and how long a session is."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from schemas.records import Turn
from schemas.states import Step

MARGIN_S = 2.0
_GOAL = (
    "I want to do this: {}. Will you help me?",
    "Please guide me: {}.",
    "My task is: {}. Tell me what to do.",
)
_INSTRUCTION = ("Next: {}.", "The next step is: {}.", "Now go on with this: {}.")
_FEEDBACK = ("Well done, that is finished: {}.", "Good, this step is complete: {}.", "That is done: {}.")
_CORRECTION = (
    "Wait, that is not right. Please check what you just did.",
    "Careful, there is a mistake. Please undo it before you go on.",
    "That does not belong there. Have another look.",
)
_CLOSING = ("That was the last step. Great work!", "All steps are done, you have finished.", "We are done!")


def session_range(
    steps: Sequence[Step], turns: Sequence[Turn], mistakes: Sequence[tuple[float, float]] | None
) -> tuple[float, float]:
    """Start and end in seconds of a session: all that happens in it from 0 on, and 2 s on either side."""
    times = [t for step in steps for span in step.spans for t in span]
    times += [turn.t_s for turn in turns]
    times += [t for span in mistakes or () for t in span]
    times = [t for t in times if math.isfinite(t) and t >= 0]
    return max(0.0, min(times) - MARGIN_S), max(times) + MARGIN_S


def template_dialog(
    goal: str, steps: Sequence[Step], mistakes: Sequence[tuple[float, float]] | None, seed_text: str
) -> tuple[Turn, ...]:
    """The dialogue a plan implies, for recordings nobody wrote one for.

    The user tells the goal a second before the first step; the assistant gives an instruction at each start,
    feedback at each completion, a correction at the start of each mistake, and closes at the last end.

    Args:
        steps: those without a start are passed over, those without an end get no feedback.
        mistakes: half-open spans in seconds, or None.
        seed_text: chooses the wording; the same text gives the same words everywhere.

    Returns:
        Turns in order of time; none when no step starts.
    """
    seen = [step for step in steps if math.isfinite(step.start)]
    if not seen:
        return ()
    # (seconds, rank among equals, wordings, what it is about): praise for a step precedes the next one
    events = [(max(0.0, min(step.start for step in seen) - 1.0), 0, _GOAL, goal)]
    events += [(step.start, 3, _INSTRUCTION, step.name) for step in seen]
    ended = [step for step in seen if math.isfinite(step.end)]
    events += [(step.end, 4 if step.end == step.start else 1, _FEEDBACK, step.name) for step in ended]
    events += [(start, 2, _CORRECTION, "") for start, _ in mistakes or ()]
    if ended:
        events.append((max(step.end for step in ended), 5, _CLOSING, ""))
    events.sort(key=lambda event: event[:2])
    return tuple(_say(*event, f"{seed_text}/{index}") for index, event in enumerate(events))


def _say(t_s: float, rank: int, wordings: Sequence[str], about: str, seed_text: str) -> Turn:
    choice = int.from_bytes(hashlib.sha256(seed_text.encode()).digest()[:8], "big") % len(wordings)
    text = wordings[choice].format(about.strip().rstrip("."))
    if rank == 0:
        return Turn(t_s, "user", text, ("goal",))
    kind = {1: "feedback", 2: "correction", 3: "instruction", 4: "feedback", 5: "closing"}[rank]
    return Turn(t_s, "assistant", text, ("initiative", kind))
