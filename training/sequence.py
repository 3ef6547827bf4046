"""One causal sequence for a window of ticks: header, memory, observation as trunk, speech as branches off it or inline.

Training builds its windows here, and so does everything that runs a trained model: there is no other path.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from schemas.errors import UserError
from schemas.states import COMPLETED
from training.losses import IGNORE

ROLE = "You are a proactive assistant."
STATE_TAGS = ("to do", "doing", "done")  # what the plan shows for not started, in progress, completed
_MARK = "\u241f"


@dataclass(frozen=True)
class Words:
    """An utterance at a tick, by ``user`` or ``assistant``."""

    tick: int
    role: str
    text: str


@dataclass
class Window:
    """A window of ``T`` ticks as tokens, with ``L`` positions, ``K`` shown steps, ``m`` visual tokens a tick.

    Attributes:
        tokens: int64 ``[L]``; the image placeholder where a visual token stands.
        speech: bool ``[L]``; True on words that branch off: the trunk never attends to them.
        positions: int64 ``[L]``; the trunk counts on as if the branches were not there.
        visual_at: int64 ``[T * m]``; indices of the visual tokens.
        tick_at: int64 ``[T]``; index of the last visual token of each tick, where heads 1, 2, 4 read.
        step_at: int64 ``[K]``; index of the last token of each shown step's name.
        shown: int64 ``[K]``; which steps of the plan those are.
        targets: int64 ``[L]``; the next token where head 3 is trained, ``IGNORE`` elsewhere.
            With ``speak_by="end_of_turn"`` a tick's last visual token has one, too: the end of the utterance where
            the assistant is silent, else what opens its message.
    """

    tokens: NDArray[np.int64]
    speech: NDArray[np.bool_]
    positions: NDArray[np.int64]
    visual_at: NDArray[np.int64]
    tick_at: NDArray[np.int64]
    step_at: NDArray[np.int64]
    shown: NDArray[np.int64]
    targets: NDArray[np.int64]


class SequenceBuilder:
    """Writes windows with a checkpoint's own tokenizer and chat template.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template and an ``<image>`` token.
        visual_tokens: tokens a tick after the visual adapter.
        max_plan_steps: a longer plan shows the steps around the first one that is not completed.
        memory_turns: turns before the window that are repeated in it.
        speech: ``branch`` keeps the assistant's words out of what later ticks see, ``inline`` does not.
        speak_by: ``end_of_turn`` makes silence a next token of the language model.
    """

    def __init__(
        self,
        tokenizer: Any,
        visual_tokens: int,
        max_plan_steps: int,
        memory_turns: int,
        speech: Literal["branch", "inline"] = "branch",
        speak_by: Literal["head", "end_of_turn"] = "head",
    ) -> None:
        self.visual_tokens = visual_tokens
        self.max_plan_steps = max_plan_steps
        self.memory_turns = memory_turns
        self.speech, self.speak_by = speech, speak_by
        self.tokenizer = tokenizer
        self._ids = functools.lru_cache(maxsize=1 << 16)(self._encode)  # plans and turns come again and again
        self.image_id = tokenizer.convert_tokens_to_ids("<image>")
        if self.image_id is None or self.image_id == tokenizer.unk_token_id:
            raise UserError("the checkpoint's tokenizer has no <image> token; give a SmolVLM2 checkpoint")
        prefix, suffix = self._template("system", first=True)
        self._system = (self._ids(prefix), self._ids(suffix))
        prefix, suffix = self._template("user", first=False)
        self._user = (self._ids(prefix), self._ids(suffix))
        prefix, suffix = self._template("assistant", first=False)
        self.assistant_prefix, self._assistant_suffix = self._ids(prefix), self._ids(suffix)
        self.end_of_utterance = self._assistant_suffix[0]
        self.pad_token = tokenizer.pad_token_id
        if self.end_of_utterance == self.pad_token:
            raise UserError("the checkpoint pads with its end-of-utterance token; set another pad_token")

    @classmethod
    def of(cls, folder: Path, config: Any) -> SequenceBuilder:
        """The builder of a trained checkpoint: its tokenizer, and windows written as in its training."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        shape = (config.visual_tokens, config.max_plan_steps, config.memory_turns)
        return cls(tokenizer, *shape, config.speech, config.speak_by)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _template(self, role: str, first: bool) -> tuple[str, str]:
        """What the chat template puts before and after a message; a space before the text goes with the text."""

        def render(*messages: tuple[str, str]) -> str:
            parts = [{"role": r, "content": [{"type": "text", "text": text}]} for r, text in messages]
            return str(self.tokenizer.apply_chat_template(parts, tokenize=False))

        opening = "" if first else render(("system", "-"))
        rendered = render((role, _MARK)) if first else render(("system", "-"), (role, _MARK))
        if not rendered.startswith(opening) or rendered.count(_MARK) != 1:
            raise UserError(
                "the checkpoint's chat template does not keep messages apart; give a SmolVLM2 checkpoint"
            )
        before, after = rendered.removeprefix(opening).split(_MARK)
        return before.rstrip(" "), after

    def answer(self, text: str) -> list[int]:
        """Tokens of what the assistant says, closed by the end of the utterance."""
        return [*self._ids(f" {text}"), self.end_of_utterance]

    def text_of(self, tokens: Sequence[int]) -> str:
        """The words of an answer's tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def window(
        self,
        goal: str,
        step_names: Sequence[str],
        state: NDArray[np.int8],
        first_tick: int,
        num_ticks: int,
        words: Sequence[Words],
    ) -> Window:
        """Write one window.

        Args:
            state: int8 ``[K]``, the state of every step before the window's first tick.
            words: utterances of the session in order; those before ``first_tick`` are its memory, those after
                the window are left out.
        """
        draft = _Draft(branches=self.speech == "branch")
        shown = shown_steps(state, self.max_plan_steps)
        said_at: dict[int, list[Words]] = {}
        for said in words:
            said_at.setdefault(said.tick, []).append(said)
        draft.trunk([*self._system[0], *self._ids(f" {ROLE}\nGoal: {goal}\nPlan:")])
        step_at = []
        for step in shown:
            draft.trunk(self._ids(f"\n{step + 1}. {STATE_TAGS[state[step]]}:"))
            draft.trunk(self._ids(f" {step_names[step]}"))
            step_at.append(len(draft.tokens) - 1)
        draft.trunk(self._system[1])
        earlier = [w for w in words if w.tick < first_tick]
        for said in earlier[len(earlier) - self.memory_turns :] if self.memory_turns else []:
            draft.trunk(self._message(said))
        visual_at: list[int] = []
        for tick in range(first_tick, first_tick + num_ticks):
            now = said_at.get(tick, [])
            for said in now:
                if said.role == "user":
                    draft.trunk(self._message(said))
            visual_at += range(len(draft.tokens), len(draft.tokens) + self.visual_tokens)
            draft.trunk([self.image_id] * self.visual_tokens)
            spoken = " ".join(w.text for w in now if w.role == "assistant")
            if self.speak_by == "end_of_turn":
                draft.targets[-1] = self.assistant_prefix[0] if spoken else self.end_of_utterance
            if spoken:
                draft.spoken(self.assistant_prefix, self.answer(spoken))
        return Window(
            tokens=np.array(draft.tokens, dtype=np.int64),
            speech=np.array(draft.speech, dtype=np.bool_),
            positions=np.array(draft.positions, dtype=np.int64),
            visual_at=np.array(visual_at, dtype=np.int64),
            tick_at=np.array(visual_at[self.visual_tokens - 1 :: self.visual_tokens], dtype=np.int64),
            step_at=np.array(step_at, dtype=np.int64),
            shown=shown,
            targets=np.array(draft.targets, dtype=np.int64),
        )

    def _message(self, said: Words) -> list[int]:
        if said.role == "user":
            return [*self._user[0], *self._ids(f" {said.text}"), *self._user[1]]
        return [*self.assistant_prefix, *self._ids(f" {said.text}"), *self._assistant_suffix]


def shown_steps(state: NDArray[np.int8], max_plan_steps: int) -> NDArray[np.int64]:
    """Indices of the steps a plan shows: all, or ``max_plan_steps`` of them around the current position.

    That is the number of completed steps: one step that was left out, or a wrong state, moves it by one, no more.
    """
    count = len(state)
    if count <= max_plan_steps:
        return np.arange(count)
    current = min(int((state == COMPLETED).sum()), count - 1)
    start = min(max(0, current - max_plan_steps // 4), count - max_plan_steps)
    return np.arange(start, start + max_plan_steps)


@dataclass
class _Draft:
    """A window while it is written."""

    branches: bool
    tokens: list[int] = field(default_factory=list)
    speech: list[bool] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    next_position: int = 0

    def trunk(self, tokens: list[int]) -> None:
        self._add(tokens, speech=False, targets=[IGNORE] * len(tokens))
        self.next_position += len(tokens)

    def spoken(self, prefix: list[int], answer: list[int]) -> None:
        """A branch begins where the trunk stands and leaves it there; the last token of an answer predicts nothing."""
        targets = [*[IGNORE] * (len(prefix) - 1), *answer, IGNORE]
        self._add([*prefix, *answer], speech=self.branches, targets=targets)
        if not self.branches:
            self.next_position += len(prefix) + len(answer)

    def _add(self, tokens: list[int], speech: bool, targets: list[int]) -> None:
        self.tokens += tokens
        self.speech += [speech] * len(tokens)
        self.positions += range(self.next_position, self.next_position + len(tokens))
        self.targets += targets
