"use strict";
// What a visitor takes along: the command, the answer, the picture.

function showCommand(list) {
  if (upload === null) return;
  const labels = [...new Set(found.map((each) => each.label))].filter((label) => !unwanted.has(label));
  const idsOf = (label) => [...new Set(found.filter((each) => each.label === label).map((each) => each.class_id))];
  const none = found.length > 0 && labels.length === 0;
  $("curl").textContent = none ? "Choose a class first: a request cannot ask for none." : curlCommand(upload, {
    threshold: threshold(), labels: unwanted.size ? labels : null, idsOf, most: list.length, needsKey,
  });
  $("copy").disabled = none || !content;
  $("curl-hint").textContent = (upload.isSample ? "The same request, from a terminal." : `The same request, from a terminal in the folder of ${upload.name}.`)
    + (needsKey ? " Set API_KEY there first." : "");
}

async function copyCommand() {
  const text = $("curl").textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // without https there is no such clipboard: the old way
    getSelection().selectAllChildren($("curl"));
    if (!document.execCommand("copy")) { announce("Select the command and copy it."); return; }
  }
  $("copy").textContent = "Copied";
  announce("Copied");
  setTimeout(() => { $("copy").textContent = "Copy as curl"; }, 2000);
}

function save(blob, ending) {
  const link = element("a");
  link.href = URL.createObjectURL(blob);
  link.download = upload.name.replace(/\.[^.]*$/, "") + ending;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function saveJson() {
  const answer = { ...content, images: [{ ...content.images[0], detections: shown() }] };
  save(new Blob([JSON.stringify(answer, null, 2), "\n"], { type: "application/json" }), ".json");
}

async function savePicture() {
  const canvas = element("canvas"), { width, height } = content.images[0];
  canvas.width = width;
  canvas.height = height;
  const pen = canvas.getContext("2d");
  try {
    pen.drawImage($("photo"), 0, 0, width, height);
    paintDetections(pen, shown(), { scale: 1, unit: Math.max(0.75, Math.min(width, height) / 480), withLabels: $("with-labels").checked });
    const png = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
    if (png === null) throw new Error(`${width} x ${height} px`);
    save(png, "-boxes.png");
  } catch (error) {
    $("curl-hint").textContent = `This browser cannot write so large a picture (${error.message}). The command can: add &format=image to its address, and --output boxes.png.`;
    announce($("curl-hint").textContent);
  }
}
