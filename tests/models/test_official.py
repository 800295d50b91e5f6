"""The network against the official code: its recorded answers to the same weights and pictures (make_golden.py)."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from models import VARIANTS, build_model
from tests.models.make_golden import GOLDEN, GRADIENTS, PROPOSALS, answers
from tests.models.seeded import SIZES, seed_weights, seeded_batch

RECORDED: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
ATOL_LOGITS = 1e-4  # the contract; measured 3e-6
ATOL_BOXES = 1e-5  # the contract; measured 5e-7
RTOL_GRADIENT = 1e-3  # of a norm; measured 6e-5: where a sample lies on the line between pixels its gradient jumps


def close(got: list[Any], wanted: list[Any], atol: float) -> None:
    torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), atol=atol, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_and_gradients_are_the_official_codes(variant: str) -> None:
    assert tuple(map(tuple, RECORDED["sizes"])) == SIZES
    wanted = RECORDED["variants"][variant]
    config = replace(VARIANTS[variant], dropout=0.0)
    if config.two_stage:
        config = replace(config, num_queries=PROPOSALS)
    model = build_model(config)
    seed_weights(model)
    model.train()  # training mode also gives the earlier layers; without dropout it gives the same last layer

    got = answers(model(*seeded_batch()), dict(model.named_parameters()))

    assert len(got["aux_outputs"]) == len(wanted["aux_outputs"]) == 5
    layers = [(got, wanted), *zip(got["aux_outputs"], wanted["aux_outputs"], strict=True)]
    if config.two_stage:
        layers.append((got["enc_outputs"], wanted["enc_outputs"]))
    for mine, theirs in layers:
        close(mine["pred_logits"], theirs["pred_logits"], ATOL_LOGITS)
        close(mine["pred_boxes"], theirs["pred_boxes"], ATOL_BOXES)
    assert got["gradient_norms"].keys() == wanted["gradient_norms"].keys()
    for name, norm in wanted["gradient_norms"].items():
        assert got["gradient_norms"][name] == pytest.approx(norm, rel=RTOL_GRADIENT), name


def test_what_is_recorded_depends_on_the_picture() -> None:
    for variant, recorded in RECORDED["variants"].items():
        logits, boxes = torch.tensor(recorded["pred_logits"]), torch.tensor(recorded["pred_boxes"])
        assert (logits[0] - logits[1]).abs().max() > 0.1, variant
        assert logits.std(dim=1).max() > 0.1, variant
        assert boxes.std(dim=1).min() > 1e-3, variant
        assert len(recorded["gradient_norms"]) >= len(GRADIENTS) - 2
