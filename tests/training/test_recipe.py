"""The recipe: its defaults are the paper's, its schedule and its rates; what makes no sense is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from models import VARIANTS, build_model
from tests.training.tiny import TINY, TWO_STAGE, tiny_model
from training.criterion import LOSS_WEIGHTS
from training.recipe import Recipe
from training.trainer import parameter_groups, rate_at


def test_the_defaults_are_the_papers() -> None:
    recipe = Recipe()
    assert (recipe.epochs, recipe.lr, recipe.lr_backbone, recipe.lr_projections) == (50, 2e-4, 2e-5, 0.1)
    assert (recipe.weight_decay, recipe.clip_norm) == (1e-4, 0.1)
    assert (recipe.schedule, recipe.drop_at * recipe.epochs, recipe.warmup_steps) == ("step", 40, 0)
    # What the paper does not have is off.
    assert (recipe.ema_decay, recipe.quality_targets, recipe.denoising_groups, recipe.precision) == (
        0,
        False,
        0,
        "fp32",
    )
    assert recipe.freeze_stem
    assert LOSS_WEIGHTS == {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}


def test_the_rate_falls_to_a_tenth_at_epoch_40_of_50() -> None:
    recipe, steps = Recipe(), 7
    rates = [rate_at(step, recipe, steps) for step in range(50 * steps)]
    assert rates == [1.0] * 40 * steps + [0.1] * 10 * steps


def test_cosine_is_flat_and_then_falls_to_nothing_after_a_warm_up() -> None:
    recipe = Recipe(epochs=10, schedule="cosine", drop_at=0.5, warmup_steps=4)
    rates = [rate_at(step, recipe, 10) for step in range(101)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert set(rates[4:50]) == {1.0}
    assert rates[75] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))


@pytest.mark.parametrize("config", [TINY, TWO_STAGE], ids=["plain", "two-stage"])
def test_the_three_rates_and_what_they_are_for(config: Any) -> None:
    model = tiny_model(config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {group["lr"]: {names[p] for p in group["params"]} for group in parameter_groups(model, Recipe())}
    assert sorted(groups) == pytest.approx([2e-5, 2e-4])  # a tenth of lr is the backbone's rate
    slow = groups[min(groups)]
    assert {name for name in names.values() if name.startswith("backbone.")} < slow
    assert slow - {n for n in slow if n.startswith("backbone.")} == {
        name for name in names.values() if "reference_points" in name or "sampling_offsets" in name
    }
    assert set.union(*groups.values()) == set(names.values())


def test_each_parameter_has_one_rate_whatever_the_recipe() -> None:
    model = tiny_model()
    recipe = Recipe(lr=1e-3, lr_backbone=5e-4, lr_projections=0.3)
    groups = parameter_groups(model, recipe)
    assert sorted(group["lr"] for group in groups) == pytest.approx([3e-4, 5e-4, 1e-3])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_a_frozen_parameter_is_in_no_group() -> None:
    model = tiny_model()
    model.backbone.conv1.requires_grad_(False)
    kept = {id(p) for group in parameter_groups(model, Recipe()) for p in group["params"]}
    assert id(model.backbone.conv1.weight) not in kept


def test_the_papers_network_has_both_projections_at_a_tenth() -> None:
    small = replace(
        VARIANTS["r50"], backbone_depths=(1, 1, 1, 1), backbone_widths=(8, 8, 8, 8), hidden_dim=32, ffn_dim=32
    )
    model = build_model(small)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, Recipe(lr=1.0, lr_backbone=0.5))
    slow = {names[p] for group in groups if group["lr"] == pytest.approx(0.1) for p in group["params"]}
    assert "transformer.reference_points.weight" in slow
    assert len([name for name in slow if "sampling_offsets" in name]) == 2 * (6 + 6)
    assert len(slow) == 26


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schedule", "linear"),
        ("precision", "int8"),
        ("drop_at", 0.0),
        ("drop_at", 1.5),
        ("epochs", 0),
        ("batch_size", 0),
        ("evaluate_every", -1),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field}.*{value}"):
        Recipe(**{field: value})
