"""The command line. Each command is one stage; torch and what needs it is imported inside the commands."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from csv import DictWriter
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.devices import choose_device, choose_devices
from pipeline.ending import Commands, os_sentence, stop
from pipeline.labels_terminal import echo_counts, points_picture, prepare_and_tell, some_frames
from pipeline.terminal import progress
from schemas.checkpoints import DEFAULT_EMBEDDING, DEFAULT_MODEL
from schemas.errors import UserError
from schemas.records import Marks
from schemas.shards import ComputeType, Decoder, FeatureType, Filter, Storage

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Turn procedural video and its annotations into a trained proactive assistant, stage by stage.",
)

Source = Annotated[str, typer.Option(help="The corpus.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. Default: the GPU if there is one.")]
Gpu = Annotated[int | None, typer.Option(help="Number of the GPU to use.")]
Split = Annotated[str, typer.Option(help="train, val or test.")]
Checkpoint = Annotated[str, typer.Option(help="best, latest or best_TASK.")]
AnyCheckpoint = Annotated[
    str | None,
    typer.Option(help="best, latest or best_TASK. Default: best; of a run of counting best_joint."),
]


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback for errors.")] = False,
) -> None:
    signal.signal(signal.SIGTERM, stop)
    # Read by transformers when it is imported; what matters is checked and said by the commands themselves.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@app.command()
def sample(
    source: Source = "assembly101",
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: data/SOURCE.")] = None,
    sessions: Annotated[
        int, typer.Option(help="Sessions to make; most videos hold two, a picture is one.")
    ] = 180,
    seed: Annotated[int, typer.Option(min=0, help="Decides everything random.")] = 0,
) -> None:
    """Write a synthetic corpus in a corpus' official layout, real H.264 videos or pictures included.

    Example: dst sample --source holoassist --sessions 24 --seed 1
    """
    from data_manifests import load_manifest
    from pipeline.sample.corpus import write_sample

    load_manifest(source)
    out = out or Path("data") / source
    with progress("files") as bar:
        write_sample(source, out, sessions, seed, on_plan=bar.start, on_file=lambda: bar.advance(1))
    root = shlex.quote(str(out))
    typer.echo(f"{sessions} sessions in {out}; next: dst prepare --source {source} --root {root}")


@app.command()
def sources(
    data: Annotated[Path, typer.Option(help="Folder with one folder a corpus.")] = Path("data"),
) -> None:
    """List the corpora: what is there, what is missing, under which licence, and where to ask for it.

    Example: dst sources --data data
    """
    from pipeline.found import find_sources

    for manifest, kinds in find_sources(data):
        there = any(found.count for found in kinds)
        typer.secho(f"{manifest.name}: {manifest.title}", bold=True)
        typer.echo(f"  licence {manifest.licence}; {'more' if there else 'ask'} at {manifest.ask_at}")
        for found in kinds:
            state = "there" if found.whole else "incomplete" if found.count else "missing"
            typer.echo(f"  {found.kind:12} {state:10} {found.amount():<28} {found.place}")
        if there:
            root = shlex.quote(str(data / manifest.name))
            typer.echo(f"  next: dst prepare --source {manifest.name} --root {root}")
        typer.echo()


@app.command()
def prepare(
    source: Annotated[str, typer.Option(help="The corpus, or all: each that is in ROOT.")] = "assembly101",
    root: Annotated[
        Path | None, typer.Option(help="The corpus. Default: data/SOURCE, or data with --source all.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of all label tables.")] = Path("out/labels"),
    dialogs: Annotated[
        Path | None, typer.Option(help="Dialogs and DST. Default: ROOT/dialogs, if there.")
    ] = None,
    tick_hz: Annotated[float, typer.Option(help="Ticks a second.")] = 2.0,
    level: Annotated[str, typer.Option(help="What a step is: step (coarse) or substep (fine).")] = "step",
    view: Annotated[
        str | None, typer.Option(help="Camera. Default: the first of the manifest that is there.")
    ] = None,
    marks: Annotated[
        Marks,
        typer.Option(help="Of pictures (fsc147): drawn makes a tick for each mark, with it on the picture."),
    ] = "none",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that read. Default: one a core.")
    ] = None,
) -> None:
    """Read a corpus' annotations and write its label tables (Parquet).

    What cannot be used is listed in rejects.parquet with its file, place and reason. With --source all the
    exit status is 1 when a corpus that is there could not be prepared.

    Example: dst prepare --source assembly101 --root data/assembly101
    """
    if not 0 < tick_hz <= 1000:
        raise UserError(f"--tick-hz must be above 0 and at most 1000, not {tick_hz}")
    workers = workers or os.cpu_count() or 1
    if source != "all":
        root = root or Path("data") / source
        prepare_and_tell(source, root, out, dialogs, tick_hz, level, view, workers, marks)
        made = shlex.quote(str(out / source))
        typer.echo(f"labels in {out / source}; what they hold: dst inspect {made}")
        typer.echo(f"next: dst cache-features --labels {shlex.quote(str(out))}")
        return
    from pipeline.found import find_sources

    if dialogs or view:
        raise UserError(
            "--dialogs and --view are for one corpus; --source all takes each corpus' own dialogs folder"
        )
    if marks != "none":
        raise UserError("--marks is for one corpus of pictures; name it with --source")
    data = root or Path("data")
    there = [manifest.name for manifest, kinds in find_sources(data) if any(kind.count for kind in kinds)]
    if not there:
        raise UserError(f"{data} holds no corpus; see what belongs where with 'dst sources --data {data}'")
    failed = []
    for name in there:
        typer.secho(f"\n== {name}", bold=True)
        try:
            prepare_and_tell(name, data / name, out, dialogs, tick_hz, level, view, workers, marks)
        except (UserError, OSError) as error:
            sentence = os_sentence(error) if isinstance(error, OSError) else str(error)
            typer.secho(f"error: {sentence}", fg="red", err=True)
            failed.append(name)
    typer.echo(f"labels of {', '.join(n for n in there if n not in failed) or 'none'} in {out}")
    tables = shlex.quote(str(out))
    typer.echo(f"what they hold: dst inspect {tables}; next: dst cache-features --labels {tables}")
    if failed:
        typer.secho(f"could not be prepared: {', '.join(failed)}", fg="red", err=True)
        raise typer.Exit(1)


@app.command()
def inspect(
    labels: Annotated[Path, typer.Argument(help="Label tables of one or all corpora.")] = Path("out/labels"),
    session: Annotated[str | None, typer.Option(help="Show this session, and write its picture.")] = None,
    out: Annotated[Path | None, typer.Option(help="The picture. Default: out/pictures/SESSION.png.")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print the counts as CSV, for other programs.")] = False,
) -> None:
    """Show what label tables hold: counts by corpus and split, what was not used, or one session's timeline or marks.

    Example: dst inspect out/labels/assembly101 --csv
    """
    from pipeline.inspect import read_session, rejects_by_reason, summary, timeline

    if session is not None:
        if csv:
            raise UserError("--csv goes with the counts, not with --session")
        shown = read_session(labels, session)
        for line in timeline(shown):
            typer.echo(line)
        out = out or Path("out/pictures") / f"{session.replace('/', '_')}.png"
        if shown.points is not None:
            if points_picture(shown, out, lambda why: typer.echo(f"no picture: {why}", err=True)):
                typer.echo(f"picture in {out}")
            return
        from training.plots import labels_picture

        labels_picture(shown, some_frames(shown, lambda why: typer.echo(f"no frames: {why}", err=True)), out)
        typer.echo(f"picture in {out}")
        return
    if out is not None:
        raise UserError("--out is where the picture of one session goes; name the session with --session")
    rows, rejects = summary(labels), rejects_by_reason(labels)
    if csv:
        writer = DictWriter(sys.stdout, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
        return
    echo_counts(rows, rejects)
    typer.echo(f"one session from beginning to end: dst inspect {shlex.quote(str(labels))} --session ID")


@app.command("init-model")
def init_model(
    preset: Annotated[
        str, typer.Option(help="tiny, tiny-grid, smolvlm2-256m, smolvlm2-500m or smolvlm2-2.2b.")
    ] = "tiny",
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: models/PRESET.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the weights.")] = 0,
) -> None:
    """Write a checkpoint of SmolVLM2's architecture with random weights and its own tokenizer.

    Example: dst init-model --preset tiny --out models/tiny
    """
    from pipeline.presets import init_model as run

    out = out or Path("models") / preset
    run(preset, out, seed)
    typer.echo(f"random checkpoint in {out}")


@app.command("cache-features")
def cache_features(
    gpu: Annotated[
        str | None, typer.Option(help="Number of the GPU, or several: 0,1,2,3 run a process each.")
    ] = None,
    device: Device = None,
    labels: Annotated[Path, typer.Option(help="Label tables of one or all corpora.")] = Path("out/labels"),
    out: Annotated[str, typer.Option(help="Folder of the shards, or an address: s3://...")] = "out/shards",
    model: Annotated[str, typer.Option(help="A checkpoint: a hub name or a folder.")] = DEFAULT_MODEL,
    tokens_per_frame: Annotated[
        int | None, typer.Option(help="Average the token grid down to so many. Default: all.")
    ] = None,
    tiles: Annotated[
        int,
        typer.Option(
            min=1, max=8, help="Cut a frame into N x N, for crowded pictures: N x N times the tokens."
        ),
    ] = 1,
    dtype: Annotated[FeatureType, typer.Option(help="How features are kept; int8 takes half.")] = "float16",
    preprocess: Annotated[
        Filter, typer.Option(help="Resize filter: lanczos is the model's own, bicubic is faster.")
    ] = "lanczos",
    compute: Annotated[
        ComputeType | None, typer.Option(help="What the tower computes in. Default: by the GPU.")
    ] = None,
    decoder: Annotated[Decoder, typer.Option(help="decord only takes what it decodes exactly.")] = "pyav",
    format: Annotated[Storage, typer.Option(help="Kind of the shard files.")] = "tar",
    shard: Annotated[
        str | None, typer.Option(help="Make part I of N (I/N, from 0): for array jobs on one folder.")
    ] = None,
    shard_mb: Annotated[int, typer.Option(min=1, help="Size of a vision shard, in MB.")] = 512,
    batch_size: Annotated[
        int, typer.Option(min=1, max=4096, help="Frames at once in the vision tower.")
    ] = 16,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Decode processes for each GPU. Default: by the cores.")
    ] = None,
    time_limit: Annotated[
        float, typer.Option(min=1, help="Seconds without progress, after which a video is given up.")
    ] = 120.0,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="ray: one encoder a GPU of a Ray cluster.")
    ] = "local",
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try videos again that failed in an earlier run.")
    ] = False,
    labels_only: Annotated[
        bool, typer.Option("--labels-only", help="Write new labels to the cache; no video is opened.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell frames, bytes, hours and room.")
    ] = False,
) -> None:
    """Decode the videos and pictures, run vision tower and connector once over each tick, write shard pairs.

    Run it again after an interruption: finished shards are kept. Exit status 1 when something failed.

    Example: dst cache-features --gpu 0 --model models/tiny
    """
    from pipeline.cache_terminal import cache_and_tell, dry_run_and_tell, open_engine, relabel_and_tell
    from pipeline.encode import EncoderSpec
    from pipeline.todo import CacheOptions
    from pipeline.workers import available_cores
    from schemas.checkpoints import checkpoint_folder

    on_ray = engine == "ray"
    if labels_only:
        if dry_run or retry_failed or shard is not None or on_ray:
            raise UserError(
                "--labels-only writes the labels of all finished shards: leave --dry-run, --retry-failed, --shard and "
                "--engine away"
            )
        raise typer.Exit(1 if relabel_and_tell(labels, out) else 0)
    if on_ray and (gpu is not None or shard is not None or dry_run):
        raise UserError("--engine ray takes all GPUs of its cluster: leave --gpu, --shard and --dry-run away")
    part, of = _part_of(shard)
    if decoder == "decord":
        from pipeline.decord_frames import require_decord

        require_decord()
    devices = choose_devices(gpu, device, somewhere_else=on_ray)
    folder = checkpoint_folder(model)
    spec = EncoderSpec(folder, model, tokens_per_frame, preprocess, compute, batch_size, tiles)
    # on the CPU, the tower takes its share of the cores
    sharing = len(devices) if devices[0] != "cpu" else 2
    workers = workers or max(1, available_cores() // sharing)
    options = CacheOptions(shard_mb, format, dtype, decoder, workers, time_limit, part, of, retry_failed)
    if dry_run:
        dry_run_and_tell(labels, out, spec, devices, options)
    elif cache_and_tell(labels, out, open_engine(spec, devices, on_ray), options):
        raise typer.Exit(1)


@app.command()
def verify(
    shards: Annotated[str, typer.Argument(help="The cache: a folder or an address.")] = "out/shards",
    labels: Annotated[Path | None, typer.Option(help="Also compare with these label tables.")] = None,
) -> None:
    """Check a cache end to end: checksums, every number, every label against its spans. Exit status 1 on a problem.

    Example: dst verify out/shards --labels out/labels
    """
    from pipeline.cache_terminal import echo_report
    from pipeline.verify import verify as run

    with progress("files") as bar:
        report = run(shards, labels, on_plan=bar.start, on_file=lambda: bar.advance(1))
    echo_report(report, shards)
    if report.problems:
        raise typer.Exit(1)


@app.command()
def train(
    shards: Annotated[
        str | None, typer.Option(help="The feature cache: a folder or an address. Default: out/shards.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="A packaged recipe (tiny, ...; an unknown name lists them) or a YAML file."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change one value: section.key=value.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: out/runs/RECIPE.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last saved step; start where there is none.")
    ] = False,
    gpu: Gpu = None,
    device: Device = None,
) -> None:
    """Train language model, adapter and the four heads on cached features.

    SIGTERM and Ctrl-C save first; --resume then goes on as if nothing had happened. Several processes, one a GPU:
    torchrun --nproc-per-node 2 $(which dst) train ...

    Example: dst train --shards out/shards --recipe tiny --set train.steps=200
    """
    from training.recipe import any_recipe

    out = out or Path("out/runs") / (Path(recipe).stem if recipe else "default")
    begun = resume and (out / "recipe.yaml").is_file()
    base = str(out / "recipe.yaml") if begun and recipe is None else recipe
    settings = any_recipe(base, set_ or [])
    if begun:
        shards = shards or json.loads((out / "run.json").read_text(encoding="utf-8"))["shards"]
    from training.terminal import train_and_tell
    from training.trainer import require_same_recipe

    if begun:
        require_same_recipe(out, settings)
    train_and_tell(shards or "out/shards", settings, out, choose_device(gpu, device), resume)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="A folder of runs, or one run.")] = Path("out/runs"),
    csv: Annotated[bool, typer.Option("--csv", help="Print every score as CSV, for other programs.")] = False,
) -> None:
    """Compare training runs: how far each is, its best validation scores, and what it has otherwise than the best run.

    Runs of counting stand in a table of their own. Exit status 1 when there are runs, and none can be shown.

    Example: dst runs out/runs --csv
    """
    from training.runs_terminal import runs_and_tell

    if not runs_and_tell(folder, csv):
        raise typer.Exit(1)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Option(help="A run made by dst train.")],
    shards: Annotated[str | None, typer.Option(help="The cache. Default: the one it was trained on.")] = None,
    split: Split = "test",
    checkpoint: AnyCheckpoint = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="free: on its own state and words. teacher: the true state at each window's start, all logits kept. "
            "Default: free."
        ),
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(
            help="How words are compared: a sentence model by hub name or folder, or bag-of-words. "
            f"Default: {DEFAULT_EMBEDDING}."
        ),
    ] = None,
    gpu: Gpu = None,
    device: Device = None,
) -> None:
    """Score a run beside baselines that never look, and write a report to open in a browser.

    Example: dst evaluate --run out/runs/tiny --split test
    """
    chosen = choose_device(gpu, device)
    from training.report_terminal import evaluate_any_and_tell

    evaluate_any_and_tell(run, shards, split, checkpoint, mode, embedding, chosen)


@app.command()
def count(
    run: Annotated[Path, typer.Option(help="A run of counting, made by dst train, or an export of one.")],
    image: Annotated[Path, typer.Option(help="A JPEG, PNG, WebP or BMP picture.")],
    what: Annotated[
        str | None, typer.Option(help="A category of the training part. Default: the only one, if it is.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The picture with marks, a PNG. Default: out/pictures/IMAGE-counted.png."),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="best_joint, latest, best_coord or best_done. Default: best_joint.")
    ] = None,
    gpu: Gpu = None,
    device: Device = None,
) -> None:
    """Count objects in a picture by marking them one after the other, and write it with the numbered marks.

    Example: dst count --run out/runs/counting --image discs.jpg --what "red discs"
    """
    chosen = choose_device(gpu, device)
    from training.counting.terminal import count_and_tell

    count_and_tell(run, image, what, out, checkpoint, chosen)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A run that was scored with dst evaluate.")],
    second: Annotated[Path, typer.Argument(help="Another one, scored on the same sessions.")],
    split: Split = "test",
    checkpoint: Checkpoint = "best",
    embedding: Annotated[
        str | None, typer.Option(help="How words are compared. Default: as both were scored.")
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print them as CSV, for other programs.")] = False,
) -> None:
    """Put two runs side by side: differences with bootstrap intervals over recordings. Needs no model and no cache.

    Example: dst compare out/runs/tiny out/runs/proassist --split val
    """
    from training.runs import require_dialog

    for run in (first, second):
        require_dialog(run, "dst compare")
    from training.evaluate import Reports
    from training.report_terminal import compare_and_tell

    compare_and_tell(Reports(first, checkpoint, split), Reports(second, checkpoint, split), embedding, csv)


@app.command()
def stream(
    run: Annotated[Path, typer.Option(help="A run made by dst train, or a folder made by dst export.")],
    video: Annotated[
        str, typer.Option(help="A video file, a camera's number (0), or an address (rtsp, http, ...).")
    ],
    plan: Annotated[Path, typer.Option(help="YAML: 'goal' and 'steps', a list of their names.")],
    words: Annotated[
        Path | None, typer.Option(help="What the user says, a line each: seconds and words.")
    ] = None,
    events: Annotated[
        Path | None, typer.Option(help="Also write the events here, a line of JSON each.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Write an mp4 of the pictures with the state beside them.")
    ] = None,
    start: Annotated[float, typer.Option(min=0, help="Second at which the task begins.")] = 0.0,
    pace: Annotated[bool, typer.Option("--pace", help="A file in real time, to be looked at.")] = False,
    rotate: Annotated[
        int,
        typer.Option(help="Degrees counter-clockwise, as the corpus' videos were turned: 0, 90, 180, 270."),
    ] = 0,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="best, latest or best_TASK. Default: best, or the one that was exported."),
    ] = None,
    gpu: Gpu = None,
    device: Device = None,
) -> None:
    """The assistant, live: it watches, follows the plan, and speaks. On a terminal you can type to it.

    Where the output is no terminal, it is the events as they happen, a line of JSON each.

    Example: dst stream --run out/runs/tiny --video 0 --plan plan.yaml
    """
    from training.runs import require_dialog

    require_dialog(run, "dst stream")
    chosen = choose_device(gpu, device)
    from training.stream import stream_and_tell

    if rotate not in (0, 90, 180, 270):
        raise UserError(f"--rotate {rotate} is not 0, 90, 180 or 270")
    stream_and_tell(
        *(run, video, plan),
        checkpoint=checkpoint,
        device=chosen,
        rotation_deg=rotate,
        start_s=start,
        pace=pace,
        words=words,
        events=events,
        record=record,
    )


@app.command()
def export(
    run: Annotated[Path, typer.Option(help="A run made by dst train.")],
    out: Annotated[Path, typer.Option(help="Folder to write; an earlier export there is replaced.")],
    checkpoint: AnyCheckpoint = None,
) -> None:
    """One folder with all that a trained model needs elsewhere: weights, vision tower, tokenizer, thresholds, card.

    Example: dst export --run out/runs/tiny --out out/export
    """
    from training.export import export as write
    from training.runs import is_counting_run

    lacking = write(run, out, checkpoint)
    if lacking:
        typer.echo(lacking, err=True)
    use = "count --run {} --image ..." if is_counting_run(run) else "stream --run {} --video ... --plan ..."
    typer.echo(f"exported to {out}; next: dst {use.format(shlex.quote(str(out)))}")


@app.command()
def demo(
    family: Annotated[
        Literal["dst", "counting"], typer.Option(help="dst: the dialog model. counting: objects in pictures.")
    ] = "dst",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for everything; an earlier demo there is replaced. Default: out/demo, of counting "
            "out/demo-counting."
        ),
    ] = None,
    sessions: Annotated[
        int | None, typer.Option(help="Synthetic sessions. Default: 180, of counting 4000.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of corpus, weights and order.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Training steps. Default: the recipe's.")] = None,
) -> None:
    """All stages on a synthetic corpus on the CPU, with a blind control: watch the system learn.

    Example: dst demo --out out/demo --seed 1
    """
    from training.demo import demo as run

    run(family, out, sessions, seed, steps)


def _part_of(shard: str | None) -> tuple[int, int]:
    """``3/8`` as numbers."""
    if shard is None:
        return 0, 1
    part, _, of = shard.partition("/")
    if not (part.isdecimal() and of.isdecimal() and int(part) < int(of)):
        raise UserError(
            f"--shard {shard!r} is not I/N with I from 0 to N - 1; write 0/8 for the first of eight parts"
        )
    return int(part), int(of)
