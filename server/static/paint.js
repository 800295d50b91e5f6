"use strict";
// Boxes and labels over a picture, on the screen and in the file to download.

// The colours that format=image has, too: the server's draw.py.
const PALETTE = ["#e63946", "#1d7ac4", "#f4a21b", "#2a9d60", "#8e44c1", "#00a0b0", "#e954a0", "#7a5c3c"];
const AA = 4.5;  // the least contrast of text, by WCAG 2

const colorOf = (classId) => PALETTE[classId % PALETTE.length];

/** White where it can be read on `color` (#rrggbb), else black. */
function inkOn(color) {
  const [red, green, blue] = [1, 3, 5].map((at) => {
    const value = parseInt(color.slice(at, at + 2), 16) / 255;
    return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  });
  return 1.05 / (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05) >= AA ? "#fff" : "#000";
}

/**
 * Paint `detections`, best first, so that the best is on top.
 * `scale`: canvas px of one picture px; `unit`: canvas px of one px to the eye; `labelPx`: height of letters, to the
 * eye; `lit`: the one to bring forward, or null.
 */
function paintDetections(pen, detections, { scale, unit, labelPx = 13, lit = null, withLabels = true }) {
  const order = [...detections].reverse().sort((a, b) => (a === lit) - (b === lit));
  pen.lineJoin = "round";
  for (const detection of order) {
    const [x0, y0, x1, y1] = detection.box.map((edge) => edge * scale);
    const color = colorOf(detection.class_id), isLit = detection === lit;
    pen.globalAlpha = lit === null || isLit ? 1 : 0.3;
    pen.fillStyle = color + (isLit ? "40" : "14");
    pen.fillRect(x0, y0, x1 - x0, y1 - y0);
    for (const [style, width] of [["#ffffffa0", isLit ? 6 : 4], [color, isLit ? 3.5 : 2]]) {  // a rim: seen on any ground
      pen.strokeStyle = style;
      pen.lineWidth = width * unit;
      pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
    }
  }
  pen.globalAlpha = 1;
  const labelled = withLabels && lit === null ? detections : detections.filter((each) => each === lit);
  for (const label of placeLabels(pen, labelled, { scale, unit, labelPx })) {
    const color = colorOf(label.detection.class_id);
    pen.fillStyle = color;
    pen.beginPath();
    pen.roundRect(label.x, label.y, label.width, label.height, 3 * unit);
    pen.fill();
    pen.fillStyle = inkOn(color);
    pen.fillText(label.text, label.x + 4 * unit, label.y + label.height / 2 + 0.5 * unit);
  }
}

/**
 * Where labels go so that none covers another: the best first. One without a place is shortened to its class, then
 * left out; its row in the table still tells.
 */
function placeLabels(pen, detections, { scale, unit, labelPx }) {
  const height = (labelPx + 5) * unit, placed = [];
  pen.font = `600 ${labelPx * unit}px system-ui, sans-serif`;
  pen.textBaseline = "middle";
  for (const detection of detections) {
    const [x0, y0, x1, y1] = detection.box.map((edge) => edge * scale);
    for (const text of [`${detection.label} ${detection.score.toFixed(2)}`, detection.label]) {
      const width = pen.measureText(text).width + 8 * unit;
      const spots = [[x0, y0 - height], [x1 - width, y0 - height], [x0, y1], [x1 - width, y1], [x0, y0], [x1 - width, y1 - height]]
        .map(([x, y]) => ({ x: Math.max(0, Math.min(x, pen.canvas.width - width)), y, width, height, text, detection }))
        .filter((spot) => spot.y >= 0 && spot.y + height <= pen.canvas.height);
      const free = spots.find((spot) => placed.every((other) => apart(spot, other)));
      if (free) { placed.push(free); break; }
    }
  }
  return placed;
}

const apart = (a, b) => a.x + a.width <= b.x || b.x + b.width <= a.x || a.y + a.height <= b.y || b.y + b.height <= a.y;

/** How the scores are spread, as bars above the slider from `low` to `high`; those under `threshold` are pale. */
function paintSpread(canvas, detections, low, high, threshold, colors) {
  const unit = window.devicePixelRatio || 1, thumb = 12 * unit, bins = 45;
  canvas.width = Math.round(canvas.clientWidth * unit);
  canvas.height = Math.round(canvas.clientHeight * unit);
  const pen = canvas.getContext("2d"), counts = new Array(bins).fill(0), width = (canvas.width - 2 * thumb) / bins;
  const step = (high - low) / bins;
  for (const { score } of detections) counts[Math.max(0, Math.min(bins - 1, Math.floor((score - low) / step)))] += 1;
  const most = Math.max(1, ...counts);
  counts.forEach((count, bin) => {
    if (count === 0) return;
    const height = Math.max(3 * unit, (canvas.height - 2 * unit) * Math.sqrt(count / most));  // a root: ones stay visible
    pen.fillStyle = low + (bin + 0.5) * step >= threshold ? colors.on : colors.off;
    pen.fillRect(thumb + bin * width + 0.5 * unit, canvas.height - height, Math.max(unit, width - unit), height);
  });
}
