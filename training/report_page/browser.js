// The list of sessions, the chosen one, and what keys and pointer do.

function orderedSessions() {
  const by = byId("order").value;
  const needle = byId("filter").value.trim().toLowerCase();
  const text = (one) => [one.id, one.video, one.goal, ...one.steps,
    ...[one.true.says, one.predicted.says, one.heard].flat().map((each) => each[1])].join("\n").toLowerCase();
  return data.sessions.filter((one) => !needle || text(one).includes(needle)).sort((a, b) => {
    const difference = by === "id" ? 0 : (a[by] ?? 0) - (b[by] ?? 0);
    return difference || (a.id < b.id ? -1 : 1);
  });
}

function drawList() {
  const by = byId("order").value;
  const shown = orderedSessions();
  const told = by === "id" ? "joint" : by;
  byId("shown").textContent = `${shown.length} of ${data.sessions.length} sessions; the number is each one's ${told}`;
  byId("list").replaceChildren(...shown.map((one) => {
    const button = html("button", { type: "button" }, literal(one.id), html("span", {}, digits(one[told])),
      html("span", { class: "small", dir: "auto" }, one.goal));
    button.addEventListener("click", () => choose(one));
    button.session = one;
    return html("li", {}, button);
  }));
  markChosen();
}

function markChosen() {
  for (const button of byId("list").querySelectorAll("button")) {
    const chosen = button.session === session;
    button.setAttribute("aria-current", String(chosen));
    if (!chosen) continue;
    // Scrolls the list alone, not the page.
    const list = byId("list");
    const { top, bottom } = button.getBoundingClientRect();
    const frame = list.getBoundingClientRect();
    if (top < frame.top) list.scrollTop -= frame.top - top;
    if (bottom > frame.bottom) list.scrollTop += bottom - frame.bottom;
  }
}

function stepSession(by) {
  const shown = orderedSessions();
  const next = shown[Math.max(0, Math.min(shown.length - 1, shown.indexOf(session) + by))];
  if (next) choose(next);
}

function choose(one) {
  session = opened(one);
  view = { from: 0, to: Math.max(1, one.ticks) };
  cursor = 0;
  byId("name").textContent = one.id;
  const joint = `joint ${digits(one.joint)}, combined ${digits(one.combined)}, matched ${digits(one.matched)}`;
  const refused = `${one.rejections.length} of ${one.proposed} proposed changes of state rejected`;
  byId("about").replaceChildren(literal(one.goal), one.goal && " · ",
    `video ${one.video || "–"}, ${clock(0)} to ${clock(one.ticks)}, `
    + `${one.ticks} ticks at ${one.hz} a second · ${joint} · ${refused}`);
  markChosen();
  drawLegend();
  drawDialogue();
  drawTimeline();
}

function drawLegend() {
  const swatch = (...shapes) => svg("svg", { viewBox: "0 0 26 14", "aria-hidden": "true" }, ...shapes);
  const band = (name) => swatch(svg("rect", { class: name, x: 1, y: 1, width: 24, height: 12 }));
  const count = (outcome) => [...session.meant, ...session.said].filter((each) => each.outcome === outcome).length;
  const pair = (outcome) => swatch(svg("line", { class: `pair ${outcome}`, x1: 2, x2: 24, y1: 7, y2: 7 }),
    markOf(outcome, 13, 7));
  const spoken = session.matched === null
    ? [["plain", OUTCOMES.plain, swatch(markOf("plain", 13, 7))]]
    : [["alike", `pair, alike: ${count("alike") / 2}`, pair("alike")],
      ["other", `pair, other words: ${count("other") / 2}`, pair("other")],
      ["missed", `missed: ${count("missed")}`, swatch(markOf("missed", 13, 7))],
      ["redundant", `redundant: ${count("redundant")}`, swatch(markOf("redundant", 13, 7))]];
  const rows = [
    ...STATES.map((name, state) => [`state${state}`, name, band(`state${state}`)]),
    ["disagree", "predicted is not true", swatch(svg("rect", { class: "disagree", x: 1, y: 5, width: 24, height: 3 }))],
    ["rejected", "change of state rejected", swatch(refusal(13, 7))],
    ...spoken, ["user", `user: ${session.user.length}`, swatch(markOf("user", 13, 7))]];
  byId("legend").replaceChildren(
    ...rows.map(([name, text, drawing]) => html("li", { "data-name": name }, drawing, text)));
}

// A row for each utterance; what is said stands beside what it is paired with.
function drawDialogue() {
  const rows = [
    ...session.user.map((each) => [each.tick, "user", each.text, "user", each.text]),
    ...session.meant.map((each) => [each.tick, each.outcome, each.text, each.partner?.text ?? "–"]),
    ...session.said.filter((each) => !each.partner).map((each) => [each.tick, each.outcome, "–", each.text]),
  ].sort((a, b) => a[0] - b[0]);
  byId("dialogue").replaceChildren(
    html("thead", {}, html("tr", {}, ...["time", "to be said", "said", "outcome"].map((name) =>
      html("th", { scope: "col" }, name)))),
    html("tbody", {}, ...rows.map(([tick, outcome, meant, said]) => {
      const go = html("button", { type: "button", title: "set the cursor here" }, clock(tick));
      const cells = outcome === "user" ? [html("td", { colspan: 2 }, "user: ", uttered(meant))]
        : [html("td", {}, uttered(meant)), html("td", {}, uttered(said))];
      const row = html("tr", { "data-outcome": outcome }, html("td", {}, go), ...cells,
        html("td", {}, OUTCOMES[outcome] ?? ""));
      row.addEventListener("click", () => moveTo(tick));
      return row;
    })));
  if (!rows.length) byId("dialogue").append(html("tbody", {}, html("tr", {}, html("td", {}, "Nobody says anything."))));
}

