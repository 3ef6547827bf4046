"""Which objective, loss, adapter and way to speak learns best on the synthetic corpora: mean and spread over seeds.

    dst sample && dst prepare && dst init-model && dst cache-features --model models/tiny --device cpu
    python benchmarks/learning.py --shards out/shards --model models/tiny --out out/learning

    dst sample --source fsc147 --sessions 4000 && dst prepare --source fsc147 && dst init-model --preset tiny-grid
    dst cache-features --model models/tiny-grid --device cpu
    python benchmarks/learning.py --family counting --shards out/shards --model models/tiny-grid --out out/learning

Each variant changes a few settings of the recipe `tiny` or `counting`, is trained with each seed, and scored
free-running on the test part. Objectives get the same processor time: the seconds a step of each takes are measured
first, in turn, and kept in `steps.json`. A run that is there is not made again, so it may be stopped at any time.
Prints a Markdown table; all figures are in OUT/results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FOCAL = "{loss: focal, gamma: 2.0, alpha: [0.25, 0.75]%s}"
SHARE = "silence_ratio: 0.3"


def decisions(text: str) -> list[str]:
    return [f"tasks.speaking={text}", f"tasks.dst_update={text}"]


VARIANTS: dict[str, list[str]] = {
    "joint": [],
    "uncertainty": ["train.objective=uncertainty"],
    "pcgrad": ["train.objective=pcgrad"],
    # as many steps of the trunk a round as there are tasks: half the rate
    "independent, alternating": ["train.objective=independent", "train.lr=1e-3"],
    "independent, shared forward": [
        "train.objective=independent",
        "train.strategy=shared_forward",
        "train.lr=1e-3",
    ],
    "plain cross-entropy": decisions("{loss: cross_entropy}"),
    "focal": decisions(FOCAL % ""),
    "balanced, 0.3 of silence": decisions(f"{{loss: balanced, {SHARE}}}"),
    "plain, 0.3 of silence": decisions(f"{{loss: cross_entropy, {SHARE}}}"),
    "focal, 0.3 of silence": decisions(FOCAL % f", {SHARE}"),
    "state x3 near transitions": ["tasks.dst_state.near_weight=3"],
    "identity, all 4 tokens": ["model.visual_adapter=identity", "data.max_seq_len=300"],
    "fuse to 2 tokens": ["model.visual_tokens=2", "data.max_seq_len=232"],
    "inline speech": ["data.speech=inline"],
    "proassist": [],
}
OBJECTIVES = ["joint", "uncertainty", "pcgrad", "independent, alternating", "independent, shared forward"]
COLUMNS: dict[str, tuple[str, ...]] = {
    "speak F1": ("speaking", "f1"),
    "speak F1 2 s": ("speaking", "event_f1", "2"),
    "update F1": ("dst_update", "f1"),
    "state F1": ("dst_state", "macro_f1"),
    "joint near": ("dst_state", "joint_near_transition"),
    "transition F1 2 s": ("dst_state", "transition_f1", "2"),
    "matched F1": ("matched", "f1"),
    "words": ("response", "exact_match"),
    "combined": ("combined", "value"),
}


# one step of the trunk a round, and one decay, not two of each
JOINT = ["train.objective=joint", "train.strategy=alternating", "train.weight_decay=0.01"]
COUNTING_VARIANTS: dict[str, list[str]] = {
    "joint": JOINT,
    "independent": [],
    "independent, alternating": ["train.strategy=alternating"],
    # the same objective, and as many steps
    "joint, done x100": [*JOINT, "tasks.done.weight=100"],
    "independent, done x100": ["tasks.done.weight=100"],
    "joint, coord x100": [*JOINT, "tasks.coord.weight=100"],
    "independent, coord x100": ["tasks.coord.weight=100"],
    # of a third of the steps: there is little to learn
    "joint, blind": [*JOINT, "data.blind=true"],
}
COUNTING_OBJECTIVES = ["joint", "independent", "independent, alternating"]
COUNTING_COLUMNS: dict[str, tuple[str, ...]] = {
    "count MAE": ("up_to_20", "count", "mae"),
    "mean's": ("baselines", "training_mean", "up_to_20", "count", "mae"),
    "next point": ("up_to_20", "coord", "median_error"),
    "done too early": ("up_to_20", "done", "false_positive"),
    "done at the end": ("up_to_20", "done", "recall"),
    "marks F1": ("up_to_20", "marks", "f1"),
    "count MAE, 0-60": ("count", "mae"),
}


def run_one(
    arguments: argparse.Namespace, name: str, changes: list[str], seed: int, steps: int, out: Path
) -> None:
    """Train and score one run in a process of its own, on one core."""
    packaged = {"proassist": "proassist"}.get(name, "tiny")
    recipe = "counting" if arguments.family == "counting" else packaged
    settings = [f"train.steps={steps}", f"train.eval_every={steps}", f"train.seed={seed}"]
    settings += [f"model.init={arguments.model}", *changes]
    command = [sys.executable, __file__, "--one", str(out), "--recipe", recipe, "--shards", arguments.shards]
    for each in settings:
        command += ["--set", each]
    one_core = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(command, check=True, env=os.environ | one_core)


def one(arguments: argparse.Namespace) -> None:
    """In that process: the run, its scores and its processor time."""
    import resource

    from schemas.files import write_text
    from training.counting.evaluate import evaluate as evaluate_counter
    from training.evaluate import evaluate
    from training.recipe import any_recipe
    from training.trainer import train

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    out, marks = Path(arguments.one), []
    recipe = any_recipe(arguments.recipe, arguments.set)
    train(arguments.shards, recipe, out, device="cpu", resume=True, on_step=lambda row: marks.append(spent()))
    pace = (marks[-2] - marks[0]) / (len(marks) - 2) if len(marks) > 2 else None  # the last one validates
    found: dict[str, Any] = {"seconds_a_step": pace, "steps": recipe.train.steps}
    if arguments.score:
        score = evaluate_counter if arguments.recipe == "counting" else evaluate
        found |= score(out, None)[0]
    write_text(out / "result.json", json.dumps(found) + "\n")


def steps_of_objectives(arguments: argparse.Namespace) -> dict[str, int]:
    """So many steps of each objective take the processor time that ``--steps`` of joint do."""
    path = arguments.out / "steps.json"
    if not path.exists():
        objectives = COUNTING_OBJECTIVES if arguments.family == "counting" else OBJECTIVES
        paces: dict[str, list[float]] = {name: [] for name in objectives}
        for turn in range(3):
            for name in objectives:
                out = arguments.out / "pace" / f"{turn}-{name}"
                run_one(arguments, name, arguments.variants[name], 0, 14, out)
                paces[name].append(json.loads((out / "result.json").read_text())["seconds_a_step"])
        pace = {name: statistics.median(times) for name, times in paces.items()}
        steps = {name: round(arguments.steps * pace["joint"] / pace[name]) for name in objectives}
        path.write_text(json.dumps({"seconds_a_step": pace, "steps": steps}, indent=1) + "\n")
    found: dict[str, int] = json.loads(path.read_text())["steps"]
    return found


def value(metrics: dict[str, Any], keys: tuple[str, ...]) -> float:
    for key in keys:
        metrics = metrics[key]
    return float(metrics)  # type: ignore[arg-type]


def table(results: dict[str, list[dict[str, Any]]], columns: dict[str, tuple[str, ...]]) -> str:
    lines = ["| | steps | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, runs in results.items():
        cells = []
        for keys in columns.values():
            values = [value(run, keys) for run in runs]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {name} | {runs[0]['steps']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--family", choices=("dst", "counting"), default="dst")
    parser.add_argument("--shards", default="out/shards")
    parser.add_argument("--model", default="models/tiny")
    parser.add_argument("--out", type=Path, default=Path("out/learning"))
    parser.add_argument(
        "--steps", type=int, default=300, help="of joint; other objectives get its processor time"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=2, help="runs beside each other, a core each")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--recipe", help=argparse.SUPPRESS)
    parser.add_argument("--set", action="append", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.variants = COUNTING_VARIANTS if arguments.family == "counting" else VARIANTS
    arguments.score = arguments.one is not None and "/pace/" not in arguments.one
    if arguments.one:
        one(arguments)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    steps = steps_of_objectives(arguments)
    # by seeds first, so that a study that is stopped has compared all variants on some
    todo = [(name, seed) for seed in range(arguments.seeds) for name in arguments.variants]
    places = {
        (name, seed): arguments.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
        for name, seed in todo
    }

    def make(name: str, seed: int) -> None:
        if not (places[name, seed] / "result.json").exists():
            changes = arguments.variants[name]
            objective = name.removesuffix(", done x100").removesuffix(", coord x100")
            made = steps["joint"] // 3 if name == "joint, blind" else steps.get(objective, arguments.steps)
            run_one(arguments, name, changes, seed, made, places[name, seed])

    with ThreadPoolExecutor(arguments.at_once) as pool:
        for made in [pool.submit(make, *each) for each in todo]:
            made.result()
    results: dict[str, list[dict[str, Any]]] = {}
    with (arguments.out / "results.jsonl").open("w", encoding="utf-8") as file:
        for name in arguments.variants:
            for seed in range(arguments.seeds):
                found = json.loads((places[name, seed] / "result.json").read_text())
                results.setdefault(name, []).append(found)
                file.write(json.dumps({"variant": name, "seed": seed, **found}) + "\n")
    print(table(results, COUNTING_COLUMNS if arguments.family == "counting" else COLUMNS))


if __name__ == "__main__":
    main()
