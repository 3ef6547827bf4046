"""The settings of a training run: what a recipe file may say, and what each value buys."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from schemas.config import Strict, load_config
from schemas.errors import UserError
from training.losses import LossName

Objective = Literal["joint", "independent", "uncertainty", "pcgrad"]

Share = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]


class Settings(Strict):
    """A section of a recipe. Numbers are finite, and true or false is none."""

    model_config = ConfigDict(allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_switch_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        is_switch = cls.model_fields[str(info.field_name)].annotation is bool
        parts = value if isinstance(value, list) else [value]
        if not is_switch and any(isinstance(part, bool) for part in parts):
            raise ValueError("true and false are for switches, and this is none")
        return value


class LoraSettings(Settings):
    """Low-rank adapters on the language model's projections (Hu et al., 2021)."""

    rank: Count = 16
    alpha: Count = 32  # their output is scaled by alpha / rank
    dropout: float = Field(0.0, ge=0, lt=1)


class BackboneSettings(Settings):
    """Which backbone, and what of it is trained."""

    init: str | None = None  # a hub name or a folder; none takes the checkpoint the cache was made with
    tune: Literal["full", "lora", "heads"] = (
        "full"  # adapter and heads always are; heads leaves the backbone as it is
    )
    lora: LoraSettings = LoraSettings()


class ModelSettings(BackboneSettings):
    """The dialog model's backbone, and how a tick enters it."""

    visual_adapter: Literal["identity", "fuse"] = "fuse"
    visual_tokens: Count = 1  # a tick in the sequence; with fuse 1 an hour is 7,200 tokens


class LoadingSettings(Settings):
    """What both families read with."""

    blind: bool = False  # features are zeroed: shows what the labels alone give away
    workers: int = Field(0, ge=0)  # processes that read and pack ahead, for each rank


class DataSettings(LoadingSettings):
    """How windows are cut, written and batched."""

    window_ticks: Count = 64
    max_plan_steps: Count = 24  # a longer plan shows the steps around the current one
    memory_turns: int = Field(2, ge=0)  # utterances before a window that are repeated in it
    speech: Literal["branch", "inline"] = (
        "branch"  # inline: later ticks see the true words, and learn to read them
    )
    speak_by: Literal["head", "end_of_turn"] = (
        "head"  # end_of_turn: silence is the language model's own next token
    )
    max_seq_len: int = Field(2048, ge=64)  # windows are packed into rows of up to so many tokens
    batch_rows: Count = 8  # rows of a step, over all ranks and accumulation steps
    rows_at_once: Count | None = (
        None  # rows of one forward pass on one device; none: as many as a step has for it
    )
    state_noise: float = Field(0.03, ge=0, le=1)  # chance that a step's starting state is shown wrongly

    @model_validator(mode="after")
    def _inline_needs_its_order(self) -> DataSettings:
        if self.speak_by == "end_of_turn" and self.speech == "branch":
            raise ValueError("speak_by end_of_turn needs speech inline: a branch is not what comes next")
        return self


class OptimizerSettings(Settings):
    """AdamW and its schedule."""

    lr: Rate = 5e-5  # of the backbone
    head_lr: Rate = 5e-4  # of adapter and heads, which start from nothing
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up; cosine ends at a hundredth
    warmup_steps: int = Field(100, ge=0)
    weight_decay: NotNegative = 0.01
    clip_norm: Rate = 1.0


class TaskOptimizer(Settings):
    """What a task's own optimizer has otherwise than the run's."""

    lr: Rate | None = None
    head_lr: Rate | None = None
    schedule: Literal["cosine", "constant"] | None = None
    warmup_steps: int | None = Field(None, ge=0)
    weight_decay: NotNegative | None = None
    clip_norm: Rate | None = None


class AnyTask(Settings):
    """What a task has in either family: how it is optimised, what its best checkpoint is."""

    weight: NotNegative = 1.0  # in the sum; 0 leaves the task out
    optimizer: TaskOptimizer = TaskOptimizer()  # objective independent only
    metric: str = (
        ""  # the validation score that selects best_<task>; of losses and errors the lowest, else the highest
    )
    patience: Count | None = None  # validations without a better score; none never ends


