"""Groups that the answers suffer from are found and left out; agreement says by how much answers differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import pytest

from export.calibrate import calibrate
from export.plain import plain_graph
from export.quantisable import groups_of, layers_of
from export.sensitivity import Refused, agreement, choose
from parity.compare import Answer
from tests.export.conftest import Exported
from tests.export.test_quantise import LIBRARY, feeds


def in_integers(proto: onnx.ModelProto) -> int:
    kinds = Counter(node.op_type for node in proto.graph.node)
    return kinds["QLinearConv"] + kinds["MatMulIntegerToFloat"]


@pytest.fixture(scope="module")
def plain(exported: Callable[[str], Exported]) -> onnx.ModelProto:
    return plain_graph(exported("r50-two-stage").proto())


def test_the_group_whose_ranges_are_wrong_is_left_out_first(plain: onnx.ModelProto) -> None:
    layers = layers_of(plain)
    ranges = calibrate(plain, layers, feeds(4), LIBRARY, 1)
    broken = next(layer for layer in layers if layer.path.endswith("encoder.layers.0.linear2"))
    product = next(node for node in plain.graph.node if node.name == broken.node)
    ranges[product.input[0]] = (0, 1e5)  # a step of 400: all that it takes is one integer
    asked: list[int] = []

    def accept(proto: onnx.ModelProto) -> bool:
        asked.append(in_integers(proto))
        return asked[-1] < len(layers)

    said: list[str] = []
    choice = choose(plain, layers, ranges, feeds(3), accept, LIBRARY, 1, said.append)
    assert choice.float_groups == ("encoder.0",)
    assert asked == [len(layers), len(layers) - sum(layer.group == "encoder.0" for layer in layers)]
    assert in_integers(choice.proto) == asked[-1]
    assert len([line for line in said if "alone" in line]) == len(groups_of(layers))


def test_what_is_accepted_whole_costs_no_search(plain: onnx.ModelProto) -> None:
    layers = layers_of(plain)
    said: list[str] = []
    ranges = calibrate(plain, layers, feeds(2), LIBRARY, 1)
    choice = choose(plain, layers, ranges, [], lambda _: True, LIBRARY, 1, said.append)
    assert choice.float_groups == ()
    assert said == []


def test_a_graph_mostly_of_floats_is_refused(plain: onnx.ModelProto) -> None:
    layers = layers_of(plain)
    tried: list[int] = []

    def accept(proto: onnx.ModelProto) -> bool:
        tried.append(in_integers(proto))
        return False

    with pytest.raises(Refused, match="nor with .* in float32"):
        choose(plain, layers, calibrate(plain, layers, feeds(2), LIBRARY, 1), feeds(2), accept, LIBRARY, 1)
    assert tried == sorted(tried, reverse=True)
    assert len(tried) == 1 + len(groups_of(layers)) // 2


def answer(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Answer:
    return Answer(np.array(boxes, np.float32), np.array(scores, np.float32), np.array(labels))


def test_agreement_pairs_one_to_one_by_box_and_label() -> None:
    boxes = [[0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9], [0.0, 0.0, 0.3, 0.3]]
    want = answer(boxes, [0.9, 0.8, 0.7, 0.1], [1, 1, 2, 1])
    same = agreement([want], [want])
    assert (same.detections, same.matched, same.score_difference) == (3, 1.0, 0.0)
    got = answer(
        [[0.1, 0.1, 0.5, 0.501], [0.6, 0.6, 0.9, 0.9], [0.0, 0.0, 0.3, 0.3]],
        [0.7, 0.7, 0.1],
        [1, 3, 1],
    )
    found = agreement([want], [got])
    assert found.matched == pytest.approx(1 / 3)  # one of the two on the same place, and another label
    assert found.score_difference == pytest.approx(0.2)
    assert agreement([want], [got], threshold=0.0).detections == 4
    nothing = agreement([answer([[0, 0, 1, 1]], [0.2], [1])], [got])
    assert (nothing.detections, nothing.matched, nothing.score_difference) == (0, 1.0, 0.0)
