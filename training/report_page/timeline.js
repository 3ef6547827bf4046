// The drawing of the chosen session over time. A tick lasts from its number to the next.

let view = { from: 0, to: 1 }; // ticks
let cursor = 0;
let plot = null; // where things are in the drawing

const shortened = (text, room) => {
  const letters = Array.from(text.replace(/\s+/g, " ").trim());
  const most = Math.floor(room / 5.9);
  return letters.length <= most ? letters.join("") : most < 6 ? "" : `${letters.slice(0, most - 1).join("")}…`;
};

// Each outcome has a shape of its own; a size of 4.5 is half a mark's width.
function markOf(outcome, x, y, size = 4.5) {
  const name = `mark ${outcome}${size < 3 ? " crowded" : ""}`;
  if (outcome === "redundant") {
    const cross = `M${x - size} ${y - size}L${x + size} ${y + size}M${x - size} ${y + size}L${x + size} ${y - size}`;
    return svg("path", { class: name, d: cross });
  }
  if (outcome === "other" || outcome === "user") {
    const half = size * 0.8;
    return svg("rect", { class: name, x: x - half, y: y - half, width: 2 * half, height: 2 * half,
      transform: outcome === "other" ? `rotate(45 ${x} ${y})` : "" });
  }
  return svg("circle", { class: name, cx: x, cy: y, r: size });
}

const refusal = (x, y) => svg("path", { class: "rejected",
  d: `M${x - 5} ${y}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0M${x - 3.5} ${y + 3.5}l7 -7` });

// Draws what is in view, from top to bottom; each part adds itself and returns where the next begins.
function drawTimeline() {
  const holder = byId("timeline");
  const width = Math.max(280, holder.clientWidth);
  const narrow = width < 640;
  const [left, right] = narrow ? [6, 6] : [172, 62];
  const span = view.to - view.from;
  const x = (tick) => left + (tick - view.from) / span * (width - left - right);
  const inside = svg("g", { "clip-path": "url(#inside)" });
  const beside = svg("g");
  plot = { x, left, right: width - right, width, rows: [], tickAt: (px) =>
    Math.floor(view.from + (px - left) / (width - left - right) * span) };
  const label = (text, y, heading = narrow) => {
    const room = heading ? width - 12 : left - 12;
    const place = heading ? { x: left, y } : { x: left - 8, y, "text-anchor": "end" };
    beside.append(svg("text", { class: "ink", ...place }, shortened(text, room), svg("title", {}, text)));
  };
  const note = (text, y) => { if (!narrow) beside.append(svg("text", { x: width - right + 6, y }, text)); };
  const part = { x, width, narrow, span, inside, beside, label, note, left, right: width - right };

  let y = drawOverview(part, 0);
  y = drawFilm(part, y);
  y = drawAxis(part, y);
  const top = y;
  y = drawSteps(part, y);
  y = drawSpeech(part, y);
  y = drawProbability(part, y, "speaks", session.speak, session.meant.map((each) => each.tick),
    session.said.map((each) => each.tick), data.decisions[0].threshold);
  y = drawProbability(part, y, "updates state", session.update, session.true.updates, session.predicted.updates,
    data.decisions[1].threshold);

  const lines = { y1: top - 6, y2: y };
  plot.cursor = svg("line", { class: "cursor", ...lines });
  plot.hover = svg("line", { class: "hover", ...lines, visibility: "hidden" });
  plot.drag = svg("rect", { class: "drag", y: top - 6, height: y - top + 6, visibility: "hidden" });
  inside.append(plot.hover, plot.cursor, plot.drag);
  const clip = svg("clipPath", { id: "inside" },
    svg("rect", { x: left - 5, y: 0, width: width - left - right + 10, height: y }));
  holder.replaceChildren(svg("svg", { viewBox: `0 0 ${width} ${y + 4}`, role: "img",
    "aria-label": "what is true and what is predicted over time; the dialogue below has it in words" },
  svg("defs", {}, clip), inside, beside));
  byId("window").textContent = span < session.ticks
    ? `showing ${clock(view.from)} to ${clock(view.to)} of ${clock(0)} to ${clock(session.ticks)}` : "";
  showCursor();
}

