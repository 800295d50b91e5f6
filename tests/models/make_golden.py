"""Write golden_official.json: what the official code answers with the weights and pictures of seeded.py.

    python -m tests.models.make_golden CHECKOUT

CHECKOUT is a clone of github.com/fundamentalvision/Deformable-DETR; torchvision must import. The CUDA op is replaced
by the official code's own PyTorch function for it, so no GPU is needed. Nothing else of the official code is touched.
"""

from __future__ import annotations

import json
import subprocess
import sys
import types
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from models import VARIANTS, DeformableDetrConfig
from tests.models.seeded import SIZES, seeded_batch, seeded_tensor

GOLDEN = Path(__file__).with_name("golden_official.json")
QUERIES = (0, 1, 7, 20, 33, 49)
CLASSES = (0, 1, 17, 90)
PIXELS = (30, 150, 333, 390)  # of the encoder's output, two-stage only
PROPOSALS = 50  # few, so that no two scores of the best are close enough to change places on another CPU
GRADIENTS = (
    "backbone.layer2.0.conv1.weight",
    "input_proj.0.0.weight",
    "transformer.level_embed",
    "transformer.encoder.layers.0.self_attn.sampling_offsets.weight",
    "transformer.encoder.layers.5.self_attn.attention_weights.weight",
    "transformer.decoder.layers.0.self_attn.in_proj_weight",
    "transformer.decoder.layers.1.cross_attn.sampling_offsets.bias",
    "transformer.decoder.layers.5.cross_attn.value_proj.weight",
    "transformer.reference_points.weight",
    "transformer.pos_trans.weight",
    "query_embed.weight",
    "class_embed.0.weight",
    "bbox_embed.0.layers.0.weight",
)


def own_name(key: str, refine: bool) -> str:
    """The official name of a tensor as ours."""
    key = key.replace("backbone.0.body.", "backbone.")
    for head in ("class_embed", "bbox_embed"):
        key = key.replace(f"transformer.decoder.{head}.", f"{head}.")
        if key.startswith(head) and not refine:
            key = ".".join([head, "0", *key.split(".")[2:]])
    return key


def selected(outputs: dict[str, Any]) -> dict[str, Any]:
    """The chosen numbers of one layer's answer."""
    return {
        "pred_logits": outputs["pred_logits"][:, QUERIES][..., CLASSES].tolist(),
        "pred_boxes": outputs["pred_boxes"][:, QUERIES].tolist(),
    }


def answers(outputs: dict[str, Any], parameters: dict[str, torch.Tensor]) -> dict[str, Any]:
    """All that is held: the last and every earlier layer, the encoder's proposals, the gradients' norms."""
    held: dict[str, Any] = selected(outputs)
    held["aux_outputs"] = [selected(layer) for layer in outputs["aux_outputs"]]
    if "enc_outputs" in outputs:
        encoder = outputs["enc_outputs"]
        held["enc_outputs"] = {
            "pred_logits": encoder["pred_logits"][:, PIXELS][..., CLASSES].tolist(),
            "pred_boxes": encoder["pred_boxes"][:, PIXELS].tolist(),
        }
    loss = sum(
        (layer["pred_logits"] ** 2).mean() + (layer["pred_boxes"] ** 2).sum(-1).mean()
        for layer in [outputs, *outputs["aux_outputs"]]
    )
    loss.backward()
    names = [name for name in GRADIENTS if name in parameters]
    held["gradient_norms"] = {name: parameters[name].grad.norm().item() for name in names}
    return held


def official_answers(config: DeformableDetrConfig) -> dict[str, Any]:
    from util.misc import NestedTensor  # type: ignore[import-not-found]

    from models.deformable_detr import build  # type: ignore[attr-defined]

    given = Namespace(
        lr_backbone=2e-5, masks=False, backbone="resnet50", dilation=config.dilation, position_embedding="sine",
        num_feature_levels=config.num_feature_levels, hidden_dim=256, nheads=8, enc_layers=6, dec_layers=6,
        dim_feedforward=1024, dropout=0.0, enc_n_points=4, dec_n_points=4, two_stage=config.two_stage,
        num_queries=PROPOSALS if config.two_stage else 300, with_box_refine=config.with_box_refine, aux_loss=True,
        dataset_file="coco", device="cpu", set_cost_class=2, set_cost_bbox=5, set_cost_giou=2, cls_loss_coef=2,
        bbox_loss_coef=5, giou_loss_coef=2, focal_alpha=0.25, frozen_weights=None,
    )  # fmt: skip
    model = build(given)[0].train()
    state = model.state_dict()
    names = {key: own_name(key, config.with_box_refine) for key in state}
    model.load_state_dict({key: seeded_tensor(names[key], tuple(state[key].shape)) for key in state})
    pixels, mask = seeded_batch()
    parameters = {names[key]: parameter for key, parameter in model.named_parameters()}
    return answers(model(NestedTensor(pixels, ~mask)), parameters)


def main(checkout: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "models"]:
        sys.modules["own_" + name] = sys.modules.pop(name)  # the official package is called `models`, too
    sys.path.insert(0, checkout)
    sys.modules["MultiScaleDeformableAttention"] = types.ModuleType("MultiScaleDeformableAttention")
    import models.ops.functions.ms_deform_attn_func as functions  # type: ignore[import-not-found]
    import models.ops.modules.ms_deform_attn as modules  # type: ignore[import-not-found]

    class OnTheCpu:
        @staticmethod
        def apply(value, shapes, _start, locations, weights, _step):  # type: ignore[no-untyped-def]
            return functions.ms_deform_attn_core_pytorch(value, shapes, locations, weights)

    modules.MSDeformAttnFunction = OnTheCpu
    head = ["git", "-C", checkout, "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    content = {
        "source": f"github.com/fundamentalvision/Deformable-DETR at {commit}, torch {torch.__version__}",
        "sizes": SIZES,
        "variants": {name: official_answers(config) for name, config in VARIANTS.items()},
    }
    rounded = json.loads(json.dumps(content), parse_float=lambda text: float(f"{float(text):.8g}"))
    GOLDEN.write_text(json.dumps(rounded, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
