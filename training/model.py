"""SmolVLM2's language model with a visual adapter and exactly four heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from schemas.errors import UserError
from training.batch import Batch
from training.family import Counts
from training.recipe import TaskSettings
from training.tasks import count_labels, task_losses

HEADS = ("speaking", "dst_update", "response", "dst_state")
OWN_PARTS = {"speaking": "speaking_head.", "dst_update": "dst_update_head.", "dst_state": "dst_state_head."}
"""How parameters begin that one head alone has; the response head's are the word embeddings' own."""
NEW_PARTS = ("visual_adapter.", *OWN_PARTS.values())
"""Parameters that a SmolVLM2 checkpoint does not have."""


class DSTSmolVLMConfig(SmolVLMConfig):
    """A SmolVLM configuration with what the dialog model adds.

    Args:
        visual_adapter: ``identity`` lets every cached token in; ``fuse`` projects a tick's tokens to
            ``visual_tokens``.
        cached_tokens: tokens a tick in the feature cache.
        tiles: pieces of a frame's side that were encoded one by one.
        visual_tokens: tokens a tick in the sequence.
        with_vision: whether the vision tower and connector are part of the model; training needs neither.
        window_ticks, max_plan_steps, memory_turns, speech: how windows are written; a live run must do the same.
        speak_by: ``head`` decides with head 1, ``end_of_turn`` with the language model's probability of
            ``end_of_turn_token`` as the next one.
        speaking_threshold, dst_update_threshold, min_gap_ticks: chosen on the validation part; the last is how many
            ticks lie between two utterances at least.
        vision: where the features came from: ``model``, ``sha256`` of its vision tower, ``filter`` of the resizing,
            ``dtype`` that they were kept in, ``compute`` type of the tower.
    """

    model_type = "dst_smolvlm"

    visual_adapter: Literal["identity", "fuse"] = "fuse"
    cached_tokens: int = 64
    tiles: int = 1
    visual_tokens: int = 1
    with_vision: bool = False
    tick_hz: float = 2.0
    window_ticks: int = 64
    max_plan_steps: int = 24
    memory_turns: int = 2
    speech: Literal["branch", "inline"] = "branch"
    speak_by: Literal["head", "end_of_turn"] = "head"
    end_of_turn_token: int = 0
    speaking_threshold: float | None = None
    dst_update_threshold: float | None = None
    min_gap_ticks: int = 0
    vision: dict[str, str] | None = None


class VisualAdapter(nn.Module):
    """A tick's cached tokens to the tokens that enter the language model."""

    def __init__(self, config: DSTSmolVLMConfig) -> None:
        super().__init__()
        self.out_tokens = config.visual_tokens
        width = config.text_config.hidden_size
        if config.visual_adapter == "identity" and config.visual_tokens != config.cached_tokens:
            raise ValueError(
                f"the identity adapter keeps all {config.cached_tokens} tokens, not {config.visual_tokens}"
            )
        self.fuse = (
            nn.Linear(config.cached_tokens * width, config.visual_tokens * width)
            if config.visual_adapter == "fuse"
            else None
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """``[N, cached_tokens, H]`` to ``[N, visual_tokens, H]``."""
        if self.fuse is None:
            return features
        return self.fuse(features.flatten(1)).view(len(features), self.out_tokens, -1)


class StateHead(nn.Module):
    """Scores each pair of a tick and a step: bilinear in their hidden states, so plans may have any length."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bilinear = nn.Linear(width, 3 * width)
        self.scale = width**-0.5

    def forward(self, ticks: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Ticks ``[N, H]`` and the steps of each tick's plan ``[N, K, H]`` to logits ``[N, K, 3]``."""
        queries = self.bilinear(ticks).view(len(ticks), 3, -1)
        return torch.einsum("nch,nkh->nkc", queries, steps) * self.scale


class DSTSmolVLM(SmolVLMForConditionalGeneration):
    """The dialog model. Its heads work in float32 whatever the backbone's type is.

    Heads 1 ``speaking_head`` and 2 ``dst_update_head`` decide at each tick, head 3 `response_head` is the
    vocabulary projection, head 4 ``dst_state_head`` scores (tick, step) pairs.
    """

    config_class = DSTSmolVLMConfig
    own_parts = OWN_PARTS
    new_parts = NEW_PARTS
    _keys_to_ignore_on_load_unexpected = (r"model\.vision_model\..*", r"model\.connector\..*")

    def __init__(self, config: DSTSmolVLMConfig) -> None:
        super().__init__(config)
        if not config.with_vision:
            del self.model.vision_model, self.model.connector
        width = config.text_config.hidden_size
        self.visual_adapter = VisualAdapter(config)
        self.speaking_head = nn.Linear(width, 2)
        self.dst_update_head = nn.Linear(width, 2)
        self.dst_state_head = StateHead(width)
        self.post_init()

    @property
    def response_head(self) -> nn.Linear:
        """The language model's own vocabulary projection."""
        return self.lm_head

    def embed(self, tokens: torch.Tensor, features: torch.Tensor, visual_at: torch.Tensor) -> torch.Tensor:
        """Token embeddings with the visual tokens in their places.

        Args:
            tokens: int64 ``[B, L]``.
            features: ``[N, cached_tokens, H]`` of all ticks, in the order of ``visual_at``.
            visual_at: int64 ``[N * visual_tokens]``, indices into the flattened ``[B * L]``.
        """
        embedded = self.get_input_embeddings()(tokens)
        visual = self.visual_adapter(features.to(embedded.dtype)).flatten(0, 1)
        flat = embedded.flatten(0, 1).index_copy(0, visual_at, visual.to(embedded.dtype))
        return flat.view_as(embedded)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Last hidden states of a batch, ``[B * L, H]``."""
        return self._trunk(batch, use_cache=False).last_hidden_state.flatten(0, 1)

    def hidden_with_cache(self, batch: Batch) -> tuple[torch.Tensor, Any]:
        """Last hidden states ``[B * L, H]``, and the keys and values to go on from."""
        out = self._trunk(batch, use_cache=True)
        return out.last_hidden_state.flatten(0, 1), out.past_key_values

    def _trunk(self, batch: Batch, use_cache: bool) -> Any:
        embedded = self.embed(batch.tokens, batch.features, batch.visual_at)
        by_blocks = self.config.text_config._attn_implementation == "flex_attention"
        return self.model.text_model(
            inputs_embeds=embedded,
            attention_mask=batch.block_mask() if by_blocks else batch.additive_mask(embedded.dtype),
            position_ids=batch.positions,
            use_cache=use_cache,
        )

    def decide(
        self, ticks: torch.Tensor, steps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Heads 1, 2 and 4 on hidden states of ticks ``[N, H]`` and of their plans' steps ``[N, K, H]``.

        Returns:
            Logits; those of head 1 are the language model's where silence is its next token.
        """
        ticks, steps = ticks.float(), steps.float()
        with torch.autocast(ticks.device.type, enabled=False):
            speaking = self.speaking_head(ticks)
            if self.config.speak_by == "end_of_turn":
                silent = self.project(ticks).log_softmax(-1)[:, self.config.end_of_turn_token]
                silent = silent.clamp(max=-1e-7)  # else the logarithm of what is left has no value
                speaking = torch.stack([silent, torch.log(-torch.expm1(silent))], dim=-1)
            return speaking, self.dst_update_head(ticks), self.dst_state_head(ticks, steps)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Head 3 on hidden states ``[R, H]``: float32 logits ``[R, vocabulary]``."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.response_head.weight.float())

    def forward(self, batch: Batch, heads: Sequence[str] = HEADS) -> dict[str, torch.Tensor]:
        """The heads that are asked for on a batch of packed windows.

        Returns:
            float32 logits, also under autocast: ``speaking`` and ``dst_update`` ``[N, 2]`` for N ticks, ``dst_state``
            ``[N, K, 3]``, ``response`` ``[R, vocabulary]`` for the R labelled positions.
        """
        hidden = self.hidden(batch)
        ticks = hidden[batch.tick_at].float()
        out: dict[str, torch.Tensor] = {}
        with torch.autocast(hidden.device.type, enabled=False):
            if "speaking" in heads:
                out["speaking"] = self.speaking_head(ticks)
            if "dst_update" in heads:
                out["dst_update"] = self.dst_update_head(ticks)
            if "response" in heads:
                out["response"] = self.project(hidden[batch.response_at])
            if "dst_state" in heads:
                steps = hidden[batch.step_at].float()
                out["dst_state"] = self.dst_state_head(ticks, steps[batch.window_of_tick])
        return out

    def count_labels(self, batch: Batch, tasks: Mapping[str, TaskSettings]) -> Counts:
        """As `training.tasks.count_labels`."""
        return count_labels(batch, tasks, self.config.text_config.vocab_size)

    def task_losses(
        self,
        outputs: Mapping[str, torch.Tensor],
        batch: Batch,
        tasks: Mapping[str, TaskSettings],
        totals: Counts,
    ) -> dict[str, torch.Tensor]:
        """As `training.tasks.task_losses`."""
        return task_losses(outputs, batch, tasks, totals)


AnyDst = TypeVar("AnyDst", bound=SmolVLMForConditionalGeneration)


def from_backbone(kind: type[AnyDst], folder: Path, config_changes: dict[str, Any], seed: int) -> AnyDst:
    """A model of ours on a SmolVLM2 checkpoint's language model; adapter and new heads start from ``seed``.

    Neither vision tower nor connector is loaded.

    Raises:
        UserError: the checkpoint lacks tensors of the language model.
    """
    backbone = SmolVLMConfig.from_pretrained(folder).to_dict()
    backbone.pop("model_type")
    config = kind.config_class(**{**backbone, **config_changes, "architectures": [kind.__name__]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, loading = _load(kind, folder, config=config)
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith(kind.new_parts))
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} tensors of the language model, such as {missing[0]}")
    return model


def load_trained(folder: Path) -> DSTSmolVLM:
    """A trained dialog model, as `load_checkpoint` reads it."""
    return load_checkpoint(DSTSmolVLM, folder)


def load_checkpoint(kind: type[AnyDst], folder: Path) -> AnyDst:
    """A trained checkpoint, bit for bit as it was saved; the vision tower of an export is left where it is.

    Raises:
        UserError: not a checkpoint of this model, or an incomplete one.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a checkpoint (no config.json); give a run of 'dst train'")
    config = kind.config_class.from_pretrained(folder)
    if config.architectures != [kind.__name__]:
        raise UserError(f"{folder} holds {config.architectures}, not {kind.__name__}; give another run")
    config.with_vision = False
    model, loading = _load(kind, folder, config=config)
    if loading["missing_keys"]:
        raise UserError(f"{folder} lacks {len(loading['missing_keys'])} tensors; it was not saved whole")
    return model


def _load(kind: type[AnyDst], folder: Path, config: Any) -> tuple[AnyDst, dict[str, Any]]:
    from transformers.utils import logging

    logging.set_verbosity_error()  # which tensors are new is checked here, not reported as a table
    logging.disable_progress_bar()
    loaded: tuple[AnyDst, dict[str, Any]] = kind.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True
    )
    return loaded
