"""The naming of the Hugging Face port: of the released SenseTime checkpoints, and of what transformers writes today.

They differ in the backbone (timm's names, or those of transformers' own ResNet, under `backbone.conv_encoder.model`
or `backbone.model`), in `out_proj`/`o_proj` and in `fc1`/`mlp.fc1`; all of these are read.
"""

import re
from typing import Any

import torch
from torch import Tensor

from models.weights import CheckpointError, Weights, drop_alias, drop_shared_heads

_CONFIG = {  # of transformers' DeformableDetrConfig -> ours
    "d_model": "hidden_dim",
    "encoder_attention_heads": "num_heads",
    "num_feature_levels": "num_feature_levels",
    "encoder_n_points": "num_encoder_points",
    "decoder_n_points": "num_decoder_points",
    "encoder_layers": "num_encoder_layers",
    "decoder_layers": "num_decoder_layers",
    "encoder_ffn_dim": "ffn_dim",
    "dropout": "dropout",
    "with_box_refine": "with_box_refine",
    "two_stage": "two_stage",
}
_LAYER = {  # within encoder.layers.N and decoder.layers.N
    "encoder": {
        "self_attn": "self_attn",
        "self_attn_layer_norm": "norm1",
        "fc1": "linear1",
        "fc2": "linear2",
        "final_layer_norm": "norm2",
    },
    "decoder": {
        "self_attn": "self_attn",
        "self_attn_layer_norm": "norm2",
        "encoder_attn": "cross_attn",
        "encoder_attn_layer_norm": "norm1",
        "fc1": "linear1",
        "fc2": "linear2",
        "final_layer_norm": "norm3",
    },
}
_BACKBONE = re.compile(r"model\.backbone\.(?:conv_encoder\.)?model\.(?:_backbone\.)?(.+)")
_PACKED = re.compile(r"(.+\.self_attn)\.([qkv])_proj\.(weight|bias)")
_TRANSFORMER = r"(level_embed$|reference_points|enc_output|pos_trans)"


def is_huggingface(tensors: dict[str, Tensor]) -> bool:
    """Whether the keys are named as the Hugging Face port names them."""
    return any(key.startswith("model.backbone.") for key in tensors)


def huggingface_weights(tensors: dict[str, Tensor], config: dict[str, Any]) -> Weights:
    """Translate the port's keys; `config` is its config.json, or empty."""
    facts = _facts(config)
    own: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}  # in_proj of a self-attention -> its q, k and v
    for key, tensor in tensors.items():
        if match := _PACKED.fullmatch(_own_name(key)):
            packed.setdefault(f"{match[1]}.in_proj_{match[3]}", {})[match[2]] = tensor
        else:
            own[_own_name(key)] = tensor
    for key, parts in packed.items():
        if absent := [part for part in "qkv" if part not in parts]:
            raise CheckpointError(f"missing key: {huggingface_name(key, absent[0])!r}")
        own[key] = torch.cat([parts[part] for part in "qkv"])

    refine = drop_alias(own, "transformer.decoder.bbox_embed.", "bbox_embed.") or facts.get("with_box_refine")
    drop_alias(own, "transformer.decoder.class_embed.", "class_embed.")
    facts["with_box_refine"] = drop_shared_heads(own, refine)
    if facts["with_box_refine"]:
        _untie_classes(own)
    return Weights(own, facts, huggingface_name)


def _facts(config: dict[str, Any]) -> dict[str, Any]:
    """What the port's config says of ours; CheckpointError for what this network does not have."""
    if (kind := config.get("model_type", "deformable_detr")) != "deformable_detr":
        raise CheckpointError(f"config.json describes a model of type {kind!r}, not 'deformable_detr'")
    backbone = config.get("backbone_config") or {}
    stated = {
        "activation_function": (config.get("activation_function", "relu"), "relu"),
        "position_embedding_type": (config.get("position_embedding_type", "sine"), "sine"),
        "backbone_config.hidden_act": (backbone.get("hidden_act", "relu"), "relu"),
        "backbone_config.downsample_in_bottleneck": (backbone.get("downsample_in_bottleneck", False), False),
        "backbone_config.downsample_in_first_stage": (backbone.get("downsample_in_first_stage", False), False),
        "decoder_attention_heads": (config.get("decoder_attention_heads"), config.get("encoder_attention_heads")),
        "decoder_ffn_dim": (config.get("decoder_ffn_dim"), config.get("encoder_ffn_dim")),
    }
    for name, (value, wanted) in stated.items():
        if value != wanted:
            raise CheckpointError(f"config.json has {name} = {value!r}; this network has {wanted!r}")

    facts = {ours: config[theirs] for theirs, ours in _CONFIG.items() if config.get(theirs) is not None}
    queries = "two_stage_num_proposals" if config.get("two_stage") else "num_queries"
    if config.get(queries) is not None:
        facts["num_queries"] = config[queries]
    if backbone.get("model_type") == "resnet":
        facts["dilation"] = False  # transformers' own ResNet has none, whatever `dilation` says
    elif config:
        facts["dilation"] = bool(config.get("dilation") or backbone.get("output_stride") == 16)
    labels = {int(index): str(name) for index, name in (config.get("id2label") or {}).items()}
    if labels and not all(name == f"LABEL_{index}" for index, name in labels.items()):
        if sorted(labels) != list(range(len(labels))):
            raise CheckpointError(f"id2label in config.json must count from 0 without gaps, got {sorted(labels)}")
        facts["category_names"] = tuple(labels[index] for index in range(len(labels)))
    return facts


