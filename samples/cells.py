"""Paints one cell, each in its own window of the picture."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from samples.outlines import FloatArray, Outline, Window, smooth_step


def _colour(*rgb: float) -> FloatArray:
    return np.array(rgb, dtype=np.float32)


# Levels of 255, and optical densities (-ln of transmission), for red, green and blue.
_BACKGROUND = _colour(200, 203, 197)
_RED_CELL_PINK, _RED_CELL_BROWN = _colour(0.07, 0.23, 0.165), _colour(0.10, 0.34, 0.33)
_PLASM_LILAC, _PLASM_ROSE, _PLASM_RED, _PLASM_BLUE = (
    _colour(180, 162, 196),
    _colour(184, 154, 180),
    _colour(182, 128, 150),
    _colour(162, 160, 206),
)
_NUCLEUS_VIOLET, _NUCLEUS_BLUE = _colour(156, 112, 216), _colour(128, 108, 210)
_PLATELET_VIOLET, _PLATELET_GREY = _colour(150, 128, 198), _colour(168, 168, 208)

# Lobed nucleus in pale plasm; lobes amid coarse red granules; one kidney; small and nearly all nucleus.
WHITE_KINDS = {"lobed": 0.5, "granular": 0.14, "kidney": 0.14, "round": 0.22}


@dataclass
class Canvas:
    """A picture in the making: `thickness` gathers the red cells, `image` is what the light leaves of them."""

    thickness: FloatArray  # [H, W], in units of one plain red cell
    image: FloatArray  # [H, W, 3], levels 0..255
    texture: FloatArray  # [H, W], smooth noise of about unit variance
    scale: float
    edge_px: float
    red_cell_density: FloatArray  # [3]
    overlap: float  # how much of the thinner cell's thickness shows where two red cells lie on each other

    @classmethod
    def blank(cls, rng: np.random.Generator, height: int, width: int, scale: float) -> "Canvas":
        """A lit, empty field: tint, vignette and slow gradients of one photograph."""
        tint = _BACKGROUND * np.float32(rng.uniform(0.95, 1.04)) + rng.normal(0.0, 2.5, 3).astype(np.float32)
        tilt_x, tilt_y = rng.normal(0.0, 0.03, 2)
        vignette = rng.uniform(0.0, 0.08)
        x = np.linspace(-1.0, 1.0, width, dtype=np.float32)[None, :]
        y = np.linspace(-1.0, 1.0, height, dtype=np.float32)[:, None]
        light = 1.0 - vignette * 0.5 * (x * x + y * y) + tilt_x * x + tilt_y * y
        mix = np.float32(rng.random())
        red = (_RED_CELL_PINK * (1 - mix) + _RED_CELL_BROWN * mix) * np.float32(rng.uniform(0.72, 1.12))
        return cls(
            thickness=np.zeros((height, width), dtype=np.float32),
            image=light[:, :, None].astype(np.float32) * tint,
            texture=_smooth_noise(rng, height, width, (4.0 * scale, 12.0 * scale)),
            scale=scale,
            edge_px=float(rng.uniform(1.6, 3.6)) * scale,
            red_cell_density=red,
            overlap=float(rng.uniform(0.25, 0.75)),
        )

    def window(self, outline: Outline, margin: float = 0.0) -> Window:
        height, width = self.texture.shape
        return outline.window(height, width, margin + self.edge_px + 1.0)

    def develop(self) -> None:
        """Send the light through the red cells; what is drawn from here on lies over them."""
        for channel, density in enumerate(self.red_cell_density):
            self.image[:, :, channel] *= np.exp(self.thickness * -density)

    def lay(self, window: Window, thickness: FloatArray) -> None:
        """Add a red cell."""
        below = self.thickness[window.slices]
        thicker, thinner = np.maximum(below, thickness), np.minimum(below, thickness)
        self.thickness[window.slices] = thicker + np.float32(self.overlap) * thinner

    def absorb(self, window: Window, thickness: FloatArray, density: FloatArray) -> None:
        self.image[window.slices] *= np.exp(thickness[:, :, None] * -density)

    def paint(self, window: Window, alpha: FloatArray, colour: FloatArray) -> None:
        """Colour is [3] or [h, w, 3]."""
        patch = self.image[window.slices]
        patch += alpha[:, :, None] * (colour - patch)


def random_outline(
    rng: np.random.Generator, x: float, y: float, radius: float, stretched: bool, raggedness: float = 1.0
) -> Outline:
    """An outline of about this radius in px; a stretched one is a squeezed or drawn-out disc now and then."""
    stretch = float(np.exp(rng.normal(0.0, 0.09 if stretched else 0.06)))
    amplitude = np.array([0.02, 0.016, 0.008]) * (raggedness * rng.uniform(0.3, 2.2))
    wobble = rng.normal(0.0, 1.0, (3, 2)) * amplitude[:, None]
    wobble = np.clip(wobble, -0.08, 0.08)
    return Outline(
        x=float(x),
        y=float(y),
        half_width=radius * stretch,
        half_height=radius / stretch,
        angle=float(rng.uniform(0.0, np.pi)),
        wobble=tuple((float(a), float(b)) for a, b in wobble),
    )


def draw_red_cell(canvas: Canvas, rng: np.random.Generator, outline: Outline) -> None:
    """A pink disc, dark at the rim, paler in the middle, sometimes with a bright refractile ring in it."""
    window = canvas.window(outline)
    if window.is_empty:
        return
    field = outline.field(window)
    inside = smooth_step((1.0 - field) * np.float32(outline.radius / canvas.edge_px))
    pallor = np.float32(np.clip(rng.normal(0.38, 0.3), 0.0, 0.9))
    centre = np.float32(rng.uniform(0.35, 0.62))
    hollow = smooth_step((centre - field) * np.float32(1.0 / rng.uniform(0.15, 0.4)))
    rim = np.exp(-(((field - np.float32(0.93)) * np.float32(12.0)) ** 2))
    strength = np.float32(np.clip(rng.normal(1.0, 0.16), 0.6, 1.5))
    thickness = inside * (1.0 - pallor * hollow + np.float32(rng.uniform(0.0, 0.3)) * rim)
    thickness *= strength * (1.0 + np.float32(0.03) * canvas.texture[window.slices])
    canvas.lay(window, thickness)


def draw_refraction(canvas: Canvas, rng: np.random.Generator, outline: Outline) -> None:
    """The bright, dark-edged ring that trapped air or water leaves in a red cell."""
    radius = outline.radius
    x, y = outline.x + rng.normal(0.0, 0.2) * radius, outline.y + rng.normal(0.0, 0.2) * radius
    _draw_bubble(canvas, rng, x, y, rng.uniform(0.07, 0.15) * radius)


def draw_white_cell(canvas: Canvas, rng: np.random.Generator, outline: Outline, kind: str) -> None:
    """A white cell of one of WHITE_KINDS."""
    window = canvas.window(outline)
    if window.is_empty:
        return
    radius = outline.radius
    texture = canvas.texture[window.slices]
    field = outline.field(window)
    inside = smooth_step((1.0 - field) * np.float32(radius / canvas.edge_px))

    mix = np.float32(rng.random())
    other = {"lobed": _PLASM_ROSE, "granular": _PLASM_RED, "kidney": _PLASM_BLUE, "round": _PLASM_BLUE}[kind]
    plasm = _PLASM_LILAC * (1 - mix) + other * mix
    grain = np.float32(rng.uniform(2.0, 7.0) if kind != "granular" else rng.uniform(10.0, 18.0))
    canvas.paint(window, inside * np.float32(rng.uniform(0.78, 0.95)), plasm + texture[:, :, None] * grain)

    shape = _nucleus_field(rng, kind, outline, window)
    alpha = smooth_step((shape + texture * np.float32(0.012)) * np.float32(radius / (1.3 * canvas.edge_px))) * inside
    mix = np.float32(rng.random())
    nucleus = _NUCLEUS_VIOLET * (1 - mix) + _NUCLEUS_BLUE * mix + rng.normal(0.0, 6.0, 3).astype(np.float32)
    shade = np.clip(shape * np.float32(3.0), 0.0, 1.0)[:, :, None] * _colour(-12, -16, -4)
    chromatin = texture[:, :, None] * _colour(6, 7, 4) * np.float32(rng.uniform(0.3, 1.6))
    canvas.paint(window, alpha * np.float32(0.97), nucleus + shade + chromatin)


def _nucleus_field(rng: np.random.Generator, kind: str, outline: Outline, window: Window) -> FloatArray:
    """[h, w]: positive inside the nucleus, in units of the cell's radius."""
    radius = outline.radius
    if kind == "round":
        size = rng.uniform(0.82, 0.96)
        inner = Outline(
            outline.x, outline.y, outline.half_width * size, outline.half_height * size, outline.angle, outline.wobble
        )
        field: FloatArray = (1.0 - inner.field(window)) * np.float32(size)
        return field
    if kind == "kidney":
        count, arc, ring, lobe = 6, rng.uniform(1.6, 2.8), rng.uniform(0.3, 0.42), rng.uniform(0.34, 0.42)
    else:
        count, arc, ring, lobe = int(rng.integers(3, 6)), rng.uniform(3.2, 5.0), rng.uniform(0.42, 0.5), 0.34
    start = rng.uniform(0.0, 2.0 * np.pi)
    softness = np.float32(12.0 if kind == "kidney" else 20.0)
    # The soft maximum of the lobes' fields joins them where they meet. Not quite zero: the logarithm must exist.
    total: FloatArray = np.full((window.y1 - window.y0, window.x1 - window.x0), 1e-30, dtype=np.float32)
    for step in range(count):
        angle = start + arc * (step / (count - 1) + rng.normal(0.0, 0.03))
        distance = ring * rng.uniform(0.85, 1.15)
        size = lobe * rng.uniform(0.82, 1.15)
        part = random_outline(
            rng,
            outline.x + distance * radius * np.cos(angle),
            outline.y + distance * radius * np.sin(angle),
            float(size * radius),
            True,
        )
        gain = np.float32(size) * softness
        hill: FloatArray = np.exp(gain - gain * part.field(window))
        total += hill
    union: FloatArray = np.log(total) * np.float32(1.0 / softness)
    return union


