"""The losses: the official code's recorded values, and what holds for any outputs."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from models import build_model
from tests.training.loss_cases import CASES, gradient_norms, make_case
from tests.training.make_golden import GOLDEN
from tests.training.tiny import TINY, TWO_STAGE
from training import Criterion, build_criterion
from training.boxes import cxcywh_to_xyxy, overlaps
from training.criterion import LOSS_WEIGHTS, weighted_sum

RECORDED: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]
RTOL = 1e-4  # the contract; measured 1.4e-7
RTOL_GRADIENT = 1e-4  # measured 1.2e-7


def criterion_for(name: str) -> Criterion:
    config = TINY.from_dict(
        TINY.to_dict() | {"num_classes": CASES[name].classes, "category_ids": (), "category_names": ()}
    )
    return build_criterion(config)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_their_gradients_are_the_official_codes(name: str) -> None:
    outputs, targets = make_case(name)
    wanted = RECORDED[name]

    losses = criterion_for(name)(outputs, targets)
    total = weighted_sum(losses)
    total.backward()

    assert losses.keys() == wanted["losses"].keys()
    for key, value in wanted["losses"].items():
        assert losses[key].item() == pytest.approx(value, rel=RTOL), key
    assert total.item() == pytest.approx(wanted["weighted"], rel=RTOL)
    for key, value in wanted["gradient_norms"].items():
        assert gradient_norms(outputs)[key] == pytest.approx(value, rel=RTOL_GRADIENT, abs=1e-7), key


def test_what_is_recorded_covers_every_kind_of_loss() -> None:
    names = set().union(*(case["losses"] for case in RECORDED.values()))
    suffixes = ("", "_0", "_1", "_2", "_3", "_4", "_enc")
    assert {f"{kind}{suffix}" for kind in LOSS_WEIGHTS for suffix in suffixes} <= names
    empty = RECORDED["nothing to find"]["losses"]
    assert empty["loss_bbox"] == empty["loss_giou_enc"] == 0
    assert empty["loss_ce"] > 0


def test_a_networks_outputs_give_the_names_of_the_contract() -> None:
    pixels = torch.rand(1, 3, 64, 96)
    targets = [{"labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]
    losses = build_criterion(TWO_STAGE)(build_model(TWO_STAGE).train()(pixels), targets)
    assert losses.keys() == {f"{kind}{suffix}" for kind in LOSS_WEIGHTS for suffix in ("", "_0", "_enc")}


@pytest.mark.parametrize(("label", "named"), [(3, "3"), (-1, "-1")])
def test_a_label_the_network_does_not_have_is_named(label: int, named: str) -> None:
    outputs, _ = make_case("two-stage")  # three classes
    box = torch.tensor([[0.5, 0.5, 0.1, 0.1]])
    targets = [
        {"labels": torch.tensor([0]), "boxes": box},
        {"labels": torch.tensor([label]), "boxes": box},
    ]
    with pytest.raises(ValueError, match=rf"labels of image 1 .*{named}.*classes 0 to 2"):
        build_criterion(TINY)(outputs, targets)


def test_outputs_that_are_no_numbers_are_an_error() -> None:
    outputs, targets = make_case("plain")
    outputs["pred_logits"] = torch.full_like(outputs["pred_logits"], math.nan)
    with pytest.raises(FloatingPointError, match="learning rate"):
        criterion_for("plain")(outputs, targets)


def quality(outputs: dict[str, Any], targets: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    loss: torch.Tensor = Criterion(TINY, quality_targets=True)(outputs, targets)["loss_ce"]
    return loss


def test_quality_targets_want_the_score_to_be_the_iou() -> None:
    box = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
    found = torch.tensor([[[0.5, 0.5, 0.4, 0.3]]])
    iou, _ = overlaps(cxcywh_to_xyxy(found[0]), cxcywh_to_xyxy(box))
    targets = [{"labels": torch.tensor([1]), "boxes": box}]

    def slope(score: float) -> float:
        logits = torch.full((1, 1, 3), -20.0)  # all other classes are surely not there
        logits[0, 0, 1] = math.log(score / (1 - score))
        logits.requires_grad_()
        loss = quality({"pred_logits": logits, "pred_boxes": found}, targets)
        return float(torch.autograd.grad(loss, logits)[0][0, 0, 1])

    wanted = float(iou)
    assert wanted == pytest.approx(0.75)
    assert abs(slope(wanted)) < 1e-6
    assert slope(wanted - 0.1) < 0 < slope(wanted + 0.1)


def test_quality_targets_change_the_class_loss_alone_and_give_boxes_no_gradient() -> None:
    outputs, targets = make_case("two-stage")
    plain, varifocal = build_criterion(TINY)(outputs, targets), Criterion(TINY, quality_targets=True)(outputs, targets)
    assert plain.keys() == varifocal.keys()
    for name in plain:
        assert (plain[name].item() == varifocal[name].item()) == (not name.startswith("loss_ce")), name
    assert torch.autograd.grad(varifocal["loss_ce"], outputs["pred_boxes"], allow_unused=True)[0] is None


def test_the_weighted_sum_counts_every_layer_by_its_kind() -> None:
    ones = {
        f"{kind}{suffix}": torch.tensor(1.0) for kind in LOSS_WEIGHTS for suffix in ("", "_0", "_enc", "_dn", "_dn_3")
    }
    assert float(weighted_sum(ones)) == 5 * (2 + 5 + 2)
