"""What an assistant is to help with: a goal and its steps, as a user writes them down."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import UserError


@dataclass(frozen=True)
class Task:
    """A goal and the names of its steps in order.

    Raises:
        ValueError: no goal, no step, a step without a name, or two of one name.
    """

    goal: str
    steps: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.goal.strip():
            raise ValueError("it has no goal")
        if not self.steps:
            raise ValueError("it has no steps")
        if not all(name.strip() for name in self.steps):
            raise ValueError("a step has no name")
        twice = [name for name, times in Counter(self.steps).items() if times > 1]
        if twice:
            raise ValueError(f"two steps are named {twice[0]!r}")


def _why(error: OSError | UnicodeDecodeError) -> str:
    return error.reason if isinstance(error, UnicodeDecodeError) else str(error.strerror)


def read_task(path: Path) -> Task:
    """Read a YAML file with ``goal``, a text, and ``steps``, a list of texts.

    Raises:
        UserError: it is not there, or not such a file.
    """
    import yaml

    example = "write 'goal: Assemble the truck' and 'steps: [attach the wheels, attach the cabin]'"
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the plan {path} cannot be read ({_why(error)}); {example}") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise UserError(f"the plan {path}{line} is not YAML; {example}") from None
    if not isinstance(raw, dict) or raw.keys() != {"goal", "steps"}:
        raise UserError(f"the plan {path} must hold goal and steps, nothing else; {example}")
    goal, steps = raw["goal"], raw["steps"] or []
    if not isinstance(goal, str) or not isinstance(steps, list) or not all(isinstance(s, str) for s in steps):
        raise UserError(f"in the plan {path}, goal must be a text and steps a list of texts; {example}")
    try:
        return Task(goal, tuple(steps))
    except ValueError as error:
        raise UserError(f"the plan {path} cannot be followed: {error}") from None
