"use strict";
// What goes to the server and comes back: the request, its failure in words, and the same request as a command.

const AS_PICTURE = { "Content-Type": "image/*" };  // of which format, the server sees; a file's name may be wrong about it

/** The server's answer to `path`, relative to this page, with the API key if there is one. */
function ask(path, key, options = {}) {
  const headers = new Headers(options.headers);
  // Header values are bytes: a key beyond ASCII goes as UTF-8.
  if (key) headers.set("Authorization", `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}`);
  return fetch(new URL(path, document.baseURI), { ...options, headers });
}

/** A request to find all that `upload` holds, from the score `least` on. */
function askForDetections(upload, { least, most, key, signal }) {
  const query = new URLSearchParams({ threshold: least, max_detections: most });
  return ask(`detect?${query}`, key, { method: "POST", body: upload.blob, headers: AS_PICTURE, signal });
}

/** The upload as a PNG by the server: for formats that no browser shows. No score is above 1, so no box is drawn. */
async function askForPicture(upload, key, signal) {
  const response = await ask("detect?format=image&threshold=1&max_detections=1", key,
    { method: "POST", body: upload.blob, headers: AS_PICTURE, signal });
  if (!response.ok) throw new Error(response.statusText);
  return response.blob();
}

const SMALLER = "Make it smaller, or send a part of it.";
const ANOTHER = "Open it in a picture viewer, save it as JPEG or PNG, and send that.";
// By the code of the answer's error: what happened, and what to do.
const IN_WORDS = {
  image_unreadable: ["This file cannot be read as a picture.", ANOTHER],
  image_empty: ["This file is empty.", "Choose another one."],
  image_truncated: ["This file ends before the picture does.", "It was cut off on its way: copy or download it again."],
  image_animated: ["This picture moves, and only still ones can be looked at.", "Save one frame of it, and send that."],
  unsupported_shape: ["This picture is too long and narrow for the model.", "Cut out the part that matters."],
  unsupported_format: ["This kind of file is not understood.", ANOTHER],
  unsupported_media_type: ["This kind of file is not understood.", ANOTHER],
  too_many_pixels: ["This picture has too many pixels.", SMALLER],
  too_many_bytes: ["This file is too large.", SMALLER],
  queue_full: ["The server has as many pictures as it can take.", "Try again"],
  deadline_unmeetable: ["The server has more to do than it could finish in time.", "Try again"],
  unavailable: ["The server is not able to answer just now.", "Try again"],
  body_timeout: ["The picture came too slowly, and the server gave up on it.", "Try again; a smaller picture comes quicker."],
  draining: ["The server is about to stop, or to start anew.", "Try again"],
  deadline_passed: ["The answer took too long.", "Try again; a smaller picture is quicker."],
};
const FAILED = ["The server failed on this picture.", "Try again. If it keeps failing, tell whoever runs the server; the request's id is below."];
const REFUSED = ["The server did not accept the request.", "What it says is below."];

/** `{title, advice, detail, mayRetry}` for an answer that is no success. */
function explain(response, content) {
  const error = content?.error ?? {};
  let [title, advice] = IN_WORDS[error.code] ?? (response.status >= 500 ? FAILED : REFUSED);
  if (advice === "Try again") {
    const wait = Number(response.headers.get("Retry-After"));
    advice += wait > 0 ? ` in about ${wait} s.` : " in a moment.";
  }
  const id = response.headers.get("X-Request-Id");
  const said = error.message ? `The server says: ${error.message}` : `The server answered ${response.status} ${response.statusText}`;
  const mayRetry = [408, 429].includes(response.status) || response.status >= 500;
  return { title, advice, detail: id ? `${said} (request ${id})` : said, mayRetry };
}

/** The same for a request that had no answer at all. */
function explainSilence(error, upload) {
  const megabytes = upload.blob.size / 1e6;
  return {
    title: "The server did not answer.",
    advice: `Check that it runs and that you are connected, then try again.${megabytes > 16 ? ` Or the file is too large for it: ${megabytes.toFixed(0)} MB.` : ""}`,
    detail: error.message,
    mayRetry: true,
  };
}

/** `text` as one word of a shell. */
const quote = (text) => /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;

/**
 * The command that asks for what the page shows. `labels`: null for all classes. The key itself is never part of it.
 * Not curl's -F: it reads commas, semicolons and quotes in the name of a file as its own.
 */
function curlCommand(upload, { threshold, labels, idsOf, most, needsKey }) {
  const url = new URL("detect", document.baseURI);
  const query = [`threshold=${threshold}`];
  if (labels) {  // a name that has a comma would be read as two
    const parts = labels.flatMap((label) => /^[^,\s]([^,]*[^,\s])?$/.test(label) ? [encodeURIComponent(label)] : idsOf(label));
    query.push(`classes=${parts.join(",")}`);
  }
  if (most > 100) query.push(`max_detections=${most}`);
  const key = needsKey ? ' -H "Authorization: Bearer $API_KEY"' : "";
  const from = upload.isSample ? `curl -sS ${quote(new URL("sample.jpg", document.baseURI).href)} | ` : "";
  const file = upload.isSample ? "-" : upload.name === "-" ? "./-" : upload.name;  // @- is standard input
  return `${from}curl -sS${key} -H ${quote(`Content-Type: ${AS_PICTURE["Content-Type"]}`)} --data-binary ${quote(`@${file}`)} ${quote(`${url.href}?${query.join("&")}`)}`;
}
