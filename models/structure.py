"""A network's config, told from the names and shapes of its tensors; and held against what else is known of it."""

import re
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from models.coco import COCO_NAMES
from models.config import VARIANTS, DeformableDetrConfig
from models.weights import CheckpointError, Weights

DEFAULT_HEADS = 8  # cannot be told from shapes; the official default
DEFAULT_PROPOSALS = 300  # of two-stage models, likewise
_TABLE_COLUMNS = ("num_feature_levels", "with_box_refine", "two_stage", "dilation")  # what a variant's name says


def structure(weights: Weights, variant: str | None = None) -> DeformableDetrConfig:
    """The config of a checkpoint's network.

    Shapes come first; what they leave open (heads, dilation, the queries of two-stage models, dropout) comes from the
    facts, then from the variant, then from the official defaults. Raises CheckpointError where two sources disagree,
    where a tensor that is needed is missing, and where nothing tells whether a single-scale model is dilated.
    """
    shaped = _shaped(weights, weights.facts.get("num_heads", DEFAULT_HEADS))
    for name, value in weights.facts.items():
        if name in shaped and shaped[name] != value:
            raise CheckpointError(f"the settings stored with it say {name} = {value!r}, its tensors {shaped[name]!r}")
    known = {**weights.facts, **shaped}
    _fit_variant(known, variant)
    if "dilation" not in known:
        if known["num_feature_levels"] == 1:
            raise CheckpointError(
                "a single-scale checkpoint without settings does not say whether its backbone is dilated: "
                "give the variant, 'r50-single-scale' or 'r50-single-scale-dc5'"
            )
        known["dilation"] = False
    known.setdefault("num_queries", DEFAULT_PROPOSALS)
    names = {field.name for field in fields(DeformableDetrConfig)}
    try:
        return named(DeformableDetrConfig(**{name: value for name, value in known.items() if name in names}))
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def named(config: DeformableDetrConfig) -> DeformableDetrConfig:
    """The config with category names: its own, else COCO's for 91 classes, else "class 0", "class 1", ..."""
    if config.category_names:
        return config
    if config.num_classes == len(COCO_NAMES) and not config.category_ids:
        return replace(config, category_names=COCO_NAMES)
    return replace(config, category_names=tuple(f"class {index}" for index in range(config.num_classes)))


def check_variant(config: DeformableDetrConfig, variant: str | None) -> None:
    """Raise CheckpointError unless the config is of that row of the paper's table."""
    _fit_variant({name: getattr(config, name) for name in _TABLE_COLUMNS}, variant)


def _fit_variant(known: dict[str, Any], variant: str | None) -> None:
    if variant is None:
        return
    if variant not in VARIANTS:
        raise CheckpointError(f"unknown variant {variant!r}; there are {', '.join(VARIANTS)}")
    for column in _TABLE_COLUMNS:
        wanted = getattr(VARIANTS[variant], column)
        if known.setdefault(column, wanted) != wanted:
            raise CheckpointError(f"not of variant {variant!r}: {column} is {known[column]!r}, not {wanted!r}")


def _shaped(weights: Weights, heads: int) -> dict[str, Any]:
    """The fields of the config that names and shapes tell."""
    tensors = weights.tensors

    def shape(name: str, dims: int) -> tuple[int, ...]:
        if name not in tensors:
            raise CheckpointError(f"missing key: {weights.theirs(name)!r}")
        if tensors[name].dim() != dims:
            raise CheckpointError(f"{weights.theirs(name)!r} should have {dims} dimensions, has {tensors[name].dim()}")
        return tuple(tensors[name].shape)

    if "transformer.level_embed" not in tensors:
        name = weights.theirs("transformer.level_embed")
        raise CheckpointError(f"missing key: {name!r} (without a level embedding it is no Deformable DETR)")
    levels, hidden = shape("transformer.level_embed", 2)
    encoder_layers = _count(tensors, r"transformer\.encoder\.layers\.(\d+)\.")
    decoder_layers = _count(tensors, r"transformer\.decoder\.layers\.(\d+)\.")

    def points(attention: str) -> int:
        rows = shape(f"{attention}.attention_weights.weight", 2)[0]
        if heads < 1 or rows % (heads * levels):
            name = weights.theirs(f"{attention}.attention_weights.weight")
            raise CheckpointError(f"{name!r} has {rows} rows, no multiple of {heads} heads x {levels} levels")
        return rows // (heads * levels)

    bottleneck = any(re.match(r"backbone\.layer\d\.\d+\.(conv|bn)3\.", key) for key in tensors)
    depths = tuple(_count(tensors, rf"backbone\.layer{stage}\.(\d+)\.") for stage in range(1, 5))
    told: dict[str, Any] = {
        "backbone_block": "bottleneck" if bottleneck else "basic",
        "backbone_depths": depths,
        "backbone_widths": tuple(shape(f"backbone.layer{stage}.0.conv1.weight", 4)[0] for stage in range(1, 5)),
        "hidden_dim": hidden,
        "num_feature_levels": levels,
        "num_encoder_layers": encoder_layers,
        "num_decoder_layers": decoder_layers,
        "num_encoder_points": points("transformer.encoder.layers.0.self_attn"),
        "num_decoder_points": points("transformer.decoder.layers.0.cross_attn"),
        "ffn_dim": shape("transformer.encoder.layers.0.linear1.weight", 2)[0],
        "num_heads": heads,
        "num_classes": shape("class_embed.0.weight", 2)[0],
        "two_stage": "transformer.enc_output.weight" in tensors,
    }
    if not told["two_stage"]:
        told["num_queries"] = shape("query_embed.weight", 2)[0]
    return told


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    """One more than the highest number that the pattern finds in the keys: a gap is then a missing key."""
    return 1 + max((int(match[1]) for key in tensors if (match := re.match(pattern, key))), default=-1)