// All of the session in one strip: where the mistakes are, and what part is in view.
function drawOverview({ left, right, inside, label }, y) {
  const place = (tick) => left + tick / Math.max(1, session.ticks) * (right - left);
  plot.rows.push({ kind: "overview", top: y, bottom: y + 14, place });
  label(`mistakes (${session.mistakes.length})`, y + 10, false);
  inside.append(
    svg("rect", { class: "state0", x: left, y: y + 1, width: right - left, height: 12 }),
    svg("rect", { class: "view", x: place(view.from), y: y + 1, width: place(view.to) - place(view.from), height: 12 }),
    svg("path", { class: "mistake", d: session.mistakes.map((tick) => `M${place(tick)} ${y + 2}v10`).join("") }));
  return y + 22;
}

// The frames in view that have room, each near the time that it was taken at.
function drawFilm({ x, left, right, inside, label }, y) {
  if (!session.pictures.length) {
    label("frames", y + 12, false);
    inside.append(svg("text", { x: left, y: y + 12 }, "no frames: the video was not found, or 40 other sessions have worse states"));
    return y + 20;
  }
  const inView = session.pictures.filter(([tick]) => view.from <= tick && tick < view.to);
  const most = Math.max(1, Math.floor((right - left) / 75));
  const every = Math.ceil(inView.length / most);
  const there = inView.filter((_, place) => place % every === 0);
  const wide = Math.min(150, (right - left) / Math.max(1, there.length) - 3);
  const high = wide * 0.5625;
  label("frames", y + high / 2, false);
  // Side by side: pushed to the right where they would overlap, then back where they would not fit.
  const places = [];
  for (const [tick] of there) {
    places.push(Math.max(x(tick + 0.5) - wide / 2, places.length ? places.at(-1) + wide + 3 : left));
  }
  for (let at = places.length - 1, end = right; at >= 0; end = places[at] - 3, at--) {
    places[at] = Math.min(places[at], end - wide);
  }
  there.forEach(([tick, jpeg], place) => {
    const at = places[place];
    inside.append(
      svg("image", { x: at, y, width: wide, height: high, href: `data:image/jpeg;base64,${jpeg}`, "data-tick": tick },
        svg("title", {}, `tick ${tick}, ${clock(tick)}`)),
      svg("path", { class: "lead", d: `M${at + wide / 2} ${y + high}L${x(tick + 0.5)} ${y + high + 9}` }));
  });
  return y + high + 12;
}

function drawAxis({ x, span, left, right, inside }, y) {
  const seconds = span / session.hz;
  const most = Math.max(2, (right - left) / 90);
  const every = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600].find((s) => seconds / s <= most) ?? 7200;
  const first = Math.ceil((session.first + view.from) / session.hz / every) * every;
  for (let at = first; at <= (session.first + view.to) / session.hz; at += every) {
    const tick = at * session.hz - session.first;
    inside.append(svg("path", { class: "grid", d: `M${x(tick)} ${y + 15}v5` }),
      svg("text", { x: x(tick), y: y + 11,
        "text-anchor": x(tick) < left + 14 ? "start" : x(tick) > right - 20 ? "end" : "middle" },
      clock(tick).replace(/\.0$/, "")));
  }
  inside.append(svg("path", { class: "grid", d: `M${left} ${y + 20}H${right}` }));
  return y + 26;
}

// A row for each step: the true band over the predicted one, and a line under them where they disagree.
function drawSteps({ x, narrow, inside, label, note }, y) {
  const band = session.steps.length <= 14 ? 13 : session.steps.length <= 40 ? 8 : 4;
  session.steps.forEach((name, step) => {
    const top = y;
    if (narrow) y += 12;
    label(`${step + 1}. ${name}`, narrow ? y - 2 : y + band + 4);
    for (const track of ["true", "predicted"]) {
      for (const [from, to, state] of stretches(session, track, step)) {
        if (to <= view.from || from >= view.to) continue;
        const [start, end] = [x(Math.max(from, view.from)), x(Math.min(to, view.to))];
        inside.append(svg("rect", { class: `band state${state}`, x: start, y, width: end - start, height: band,
          "data-step": step, "data-track": track, "data-from": from, "data-to": to, "data-state": state }));
        if (band > 10 && end - start > 68) {
          inside.append(svg("text", { class: `on${state}`, x: start + 5, y: y + 10 }, STATES[state]));
        }
      }
      if (band > 10) note(track, y + 10);
      y += band + 1;
    }
    for (const [from, to] of session.wrong[step]) {
      inside.append(svg("rect", { class: "disagree", x: x(from), y, width: Math.max(1.5, x(to) - x(from)), height: 4,
        "data-step": step, "data-from": from, "data-to": to }));
    }
    for (const [tick, where] of session.rejections) {
      if (where !== step) continue;
      const mark = refusal(x(tick + 0.5), y - band / 2 - 1);
      mark.dataset.tick = tick;
      inside.append(mark);
    }
    y += band > 4 ? 10 : 5;
    plot.rows.push({ kind: "step", step, top, bottom: y });
  });
  return y + 4;
}

