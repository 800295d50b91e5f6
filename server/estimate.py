"""How long the queue takes to work off, learnt from the batches that were run."""

import math

_NEWEST_SHARE = 0.2  # weight of the newest batch in the moving average


class Estimate:
    """A moving average of engine time an image; until the first batch, nothing is known and nothing is promised."""

    def __init__(self, engine_instances: int) -> None:
        self._instances = engine_instances
        self._seconds_per_image: float | None = None
        self.slowest_batch_s = 0.0

    def observe(self, images: int, seconds: float) -> None:
        """A batch of `images` took `seconds` in one engine."""
        each = seconds / images
        if self._seconds_per_image is None:
            self._seconds_per_image = each
        else:
            self._seconds_per_image += _NEWEST_SHARE * (each - self._seconds_per_image)
        self.slowest_batch_s = max(self.slowest_batch_s, seconds)

    def seconds_for(self, images: int) -> float:
        """Time until `images` images are worked off, all engines helping."""
        return images * (self._seconds_per_image or 0.0) / self._instances

    def retry_after_s(self, images: int) -> int:
        """Whole seconds after which `images` images are worked off, at least 1: a Retry-After."""
        return max(1, math.ceil(self.seconds_for(images)))