def _untie_classes(tensors: dict[str, Tensor]) -> None:
    """With refinement transformers 5 ties the class heads (the official code does not) and writes the first alone."""
    boxes = {key.split(".")[1] for key in tensors if key.startswith("bbox_embed.")}
    classes = {key.split(".")[1] for key in tensors if key.startswith("class_embed.")}
    if classes == {"0"}:
        for index in boxes - classes:
            for part in ("weight", "bias"):
                if (tensor := tensors.get(f"class_embed.0.{part}")) is not None:
                    tensors[f"class_embed.{index}.{part}"] = tensor.clone()


def _own_name(key: str) -> str:
    """Ours for a key of the port; a key unknown here stays as it is (and is then found to be surplus)."""
    if match := _BACKBONE.fullmatch(key):
        return "backbone." + _own_backbone_name(match[1])
    if key == "model.query_position_embeddings.weight":
        return "query_embed.weight"
    if match := re.fullmatch(r"model\.(encoder|decoder)\.layers\.(\d+)\.(?:mlp\.)?(\w+)\.(.+)", key):
        part, index, module, rest = match.groups()
        if module in _LAYER[part]:
            rest = re.sub(r"^(o_proj|out_proj)\.", "out_proj.", rest)
            return f"transformer.{part}.layers.{index}.{_LAYER[part][module]}.{rest}"
        return key
    if re.match(r"model\.decoder\.(bbox|class)_embed\.", key) or re.match(r"model\." + _TRANSFORMER, key):
        return "transformer." + key.removeprefix("model.")
    if key.startswith("model.input_proj."):
        return key.removeprefix("model.")
    return key


def _own_backbone_name(key: str) -> str:
    """Ours (torchvision's, and timm's) for a name within transformers' ResNet; others stay as they are."""
    if match := re.fullmatch(r"embedder\.embedder\.(convolution|normalization)\.(\w+)", key):
        return f"{'conv1' if match[1] == 'convolution' else 'bn1'}.{match[2]}"
    layer = r"encoder\.stages\.(\d+)\.layers\.(\d+)\."
    if match := re.fullmatch(layer + r"layer\.(\d+)\.(convolution|normalization)\.(\w+)", key):
        kind = "conv" if match[4] == "convolution" else "bn"
        return f"layer{int(match[1]) + 1}.{match[2]}.{kind}{int(match[3]) + 1}.{match[5]}"
    if match := re.fullmatch(layer + r"shortcut\.(convolution|normalization)\.(\w+)", key):
        index = 0 if match[3] == "convolution" else 1
        return f"layer{int(match[1]) + 1}.{match[2]}.downsample.{index}.{match[4]}"
    return key


def huggingface_name(name: str, packed: str = "{q,k,v}") -> str:
    """Our name of a tensor as the released checkpoints have it; `packed` says which part of an in_proj is meant."""
    if name.startswith("backbone."):
        return "model.backbone.conv_encoder.model." + name.removeprefix("backbone.")
    if name == "query_embed.weight":
        return "model.query_position_embeddings.weight"
    if name.startswith("input_proj."):
        return "model." + name
    if match := re.fullmatch(r"transformer\.(encoder|decoder)\.layers\.(\d+)\.(\w+)\.(.+)", name):
        part, index, module, rest = match.groups()
        theirs = {ours: their for their, ours in _LAYER[part].items()}[module]
        rest = re.sub(r"^in_proj_", f"{packed}_proj.", rest)
        return f"model.{part}.layers.{index}.{theirs}.{rest}"
    return "model." + name.removeprefix("transformer.") if name.startswith("transformer.") else name
