"""Denoising queries: their shapes, their noise, and that the network's own queries never see them."""

from __future__ import annotations

import pytest
import torch

from models.deformable_detr import ExtraQueries
from tests.training.tiny import TINY, TWO_STAGE, tiny_model
from training.boxes import cxcywh_to_xyxy
from training.criterion import LOSS_WEIGHTS, Criterion
from training.denoising import DenoisingQueries
from training.matcher import Target

TARGETS: list[Target] = [
    {
        "labels": torch.tensor([0, 2, 1]),
        "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.2], [0.2, 0.3, 0.1, 0.1], [0.7, 0.7, 0.2, 0.3]]),
    },
    {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.4, 0.6, 0.2, 0.2]])},
]
NOTHING: list[Target] = [{"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}] * 2
GROUPS = 4


def queries(**changes: float) -> DenoisingQueries:
    torch.manual_seed(0)
    return DenoisingQueries(TWO_STAGE, GROUPS, **changes)


def test_shapes_and_what_each_query_was_made_from() -> None:
    extra, denoising = queries()(TARGETS)
    count = 2 * GROUPS * 3  # as many places for the second image, with one object, as for the first
    assert extra.content.shape == (2, count, TWO_STAGE.hidden_dim)
    assert extra.boxes.shape == (2, count, 4)
    assert extra.blocked.shape == (count + TWO_STAGE.num_queries,) * 2
    assert denoising.groups == GROUPS
    first, second = denoising.pairs
    assert first[1].tolist() == [0, 1, 2] * GROUPS
    assert second[1].tolist() == [0] * GROUPS
    assert first[0].tolist() == [6 * group + i for group in range(GROUPS) for i in range(3)]
    assert second[0].tolist() == [6 * group for group in range(GROUPS)]


def test_groups_are_blind_to_each_other_and_the_networks_queries_to_all() -> None:
    extra, _ = queries()(TARGETS)
    count, per_group = 2 * GROUPS * 3, 6
    assert extra.blocked[count:, :count].all()  # own queries see no extra ones
    assert not extra.blocked[count:, count:].any()
    assert not extra.blocked[:count, count:].any()
    for group in range(GROUPS):
        rows = slice(group * per_group, (group + 1) * per_group)
        assert not extra.blocked[rows, rows].any()
        assert int(extra.blocked[rows, :count].sum()) == per_group * (count - per_group)


def test_boxes_to_restore_lie_nearer_than_boxes_to_reject() -> None:
    make = queries()
    restored: list[torch.Tensor] = []
    rejected: list[torch.Tensor] = []
    for _ in range(50):
        extra, denoising = make(TARGETS)
        slots, objects = denoising.pairs[0]
        true = TARGETS[0]["boxes"][objects]
        half = (true[:, 2:] / 2).repeat(1, 2)
        for found, kept in ((extra.boxes[0, slots], restored), (extra.boxes[0, slots + 3], rejected)):
            kept.append(((cxcywh_to_xyxy(found) - cxcywh_to_xyxy(true)) / half).abs())
        assert (extra.boxes >= 0).all()
        assert (extra.boxes <= 1).all()
    assert torch.cat(restored).max() <= 0.5 + 1e-5
    assert torch.cat(restored).max() > 0.45
    assert torch.cat(rejected).max() > 0.9
    assert torch.cat(rejected).mean() > 2 * torch.cat(restored).mean()


def test_a_share_of_the_labels_is_drawn_anew() -> None:
    make = queries(label_noise=0.5)
    labels = torch.zeros(4000, dtype=torch.int64)
    changed = (make._noised_labels(labels) != labels).float().mean()
    assert 0.28 < float(changed) < 0.39  # half of two in three
    assert (queries(label_noise=0.0)._noised_labels(labels) == labels).all()


@pytest.mark.parametrize("targets", [TARGETS, NOTHING], ids=["objects", "no objects"])
def test_the_networks_own_answers_do_not_change(targets: list[Target]) -> None:
    model = tiny_model(TWO_STAGE).train()  # dropout is 0
    for head in model.bbox_embed:
        torch.nn.init.normal_(head.layers[2].weight, std=0.1)  # type: ignore[union-attr, index]
    pixels = torch.randn(2, 3, 64, 96)
    extra, _ = queries()(targets)

    without, with_extra = model(pixels), model(pixels, None, extra)

    assert len(with_extra["extra"]) == TWO_STAGE.num_decoder_layers
    layers = zip([without, *without["aux_outputs"]], [with_extra, *with_extra["aux_outputs"]], strict=True)
    for alone, beside in layers:
        torch.testing.assert_close(beside["pred_logits"], alone["pred_logits"], atol=1e-5, rtol=0)
        torch.testing.assert_close(beside["pred_boxes"], alone["pred_boxes"], atol=1e-5, rtol=0)


def test_a_group_does_not_change_another_groups_answers() -> None:
    model = tiny_model(TWO_STAGE).train()
    pixels = torch.randn(2, 3, 64, 96)
    extra, _ = queries()(TARGETS)
    content = extra.content.detach().clone()
    content[:, :6] += 1.0  # the first group
    changed = ExtraQueries(content, extra.boxes, extra.blocked)
    before, after = model(pixels, None, extra)["extra"], model(pixels, None, changed)["extra"]
    for was, now in zip(before, after, strict=True):
        assert not torch.allclose(now["pred_logits"][:, :6], was["pred_logits"][:, :6], atol=1e-4)
        torch.testing.assert_close(now["pred_logits"][:, 6:], was["pred_logits"][:, 6:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", [TARGETS, NOTHING], ids=["objects", "no objects"])
def test_every_batch_has_the_same_losses_and_trains_the_label_embedding(targets: list[Target]) -> None:
    model, make = tiny_model(TWO_STAGE).train(), queries()
    extra, denoising = make(targets)
    losses = Criterion(TWO_STAGE)(model(torch.randn(2, 3, 64, 96), None, extra), targets, denoising)
    assert losses.keys() == {f"{kind}{end}" for kind in LOSS_WEIGHTS for end in ("", "_0", "_enc", "_dn", "_dn_0")}
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in [*model.parameters(), *make.parameters()])


def test_only_two_stage_networks_can_denoise() -> None:
    with pytest.raises(ValueError, match="two-stage"):
        DenoisingQueries(TINY, GROUPS)
