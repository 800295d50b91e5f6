"""The model card: every figure in its place, and the curve."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from bundle import ResizeRule
from tests.training.tiny import TWO_STAGE, tiny_model
from training import card
from training.augment import PaperAugment
from training.coco import read_split
from training.dataset import CocoDataset
from training.recipe import Recipe
from training.trainer import Processes, Trainer


def test_the_card_tells_of_the_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "SMEARS", 2)
    run = tmp_path / "run"
    run.mkdir()
    train, validation = (read_split(data, name) for name in ("train", "val"))
    model = tiny_model(TWO_STAGE)
    dataset = CocoDataset(train, PaperAugment(ResizeRule(shortest=64, longest=96)))
    recipe = Recipe(epochs=1, seed=7, freeze_stem=False)
    Trainer(model, dataset, validation, recipe, run, Processes(torch.device("cpu"))).run()

    folder = card.write_card(run, data)

    text = (folder / "README.md").read_text()
    assert "{" not in text
    assert "1 of 1, best at 1" in text
    assert "seed 7" in text
    assert "| RBC | 0." in text
    with Image.open(folder / "curve.png") as curve:
        assert curve.width > 400
