"use strict";
// What the page holds, and what it shows of it: boxes, classes, rows, times.

const $ = (id) => document.getElementById(id);
// What a visitor may not know of the embedded model's names.
const SPELLED_OUT = { RBC: "red blood cells", WBC: "white blood cells" };
const STAGES = {
  admit: ["#8d74c9", "receive the file"],
  decode: ["#3b8fd0", "unpack the picture"],
  preprocess: ["#22a390", "bring it to size"],
  queue: ["#d29b16", "wait for a turn"],
  inference: ["#d9583f", "the network looks"],
  postprocess: ["#8a9440", "sort, write the answer"],
  elsewhere: ["#8b9a96", "network and browser"],
};
const NUMBERS = { score: (d) => d.score, x: (d) => d.box[0], y: (d) => d.box[1], width: (d) => d.box[2] - d.box[0], height: (d) => d.box[3] - d.box[1] };

let model = null;  // of /model
let key = "";  // in memory only
let needsKey = false;
let upload = null;  // what was sent last
let content = null;  // the whole answer to it
let found = [];  // its detections, best first
let asking = new AbortController();  // aborted when a newer picture comes, or on Cancel
let pinned = null, lit = null;  // a detection to bring forward: chosen, or pointed at
let sorting = { by: "score", descending: true };
const unwanted = new Set();  // labels

const threshold = () => Number($("threshold").value);
const shown = () => found.filter((each) => each.score >= threshold() && !unwanted.has(each.label));

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

let announcing = 0;
function announce(text) {  // what is read out: the last of a quick row, as a slider makes them
  clearTimeout(announcing);
  announcing = setTimeout(() => { $("announce").textContent = text; }, 350);
}

function update() {
  const list = shown(), counts = new Map();
  for (const { label } of list) counts.set(label, (counts.get(label) ?? 0) + 1);
  if (!list.includes(pinned)) pinned = null;
  if (!list.includes(lit)) lit = pinned;
  const value = threshold(), { min, max } = $("threshold");
  $("threshold-shown").textContent = value.toFixed(2);
  $("threshold").style.setProperty("--at", `${(100 * (value - min)) / (max - min)}%`);
  for (const chip of $("classes").children) {
    const passing = found.filter((each) => each.label === chip.dataset.label && each.score >= value).length;
    chip.lastChild.textContent = passing;
  }
  const parts = [...counts].map(([label, count]) => `${count} ${label}`);
  const words = list.length === 0 ? "Nothing found" + (found.length ? " with these filters" : "") : `${list.length} found: ${parts.join(", ")}`;
  if (content) { $("summary").textContent = words; announce(words); }
  $("photo").alt = upload ? `${upload.name}. ${content ? words : ""}` : "";
  showRows(list);
  showCommand(list);
  drawBoxes();
  drawSpread();
}

function drawBoxes() {
  const overlay = $("overlay"), unit = window.devicePixelRatio || 1;
  overlay.width = Math.round(overlay.clientWidth * unit);
  overlay.height = Math.round(overlay.clientHeight * unit);
  if (content && overlay.width) {
    const labelPx = overlay.clientWidth < 480 ? 11 : 13;
    paintDetections(overlay.getContext("2d"), shown(), { scale: overlay.width / content.images[0].width, unit, labelPx, lit, withLabels: $("with-labels").checked });
  }
}

function drawSpread() {
  const style = getComputedStyle(document.documentElement);
  const colors = { on: style.getPropertyValue("--accent"), off: style.getPropertyValue("--line") };
  paintSpread($("spread"), found, Number($("threshold").min), Number($("threshold").max), threshold(), colors);
}

function showClasses() {
  const ids = new Map(found.map((each) => [each.label, each.class_id]));
  $("classes").replaceChildren(...[...ids].map(([label, id]) => {
    const chip = element("label", undefined, "chip"), box = element("input");
    chip.dataset.label = label;
    chip.title = SPELLED_OUT[label] ?? "";
    box.type = "checkbox";
    box.checked = true;
    box.style.accentColor = colorOf(id);
    box.onchange = () => { if (box.checked) unwanted.delete(label); else unwanted.add(label); update(); };
    chip.append(box, element("span", label), element("span", "0", "n"));
    return chip;
  }));
  if (!ids.size) $("classes").append(element("span", content ? "Nothing found." : "…", "hint"));
  $("all-or-none").hidden = ids.size < 4;
}

