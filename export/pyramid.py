"""How large the pyramid of a picture is."""

from bundle import Canvas, ResizeRule, resized_size
from models import DeformableDetrConfig

_USUAL_RATIO = 4 / 3  # of most pictures' sides


def pyramid_pixels(canvas: Canvas, config: DeformableDetrConfig) -> int:
    """How many pixels the levels have together: strides 8, 16, 32 and on, or the last stage alone."""
    if config.num_feature_levels == 1:
        strides = [16 if config.dilation else 32]
    else:
        strides = [8 * 2**level for level in range(config.num_feature_levels)]
    return sum(-(-canvas.height // stride) * -(-canvas.width // stride) for stride in strides)


def usual_pixels(config: DeformableDetrConfig) -> int:
    """`pyramid_pixels` of a picture of the usual shape, resized by the model's own rule."""
    rule = ResizeRule(shortest=config.resize_shortest, longest=config.resize_longest)
    height, width = resized_size(1000, round(1000 * _USUAL_RATIO), rule)
    return pyramid_pixels(Canvas(height=height, width=width), config)
