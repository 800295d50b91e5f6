"""What the parity tests cannot see: borders that hang on one bit, the meta device, extra queries kept apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models import DeformableDetrConfig, build_model
from models.deformable_detr import ExtraQueries
from models.geometry import pixel_centres
from models.position import sine_position
from tests.models.seeded import seed_weights, seeded_batch
from tests.models.test_checkpoint import TINY, seeded


@pytest.mark.parametrize(("filled", "side"), [(50, 50), (50, 63), (50, 84), (17, 84), (100, 168)])
def test_centres_are_the_official_codes_to_the_bit(filled: int, side: int) -> None:
    """0.5 / 50 is float32's 0.01, the border of valid proposals: a rounding more would move a whole row across it."""
    axis = (torch.arange(side) < filled).float()[None]
    centres = pixel_centres(axis, axis).view(side, side, 2)
    wanted = (torch.arange(side) + 0.5) / filled
    assert torch.equal(centres[0, :, 0], wanted)
    assert torch.equal(centres[:, 0, 1], wanted)
    if filled == 50:
        assert not (centres[0, 0] > 0.01).any()


def test_a_position_is_relative_to_the_filled_part() -> None:
    """The same picture has the same encoding on any canvas."""
    small = torch.ones(1, 6, 8, dtype=torch.bool)
    large = torch.zeros(1, 10, 20, dtype=torch.bool)
    large[:, :6, :8] = True
    torch.testing.assert_close(sine_position(large, 32)[:, :6, :8], sine_position(small, 32), atol=0, rtol=0)


def test_no_mask_is_a_full_mask() -> None:
    model = seeded(TINY)
    pixels, _ = seeded_batch(((64, 96),))
    with torch.no_grad():
        without, whole = model(pixels), model(pixels, torch.ones(1, 64, 96, dtype=torch.bool))
    assert torch.equal(without["pred_boxes"], whole["pred_boxes"])
    assert without.keys() == {"pred_logits", "pred_boxes"}, "in eval mode nothing else"


def test_gradients_are_cut_between_layers() -> None:
    """A later layer's box does not train an earlier layer's box head through its reference."""
    model = build_model(replace(TINY, with_box_refine=True, dropout=0.0))
    seed_weights(model)
    outputs = model.train()(*seeded_batch(((64, 96),)))
    outputs["pred_boxes"].sum().backward()
    gradient = model.get_parameter("bbox_embed.0.layers.2.weight").grad
    assert gradient is None or not gradient.any()
    assert model.get_parameter("bbox_embed.2.layers.2.weight").grad.any()


def test_extra_queries_are_answered_apart_and_unseen_by_the_others() -> None:
    config = replace(TINY, with_box_refine=True, two_stage=True, dropout=0.0)
    model = seeded(config)
    pixels, mask = seeded_batch(((64, 96), (48, 64)))
    count, own = 4, config.num_queries
    blocked = torch.zeros(count + own, count + own, dtype=torch.bool)
    blocked[count:, :count] = True  # the model's own queries do not see the extra ones
    extra = ExtraQueries(torch.randn(2, count, config.hidden_dim), torch.rand(2, count, 4) * 0.8 + 0.1, blocked)
    with torch.no_grad():
        plain, joined = model(pixels, mask), model(pixels, mask, extra)
    torch.testing.assert_close(joined["pred_logits"], plain["pred_logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(joined["pred_boxes"], plain["pred_boxes"], atol=1e-5, rtol=0)
    assert joined["extra"][-1]["pred_boxes"].shape == (2, count, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone_block": "wide"}, "'wide'"),
        ({"backbone_norm": "layer"}, "'layer'"),
        ({"backbone_depths": (1, 1, 1)}, "four stages"),
        ({"hidden_dim": 40}, "hidden_dim 40"),
        ({"num_heads": 7}, "num_heads 7"),
        ({"num_feature_levels": 0}, "not 0"),
        ({"two_stage": True}, "needs with_box_refine"),
        ({"category_ids": (1, 2)}, "2 entries for 5 classes"),
    ],
)
def test_a_config_that_cannot_be_is_an_error(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_config_round_trip() -> None:
    config = replace(TINY, category_ids=(1, 2, 3, 4, 5), category_names=tuple("abcde"))
    assert DeformableDetrConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown configuration keys: num_qeries"):
        DeformableDetrConfig.from_dict({"num_qeries": 3})