def draw_platelet(canvas: Canvas, rng: np.random.Generator, outline: Outline) -> None:
    """A small violet blob, darker and grainy in the middle."""
    window = canvas.window(outline)
    if window.is_empty:
        return
    texture = canvas.texture[window.slices]
    field = outline.field(window)
    inside = smooth_step((1.0 - field) * np.float32(outline.radius / (canvas.edge_px * 1.2)))
    mix = np.float32(rng.random())
    colour = _PLATELET_VIOLET * (1 - mix) + _PLATELET_GREY * mix
    body = smooth_step((np.float32(rng.uniform(0.5, 0.8)) - field) * np.float32(2.2))
    alpha = inside * np.clip(np.float32(0.5) + np.float32(0.45) * body + np.float32(0.12) * texture, 0.0, 1.0)
    canvas.paint(window, alpha, colour + (body * np.float32(-14.0) + texture * np.float32(6.0))[:, :, None])


def draw_dust(canvas: Canvas, rng: np.random.Generator) -> None:
    """A grey speck out of focus, or a droplet's thin ring: neither is a cell."""
    height, width = canvas.texture.shape
    x, y = rng.uniform(0.0, width), rng.uniform(0.0, height)
    if rng.random() < 0.5:
        _draw_bubble(canvas, rng, x, y, rng.uniform(3.0, 6.0) * canvas.scale)
        return
    outline = random_outline(rng, x, y, rng.uniform(8.0, 16.0) * canvas.scale, True)
    window = canvas.window(outline, outline.radius)
    thickness = np.exp(-(outline.field(window) ** 2) * np.float32(1.5))
    canvas.absorb(window, thickness, _colour(0.22, 0.2, 0.19) * np.float32(rng.uniform(0.2, 1.3)))


