"""The assignment: the official code's recorded pairs, and what holds for any."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.training.loss_cases import CASES, layers_of, make_case
from tests.training.make_golden import GOLDEN
from training.matcher import MatchCosts, match

RECORDED: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("name", CASES)
def test_pairs_are_the_official_codes(name: str) -> None:
    outputs, targets = make_case(name)
    for suffix, layer in layers_of(outputs).items():
        truth = targets
        if suffix == "_enc":
            truth = [target | {"labels": torch.zeros_like(target["labels"])} for target in targets]
        pairs = match(layer["pred_logits"], layer["pred_boxes"], truth, MatchCosts())
        got = [[queries.tolist(), objects.tolist()] for queries, objects in pairs]
        assert got == RECORDED[name]["matched"][suffix], suffix


def test_the_costs_are_the_papers() -> None:
    assert MatchCosts() == MatchCosts(label=2.0, l1=5.0, giou=2.0, alpha=0.25, gamma=2.0)


def test_every_object_finds_its_own_box_whatever_the_order() -> None:
    boxes = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.8, 0.2, 0.1, 0.1], [0.5, 0.8, 0.3, 0.2]])
    labels = torch.tensor([0, 1, 2])
    shuffled = torch.tensor([2, 0, 1])
    logits = torch.zeros(1, 3, 3)
    ((queries, objects),) = match(logits, boxes[shuffled][None], [{"labels": labels, "boxes": boxes}], MatchCosts())
    assert dict(zip(queries.tolist(), objects.tolist(), strict=True)) == dict(enumerate(shuffled.tolist()))


def test_of_two_equal_boxes_the_surer_query_gets_the_object() -> None:
    box = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    logits = torch.tensor([[[0.0, 0.0], [0.0, 2.0]]])
    ((queries, _),) = match(logits, box.expand(1, 2, 4), [{"labels": torch.tensor([1]), "boxes": box}], MatchCosts())
    assert queries.tolist() == [1]