// Lanes of words: the user's, what is to be said, what is said; pairs of the last two are joined.
function drawSpeech({ x, left, right, narrow, inside, label }, y) {
  const top = y;
  const head = narrow ? 14 : 0;
  const lanes = [["user", session.user, head + 20, -8], ["to be said", session.meant, head * 2 + 54, -8],
    ["said", session.said, head * 2 + 96, 17]];
  const heightOf = (list) => y + lanes.find((lane) => lane[1] === list)[2];
  const inView = (each) => view.from - 1 <= each.tick && each.tick <= view.to;
  const most = Math.max(...lanes.map(([, list]) => list.filter(inView).length));
  const size = Math.max(1.5, Math.min(4.5, (right - left) / most / 3));
  for (const { said, meant, outcome } of session.joined) {
    const name = `pair ${outcome}${size < 3 ? " crowded" : ""}`;
    inside.append(svg("line", { class: name, x1: x(meant.tick + 0.5), y1: heightOf(session.meant),
      x2: x(said.tick + 0.5), y2: heightOf(session.said) }));
  }
  lanes.forEach(([name, list, middle, text], lane) => {
    label(name, narrow ? y + middle + (lane < 2 ? -22 : 30) : y + middle + 4);
    inside.append(svg("path", { class: "grid", d: `M${left} ${y + middle}H${right}` }));
    list.forEach((each, at) => {
      if (!inView(each)) return;
      const here = x(each.tick + 0.5);
      const next = at + 1 < list.length ? Math.min(right, x(list[at + 1].tick + 0.5)) : right;
      const mark = markOf(each.outcome, here, y + middle, size);
      mark.dataset.lane = name;
      mark.dataset.tick = each.tick;
      inside.append(mark, svg("text", { class: "ink", x: here - 4, y: y + middle + text },
        shortened(each.text, next - here - 4)));
    });
  });
  y += lanes[2][2] + (narrow ? 44 : 34);
  plot.rows.push({ kind: "speech", top, bottom: y });
  return y;
}

// A probability over its threshold; true events point down from the top, decisions up from the bottom.
function drawProbability({ x, left, right, narrow, inside, label, note }, y, title, scores, meant, found, threshold) {
  const top = y;
  if (narrow) y += 14;
  const [high, low] = [y + 9, y + 57];
  const level = (share) => low - share * (low - high);
  label(title, narrow ? y - 2 : y + 36);
  note("true", high - 2);
  note("decided", low + 9);
  inside.append(svg("path", { class: "grid", d: `M${left} ${low}H${right}M${left} ${high}H${right}` }));
  if (scores) {
    const points = [];
    for (let tick = Math.max(0, view.from - 1); tick < Math.min(session.ticks, view.to + 1); tick++) {
      points.push(`${x(tick + 0.5).toFixed(1)},${level(scores[tick] / 1000).toFixed(1)}`);
    }
    const name = points.length > right - left ? "line crowded" : "line";
    inside.append(svg("polyline", { class: name, points: points.join(" ") }));
    if (threshold !== null) {
      inside.append(svg("path", { class: "limit", d: `M${left} ${level(threshold)}H${right}` }));
      note(`≥ ${threshold.toFixed(2)}`, level(threshold) + 3.5);
    }
  } else {
    inside.append(svg("text", { x: left + 4, y: level(0.4) }, "no probabilities"));
  }
  const marks = (ticks, at, drop) => ticks.filter((tick) => view.from - 1 <= tick && tick <= view.to)
    .map((tick) => `M${x(tick + 0.5) - 3.5} ${at}h7l-3.5 ${drop}z`).join("");
  inside.append(svg("path", { class: "event", d: marks(meant, high - 7, 7) }),
    svg("path", { class: "event", d: marks(found, low + 8, -7) }));
  plot.rows.push({ kind: "probability", top, bottom: low + 10 });
  return low + 20;
}
