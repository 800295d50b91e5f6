"""Batches: normalised, padded, in an order that can be repeated and shared among processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bundle import ResizeRule
from tests.training.tiny import TINY
from training.augment import Draw, FixedAugment, PaperAugment, Sample
from training.boxes import cxcywh_to_xyxy
from training.coco import read_split
from training.dataset import CocoDataset, EpochSampler, collate

RULE = ResizeRule(shortest=64, longest=96)


def unchanged(sample: Sample, _rng: np.random.Generator, _another: Draw) -> Sample:
    return sample


def same(a: Sample, b: Sample) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("pixels", "boxes", "classes"))


@pytest.mark.parametrize("augment", [PaperAugment(RULE), FixedAugment(48, 64, mosaic=1.0)], ids=["paper", "mosaic"])
@pytest.mark.parametrize("cache", [False, True])
def test_an_item_depends_on_seed_epoch_and_index_alone(data: Path, augment: FixedAugment, cache: bool) -> None:
    split = read_split(data, "train")
    first, second = (CocoDataset(split, augment, seed=5, cache=cache) for _ in range(2))
    wanted = {key: first[key] for key in ((0, 0), (0, 1), (1, 0), (7, 3))}
    second[(3, 2)]  # whatever came before
    assert all(same(second[key], wanted[key]) for key in reversed(wanted))
    assert not same(wanted[0, 0], wanted[1, 0])
    assert not same(CocoDataset(split, augment, seed=6)[0, 0], wanted[0, 0])


def test_extra_pictures_come_in_their_share(data: Path) -> None:
    drawn = Sample(np.zeros((8, 8, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    dataset = CocoDataset(read_split(data, "train"), unchanged, extra=lambda _: drawn, extra_share=0.3, cache=True)
    share = np.mean([dataset[epoch, 0].pixels.shape[0] == 8 for epoch in range(400)])
    assert 0.23 < share < 0.37


def test_late_epochs_have_an_augmentation_of_their_own(data: Path) -> None:
    blank = Sample(np.zeros((8, 8, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    dataset = CocoDataset(read_split(data, "train"), unchanged, late=(3, lambda *_: blank))
    assert [dataset[epoch, 0].pixels.shape[0] == 8 for epoch in range(5)] == [False, False, False, True, True]


def test_an_epoch_is_every_picture_once_shared_by_all_processes() -> None:
    alone = EpochSampler(11, seed=3)
    shares = [EpochSampler(11, 3, rank, 2) for rank in range(2)]
    for epoch in range(3):
        for sampler in (alone, *shares):
            sampler.epoch = epoch
        keys = list(alone)
        assert len(keys) == len(alone) == 11
        assert sorted(index for _, index in keys) == list(range(11))
        assert {e for e, _ in keys} == {epoch}
        parts = [list(share) for share in shares]
        assert [len(part) for part in parts] == [5, 5]  # equally many steps
        # Steps of both together are steps of one process with the doubled batch.
        assert [key for pair in zip(*parts, strict=True) for key in pair] == keys[:10]
    assert list(EpochSampler(11, 4)) != list(EpochSampler(11, 3))


def test_a_batch_is_padded_at_the_bottom_right_and_boxes_are_shares_of_the_picture() -> None:
    low = Sample(np.full((20, 40, 3), 255, np.uint8), np.array([[4, 2, 12, 10]], np.float32), np.array([2]))
    tall = Sample(np.zeros((30, 16, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))

    batch = collate([low, tall], TINY)

    assert batch.pixel_values.shape == (2, 3, 30, 40)
    assert batch.pixel_mask.sum((1, 2)).tolist() == [800, 480]
    assert batch.pixel_mask[0, :20].all()
    assert batch.pixel_mask[1, :, :16].all()
    assert (batch.pixel_values[~batch.pixel_mask[:, None].expand(-1, 3, -1, -1)] == 0).all()
    mean, std = torch.tensor(TINY.pixel_mean), torch.tensor(TINY.pixel_std)
    torch.testing.assert_close(batch.pixel_values[0, :, 0, 0], (1 - mean) / std)
    torch.testing.assert_close(batch.pixel_values[1, :, 29, 15], -mean / std)
    torch.testing.assert_close(cxcywh_to_xyxy(batch.targets[0]["boxes"]), torch.tensor([[0.1, 0.1, 0.3, 0.5]]))
    assert batch.targets[0]["labels"].tolist() == [2]
    assert batch.targets[1]["boxes"].shape == (0, 4)
    assert batch.targets[1]["labels"].dtype == torch.int64