function chooseAll(wanted) {
  unwanted.clear();
  for (const { label } of wanted ? [] : found) unwanted.add(label);
  for (const box of $("classes").querySelectorAll("input")) box.checked = wanted;
  update();
}

function showRows(list) {
  const value = sorting.by === "label" ? (d) => d.label : NUMBERS[sorting.by], sign = sorting.descending ? -1 : 1;
  const sorted = [...list].sort((a, b) => sign * (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0));
  $("rows").replaceChildren(...sorted.map((detection) => {
    const row = element("tr"), name = element("td"), swatch = element("span", undefined, "swatch");
    swatch.style.background = colorOf(detection.class_id);
    name.append(swatch, detection.label);
    row.append(name, element("td", detection.score.toFixed(2)), ...["x", "y", "width", "height"].map((by) => element("td", NUMBERS[by](detection).toFixed(0))));
    row.detection = detection;
    return row;
  }));
  for (const button of document.querySelectorAll("[data-sort]")) {
    if (button.dataset.sort === sorting.by) button.parentElement.setAttribute("aria-sort", sorting.descending ? "descending" : "ascending");
    else button.parentElement.removeAttribute("aria-sort");
  }
  $("count").textContent = content ? list.length : "";
  $("nothing").hidden = list.length > 0 || !content;
  $("nothing").textContent = found.length ? "Nothing passes these filters: lower the threshold, or choose more classes." : "The model found nothing it knows in this picture.";
  mark();
}

/** Show in the rows which detection is lit and which is pinned; of all rows one can be reached with Tab. */
function mark() {
  const rows = [...$("rows").children], reachable = rows.find((row) => row.detection === (pinned ?? lit)) ?? rows[0];
  for (const row of rows) {
    row.classList.toggle("lit", row.detection === lit);
    row.setAttribute("aria-selected", row.detection === pinned);
    row.tabIndex = row === reachable ? 0 : -1;
  }
}

function light(detection, reveal = false) {
  if (detection === lit) return;
  lit = detection;
  mark();
  drawBoxes();
  const row = $("rows").querySelector(".lit"), box = $("scroll");
  if (!reveal || !row) return;
  const top = row.offsetTop - $("scroll").querySelector("thead").offsetHeight, bottom = row.offsetTop + row.offsetHeight;
  if (top < box.scrollTop) box.scrollTop = top;
  else if (bottom > box.scrollTop + box.clientHeight) box.scrollTop = bottom - box.clientHeight;
}

function pin(detection, reveal = false) {
  pinned = detection === pinned ? null : detection;
  if (detection) light(pinned ?? detection, reveal);
  mark();
}

/** The smallest box under the pointer, or null. */
function detectionAt(event) {
  if (!content) return null;
  const place = $("overlay").getBoundingClientRect(), scale = content.images[0].width / place.width;
  const x = (event.clientX - place.left) * scale, y = (event.clientY - place.top) * scale;
  const area = (detection) => NUMBERS.width(detection) * NUMBERS.height(detection);
  const under = shown().filter(({ box: [x0, y0, x1, y1] }) => x0 <= x && x <= x1 && y0 <= y && y <= y1);
  return under.sort((a, b) => area(a) - area(b))[0] ?? null;
}

function showTimes(header, tookMs = 0) {
  const given = [...(header ?? "").matchAll(/([\w-]+)\s*;\s*dur=([\d.]+)/g)].map(([, name, ms]) => [name, Number(ms)]).filter(([name]) => name !== "total");
  const served = given.reduce((sum, [, ms]) => sum + ms, 0);
  const parts = given.length ? [...given, ["elsewhere", Math.max(0, tookMs - served)]] : [];
  const total = Math.max(served, tookMs) || 1;
  $("total").textContent = parts.length ? `${total.toFixed(0)} ms` : "";
  $("bar").replaceChildren(...parts.map(([name, ms]) => {
    const part = element("span");
    part.style.flex = `${ms / total} 1 0`;
    part.style.background = STAGES[name]?.[0] ?? STAGES.elsewhere[0];
    part.title = `${name} ${ms.toFixed(1)} ms`;
    return part;
  }));
  $("stages").replaceChildren(...parts.map(([name, ms]) => {
    const row = element("tr"), cell = element("td"), swatch = element("span", undefined, "swatch");
    swatch.style.background = STAGES[name]?.[0] ?? STAGES.elsewhere[0];
    cell.append(swatch, `${name} `, element("small", STAGES[name]?.[1] ?? ""));
    row.append(cell, element("td", `${ms.toFixed(1)} ms`));
    return row;
  }));
}