def _draw_bubble(canvas: Canvas, rng: np.random.Generator, x: float, y: float, radius: float) -> None:
    outline = random_outline(rng, x, y, max(radius, 1.0), True)
    window = canvas.window(outline, outline.radius)
    if window.is_empty:
        return
    field = outline.field(window)
    ring = np.exp(-(((field - 1.0) * np.float32(3.5)) ** 2))
    glint = np.exp(-((field * np.float32(1.8)) ** 2))
    strength = np.float32(rng.uniform(0.2, 1.0))
    canvas.absorb(window, (ring - np.float32(0.9) * glint) * strength, _colour(0.25, 0.4, 0.22))


def _smooth_noise(rng: np.random.Generator, height: int, width: int, grains_px: tuple[float, float]) -> FloatArray:
    """[H, W]: two grains mixed. The coarse one is added to the fine one before the costly enlargement."""
    fine_px, coarse_px = (max(grain_px, 1.0) for grain_px in grains_px)
    size = (int(width / fine_px) + 2, int(height / fine_px) + 2)
    coarse = rng.standard_normal((int(height / coarse_px) + 2, int(width / coarse_px) + 2), dtype=np.float32)
    noise = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    noise = noise + rng.standard_normal((size[1], size[0]), dtype=np.float32)
    enlarged = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(enlarged, dtype=np.float32)
