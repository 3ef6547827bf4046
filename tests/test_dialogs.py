"""Dialogues and dialog states in every form files have had, and the dialogue a plan implies."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dialogs import Dialog, DialogIndex
from pipeline.prepare import Counts, prepare
from pipeline.template import session_range, template_dialog
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.records import Rejects, Turn
from schemas.states import SourceRow, Step
from schemas.tables import TABLES, read_table, validate_labels

COARSE = "annotations/coarse-annotations/coarse_labels"
SPLITS = "annotations/coarse-annotations/coarse_splits"
HEAD_CAMERA = "HMC_21110305_mono10bit"
ONE, NINE = "assembly_one__C10095_rgb", "assembly_nine__C10095_rgb"
FIRST, SECOND = {"id": "S1", "name": "put it on"}, {"id": "S2", "name": "turn it"}
DST = [
    {"type": "step", **FIRST, "start_ts": 10.0, "end_ts": 12.0},
    {"type": "step", **SECOND, "start_ts": 11.5, "end_ts": 20.25},
]
WORDS = [
    {"role": "system", "content": "Be helpful."},
    {"role": "user", "time": 9.0, "content": "Hello."},
    {"role": "assistant", "time": 10.2, "content": "Take it.", "labels": "initiative|instruction,feedback"},
    {"role": "assistant", "time": 10.4, "content": "Look.", "progress": "The wheel is on."},
]


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def lines(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def generated(uid: str, **more: Any) -> dict[str, Any]:
    talk = {"user_type": "no_talk", "conversation": WORDS, "auto_quality_eval": {"final_score": 9.5}}
    about = {"inferred_goal": "Build it", "inferred_knowledge": "1. Do"}
    return {"video_uid": uid, **about, "conversations": [talk], **more}


def read(path: Path, uid: str = "v") -> tuple[list[Dialog], list[tuple[str, str]]]:
    """The dialogues about one video, and locator and reason of each reject."""
    rejects = Rejects()
    dialogs = DialogIndex(path, rejects).of(uid, rejects)
    return dialogs, [(reject.locator, reject.reason) for reject in rejects.rows]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """One recording with labels of both activities, in train."""
    root = tmp_path / "assembly101"
    put(root / COARSE / "assembly_one.txt", "300\t600\tattach wheel\n600\t900\tattach roof\n")
    put(root / COARSE / "disassembly_one.txt", "2100\t2400\tdetach wheel\n")
    put(root / SPLITS / "train_coarse_assembly.txt", "assembly_one.txt\tshared\tc01\tdump_truck\n")
    return root


def run(corpus: Path, dialogs: Path | None = None) -> tuple[Counts, dict[str, list[dict[str, Any]]]]:
    counts = prepare("assembly101", corpus, corpus.parent / "labels", Clock(2.0), dialogs=dialogs)
    folder = corpus.parent / "labels" / "assembly101"
    assert validate_labels(folder) == []
    return counts, {name: read_table(folder, name).to_pylist() for name in TABLES}


def of(rows: list[dict[str, Any]], session_id: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["session_id"] == session_id]


# ---- dialogues


def test_dialogs_become_sessions(corpus: Path) -> None:
    one = generated(ONE)
    one["conversations"] *= 2
    unknown = generated("assembly_one__front")
    records = [one, generated(NINE), unknown, {"what": 1}, 5]
    put(corpus / "dialogs" / "generated_val.json", json.dumps(records))
    tsv = "step\tA\t10\t12\tput it on"
    bare = [{"video_uid": NINE, "dst": tsv}, {"video_uid": NINE, "dst": tsv, "user_type": "talk_more"}]
    put(corpus / "dialogs" / "dst.jsonl", lines(bare) + '{"video_uid": "as')
    counts, found = run(corpus)
    names = [f"{NINE}/no_talk_0", f"{ONE}/no_talk_0", f"{ONE}/no_talk_1", f"disassembly_one__{HEAD_CAMERA}"]
    assert [s["session_id"] for s in found["sessions"]] == [f"assembly101/{name}" for name in names]
    nine = found["sessions"][0]
    assert (nine["goal"], nine["knowledge"], nine["user_type"]) == ("Build it", "1. Do", "no_talk")
    assert (nine["dialog_origin"], nine["quality"], nine["num_steps"]) == ("generated", 9.5, 1)
    assert [s["split"] for s in found["sessions"]] == ["val", "train", "train", "train"]
    assert (nine["first_tick"], nine["num_ticks"]) == (14, 15)  # from 9 - 2 s to 12 + 2 s
    turns = of(found["turns"], nine["session_id"])
    assert [(t["tick"], t["role"], t["text"]) for t in turns] == [
        *((18, "user", "Hello."), (21, "assistant", "Take it."), (21, "assistant", "Look."))
    ]
    assert [t["labels"] for t in turns] == [[], ["initiative", "instruction", "feedback"], []]
    assert [t["progress"] for t in turns] == [None, None, "The wheel is on."]
    frames = of(found["frames"], nine["session_id"])
    assert [(f["tick"], f["response"]) for f in frames if f["speak"]] == [(21, "Take it. Look.")]
    assert [(f["tick"], f["transitions"]) for f in frames if f["dst_update"]] == [(20, [1]), (24, [2])]
    listed = [(Path(r["source_file"]).name, r["locator"], r["reason"]) for r in found["rejects"]]
    assert listed == [
        ("dst.jsonl", "row 3", "not JSON"),
        ("generated_val.json", "record 4", "unknown form"),
        ("generated_val.json", "record 5", "unknown form"),
        ("dst.jsonl", "row 2", "no dialogue for this DST"),
        ("generated_val.json", "record 3", "unknown video_uid"),
    ]
    assert counts.rejects == Counter(reason for _, _, reason in listed)
    assert (counts.sessions, counts.notes) == ({"val": 1, "train": 3}, {})
    assert counts.joined_turns == 3 + 1  # the template closes where the last step is done


def test_dialogs_with_steps_of_their_own(corpus: Path) -> None:
    put(corpus / "dialogs" / "talk.json", json.dumps([generated(ONE, dst=DST), generated(NINE)]))
    counts, found = run(corpus)
    session = f"assembly101/{ONE}/no_talk_0"
    assert [s["name"] for s in of(found["steps"], session)] == ["put it on", "turn it"]
    assert [(r["locator"], r["reason"]) for r in found["rejects"]] == [
        (f"assembly101/{NINE}/no_talk_0", "no steps"),
        *((f"record 2, conversation 1, turn {n}", "no steps") for n in (2, 3, 4)),
        *((f"row {n}", "the dialogues bring their own steps") for n in (1, 2)),
    ]
    unused = found["rejects"][-1]
    assert unused["source_file"] == str(corpus / COARSE / "assembly_one.txt")
    assert unused["detail"] == f"{ONE}: attach roof"
    assert counts.notes == {}  # "nine" has no session, so nobody asks for its split
    put(corpus / "dialogs" / "talk.json", json.dumps(generated(NINE, dst=DST)))
    assert list(run(corpus)[0].notes.values()) == [1]


def test_a_dst_without_a_dialogue_gets_the_template(corpus: Path) -> None:
    put(corpus / "dialogs" / "dst_test.jsonl", lines([{"video_uid": NINE, "dst": DST}] * 2))
    _, found = run(corpus)
    session = found["sessions"][0]
    assert session["session_id"] == f"assembly101/{NINE}/dst_0"
    assert (session["dialog_origin"], session["split"], session["num_steps"]) == ("template", "test", 2)
    said = [(t["t_s"], t["role"], t["labels"][-1]) for t in of(found["turns"], session["session_id"])]
    assert said == [
        (9.0, "user", "goal"),
        (10.0, "assistant", "instruction"),
        (11.5, "assistant", "instruction"),
        (12.0, "assistant", "feedback"),
        (20.25, "assistant", "feedback"),
        (20.25, "assistant", "closing"),
    ]
    assert {t["source_row"] for t in of(found["turns"], session["session_id"])} == {None}
    assert [(r["locator"], r["reason"]) for r in found["rejects"]] == [
        ("row 2", "second DST of one dialogue")
    ]


def test_files_that_disagree_on_a_split(corpus: Path) -> None:
    for split in ("train", "val"):
        put(corpus / "dialogs" / f"generated_{split}.json", json.dumps(generated(NINE, dst=DST)))
    with pytest.raises(UserError, match=r"'nine' is in '(train|val)' and in '(train|val)'"):
        run(corpus)


@pytest.mark.parametrize("end", [1e6, 1e300])
def test_times_that_cannot_be(corpus: Path, end: float) -> None:
    plans = {NINE: {**FIRST, "t0": 1.0, "t1": end}, ONE: {**FIRST, "t0": math.inf, "t1": None}}
    records = [{"video_uid": uid, "dst": [plan]} for uid, plan in plans.items()]
    put(corpus / "dialogs" / "dst.jsonl", lines(records))
    rejects = [(r["locator"], r["reason"]) for r in run(corpus)[1]["rejects"]]
    assert rejects == [
        (f"assembly101/{NINE}/dst_0", "later than a day"),
        ("row 1, dst 1", "later than a day"),
        ("row 2", "unreadable DST"),
    ]


def test_kinds_that_are_written_alike_are_numbered(corpus: Path) -> None:
    first, second = generated(ONE), generated(ONE)
    first["conversations"][0]["user_type"], second["conversations"][0]["user_type"] = "a b", "a.b"
    path = put(corpus.parent / "talk.json", json.dumps([first, second]))
    sessions = [(s["session_id"], s["user_type"]) for s in run(corpus, path)[1]["sessions"]]
    ids = [f"assembly101/{ONE}/a-b_{n}" for n in (0, 1)]
    assert [pair for pair in sessions if pair[1]] == [(ids[0], "a b"), (ids[1], "a.b")]


# ---- forms


def test_forms_of_conversations(tmp_path: Path) -> None:
    meta = {"user_type": "talk_more", "task_goal": "Tea", "knowledge": "Boil.", "quality": 8.0}
    said = {"role": "assistant", "time": "1.5", "content": " Hi ", "labels": ["a", "b"], "progress": "none"}
    prepared = {"video_uid": "v", "conversation": [{"role": "frames", "start": 0, "end": 3}, said]}
    odd = [
        {"role": "user", "time": 2.0, "content": "Hi"},
        {"role": "robot", "time": 2.0, "content": "Hi"},
        {"role": "user", "content": "Hi"},
        {"role": "user", "time": "nan", "content": "Hi"},
        {"role": "user", "time": 2.0, "content": " "},
        {"role": "user", "time": 2.0, "content": [{}]},
        "Hi",
    ]
    records = [
        {**prepared, "metadata": meta},
        {"video_uid": "v", "inferred_goal": "Tea", "conversation": odd, "dst": DST, "quality": 3.5},
        {"video_uid": "v", "conversation": [WORDS[0]]},
        {"video_uid": "v", "conversation": WORDS, "dst": [{"id": "S1", "start_ts": 1}]},
        {"video_uid": "v", "conversation": []},
        {"video_uid": "v", "conversations": [{"user_type": "x"}]},
        {"video_uid": "v", "conversations": []},
        {"video_uid": "v", "anything": 1},
        {"video_uid": ""},
    ]
    path = put(tmp_path / "dst_training.jsonl", lines(records))
    (first, second), rejects = read(path)
    where = SourceRow(str(path), "row 1, turn 2")
    assert first.turns == (Turn(1.5, "assistant", "Hi", ("a", "b"), "none", where),)
    assert (first.goal, first.knowledge, first.user_type, first.quality) == ("Tea", "Boil.", "talk_more", 8.0)
    assert (first.steps, first.split, second.split) == (None, None, None)  # "training" is no split
    assert (second.quality, second.user_type, len(second.turns)) == (3.5, None, 1)
    assert [step.name for step in second.steps or ()] == ["put it on", "turn it"]
    assert sorted(rejects) == [
        ("row 2, turn 2", "unknown role"),
        ("row 2, turn 3", "no time"),
        ("row 2, turn 4", "no time"),
        ("row 2, turn 5", "empty content"),
        ("row 2, turn 6", "empty content"),
        ("row 2, turn 7", "unknown form"),
        ("row 3", "no turns"),
        ("row 4", "unreadable DST"),
        *((f"row 4, turn {n}", "dialogue with unreadable DST") for n in (2, 3, 4)),
        ("row 5", "unknown form"),
        ("row 6, conversation 1", "unknown form"),
        *((f"row {n}", "unknown form") for n in (7, 8, 9)),
    ]


def test_a_dialogue_whose_plan_cannot_be_read_accounts_for_its_words(tmp_path: Path) -> None:
    """Two dialogues share a plan that cannot be read; what is wrong in their words is told too."""
    odd = [*WORDS, {"role": "robot", "time": 1.0, "content": "Beep."}]
    talks = [{"user_type": "no_talk", "conversation": words} for words in (odd, WORDS[:2])]
    record = {"video_uid": "v", "conversations": talks, "dst": [{**FIRST, "name": 5, "t0": 1, "t1": 2}]}
    path, rejects = put(tmp_path / "talk.json", json.dumps(record)), Rejects()
    assert DialogIndex(path, rejects).of("v", rejects) == []
    spoilt = "dialogue with unreadable DST"
    first, second = (f"record 1, conversation {n}" for n in (1, 2))
    wrong = "DST entry 'S1' has the name 5, which is no text"
    assert [(r.source_file, r.locator, r.reason, r.detail) for r in rejects.rows] == [
        (str(path), f"{first}, turn 5", "unknown role", "robot"),
        (str(path), first, "unreadable DST", wrong),
        (str(path), f"{first}, turn 2", spoilt, "user: Hello."),
        (str(path), f"{first}, turn 3", spoilt, "assistant: Take it."),
        (str(path), f"{first}, turn 4", spoilt, "assistant: Look."),
        (str(path), second, "unreadable DST", wrong),
        (str(path), f"{second}, turn 2", spoilt, "user: Hello."),
    ]


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", ""), ("a.jsonl", "\n \r\n"), ("a.json", "[]")])
def test_a_file_without_a_record(corpus: Path, name: str, text: str) -> None:
    path = put(corpus / "dialogs" / name, text)
    _, found = run(corpus)
    assert [(r["source_file"], r["locator"], r["reason"]) for r in found["rejects"]] == [
        (str(path), "file", "empty file")
    ]
    put(path, lines([{"video_uid": 5}]) if name == "a.jsonl" else '[{"video_uid": 5}]')
    assert [r["reason"] for r in run(corpus)[1]["rejects"]] == ["unknown form"]


def test_clips_of_one_dialogue_are_joined(tmp_path: Path) -> None:
    """Those of other users, and of other files, are other dialogues."""

    def clip(index: int, user: str, time: float) -> dict[str, Any]:
        words = [{"role": "assistant", "time": time, "content": f"{user} {index}"}]
        meta = {"user_type": user.rpartition("_")[0], "user_id": user}
        return {"video_uid": "v", "clip_idx": index, "conversation": words, "metadata": meta}

    records = [clip(0, "no_talk_0", 1), clip(1, "no_talk_0", 2), clip(2, "no_talk_0", 3)]
    records += [clip(0, "no_talk_1", 4), clip(1, "talk_some_0", 5), clip(0, "talk_some_1", 6)]
    records += [clip(1, "no_talk_1", 8)]
    put(tmp_path / "a.jsonl", lines(records))
    put(tmp_path / "b.jsonl", lines([clip(1, "talk_some_1", 7)]))
    dialogs, rejects = read(tmp_path)
    assert [[turn.text for turn in dialog.turns] for dialog in dialogs] == [
        ["no_talk_0 0", "no_talk_0 1", "no_talk_0 2"],
        ["no_talk_1 0", "no_talk_1 1"],
        *(["talk_some_0 1"], ["talk_some_1 0"], ["talk_some_1 1"]),
    ]
    assert rejects == []
    assert dialogs[0].turns[2].source_row == (str(tmp_path / "a.jsonl"), "row 3, turn 1")


SPANS = [("put it on", [(10.0, 12.0)]), ("turn it", [(11.5, 20.25)])]
CHILD = {"name": "turn it", "timestamps": {"start_ts": "11.5", "end_ts": 20.25}}
PARENT = {**FIRST, "timestamps": {"start_ts": 10, "end_ts": 12.0}, "substeps": [CHILD]}
FORMS = {
    "list": DST,
    "nested": {"steps": [PARENT]},
    "tsv": "type\tid\tstart_ts\tend_ts\tname\nstep\tS1\t10\t12.0\tput it on\nstep\tS2\t11.5\t20.25\tturn it\n",
    "t0t1": {"steps": [{**FIRST, "t0": 10, "t1": 12, "conf": 1}, {**SECOND, "t0": "11.5", "t1": 20.25}]},
    "tasks": {"put it on": {"timestamps": [10.0, 11.0, 12.0]}, "turn it": {"timestamps": [11.5, 20.25]}},
}


@pytest.mark.parametrize("place", ["beside conversations", "beside conversation", "alone"])
@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_of_dst_gives_the_same_spans(corpus: Path, form: str, place: str) -> None:
    plan = {"video_uid": NINE, "dst": FORMS[form]}
    records = {
        "beside conversations": [generated(NINE, dst=FORMS[form])],
        "beside conversation": [{**plan, "conversation": WORDS}],
        "alone": [plan, generated(NINE)],
    }[place]
    _, found = run(corpus, put(corpus.parent / "forms.json", json.dumps(records)))
    steps = of(found["steps"], found["sessions"][0]["session_id"])
    spans = [(s["name"], [(p["start_s"], p["end_s"]) for p in s["spans"]]) for s in steps]
    assert spans == SPANS
    where = f"{corpus.parent / 'forms.json'}, record 1{', conversation 1' if place.endswith('s') else ''}"
    assert [s["source_rows"] for s in steps] == [[f"{where}, dst 1"], [f"{where}, dst 2"]]


def updates(*given: tuple[float, Any, str]) -> list[dict[str, Any]]:
    return [{"role": "DST_UPDATE", "time": t, "content": [{"id": i, "transition": x}]} for t, i, x in given]


def test_a_plan_from_its_updates(tmp_path: Path) -> None:
    entries = updates((1.0, "S1", "start"), (2.5, "S1", "complete"), (3.0, "S3", "start"))
    entries[1]["content"].append({"id": "S4", "transition": "start"})
    entries += [*WORDS, *updates((11.0, "S1", "start"), (12.0, "S1", "complete"), (13.0, "S4", "complete"))]
    knowledge = "Tea\n 1. Boil water.\n2) Take a cup.\n3. Pour  \n4. Drink, twice."
    about = {"video_uid": "v", "conversation": entries}
    path = put(tmp_path / "talk.jsonl", lines([{**about, "inferred_knowledge": knowledge}, about]))
    (named, bare), rejects = read(path)
    assert [(s.step_id, s.name, s.spans) for s in named.steps or ()] == [
        ("S1", "Boil water.", ((1.0, 2.5), (11.0, 12.0))),
        ("S2", "Take a cup.", ()),
        ("S3", "Pour", ((3.0, math.inf),)),
        ("S4", "Drink, twice.", ((2.5, 13.0),)),
    ]
    starts = {s.step_id: s.source_rows for s in named.steps or ()}
    assert starts["S1"] == ((str(path), "row 1, turn 1"), (str(path), "row 1, turn 8"))
    assert [(s.step_id, s.name) for s in bare.steps or ()] == [("S1", "S1"), ("S4", "S4"), ("S3", "S3")]
    assert rejects == []


@pytest.mark.parametrize(
    "entries",
    [
        updates((1, "S1", "complete")),
        updates((1, "S1", "start"), (2, "S1", "start")),
        updates((1, "S1", "start"), (2, "S1", "complete"), (3, "S1", "complete")),
        updates((5, "S1", "start"), (2, "S1", "complete")),
        updates((1, "S1", "pause")),
        updates((math.nan, "S1", "start")),
        [{"role": "DST_UPDATE", "time": 1, "content": "S1"}],
        [{"role": "DST_UPDATE", "time": 1, "content": ["S1"]}],
        [{"role": "DST_UPDATE", "time": 1, "content": [{"transition": "start"}]}],
        *(updates((1, given, "start")) for given in (None, True, 1.5, ["S1"], "")),
    ],
)
def test_updates_in_an_impossible_order(tmp_path: Path, entries: list[dict[str, Any]]) -> None:
    record = {"video_uid": "v", "conversation": [*entries, *WORDS]}
    dialogs, rejects = read(put(tmp_path / "talk.json", json.dumps([record])))
    words = [(f"record 1, turn {len(entries) + n}", "dialogue with unreadable DST") for n in (2, 3, 4)]
    assert (dialogs, rejects) == ([], [("record 1", "unreadable DST"), *words])


# ---- the template


pairs = st.tuples(st.integers(0, 50), st.integers(0, 9))


@given(st.lists(pairs, max_size=6), st.text(max_size=5))
def test_the_template_says_each_thing_once(spans: list[tuple[int, int]], seed_text: str) -> None:
    steps = [Step(f"S{n}", f"step {n}.", ((float(a), float(a + b)),)) for n, (a, b) in enumerate(spans)]
    turns = template_dialog("make {tea}", steps, [(3.0, 4.0)], seed_text)
    assert turns == template_dialog("make {tea}", steps, [(3.0, 4.0)], seed_text)
    if not steps:
        assert turns == ()
        return
    assert [turn.t_s for turn in turns] == sorted(turn.t_s for turn in turns)
    said = Counter((turn.labels[-1], turn.t_s) for turn in turns)
    expected = Counter([("instruction", s.start) for s in steps] + [("feedback", s.end) for s in steps])
    first, last = min(a for a, _ in spans), max(a + b for a, b in spans)
    goal = ("goal", max(0.0, first - 1.0))
    assert said == expected + Counter([goal, ("correction", 3.0), ("closing", last)])
    ends = (max(0, min(goal[1], 3.0) - 2.0), max(last, 3.0) + 2.0)
    assert session_range(steps, turns, None) == session_range(steps, turns, ()) == ends


@given(
    st.lists(pairs, min_size=1, max_size=3),
    st.lists(st.integers(-60, 60), max_size=3),
    st.none() | st.lists(pairs, max_size=3),
)
def test_a_session_spans_all_that_happens_in_it(
    spans: list[tuple[int, int]], spoken: list[int], mistakes: list[tuple[int, int]] | None
) -> None:
    """Steps, words and mistakes; what comes before the video begins stretches nothing."""
    steps = [Step(f"S{n}", "step", ((a, a + b),)) for n, (a, b) in enumerate(spans)]
    steps += [Step("open", "never ends", ((99.0, math.inf),)), Step("none", "never starts")]
    turns = [Turn(float(t), "user", "words") for t in spoken]
    wrong = None if mistakes is None else [(float(a), float(a + b)) for a, b in mistakes]
    happens = {99, *(t for t in spoken if t >= 0)}
    happens |= {t for a, b in [*spans, *(mistakes or ())] for t in (a, a + b)}
    start, end = session_range(steps, turns, wrong)
    assert (start, end) == (max(0, min(happens) - 2), max(happens) + 2)


# ---- the real excerpts, where they lie beside the repository: read in place

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"
PROASSIST = [path for path in (SAMPLES / "proassist",) if path.is_dir()]


@pytest.mark.parametrize("folder", PROASSIST)
def test_the_excerpts_of_dialogs(folder: Path, tmp_path: Path) -> None:
    """Turns, steps and rows of origin, against the files read as plain JSON."""
    prepare("assembly101", SAMPLES / "assembly101", tmp_path, Clock(), dialogs=folder)
    labels = tmp_path / "assembly101"
    assert validate_labels(labels) == []
    turns, steps = (read_table(labels, name).to_pylist() for name in ("turns", "steps"))
    training = json.loads((folder / "dst_training_v4.json").read_text())
    apart, together = map(json.loads, (folder / "prepared_dialog_L0_I1.jsonl").read_text().splitlines())
    for record, ending in ((training, "dialog_0"), (together, "talk_more_0")):
        rows = of(turns, f"assembly101/{record['video_uid']}/{ending}")
        spoken = [entry for entry in record["conversation"] if entry["role"] in ("user", "assistant")]
        spoken.sort(key=lambda entry: entry["time"])
        assert [(row["role"], row["text"], row["t_s"]) for row in rows] == [
            (entry["role"], entry["content"], entry["time"]) for entry in spoken
        ]
        for row in rows:
            entry = record["conversation"][int(row["source_row"].rpartition(", turn ")[2]) - 1]
            assert (entry["content"], entry["time"]) == (row["text"], row["t_s"])
    plan = of(steps, f"assembly101/{training['video_uid']}/dialog_0")
    assert [(row["step_id"], row["name"], row["spans"]) for row in plan] == [
        (entry["id"], entry["name"], [{"start_s": entry["start_ts"], "end_s": entry["end_ts"]}])
        for entry in training["dst"]
    ]
    assert [row["source_rows"][0].rpartition(", dst ")[2] for row in plan] == ["1", "2", "3", "4", "5", "6"]
    sessions = {row["session_id"]: row for row in read_table(labels, "sessions").to_pylist()}
    together_id = f"assembly101/{together['video_uid']}/talk_more_0"
    assert sessions[together_id]["quality"] == together["metadata"]["quality"]
    unused = [r for r in read_table(labels, "rejects").to_pylist() if r["reason"] == "no steps"]
    session = f"assembly101/{apart['video_uid']}/no_talk_0"  # it brings no steps; its recording has none here
    said = [
        (f"row 1, turn {n}", f"{session}: {entry['content'].strip()}")
        for n, entry in enumerate(apart["conversation"], 1)
        if entry["role"] in ("user", "assistant")
    ]
    assert [(r["locator"], r["detail"]) for r in unused] == [(session, ""), *said]
    assert {r["source_file"] for r in unused} == {str(folder / "prepared_dialog_L0_I1.jsonl")}


@pytest.mark.parametrize("folder", PROASSIST)
def test_the_updates_of_an_excerpt_say_what_its_dst_says(folder: Path, tmp_path: Path) -> None:
    record = json.loads((folder / "dst_training_v4.json").read_text())
    dst = record.pop("dst")
    ([dialog], rejects) = read(put(tmp_path / "v4.json", json.dumps(record)), record["video_uid"])
    assert [(s.step_id, s.name, s.spans) for s in dialog.steps or ()] == [
        (entry["id"], entry["name"], ((entry["start_ts"], entry["end_ts"]),)) for entry in dst
    ]
    assert rejects == []
