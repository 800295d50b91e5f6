"""A split as the network sees it: samples as tensors, padded batches, an order that can be repeated."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from models import DeformableDetrConfig
from training.augment import Draw, Sample
from training.coco import CocoSplit, read_pixels
from training.matcher import Target

Augment = Callable[[Sample, np.random.Generator, Draw], Sample]


@dataclass(frozen=True)
class Batch:
    """pixel_values [N, 3, H, W] float32 normalised, pixel_mask [N, H, W] bool (True = image), and the targets."""

    pixel_values: Tensor
    pixel_mask: Tensor
    targets: list[Target]


class CocoDataset(Dataset[Sample]):
    """Augmented samples of a split; item (epoch, i) is the same whatever came before it.

    `extra` draws pictures that are not in the split, of them `extra_share` of all samples. `late` is an epoch (from 0)
    and the augmentation from there on. With `cache` the decoded pictures stay in memory, a copy in each worker.
    """

    def __init__(
        self,
        split: CocoSplit,
        augment: Augment,
        seed: int = 0,
        cache: bool = False,
        extra: Draw | None = None,
        extra_share: float = 0.0,
        late: tuple[int, Augment] | None = None,
    ) -> None:
        self.split, self.augment, self.seed = split, augment, seed
        self.extra, self.extra_share, self.late = extra, extra_share, late
        self._cache: dict[int, np.ndarray] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.split.pictures)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        augment = self.late[1] if self.late is not None and epoch >= self.late[0] else self.augment
        return augment(self._drawn(rng) or self._read(index), rng, self._another)

    def _another(self, rng: np.random.Generator) -> Sample:
        return self._drawn(rng) or self._read(int(rng.integers(len(self))))

    def _drawn(self, rng: np.random.Generator) -> Sample | None:
        """A picture from outside the split, when its turn has come."""
        if self.extra is None or rng.random() >= self.extra_share:
            return None
        return self.extra(rng)

    def _read(self, index: int) -> Sample:
        picture = self.split.pictures[index]
        if self._cache is None:
            pixels = read_pixels(picture)
        else:
            pixels = self._cache.setdefault(
                index, read_pixels(picture) if index not in self._cache else self._cache[index]
            )
        return Sample(pixels, picture.boxes, picture.classes)


class EpochSampler(Sampler[tuple[int, int]]):
    """A process' share of a shuffled epoch, the same in every run with this seed; set `epoch` before each."""

    def __init__(self, size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.size, self.seed, self.rank, self.world_size = size, seed, rank, world_size
        self.epoch = 0

    def __len__(self) -> int:
        return self.size // self.world_size  # the odd ones rest for an epoch, so that processes step together

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        for index in order[self.rank :: self.world_size][: len(self)]:
            yield self.epoch, int(index)


def normalise(pixels: np.ndarray, config: DeformableDetrConfig) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, H, W], normalised."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.pixel_mean, config.pixel_std))
    return (torch.tensor(pixels).permute(2, 0, 1).float() / 255 - mean) / std


def collate(samples: list[Sample], config: DeformableDetrConfig) -> Batch:
    """Pad samples to the largest height and width among them."""
    height = max(s.pixels.shape[0] for s in samples)
    width = max(s.pixels.shape[1] for s in samples)
    pixel_values = torch.zeros(len(samples), 3, height, width)
    pixel_mask = torch.zeros(len(samples), height, width, dtype=torch.bool)
    targets = []
    for i, sample in enumerate(samples):
        h, w = sample.pixels.shape[:2]
        pixel_values[i, :, :h, :w] = normalise(sample.pixels, config)
        pixel_mask[i, :h, :w] = True
        x0, y0, x1, y1 = torch.tensor(sample.boxes).unbind(-1)
        boxes = torch.stack([(x0 + x1) / 2 / w, (y0 + y1) / 2 / h, (x1 - x0) / w, (y1 - y0) / h], dim=-1)
        targets.append({"labels": torch.tensor(sample.classes), "boxes": boxes})
    return Batch(pixel_values, pixel_mask, targets)