function showCursor() {
  const at = plot.x(cursor + 0.5);
  plot.cursor.setAttribute("x1", at);
  plot.cursor.setAttribute("x2", at);
  byId("reading").replaceChildren(session.ticks ? readingOf(cursor) : "This session has no tick.");
}

function look(from, span) {
  const width = Math.max(Math.min(8, session.ticks), Math.min(Math.round(span), session.ticks), 1);
  const start = Math.max(0, Math.min(Math.round(from), session.ticks - width));
  view = { from: start, to: start + width };
  drawTimeline();
}

function moveTo(tick) {
  cursor = Math.max(0, Math.min(session.ticks - 1, tick));
  const span = view.to - view.from;
  if (cursor < view.from || cursor >= view.to) look(cursor - span / 2, span); else showCursor();
}

function zoom(factor) {
  const span = view.to - view.from;
  const middle = cursor >= view.from && cursor < view.to ? cursor + 0.5 : (view.from + view.to) / 2;
  look(middle - (middle - view.from) * factor, span * factor);
}

const KEYS = {
  j: () => stepSession(1),
  k: () => stepSession(-1),
  n: () => moveTo(session.mistakes.find((tick) => tick > cursor) ?? cursor),
  p: () => moveTo(session.mistakes.findLast((tick) => tick < cursor) ?? cursor),
  "+": () => zoom(0.5),
  "=": () => zoom(0.5),
  "-": () => zoom(2),
  0: () => look(0, session.ticks),
  "[": () => look(view.from - (view.to - view.from) / 2, view.to - view.from),
  "]": () => look(view.from + (view.to - view.from) / 2, view.to - view.from),
  "/": () => byId("filter").focus(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const inList = event.target.closest("#list") !== null;
  const steps = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const rows = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (steps) moveTo(cursor + steps * (event.shiftKey ? 10 : 1));
  else if (rows && inList) {
    stepSession(rows);
    byId("list").querySelector("[aria-current=true]")?.focus();
  } else if (Object.hasOwn(KEYS, event.key)) KEYS[event.key]();
  else return;
  event.preventDefault();
});

// Where a pointer is: the row, and the tick; in the lanes of words the nearest word within a few pixels.
function pointedAt(event) {
  const box = byId("timeline").firstElementChild.getBoundingClientRect();
  const scale = plot.width / box.width;
  const [px, py] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  const row = plot.rows.find((each) => each.top <= py && py < each.bottom) ?? null;
  let tick = Math.max(view.from, Math.min(view.to - 1, plot.tickAt(px)));
  if (row?.kind === "speech") {
    const near = [...session.user, ...session.meant, ...session.said]
      .map((each) => [Math.abs(plot.x(each.tick + 0.5) - px), each.tick]).sort((a, b) => a[0] - b[0])[0];
    if (near && near[0] <= 8) tick = near[1];
  }
  return { px, row, tick };
}

let dragFrom = null; // where the pointer went down, in pixels of the drawing
const timeline = byId("timeline");
timeline.addEventListener("pointerdown", (event) => {
  if (event.button === 0 && event.pointerType !== "touch") dragFrom = pointedAt(event).px;
});
timeline.addEventListener("pointermove", (event) => {
  if (!session.ticks) return;
  const { px, row, tick } = pointedAt(event);
  for (const end of ["x1", "x2"]) plot.hover.setAttribute(end, plot.x(tick + 0.5));
  plot.hover.setAttribute("visibility", "visible");
  showTip(event, readingOf(tick, row?.step ?? null));
  if (dragFrom === null) return;
  plot.drag.setAttribute("visibility", "visible");
  plot.drag.setAttribute("x", Math.min(px, dragFrom));
  plot.drag.setAttribute("width", Math.abs(px - dragFrom));
});
timeline.addEventListener("pointerleave", () => {
  hideTip();
  dragFrom = null;
  plot.hover.setAttribute("visibility", "hidden");
  plot.drag.setAttribute("visibility", "hidden");
});
timeline.addEventListener("pointerup", (event) => {
  const { px, row, tick } = pointedAt(event);
  const from = dragFrom ?? px;
  dragFrom = null;
  plot.drag.setAttribute("visibility", "hidden");
  if (row?.kind === "overview") {
    const span = view.to - view.from;
    look((px - plot.left) / (plot.right - plot.left) * session.ticks - span / 2, span);
  } else if (Math.abs(px - from) > 6) {
    const [start, end] = [plot.tickAt(Math.min(px, from)), plot.tickAt(Math.max(px, from)) + 1];
    look(start, end - start);
  } else moveTo(tick);
});

for (const button of byId("tools").querySelectorAll("button")) {
  button.addEventListener("click", () => KEYS[button.dataset.key]());
}
byId("filter").addEventListener("input", drawList);
byId("order").addEventListener("change", drawList);
let drawnWidth = 0;
addEventListener("resize", () => {
  if (session && timeline.clientWidth !== drawnWidth) drawTimeline();
  drawnWidth = timeline.clientWidth;
});

choose(orderedSessions()[0]);
drawList();
