"""The embedded model's command: drawn pictures among the photographs, and one line from data to checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models import load_checkpoint
from samples import draw_smear
from tests.training.tiny import ALL_ON
from training import embedded
from training.augment import FixedAugment
from training.embedded import BOX_MARGIN, CONFIG, RECIPE, drawn_smear, main


def test_a_drawn_smear_has_the_datas_classes_and_loose_boxes() -> None:
    sample = drawn_smear(np.random.default_rng(3))
    seed = int(np.random.default_rng(3).integers(2**31))
    smear = draw_smear(seed)
    assert np.array_equal(sample.pixels, smear.image)
    assert [CONFIG.category_ids[index] for index in sample.classes] == smear.category_ids.tolist()
    height, width = sample.pixels.shape[:2]
    inner = ((smear.boxes[:, :2] > 20) & (smear.boxes[:, 2:] < [width - 20, height - 20])).all(1)
    sides, drawn = sample.boxes[:, 2:] - sample.boxes[:, :2], smear.boxes[:, 2:] - smear.boxes[:, :2]
    np.testing.assert_allclose(sides[inner] / drawn[inner], BOX_MARGIN, rtol=1e-4)
    assert (sample.boxes >= 0).all()
    assert (sample.boxes <= [width, height, width, height]).all()
    assert sample.boxes.dtype == np.float32


def test_the_recipe_suits_the_network() -> None:
    assert CONFIG.two_stage or not RECIPE.denoising_groups
    assert (embedded.AUGMENT.height, embedded.AUGMENT.width) == (CONFIG.resize_shortest, CONFIG.resize_longest)
    assert not RECIPE.freeze_stem  # it starts from nothing


def test_one_command_trains_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embedded, "CONFIG", ALL_ON)
    monkeypatch.setattr(embedded, "AUGMENT", FixedAugment(height=64, width=96))
    words = ["--data", str(data), "--output", str(tmp_path), "--workers", "0", "--epochs", "1", "--threads", "1"]
    assert main(words) == 0
    assert "AP50" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "best.safetensors").config == ALL_ON
    assert main([*words, "--resume"]) == 0  # nothing left to do
    with pytest.raises(SystemExit) as stopped:
        main(["--data", str(tmp_path), "--output", str(tmp_path)])
    assert stopped.value.code == 1
    assert "no annotations for 'train'" in capsys.readouterr().err