class TaskSettings(AnyTask):
    """One head of the dialog model, and its loss."""

    classes: ClassVar[int]
    loss: LossName = "cross_entropy"
    gamma: NotNegative = 2.0  # focal only
    alpha: tuple[NotNegative, ...] | None = None  # focal only: one weight a class

    @field_validator("alpha", mode="before")
    @classmethod
    def _alpha_is_a_weight_a_class(cls, alpha: Any) -> Any:
        if alpha is None:
            return None
        if cls.classes == 0:
            raise ValueError("words are no classes, and have no weights of their own; leave it away")
        if not isinstance(alpha, list | tuple) or len(alpha) != cls.classes:
            example = {2: "[0.25, 0.75]", 3: "[0.2, 0.6, 0.2]"}[cls.classes]
            raise ValueError(f"must be {cls.classes} numbers, one a class, for example {example}")
        return alpha

    @model_validator(mode="after")
    def _alpha_is_for_focal(self) -> TaskSettings:
        if self.alpha is not None and self.loss != "focal":
            raise ValueError(f"alpha belongs to the focal loss, not to {self.loss}")
        return self


class DecisionTask(TaskSettings):
    """Whether something happens at a tick: of real ones, 3 to 6 in a hundred."""

    classes = 2
    loss: LossName = "balanced"  # its threshold is flat, so that it travels well from val to test
    silence_ratio: Share = 1.0  # share of ticks without the event that the loss looks at, others each epoch


class SpeakingTask(DecisionTask):
    metric: str = "val/speaking_f1"


class UpdateTask(DecisionTask):
    metric: str = "val/dst_update_f1"


class ResponseTask(TaskSettings):
    classes = 0  # words are as many as the checkpoint has: none has a weight of its own
    metric: str = "val/loss_response"


class StateTask(TaskSettings):
    classes = 3
    metric: str = "val/dst_state_joint_near_transition"
    near_weight: Rate = 1.0  # of labels within two ticks of a transition; the others weigh 1


T = TypeVar("T", bound=AnyTask)


class SomeTasks(Settings, Generic[T]):
    """The tasks of a family; each field is one."""

    @model_validator(mode="after")
    def _something_is_learned(self) -> Self:
        if not self.active:
            raise ValueError("all weights are 0, so that nothing is learned")
        return self

    @property
    def active(self) -> dict[str, T]:
        """Those with a weight, by name."""
        every = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: task for name, task in every.items() if task.weight > 0}


class Tasks(SomeTasks[TaskSettings]):
    """The four tasks of the dialog model, a head each."""

    speaking: SpeakingTask = SpeakingTask()
    dst_update: UpdateTask = UpdateTask()
    response: ResponseTask = ResponseTask()
    dst_state: StateTask = StateTask()


TASK_NAMES = ("speaking", "dst_update", "response", "dst_state")


class TrainSettings(OptimizerSettings):
    """Objective, length, and what it runs in."""

    objective: Objective = "joint"
    strategy: Literal["alternating", "shared_forward"] = (
        "alternating"  # of independent: a forward pass a task, or one
    )
    on_plateau: Literal["continue", "freeze_task"] = (
        "continue"  # what becomes of a task that is out of patience
    )
    steps: Count = 2000
    eval_every: Count | None = 200  # steps between validations; none: at the end of each epoch
    save_every: Count | None = None  # steps between saves of `latest`; none: at each validation
    probe_every: int = Field(0, ge=0)  # steps between looks at each task's gradient (one more pass); 0: never
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"  # auto: what the GPU computes well
    gradient_checkpointing: bool = False  # less memory for a third more time
    shard: bool = False  # a part of the model on each of several cards (FSDP), where one has no room for it
    compile: bool = False  # torch.compile: pays on long GPU runs
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()  # beside log.jsonl; pip install 'dst[track]'
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _strategy_is_for_independent(self) -> TrainSettings:
        if self.strategy != "alternating" and self.objective != "independent":
            raise ValueError(
                f"strategy {self.strategy} belongs to objective independent, not to {self.objective}; set "
                "train.strategy=alternating beside it"
            )
        return self


