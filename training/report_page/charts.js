"use strict";
// What all parts of the page share (elements, numbers, the tooltip), the head, the tables and the curves.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

// Children that are strings become text nodes: words of a corpus are never read as markup.
const maker = (namespace) => (tag, attributes = {}, ...children) => {
  const node = document.createElementNS(namespace, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};
const html = maker("http://www.w3.org/1999/xhtml");
const svg = maker("http://www.w3.org/2000/svg");

const digits = (value) => (value === null || value === undefined ? "–" : value.toFixed(3));
const literal = (text) => html("bdi", {}, text);
const uttered = (text) => literal(text || "(no words)");
const definitions = (rows) => html("dl", {}, ...rows.flatMap(([name, value]) =>
  [html("dt", {}, name), html("dd", { dir: "auto" }, value)]));

function showTip(event, content) {
  const tip = byId("tip");
  tip.replaceChildren(content);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = event.clientX + 16 + width < innerWidth ? event.clientX + 16 : event.clientX - width - 16;
  const top = event.clientY + 16 + height < innerHeight ? event.clientY + 16 : event.clientY - height - 16;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}
const hideTip = () => { byId("tip").hidden = true; };

function drawHead() {
  const { run, ...about } = data.about;
  const name = run ? run.split("/").filter(Boolean).pop() : "Evaluation";
  document.title = `${name} – dst report`;
  byId("title").textContent = name;
  const modes = { free: "free (on its own state and words)", teacher: "teacher (true state at each window's start)" };
  const told = (key, value) => {
    if (key === "mode") return modes[value] ?? String(value);
    if (typeof value === "boolean") return value ? "yes" : "no";
    if (value === null) return "–";
    if (typeof value === "object") return Object.entries(value).map((pair) => pair.join(" ")).join(", ");
    return typeof value === "number" ? value.toLocaleString("en") : String(value);
  };
  const facts = Object.entries({ ...(run ? { run } : {}), ...about });
  byId("facts").append(...facts.map(([key, value]) =>
    html("div", {}, html("dt", {}, key), html("dd", {}, told(key, value)))));
}

function drawTables() {
  const names = data.rows.map(([name]) => name);
  const columns = data.columns.map(([name, meaning]) => html("th", { scope: "col", title: meaning }, name));
  byId("scores").append(
    html("thead", {}, html("tr", {}, html("th", { scope: "col" }, "predictor"), ...columns)),
    html("tbody", {}, ...data.rows.map(([name, values], row) => html(
      "tr", row ? {} : { class: "model" }, html("th", { scope: "row" }, name),
      ...values.map((value, column) => {
        const best = Math.max(...data.rows.map(([, others]) => others[column] ?? -1));
        return html("td", value !== null && value === best ? { class: "best" } : {}, digits(value));
      })))));
  byId("formula").textContent = `Combined: ${data.formula}.`
    + (data.similarity ? ` Words are matched by ${data.similarity}.` : "");
  byId("meanings").append(...data.columns.flatMap(([name, meaning]) =>
    [html("dt", {}, name), html("dd", {}, meaning)]));
  byId("every").append(
    html("thead", {}, html("tr", {}, ...["score", ...names].map((name) => html("th", { scope: "col" }, name)))),
    html("tbody", {}, ...data.every.map(([name, ...values]) => html(
      "tr", {}, html("th", { scope: "row" }, name), ...values.map((value) => html("td", {}, digits(value)))))));
}

// A chart of lines over [0, 1] x [0, 1]; points are [x, y, what the tooltip says].
function chart(title, caption, axes, lines, dots, limit) {
  const [width, height, left, top, right, bottom] = [300, 220, 42, 8, 8, 32];
  const x = (value) => left + value * (width - left - right);
  const y = (value) => height - bottom - value * (height - top - bottom);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}. ${caption}` });
  for (const at of [0, 0.25, 0.5, 0.75, 1]) {
    root.append(
      svg("line", { class: "grid", x1: x(0), x2: x(1), y1: y(at), y2: y(at) }),
      svg("line", { class: "grid", x1: x(at), x2: x(at), y1: y(0), y2: y(1) }),
      svg("text", { x: left - 5, y: y(at) + 3.5, "text-anchor": "end" }, String(at)),
      svg("text", { x: x(at), y: height - bottom + 13, "text-anchor": "middle" }, String(at)));
  }
  root.append(
    svg("text", { x: x(0.5), y: height - 4, "text-anchor": "middle" }, axes[0]),
    svg("text", { x: 9, y: y(0.5), "text-anchor": "middle", transform: `rotate(-90 9 ${y(0.5)})` }, axes[1]));
  if (limit !== null) root.append(svg("line", { class: "limit", x1: x(limit), x2: x(limit), y1: y(0), y2: y(1) }));
  lines.forEach((points, order) => root.append(svg("polyline", {
    class: order ? "line second" : "line", points: points.map((p) => `${x(p[0])},${y(p[1])}`).join(" ") })));
  for (const [px, py] of dots) root.append(svg("circle", { class: "dot", cx: x(px), cy: y(py), r: 4.5 }));
  root.addEventListener("pointermove", (event) => {
    const box = root.getBoundingClientRect();
    const [mx, my] = [(event.clientX - box.left) * width / box.width, (event.clientY - box.top) * height / box.height];
    const away = (p) => Math.hypot(x(p[0]) - mx, y(p[1]) - my);
    const nearest = lines.flat().reduce((a, b) => (away(b) < away(a) ? b : a));
    if (away(nearest) < 30) showTip(event, definitions(nearest[2])); else hideTip();
  });
  root.addEventListener("pointerleave", hideTip);
  return html("figure", {}, html("figcaption", {}, title, html("span", {}, caption)), root);
}

function drawCurves() {
  for (const one of data.decisions) {
    const title = one.name[0].toUpperCase() + one.name.slice(1);
    if (one.missing) {
      byId("curves").append(html("figure", {}, html("figcaption", {}, title, html("span", {}, one.missing))));
      continue;
    }
    const told = (p) => ["threshold", "precision", "recall", "F1 by tick", "F1 within 2 s"]
      .map((name, at) => [name, digits(p[at])]);
    const line = (from, to) => one.points.map((p) => [p[from], p[to], told(p)]);
    const chosen = one.threshold === null ? "" : ` Circles: the threshold in use, ${digits(one.threshold)}.`
      + (one.gap_s ? ` With at least ${one.gap_s} s between two.` : "");
    const dots = (...places) => (one.threshold === null ? [] : places);
    byId("curves").append(
      chart(`${title}: precision and recall`, `Area under the curve ${digits(one.pr_auc)}.${chosen}`,
        ["recall", "precision"], [line(2, 1)], dots([one.recall, one.precision]), null),
      chart(`${title}: F1 over thresholds`, `Solid: by tick. Dashed: events within 2 s.${chosen}`,
        ["threshold", "F1"], [line(0, 3), line(0, 4)],
        dots([one.threshold, one.f1], [one.threshold, one.event_f1]), one.threshold));
  }
}

drawHead();
drawTables();
drawCurves();
