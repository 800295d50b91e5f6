"""The query parameters of /detect."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.errors import BadParameter

BoxFormat: TypeAlias = Literal["xyxy", "xywh", "cxcywh"]
Units: TypeAlias = Literal["pixel", "normalized"]
OutputFormat: TypeAlias = Literal["json", "coco", "image"]

_SHOWN_NAMES = 20
_NUMBERS = ("threshold", "max_detections")


class DetectOptions(BaseModel):
    """What the caller wants to see of the detections."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, description="least score of a detection")] = 0.5
    max_detections: Annotated[int, Field(ge=1, description="most detections of an image, best first")] = 100
    classes: Annotated[str | None, Field(description="comma-separated names or ids: only these classes")] = None
    box_format: Annotated[
        BoxFormat,
        Field(description="`xyxy`: corners; `xywh`: corner and size; `cxcywh`: centre and size. For `format=json`"),
    ] = "xyxy"
    units: Annotated[
        Units, Field(description="`pixel` of the picture as displayed, or `normalized` to 0..1. For `format=json`")
    ] = "pixel"
    format: Annotated[
        OutputFormat,
        Field(description="`json`; `coco`: a COCO dataset whose annotations carry scores; `image`: a PNG with boxes"),
    ] = "json"


def parse_options(query: Iterable[tuple[str, str]]) -> DetectOptions:
    """The options in a query string. Raises BadParameter naming the parameter and its value."""
    given: dict[str, str] = {}
    for name, value in query:
        if name in given:
            raise BadParameter(f"{name}: given twice, {given[name][:100]!r} and {value[:100]!r}")
        if name in _NUMBERS and "_" in value:  # Python's numbers may have some
            raise BadParameter(f"{name}: {value[:100]!r} should be a number")
        given[name] = value
    try:
        options = DetectOptions.model_validate(given)
    except ValidationError as error:
        raise BadParameter(_explain(error)) from error
    if options.format == "coco" and (given.get("box_format", "xywh") != "xywh" or options.units != "pixel"):
        raise BadParameter("format: 'coco' has boxes in xywh and pixel; leave box_format and units out")
    return options


def category_ids(classes: str | None, categories: Mapping[int, str]) -> frozenset[int] | None:
    """The category ids that `classes` (comma-separated names or ids) means; None means all.

    Names are matched as they are, else without regard to case. Raises BadParameter naming what there is.
    """
    if classes is None:
        return None
    by_name: dict[str, set[int]] = {}
    by_folded_name: dict[str, set[int]] = {}
    for category_id, name in categories.items():
        by_name.setdefault(name, set()).add(category_id)
        by_folded_name.setdefault(name.casefold(), set()).add(category_id)
    chosen: set[int] = set()
    for part in classes.split(","):
        name = part.strip()
        if name in by_name:
            chosen |= by_name[name]
        elif name.casefold() in by_folded_name:
            chosen |= by_folded_name[name.casefold()]
        elif name.isascii() and name.isdigit() and len(name) < 10 and int(name) in categories:
            chosen.add(int(name))
        else:
            raise BadParameter(f"classes: {name[:100]!r} is none of {_list_names(categories)}")
    return frozenset(chosen)


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])[:100]
    if first["type"] == "extra_forbidden":
        return f"{name}: no such parameter; there are {', '.join(DetectOptions.model_fields)}"
    message = first["msg"].removeprefix("Input should be ").removesuffix(", unable to parse string as a number")
    return f"{name}: {str(first['input'])[:100]!r} should be {message}"


def _list_names(categories: Mapping[int, str]) -> str:
    names = [f"{name} ({category_id})" for category_id, name in categories.items()]
    more = [f"and {len(names) - _SHOWN_NAMES} more, see /model"] if len(names) > _SHOWN_NAMES else []
    return ", ".join(names[:_SHOWN_NAMES] + more)
