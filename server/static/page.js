"use strict";
// A picture comes in; what visitors do, and what follows.

function take(files) {
  const file = [...files].find((each) => each.type.startsWith("image/")) ?? files[0];
  if (!file) return;
  if (file.type && !file.type.startsWith("image/")) {
    complain({ title: `${file.name} is not a picture.`, advice: "Choose a JPEG, PNG, WebP, BMP or TIFF file.", detail: `It is of type ${file.type}.` });
  } else {
    detect({ blob: file, name: file.name || "picture", isSample: false });
  }
}

async function takeSample() {
  const before = asking;
  try {
    const response = await ask("sample.jpg", key);
    const blob = await response.blob();
    if (before !== asking) return;  // a picture came meanwhile
    if (response.ok) detect({ blob, name: "sample.jpg", isSample: true });
    else complain(explain(response, null));
  } catch (error) {
    complain({ title: "The sample did not come.", advice: "Check that the server runs, then try again.", detail: error.message });
  }
}

async function detect(next) {
  asking.abort();
  const mine = asking = new AbortController();
  upload = next;
  content = null; found = []; pinned = lit = null; unwanted.clear();
  $("problem").hidden = true;
  $("stage").hidden = true;
  enter("busy", "Looking …");
  showClasses(); showTimes(null); update();
  const seen = showPicture(upload.blob);
  try {
    const startedMs = performance.now();
    // Asked for once, down to the slider's lowest: what is above is filtered here.
    const most = model?.max_detections ?? 100, least = $("threshold").min;
    const response = await askForDetections(upload, { least, most, key, signal: mine.signal });
    const received = await response.json().catch(() => null);
    const tookMs = performance.now() - startedMs;
    const isVisible = await seen;
    if (mine !== asking) return;
    if (response.status === 401) { askForKey(); return; }
    if (!response.ok || received === null) { fail(explain(response, received)); return; }
    content = received;
    found = received.images[0].detections;
    if (model === null) loadModel();
    if (!isVisible) await showByServer(mine);
    if (mine !== asking) return;
    $("frame").style.setProperty("--w", received.images[0].width);
    $("frame").style.setProperty("--h", received.images[0].height);
    enter("done", "");
    showClasses(); showTimes(response.headers.get("Server-Timing"), tookMs); update();
  } catch (error) {
    if (mine === asking) fail(explainSilence(error, upload));
  }
}

/** Show the picture while the server looks at it; false for a format that this browser does not know. */
async function showPicture(blob) {
  const photo = $("photo"), url = URL.createObjectURL(blob), mine = asking;
  photo.src = url;
  try { await photo.decode(); } catch { return false; } finally { URL.revokeObjectURL(url); }
  if (mine !== asking) return true;
  $("frame").style.setProperty("--w", photo.naturalWidth);
  $("frame").style.setProperty("--h", photo.naturalHeight);
  $("stage").hidden = false;
  return true;
}

async function showByServer(mine) {
  try {
    const png = await askForPicture(upload, key, mine.signal);
    if (mine === asking) await showPicture(png);
  } catch {
    // The table and the downloads still have everything.
  }
}

function enter(state, words) {
  document.body.dataset.state = state;
  $("picture").setAttribute("aria-busy", state === "busy");
  $("cancel").hidden = state !== "busy";
  $("under").hidden = state === "failed";
  for (const id of ["save-picture", "save-json", "copy"]) $(id).disabled = state !== "done";
  $("summary").textContent = words;
  if (words) announce(words);
}

/** There is no answer to the picture, and why. */
function fail(problem) {
  enter("failed", "");
  complain(problem);
}

/** Something cannot be done; what is shown stays. */
function complain({ title, advice, detail, mayRetry = false }) {
  $("problem-title").textContent = title;
  $("problem-advice").textContent = advice;
  $("problem-detail").textContent = detail;
  $("problem").hidden = false;  // filled before it is shown: an alert is read out as it appears
  $("again").hidden = !mayRetry || upload === null;
  $("problem").scrollIntoView({ block: "nearest" });
}

function askForKey() {
  needsKey = true;
  $("key-form").hidden = false;
  enter(upload ? "failed" : "start", "");
  $("key-problem").textContent = key ? "This server does not know that key. Check it, and type it again." : "";
  $("key").focus();
}

// --- the model, in words ---

/** Ask what the model is, and say it; false if there is no answer. */
async function loadModel() {
  try {
    const response = await ask("model", key);
    const received = await response.json().catch(() => null);
    if (response.status === 401) askForKey();
    else if (!response.ok || received === null) complain(explain(response, received));
    else describe(model = received);
    return response.ok;
  } catch (error) {
    complain({ title: "The server did not answer.", advice: "Check that it runs, then reload this page.", detail: error.message });
    return false;
  }
}

