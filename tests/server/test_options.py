import pytest

from server.errors import BadParameter
from server.options import DetectOptions, category_ids, parse_options

CATEGORIES = {1: "red", 2: "green", 30: "Blue", 44: "5"}


def test_defaults_are_the_contracts() -> None:
    options = parse_options([])
    assert options == DetectOptions(
        threshold=0.5, max_detections=100, classes=None, box_format="xyxy", units="pixel", format="json"
    )


def test_everything_can_be_given() -> None:
    options = parse_options(
        [
            ("threshold", "0.25"),
            ("max_detections", "7"),
            ("classes", "red"),
            ("box_format", "cxcywh"),
            ("units", "normalized"),
            ("format", "image"),
        ]
    )
    assert options.threshold == 0.25
    assert options.max_detections == 7
    assert (options.classes, options.box_format, options.units, options.format) == (
        "red",
        "cxcywh",
        "normalized",
        "image",
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", "-0.1"),
        ("threshold", "1.01"),
        ("threshold", "nan"),
        ("threshold", "inf"),
        ("threshold", ""),
        ("threshold", "half"),
        ("max_detections", "0"),
        ("max_detections", "-5"),
        ("max_detections", "1.5"),
        ("max_detections", "1_0"),
        ("threshold", "0.1_5"),
        ("max_detections", "9" * 5000),
        ("box_format", "yxyx"),
        ("units", "inch"),
        ("format", "xml"),
        ("Threshold", "0.5"),
        ("tresh", "0.5"),
    ],
)
def test_bad_values_are_named(name: str, value: str) -> None:
    with pytest.raises(BadParameter) as caught:
        parse_options([(name, value)])
    assert caught.value.message.startswith(f"{name}: ")
    assert value[:50] in caught.value.message or "no such parameter" in caught.value.message
    assert len(caught.value.message) < 400


def test_a_parameter_given_twice_is_refused() -> None:
    with pytest.raises(BadParameter, match="threshold: given twice, '0.1' and '0.9'"):
        parse_options([("threshold", "0.1"), ("threshold", "0.9")])


def test_coco_has_its_own_box_format() -> None:
    assert parse_options([("format", "coco")]).format == "coco"
    assert parse_options([("format", "coco"), ("box_format", "xywh"), ("units", "pixel")]).format == "coco"
    for name, value in (("box_format", "xyxy"), ("units", "normalized")):
        with pytest.raises(BadParameter, match="coco"):
            parse_options([("format", "coco"), (name, value)])


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (None, None),
        ("red", {1}),
        ("RED, blue", {1, 30}),
        ("30,2", {30, 2}),
        ("5", {44}),  # a name goes before an id
        ("red,red,1", {1}),
    ],
)
def test_classes_by_name_and_id(classes: str | None, expected: set[int] | None) -> None:
    assert category_ids(classes, CATEGORIES) == expected


def test_a_name_of_several_categories_means_them_all() -> None:
    assert category_ids("n/a,cat", {0: "N/A", 12: "N/A", 17: "cat"}) == {0, 12, 17}


@pytest.mark.parametrize("classes", ["", "pink", "red,,green", "3", "-1", "²", "9" * 5000])
def test_unknown_classes_are_named_with_what_there_is(classes: str) -> None:
    with pytest.raises(BadParameter, match=r"classes: .* is none of red \(1\), green \(2\), Blue \(30\), 5 \(44\)"):
        category_ids(classes, CATEGORIES)


def test_a_long_list_of_classes_is_cut() -> None:
    with pytest.raises(BadParameter, match="and 71 more, see /model"):
        category_ids("x", {index: f"class {index}" for index in range(91)})
