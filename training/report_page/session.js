// The chosen session and what there is to tell of it. Ticks are counted from the session's first.

const STATES = ["not started", "in progress", "completed"];
const OUTCOMES = {
  alike: "said, and alike", other: "said in other words", missed: "missed", redundant: "redundant",
  plain: "spoken (without words)",
};
let session = null; // of data.sessions, with what `opened` adds

// Adds to a session what is asked of it again and again: words by tick, their outcomes, mistakes.
function opened(one) {
  if (one.mistakes) return one;
  const matched = one.matched !== null;
  const place = (says, alone) => says.map(([tick, text]) =>
    ({ tick, text, outcome: matched ? alone : "plain", partner: null, similarity: null }));
  one.meant = place(one.true.says, "missed");
  one.said = place(one.predicted.says, "redundant");
  one.joined = one.pairs.map(([i, j, similarity, alike]) => {
    const [said, meant] = [one.said[i], one.meant[j]];
    const outcome = alike ? "alike" : "other";
    Object.assign(said, { outcome, similarity, partner: meant });
    Object.assign(meant, { outcome, similarity, partner: said });
    return { said, meant, outcome };
  });
  one.user = one.heard.map(([tick, text]) => ({ tick, text, outcome: "user" }));
  one.wrong = one.steps.map((_, step) => disagreements(one, step));
  const lone = [...one.meant, ...one.said].filter((each) => ["missed", "redundant"].includes(each.outcome));
  const places = [...lone.map((each) => each.tick), ...one.wrong.flat().map(([from]) => from)];
  one.mistakes = [...new Set(places)].sort((a, b) => a - b);
  return one;
}

// Stretches of one state as [from, to, state].
const stretches = (one, track, step) => one[track].states[step].map(([from, state], at, all) =>
  [from, at + 1 < all.length ? all[at + 1][0] : one.ticks, state]);

const stateAt = (one, track, step, tick) =>
  one[track].states[step].findLast(([from]) => from <= tick)?.[1] ?? 0;

// Stretches [from, to] in which a step's predicted state is not the true one.
function disagreements(one, step) {
  const edges = new Set(["true", "predicted"].flatMap((track) => one[track].states[step].map(([from]) => from)));
  const sorted = [...edges].sort((a, b) => a - b);
  const found = [];
  sorted.forEach((from, at) => {
    const to = at + 1 < sorted.length ? sorted[at + 1] : one.ticks;
    if (stateAt(one, "true", step, from) === stateAt(one, "predicted", step, from)) return;
    if (found.length && found.at(-1)[1] === from) found.at(-1)[1] = to; else found.push([from, to]);
  });
  return found;
}

// Time in the video.
function clock(tick) {
  const tenths = Math.round((session.first + tick) / session.hz * 10);
  const [hours, minutes, seconds] = [Math.floor(tenths / 36000), Math.floor(tenths / 600) % 60, tenths % 600 / 10];
  const tail = seconds.toFixed(1).padStart(4, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${tail}` : `${minutes}:${tail}`;
}

// Everything that is known about a tick, as [name, what]; a step that is pointed at comes first.
function readingOf(tick, pointed = null) {
  const rows = [["tick", `${tick}, ${clock(tick)} in the video`]];
  const at = (list) => list.filter((each) => each.tick === tick);
  const late = (each) => (each.partner.tick - each.tick) / session.hz * (session.said.includes(each) ? -1 : 1);
  const fate = (each) => (each.partner
    ? ` (${OUTCOMES[each.outcome]}: similarity ${digits(each.similarity)}, ${Math.abs(late(each)).toFixed(1)} s `
      + `${late(each) < 0 ? "early" : "late"})`
    : ` (${OUTCOMES[each.outcome]})`);
  for (const each of at(session.user)) rows.push(["user", uttered(each.text)]);
  for (const [name, list] of [["to be said", session.meant], ["said", session.said]]) {
    for (const each of at(list)) rows.push([name, html("span", {}, uttered(each.text), fate(each))]);
  }
  const stateOf = (step) => {
    const [meant, found] = ["true", "predicted"].map((track) => STATES[stateAt(session, track, step, tick)]);
    return html("span", {}, literal(session.steps[step]), meant === found ? `: ${meant}, right`
      : `: true ${meant}, predicted ${found}`);
  };
  if (pointed !== null) rows.push([`step ${pointed + 1}`, stateOf(pointed)]);
  for (const [, step, state] of session.rejections.filter(([refused]) => refused === tick)) {
    rows.push(["rejected", html("span", {}, literal(session.steps[step]), ` to ${STATES[state]}`)]);
  }
  for (const [name, scores, track] of [["speaks", "speak", "says"], ["updates", "update", "updates"]]) {
    const [meant, found] = ["true", "predicted"].map((which) =>
      session[which][track].some((each) => (track === "says" ? each[0] : each) === tick));
    const sure = session[scores] ? `probability ${digits(session[scores][tick] / 1000)}, ` : "";
    rows.push([name, `${sure}${found ? "yes" : "no"}, should be ${meant ? "yes" : "no"}`]);
  }
  const wrong = session.steps.map((_, step) => step).filter((step) =>
    session.wrong[step].some(([from, to]) => from <= tick && tick < to));
  const right = session.steps.length - wrong.length;
  rows.push(["states", `${right} of ${session.steps.length} steps right`]);
  const others = wrong.filter((step) => step !== pointed);
  for (const step of others.slice(0, 4)) rows.push([`step ${step + 1}`, stateOf(step)]);
  if (others.length > 4) rows.push(["", `and ${others.length - 4} more are wrong`]);
  return definitions(rows);
}
