"""The picture with its detections drawn on it: `format=image`, and `ddetr detect --draw`."""

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from server.postprocess import Detection

# Colours that stay apart on light and dark pictures and for most colour-blind eyes; the page has the same.
PALETTE = (
    (230, 57, 70),
    (29, 122, 196),
    (244, 162, 27),
    (42, 157, 96),
    (142, 68, 193),
    (0, 160, 176),
    (233, 84, 160),
    (122, 92, 60),
)
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)


def color_of(class_id: int) -> tuple[int, int, int]:
    """The RGB colour that boxes of this class have everywhere."""
    return PALETTE[class_id % len(PALETTE)]


def draw_detections(picture: Image.Image, detections: Sequence[Detection]) -> Image.Image:
    """A copy of `picture` (RGB) with a box and a label for every detection; the best are drawn last, on top."""
    canvas = picture.copy()
    pen = ImageDraw.Draw(canvas, "RGBA")
    shorter = min(picture.size)
    line_px = max(1, round(shorter / 240))
    font = ImageFont.load_default(size=max(10, round(shorter / 36)))
    for detection in reversed(detections):
        color = color_of(detection.class_id)
        x0, y0, x1, y1 = detection.box_xyxy_px
        # Pillow counts pixels, a box's edges lie between them.
        corners = (round(x0), round(y0), max(round(x0), round(x1) - 1), max(round(y0), round(y1) - 1))
        pen.rectangle(corners, fill=(*color, 28), outline=color, width=line_px)
    for detection in reversed(detections):
        _draw_label(pen, detection, font, line_px, picture.size)
    return canvas


def encode_png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _draw_label(
    pen: ImageDraw.ImageDraw,
    detection: Detection,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    line_px: int,
    size: tuple[int, int],
) -> None:
    """Above the box's top left corner; inside the box where there is no room above, and never past the right edge."""
    text = f"{detection.label} {detection.score:.2f}"
    color = color_of(detection.class_id)
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    pad = line_px + 1
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    x = max(0.0, min(round(detection.box_xyxy_px[0]), size[0] - width))
    y = round(detection.box_xyxy_px[1]) - height
    if y < 0:
        y = round(detection.box_xyxy_px[1])
    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
    luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    pen.text((x + pad - left, y + pad - top), text, font=font, fill=_BLACK if luminance > 150 else _WHITE)