class AnyRecipe(Settings):
    """What the recipes of both families have.

    Attributes:
        best: name of the checkpoint that is the best of the whole model.
        best_by: the validation score it is chosen by.
    """

    best: ClassVar[str]
    best_by: ClassVar[str]
    model: BackboneSettings
    data: LoadingSettings
    tasks: SomeTasks[Any]
    train: TrainSettings

    @model_validator(mode="after")
    def _each_part_fits_the_engine(self) -> Self:
        if self.train.shard and (
            self.train.objective != "joint" or self.model.tune != "full" or self.train.probe_every
        ):
            raise ValueError(
                "train.shard needs objective joint, model.tune full and probe_every 0: a task's own gradient, and "
                "low-rank adapters, need the whole model"
            )
        several = (
            self.train.objective == "pcgrad"
            or self.train.strategy == "shared_forward"
            or self.train.probe_every
        )
        if self.train.compile and several:
            raise ValueError(
                "train.compile is for one gradient a pass: not pcgrad, shared_forward, or probe_every"
            )
        own = [name for name, task in self.tasks.active.items() if task.optimizer != TaskOptimizer()]
        if own and self.train.objective != "independent":
            raise ValueError(
                f"tasks.{own[0]}.optimizer belongs to objective independent, not to {self.train.objective}"
            )
        return self

    def optimizer_of(self, task: str) -> OptimizerSettings:
        """What a task's own optimizer is like: the run's settings, but for those the task has otherwise."""
        common = {name: getattr(self.train, name) for name in OptimizerSettings.model_fields}
        return OptimizerSettings(**common | getattr(self.tasks, task).optimizer.model_dump(exclude_none=True))


class Recipe(AnyRecipe):
    """A whole training run of the dialog model."""

    best = "best"
    best_by = "val/combined"
    family: Literal["dst"] = "dst"
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    tasks: Tasks = Tasks()
    train: TrainSettings = TrainSettings()

    @model_validator(mode="after")
    def _each_part_fits_the_others(self) -> Recipe:
        if self.data.speak_by == "end_of_turn" and self.tasks.speaking.weight:
            raise ValueError("speak_by end_of_turn leaves head 1 untrained: set tasks.speaking.weight to 0")
        if self.data.speak_by == "end_of_turn" and not self.tasks.response.weight:
            raise ValueError("speak_by end_of_turn is learned by the response task: give it a weight")
        if (
            self.model.tune == "heads"
            and self.model.visual_adapter == "identity"
            and self.tasks.response.weight
        ):
            raise ValueError(
                "tune heads with visual_adapter identity leaves response nothing to train: weight it 0"
            )
        return self


def load_recipe(name: str | None, overrides: list[str]) -> Recipe:
    """A recipe of the dialog model, as `any_recipe` finds it.

    Raises:
        UserError: no such recipe, one that does not hold, or one of the other family.
    """
    recipe = any_recipe(name, overrides)
    if not isinstance(recipe, Recipe):
        raise UserError(f"the recipe {name} is for counting, and this is for the dialog model; give another")
    return recipe


def any_recipe(name: str | None, overrides: list[str]) -> AnyRecipe:
    """A recipe by the name of a packaged one, or a YAML file; none gives the dialog model's defaults.

    Its ``family`` says of which family of tasks it is: ``dst``, or ``counting``.

    Raises:
        UserError: no such recipe, or one that does not hold.
    """
    if name is None:
        return load_config(Recipe, None, overrides)
    if Path(name).is_file():
        return _read(Path(name), overrides)
    packaged = resources.files("training.recipes")
    with resources.as_file(packaged / f"{name}.yaml") as path:
        if not path.is_file():
            known = sorted(
                file.name.removesuffix(".yaml") for file in packaged.iterdir() if file.name.endswith("yaml")
            )
            raise UserError(f"no recipe {name!r}; give a YAML file or one of {', '.join(known)}")
        return _read(path, overrides)


def _read(path: Path, overrides: list[str]) -> AnyRecipe:
    from training.counting.recipe import CountingRecipe  # which is made of what stands above

    family = load_config(_Family, path).family
    return load_config(CountingRecipe if family == "counting" else Recipe, path, overrides)


class _Family(BaseModel):
    """All that is looked at before it is known which settings a file may have."""

    family: Literal["dst", "counting"] = "dst"
