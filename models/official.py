"""The official release's naming: `backbone.0.body.layer1...`, `transformer...`, and the arguments of its main.py."""

import re
from typing import Any

from torch import Tensor

from models.weights import CheckpointError, Weights, drop_alias, drop_shared_heads

BACKBONE = "backbone.0.body."
_ARGUMENTS = {  # of the official main.py -> DeformableDetrConfig
    "dilation": "dilation",
    "hidden_dim": "hidden_dim",
    "nheads": "num_heads",
    "num_feature_levels": "num_feature_levels",
    "enc_n_points": "num_encoder_points",
    "dec_n_points": "num_decoder_points",
    "enc_layers": "num_encoder_layers",
    "dec_layers": "num_decoder_layers",
    "dim_feedforward": "ffn_dim",
    "dropout": "dropout",
    "num_queries": "num_queries",
    "with_box_refine": "with_box_refine",
    "two_stage": "two_stage",
}


def is_official(tensors: dict[str, Tensor]) -> bool:
    """Whether the keys are named as the official release names them."""
    return any(BACKBONE in key for key in tensors)  # anywhere: a segmentation model has it under `detr.`


def official_weights(tensors: dict[str, Tensor], args: dict[str, Any]) -> Weights:
    """Translate official keys; `args` are the values of the checkpoint's Namespace, or empty."""
    if args.get("masks") or any(re.match(r"(detr\.|mask_head\.|bbox_attention\.)", key) for key in tensors):
        raise CheckpointError("this is a segmentation model (masks); only detection models can be loaded")
    position = args.get("position_embedding", "sine")
    if position not in ("sine", "v2") or any(key.startswith("backbone.1.") for key in tensors):
        raise CheckpointError("its position embedding is learned; only the sine encoding of the paper is supported")

    own = {
        key.replace(BACKBONE, "backbone.", 1) if key.startswith(BACKBONE) else key: value
        for key, value in tensors.items()
    }
    facts = {ours: args[theirs] for theirs, ours in _ARGUMENTS.items() if args.get(theirs) is not None}
    refine = drop_alias(own, "transformer.decoder.bbox_embed.", "bbox_embed.") or facts.get("with_box_refine")
    drop_alias(own, "transformer.decoder.class_embed.", "class_embed.")
    facts["with_box_refine"] = drop_shared_heads(own, refine)
    return Weights(own, facts, official_name)


def official_name(name: str) -> str:
    """Our name of a tensor as the official release has it."""
    return BACKBONE + name.removeprefix("backbone.") if name.startswith("backbone.") else name