function describe(model) {
  const names = Object.values(model.categories), spelled = names.map((name) => name in SPELLED_OUT ? `${name} (${SPELLED_OUT[name]})` : name);
  const few = spelled.length > 10 ? [...spelled.slice(0, 8), `${spelled.length - 8} more`] : spelled;
  $("about").replaceChildren("The model ", element("strong", model.model.name), " looks for ", element("strong", new Intl.ListFormat("en").format(few)),
    ". It draws a box around each one that it finds and gives it a score from 0 to 1: how sure it is.");
  const upTo = new Intl.NumberFormat("en", { maximumSignificantDigits: 1, roundingMode: "ceil" });
  const worst = (name) => upTo.format(Math.max(...model.parity.map((each) => each[name])));
  const facts = [
    ["Model", `${model.model.name}, version ${model.model.version} (Deformable DETR, ${model.variant})`],
    ["Classes", `${names.length}: ${spelled.join(", ")}`],
    ["Sees pictures as", `${model.resize.shortest} px on the shorter side, at most ${model.resize.longest} px on the longer`],
    ["Runs on", `${model.engine}, ${model.precision}`],
  ];
  if (model.parity.length) facts.push(["Checked on export", `${model.parity.length} comparisons with PyTorch: boxes within ${worst("max_box_error")} of a side, scores within ${worst("max_score_error")}`]);
  $("facts").replaceChildren(...facts.flatMap(([term, text]) => [element("dt", term), element("dd", text)]));
  $("model").hidden = false;
  if (!names.some((name) => name in SPELLED_OUT)) $("sample-hint").textContent = "The sample is a drawn smear of blood cells, which this model may not know.";
}

// --- what visitors do ---

let isScheduled = false;
$("threshold").oninput = () => {
  if (isScheduled) return;
  isScheduled = true;
  requestAnimationFrame(() => { isScheduled = false; update(); });
};
for (const id of ["file", "camera"]) $(id).onchange = () => { take($(id).files); $(id).value = ""; };
$("sample").onclick = takeSample;
$("again").onclick = () => detect(upload);
$("cancel").onclick = () => {
  asking.abort();  // the server drops what nobody waits for
  asking = new AbortController();
  fail({ title: "Cancelled.", advice: "Try again, or take another picture.", detail: "", mayRetry: true });
  $("again").focus();
};
$("key-form").onsubmit = async (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  $("key-form").hidden = true;
  $("problem").hidden = true;
  if (!await loadModel()) return;  // refused: asked for again
  $("key").value = "";
  if (upload) detect(upload); else $("file").focus();
};
$("with-labels").onchange = drawBoxes;
$("all").onclick = () => chooseAll(true);
$("none").onclick = () => chooseAll(false);
$("copy").onclick = copyCommand;
$("save-json").onclick = saveJson;
$("save-picture").onclick = savePicture;

for (const button of document.querySelectorAll("[data-sort]")) {
  button.onclick = () => {
    const by = button.dataset.sort;
    sorting = { by, descending: by === sorting.by ? !sorting.descending : by !== "label" };
    showRows(shown());
  };
}
const rowOf = (event) => event.target.closest("#rows tr");
$("rows").onmouseover = (event) => light(rowOf(event)?.detection ?? pinned);
$("rows").onmouseleave = () => light(pinned);
$("rows").addEventListener("focusin", (event) => light(rowOf(event).detection));
$("rows").addEventListener("focusout", () => light(pinned));
$("rows").onclick = (event) => { const row = rowOf(event); if (row) pin(row.detection); };
$("rows").onkeydown = (event) => {
  const row = rowOf(event), rows = $("rows").children;
  const goal = { ArrowDown: row.nextElementSibling, ArrowUp: row.previousElementSibling, Home: rows[0], End: rows[rows.length - 1] }[event.key];
  if (goal) goal.focus();
  else if (event.key === "Enter" || event.key === " ") pin(row.detection);
  else if (event.key === "Escape") { pinned = null; mark(); }
  if (goal !== undefined || event.key === " ") event.preventDefault();
};
$("overlay").onpointermove = (event) => { if (event.pointerType === "mouse") light(detectionAt(event) ?? pinned, true); };
$("overlay").onpointerleave = () => light(pinned);
$("overlay").onclick = (event) => {
  const detection = detectionAt(event);
  if (detection) pin(detection, true); else { pinned = null; mark(); }
  if (pinned === null) light(null);  // a finger that has left points at nothing
};

document.onpaste = (event) => {
  if (event.target.closest?.("input")) return;
  if (event.clipboardData.files.length) take(event.clipboardData.files);
  else complain({ title: "There is no picture on the clipboard.", advice: "Copy the picture itself, not its address, and paste again. Or save it and choose the file.", detail: "" });
};
let depth = 0;  // dragenter and dragleave come for every element on the way
const brings = (event, type) => event.dataTransfer.types.includes(type);
document.ondragenter = (event) => { depth += 1; document.body.classList.toggle("over", brings(event, "Files")); };
document.ondragleave = () => { depth -= 1; if (depth <= 0) { depth = 0; document.body.classList.remove("over"); } };
document.ondragover = (event) => { if (brings(event, "Files") || brings(event, "text/uri-list")) event.preventDefault(); };
document.ondrop = (event) => {
  depth = 0;
  document.body.classList.remove("over");
  if (!brings(event, "Files") && !brings(event, "text/uri-list")) return;  // text, for a field
  event.preventDefault();
  if (event.dataTransfer.files.length) take(event.dataTransfer.files);
  else complain({ title: "That was no file.", advice: "Save the picture first, then drop the file: nothing is fetched from elsewhere.", detail: "" });
};
new ResizeObserver(drawBoxes).observe($("frame"));
new ResizeObserver(drawSpread).observe($("spread"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawSpread);
loadModel();
if (location.hash === "#sample") takeSample();
