"""SmolVLM2's language model as a counter: marks go in, the next object's place and whether all are marked come out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from training.counting.batch import CountingBatch
from training.counting.coord import CoordHead, next_places, taken_before
from training.counting.losses import coord_values, nearest_unmarked, over_places, weighted
from training.counting.recipe import CoordTask, Encoding
from training.family import Counts
from training.recipe import AnyTask

TASKS = ("coord", "done")


class CountingSmolVLMConfig(SmolVLMConfig):
    """A SmolVLM configuration with what the counter adds.

    Args:
        visual_adapter: ``identity`` lets every cached token in as it is; ``project`` has a trained layer before it,
            which a random vision tower needs.
        cached_tokens: tokens an image in the feature cache, a square grid in raster order.
        marks: ``mark_tokens`` adds a token a mark after the image; ``token_embed`` adds a learned vector to the
            image token that a mark lies in, one for each part of it; ``drawn`` shows an image that has them drawn in.
        tiles: pieces of an image's side that were encoded one by one.
        done_threshold: probability from which all objects are marked; chosen on the validation part.
        max_marks: a rollout stops there.
        goals: the categories of the training part.
        vision: as of `training.model.DSTSmolVLMConfig`.
    """

    model_type = "dst_counting_smolvlm"

    visual_adapter: Literal["identity", "project"] = "identity"
    cached_tokens: int = 64
    marks: Encoding = "mark_tokens"
    tiles: int = 1
    with_vision: bool = False
    done_threshold: float | None = None
    max_marks: int = 100
    goals: list[str] | None = None
    vision: dict[str, str] | None = None


class PlaceEmbedding(nn.Module):
    """Where something is, as a vector: a projection of x, y and their sines and cosines at doubling frequencies.

    Image tokens and marks share it, so that a mark can look for what lies around it. (Fourier features, Tancik et al.,
    "Fourier features let networks learn high frequency functions", 2020.)
    """

    OCTAVES = 5  # the highest has a wave an eighth of the side long: two tokens of a grid of 8

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(4 * self.OCTAVES + 2, width)

    def forward(self, places: torch.Tensor) -> torch.Tensor:
        """``[..., 2]`` in -1..1 to ``[..., H]``."""
        frequencies = math.pi / 2 * 2 ** torch.arange(self.OCTAVES, device=places.device)
        angles = (places[..., None] * frequencies).flatten(-2)
        return self.project(torch.cat([places, angles.sin(), angles.cos()], -1))


class Projection(nn.Module):
    """A token beside what is usual at its place, and how it differs from its image's others, through a layer.

    Of a random tower, nearly all that tokens tell is their place and the colour of the whole picture; the differences
    are the rest. What is usual is measured on the training part, before training.
    """

    mean: torch.Tensor  # [T, H]
    deviation: torch.Tensor  # [H]

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(tokens, width))
        self.register_buffer("deviation", torch.ones(width))
        self.hidden, self.out = nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, width)

    def measure(self, features: torch.Tensor) -> None:
        """Take what is usual from features ``[N, T, H]``."""
        self.mean.copy_(features.mean(0))
        self.deviation.copy_((features - self.mean).std((0, 1)).clamp(min=1e-6))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """``[N, T, H]`` to ``[N, T, H]``."""
        usual = (features - self.mean) / self.deviation
        both = torch.cat([usual, usual - usual.mean(1, keepdim=True)], -1)
        return self.out(nn.functional.gelu(self.hidden(both)))


class CountingSmolVLM(SmolVLMForConditionalGeneration):
    """The counter. Its heads and all that is new work in float32 whatever the backbone's type is.

    ``coord_head`` says where the next object is, x and y in -1..1; ``done_head`` the logit of there being none. Both
    are read at the last token: the prompt's end where nothing is marked, else the last mark's.
    """

    config_class = CountingSmolVLMConfig
    own_parts = {"coord": "coord_head.", "done": "done_head."}  # noqa: RUF012 (as in the base classes)
    new_parts = ("visual_adapter.", "place.", "mark.", "sub_cell.", *own_parts.values())
    _keys_to_ignore_on_load_unexpected = (r"model\.vision_model\..*", r"model\.connector\..*")

    def __init__(self, config: CountingSmolVLMConfig) -> None:
        super().__init__(config)
        if not config.with_vision:
            del self.model.vision_model, self.model.connector
        width = config.text_config.hidden_size
        self.visual_adapter = (
            Projection(config.cached_tokens, width) if config.visual_adapter == "project" else nn.Identity()
        )
        self.place = PlaceEmbedding(width)
        self.mark = nn.Embedding(1, width) if config.marks == "mark_tokens" else None
        self.sub_cell = nn.Embedding(config.scale_factor**2, width) if config.marks == "token_embed" else None
        self.coord_head = CoordHead(width)
        self.done_head = nn.Linear(width, 1)
        self.post_init()
        if (
            not config.tie_word_embeddings
        ):  # no task reaches it, and several processes would wait for its gradient
            self.lm_head.requires_grad_(False)

    def embed(self, batch: CountingBatch) -> torch.Tensor:
        """Prompt, image and marks as the language model takes them: ``[B, L, H]``."""
        embedded = self.get_input_embeddings()(batch.tokens)
        with torch.autocast(embedded.device.type, enabled=False):
            image = self.visual_adapter(batch.features.float()) + self.place(self._centres())
            if self.sub_cell is not None:
                image = image + self._marked_cells(batch)
        flat = embedded.flatten(0, 1)
        flat = flat.index_copy(0, batch.visual_at, image.flatten(0, 1).to(flat.dtype))
        if self.mark is not None:
            marks = self.embed_marks(batch.marks)
            flat = flat.index_copy(0, batch.mark_at, marks.to(flat.dtype))
        return flat.view_as(embedded)

    def embed_marks(self, marks: torch.Tensor) -> torch.Tensor:
        """Mark tokens: places ``[M, 2]`` to ``[M, H]``, float32."""
        assert self.mark is not None
        with torch.autocast(marks.device.type, enabled=False):
            return self.place(marks) + self.mark.weight[0]

    def _centres(self) -> torch.Tensor:
        """The middle of each image token, ``[T, 2]``."""
        side = math.isqrt(self.config.cached_tokens)
        middles = (torch.arange(side, device=self.place.project.weight.device) + 0.5) / side * 2 - 1
        return torch.stack(torch.meshgrid(middles, middles, indexing="xy"), -1).flatten(0, 1)

    def _marked_cells(self, batch: CountingBatch) -> torch.Tensor:
        """What marks add to the image tokens they lie in, ``[B, T, H]``.

        The connector is a pixel shuffle and one linear layer without bias, so that a vector added after it for a part
        of a token is one added before it to the patch there.
        """
        assert self.sub_cell is not None
        side, parts = math.isqrt(self.config.cached_tokens), self.config.scale_factor
        cells = ((batch.marks + 1) / 2 * side * parts).floor().long().clamp(0, side * parts - 1)
        x, y = cells.unbind(-1)
        token = (y // parts) * side + x // parts
        vectors = self.sub_cell((y % parts) * parts + x % parts)
        added = vectors.new_zeros(len(batch.tokens) * side * side, vectors.shape[-1])
        return added.index_add(0, batch.row_of_mark * side * side + token, vectors).view(
            len(batch.tokens), side * side, -1
        )

    def trunk(self, embedded: torch.Tensor, cache: Any = None, use_cache: bool = False) -> Any:
        """The language model on what `embed` gives; each sees what comes before it.

        Args:
            cache: keys and values of what came before ``embedded``.
        """
        return self.model.text_model(inputs_embeds=embedded, past_key_values=cache, use_cache=use_cache)

    def heads(
        self, hidden: torch.Tensor, image: torch.Tensor, wanted: Sequence[str] = TASKS
    ) -> dict[str, torch.Tensor]:
        """What is asked for, float32 also under autocast: for ``coord`` what `CoordHead` says, ``at`` ``[B, S, P]`` and
        ``places`` ``[B, P, 2]``; ``done`` ``[B, S]``.

        Args:
            hidden: ``[B, S, H]``.
            image: hidden states of the image's tokens, ``[B, T, H]``.
        """
        out: dict[str, torch.Tensor] = {}
        with torch.autocast(hidden.device.type, enabled=False):
            if "coord" in wanted:
                out["at"], out["places"] = self.coord_head(hidden.float(), image.float(), self._centres())
            if "done" in wanted:
                out["done"] = self.done_head(hidden.float())[..., 0]
        return out

    def forward(self, batch: CountingBatch, heads: Sequence[str] = TASKS) -> dict[str, torch.Tensor]:
        """What is asked for where rows of `CountingBatch.only` are read, R times: ``coord`` ``[R, 2]``, the likeliest
        place that has no mark yet, beside `heads`' ``at`` ``[R, P]`` and ``places`` ``[R, P, 2]``; ``done`` ``[R]``.

        Rows are padded at their end, where no position that comes before looks.
        """
        part = batch.only(heads)
        hidden = self.trunk(self.embed(part)).last_hidden_state
        found = self.heads(hidden, self.image_states(hidden, part), heads)
        places = found.pop("places", None)
        out = {name: values.flatten(0, 1)[part.read_at] for name, values in found.items()}
        if places is not None:
            taken = taken_before(places, part.marks, part.row_of_mark, part.row_of_read, part.marked)
            out["places"] = places[part.row_of_read]
            out["coord"] = next_places(out["at"], out["places"], taken)
        return out

    def image_states(self, hidden: torch.Tensor, batch: CountingBatch) -> torch.Tensor:
        """Of hidden states ``[B, L, H]`` those of the image tokens, ``[B, T, H]``."""
        return hidden.flatten(0, 1)[batch.visual_at].view(len(hidden), -1, hidden.shape[-1])

    def count_labels(self, batch: CountingBatch, tasks: Mapping[str, AnyTask]) -> Counts:
        """The weight of each task's labels, ``[1]``."""
        return {name: getattr(batch, f"{name}_weight").sum()[None] for name in tasks}

    def task_losses(
        self,
        outputs: Mapping[str, torch.Tensor],
        batch: CountingBatch,
        tasks: Mapping[str, AnyTask],
        totals: Counts,
    ) -> dict[str, torch.Tensor]:
        """Each task's share of its mean loss over all labels of a step; beside ``coord`` the squared errors in
        ``x`` and ``y``, which are only told."""
        losses: dict[str, torch.Tensor] = {}
        batch = batch.only([task for task in TASKS if task in outputs])
        if "coord" in outputs:
            task = tasks["coord"]
            assert isinstance(task, CoordTask)
            wanted = wanted_places(outputs["coord"], batch, task)
            away = (outputs["places"] - wanted[:, None]).abs().sum(-1)
            values = over_places(coord_values(task.loss, away), outputs["at"])
            losses["coord"] = weighted(values, batch.coord_weight).mean(totals["coord"])
            squared = (outputs["coord"].detach() - wanted) ** 2
            for name, each in zip("xy", squared.unbind(-1), strict=True):
                losses[name] = weighted(each, batch.coord_weight).mean(totals["coord"])
        if "done" in outputs:
            values = nn.functional.binary_cross_entropy_with_logits(
                outputs["done"], batch.done, reduction="none"
            )
            losses["done"] = weighted(values, batch.done_weight).mean(totals["done"])
        return losses


def wanted_places(predicted: torch.Tensor, batch: CountingBatch, task: CoordTask) -> torch.Tensor:
    """Where the next object should have been found, ``[R, 2]``; anything where no object is left."""
    if task.target == "next":
        return batch.coord
    numbers = torch.arange(batch.points.shape[1], device=batch.points.device)
    is_left = (numbers >= batch.marked[:, None]) & (numbers < batch.num_points[batch.row_of_read][:, None])
    return nearest_unmarked(predicted, batch.points[batch.row_of_read], is_left)
