"""A run under way: step after step, with validations and saves between them; any step can be the last one for now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from accelerate import Accelerator

from pipeline.copies import is_remote, local_path
from schemas.errors import UserError
from schemas.files import write_text
from training.checkpoint import save_again, save_model
from training.curves import curves_picture
from training.family import Counts, Family, summed
from training.objective import Objective
from training.recipe import AnyRecipe
from training.runlog import Row, RunLog
from training.selection import Selection
from training.sharding import gathered, whole
from training.steps import Position, Step, training_loader
from training.stop import Interrupted, Stopped, StopRequest, children_that_stay
from training.tuning import merged_state


class Run:
    """Where a run is, what was best, and how it goes on."""

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Objective,
        family: Family,
        recipe: AnyRecipe,
        selection: Selection,
        out: Path,
        on_step: Callable[[Row], None],
    ) -> None:
        self.accelerator, self.objective, self.family, self.recipe = accelerator, objective, family, recipe
        self.out, self.on_step = out, on_step
        self.model = objective.model
        self.step, self.position = 0, Position()
        self.unvalidated: Row | None = None  # what is known of a step whose validation was interrupted
        self.selection = selection
        self.log = RunLog(out, accelerator)

    def start(self, shards: str | Path) -> None:
        """A new run's folder."""
        if self.accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            settings = yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False)
            write_text(self.out / "recipe.yaml", settings)
            where = str(shards) if is_remote(str(shards)) else str(local_path(str(shards)).resolve())
            write_text(self.out / "run.json", json.dumps({"shards": where}) + "\n")
        self.log.open(0)

    def load_state(self, state: dict[str, Any]) -> None:
        self.step, self.position = state["step"], Position(*state["position"])
        self.unvalidated = state["unvalidated"]
        self.selection.load_state(state["selection"])
        self.objective.load_state(state["objective"])
        self.model.config.update(state["thresholds"])
        self.log.open(self.step)

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "position": list(self.position),
            "unvalidated": self.unvalidated,
            "selection": self.selection.state(),
            "objective": self.objective.state(),
            "thresholds": {name: getattr(self.model.config, name) for name in self.family.chosen},
            "data_key": self.family.data_key,
        }

    def go(self) -> Row:
        """Steps until there are enough, or every task has run out of patience."""
        with self.log, StopRequest() as stop:
            if self.unvalidated is not None:
                self._complete(self.unvalidated, stop)
            for step in self._read_ahead():
                if self.step == self.recipe.train.steps or self.selection.is_over(self.objective.frozen):
                    break
                row = {"step": self.step + 1, "epoch": self.position.epoch} | self._take(step)
                self.position = step.after
                self._complete(row, stop)
        if self.accelerator.is_main_process:
            curves_picture(self.log.rows, self.out / "curves.png")
            write_text(self.out / "summary.json", json.dumps(self._summary(), indent=2) + "\n")
        return self.log.row_of(self.selection.bests[self.selection.best].step)

    def _summary(self) -> dict[str, float | bool]:
        """When each best was reached, and how it ended."""
        told: dict[str, float | bool] = {}
        for name, best in self.selection.bests.items():
            row = self.log.row_of(best.step)
            told |= {f"{name}_step": best.step, f"{name}_epoch": row["epoch"]}
            loss = f"val/loss_{name.removeprefix('best_')}"
            if loss in row:
                told[f"best_{loss.replace('/', '_')}"] = row[loss]
        early = self.step < self.recipe.train.steps
        return told | {"stopped_early": early, "stopped_at_epoch": self.log.row_of(self.step)["epoch"]}

    def _read_ahead(self) -> Iterator[Step]:
        """The steps from here on. A generator lets go of its worker processes as soon as nobody asks it for more."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        steps = self.family.steps(self.position, rank, ranks)
        with children_that_stay():
            loaded = iter(training_loader(steps, self.recipe.data.workers))
        for step in loaded:
            if isinstance(step, UserError):
                raise step
            yield step

    def _take(self, step: Step) -> Row:
        """One step of the optimizers; what the log says of it."""
        passes = [batch.to(self.accelerator.device) for batch in step.passes]
        totals = self._totals(passes)
        self.model.train()
        # dropout depends on the step and the rank alone: a run that was resumed, or looked at, drops the same
        seed = _mixed(self.recipe.train.seed, self.step, self.accelerator.process_index)
        probed: Row = {}
        if self.recipe.train.probe_every and self.step % self.recipe.train.probe_every == 0:
            torch.manual_seed(seed)
            probed = self.objective.probe(passes[0], totals)
        torch.manual_seed(seed)
        padding = sum(batch.padding for batch in passes) / len(passes)
        return self.objective.step(passes, totals, self.step) | probed | {"train/padding": padding}

    def _complete(self, row: Row, stop: StopRequest) -> None:
        """All that follows a step: validation, the log, saves; the end, if one was asked for."""
        train, number = self.recipe.train, int(row["step"])
        is_last = number == train.steps
        is_due = self.position.step == 0 if train.eval_every is None else number % train.eval_every == 0
        if is_due or is_last:
            try:
                scores = self._validate(stop)
            except Interrupted:
                self.unvalidated = row
                self._save(["latest"])
                raise Stopped(self._any_rank(stop.signal), self.step) from None
            row = row | scores | {"train/clip_share": self.log.clip_share(row)}
        self.step, self.unvalidated = number, None
        self.log.add(row)
        is_scored = self.selection.metric in row
        better = self._better(row) if is_scored else []
        saved = is_scored or bool(train.save_every and number % train.save_every == 0)
        if saved:
            self._save([*better, "latest"])
        self.on_step(row | self.selection.waited() if is_scored else row)
        if (asked := self._any_rank(stop.signal)) and not is_last:
            if not saved:
                self._save(["latest"])
            raise Stopped(asked, self.step)

    def _validate(self, stop: StopRequest) -> Row:
        with whole(self.model, self.objective.spare, self.accelerator.device) as model:
            return self.family.validate(model, self.accelerator, stop.check)

    def _totals(self, passes: Sequence[Any]) -> Counts:
        """Labels of the whole step, over all ranks."""
        own = summed([self.model.count_labels(batch, self.objective.tasks) for batch in passes])
        return cast(Counts, self.accelerator.reduce(own, "sum"))

    def _better(self, row: Row) -> list[str]:
        """The checkpoints that a validation makes better."""
        names = self.selection.update(self.step, row)
        frozen = self.objective.frozen
        if self.recipe.train.on_plateau == "freeze_task" and not self.selection.is_over(frozen):
            frozen |= self.selection.out_of_patience()
        return names

    def _save(self, names: Sequence[str]) -> None:
        """The model under each name; with the last one, once the others are there, what the run needs to go on."""
        self.log.sync()  # a checkpoint knows of no step that the log may still lose
        state, is_main = self.state(), self.accelerator.is_main_process
        if is_main or self.recipe.train.shard:  # every rank has a part
            tensors = gathered(merged_state(self.model))
        if is_main:
            first, *others = [self.out / "checkpoints" / name for name in names]
            save_model(self.model, self.family.tokenizer, first, tensors, None if others else state)
            for folder in others:
                save_again(self.model, first, folder, tensors, state if folder is others[-1] else None)
        self.accelerator.wait_for_everyone()

    def _any_rank(self, signal: int | None) -> int:
        """The signal that any rank has had, so that all stop after the same step."""
        if self.accelerator.num_processes == 1:
            return signal or 0
        told = torch.tensor([signal or 0], device=self.accelerator.device)
        return int(self.accelerator.gather(told).max())


def _mixed(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:6], "little")
