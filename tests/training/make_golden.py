"""Write golden_losses.json: what the official code's matcher and criterion say to the cases of loss_cases.py.

    python -m tests.training.make_golden CHECKOUT

CHECKOUT is a clone of github.com/fundamentalvision/Deformable-DETR. Of it only the criterion and the matcher run; what
the modules import beside (torchvision, the CUDA op) is replaced by empty modules, so that none need be installed.
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

from tests.training.loss_cases import CASES, gradient_norms, layers_of, make_case

GOLDEN = Path(__file__).with_name("golden_losses.json")
WEIGHTS = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}  # --cls_loss_coef and its like, as main.py has them


class Absent(types.ModuleType):
    """A module in name only: whatever is asked of it is another one, or a class to inherit from."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return type(name, (), {}) if name[0].isupper() else Absent(name)


def put_in_place(checkout: str) -> None:
    """Let `import models` find the official code."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "models"]:
        sys.modules["own_" + name] = sys.modules.pop(name)  # the official package is called `models`, too
    sys.path.insert(0, checkout)
    for name in (
        "torchvision", "torchvision.ops", "torchvision.ops.boxes", "torchvision.ops.misc",
        "torchvision.models", "torchvision.models._utils", "MultiScaleDeformableAttention",
        "pycocotools", "pycocotools.mask", "panopticapi", "panopticapi.utils",
    ):  # fmt: skip
        sys.modules[name] = Absent(name)
    sys.modules["torchvision"].__version__ = "1.0.0"  # type: ignore[attr-defined]
    sys.modules["torchvision.ops.boxes"].box_area = (  # type: ignore[attr-defined]
        lambda boxes: (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    )


def official_answers(name: str) -> dict[str, Any]:
    """The losses, their weighted sum, its gradients and every layer's matching."""
    from models.deformable_detr import SetCriterion  # type: ignore[attr-defined]
    from models.matcher import build_matcher  # type: ignore[import-not-found]

    matcher = build_matcher(Namespace(set_cost_class=2, set_cost_bbox=5, set_cost_giou=2))
    criterion = SetCriterion(CASES[name].classes, matcher, {}, ["labels", "boxes"], focal_alpha=0.25)
    outputs, targets = make_case(name)
    losses = {key: value for key, value in criterion(outputs, targets).items() if key.startswith("loss_")}
    weighted = sum(value * WEIGHTS["_".join(key.split("_")[:2])] for key, value in losses.items())
    weighted.backward()
    nothing = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
    matched = {
        suffix: [[queries.tolist(), objects.tolist()] for queries, objects in matcher(layer, truth)]
        for suffix, layer in layers_of(outputs).items()
        for truth in [nothing if suffix == "_enc" else targets]
    }
    return {
        "losses": {key: float(value) for key, value in losses.items()},
        "weighted": float(weighted),
        "gradient_norms": gradient_norms(outputs),
        "matched": matched,
    }


def main(checkout: str) -> None:
    put_in_place(checkout)
    head = ["git", "-C", checkout, "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    content = {
        "source": f"github.com/fundamentalvision/Deformable-DETR at {commit}, torch {torch.__version__}",
        "cases": {name: official_answers(name) for name in CASES},
    }
    rounded = json.loads(json.dumps(content), parse_float=lambda text: float(f"{float(text):.8g}"))
    GOLDEN.write_text(json.dumps(rounded, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
