"""What a Deformable DETR is made of: one frozen dataclass, and the five rows of the paper's table."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DeformableDetrConfig:
    """The network's structure and the facts a picture needs to enter and leave it.

    Class `i` of the logits is category `category_ids[i]`, named `category_names[i]`; when both are empty the
    class index itself is the category id, as in the official release. `resize_shortest` and `resize_longest` are the
    pixels of the paper's resize rule.
    """

    backbone_block: str = "bottleneck"  # "bottleneck" or "basic"
    backbone_depths: tuple[int, ...] = (3, 4, 6, 3)
    backbone_widths: tuple[int, ...] = (64, 128, 256, 512)
    backbone_norm: str = "frozen"  # "frozen": statistics and affine never change; "batch": ordinary batch norm
    dilation: bool = False
    hidden_dim: int = 256
    num_heads: int = 8
    num_feature_levels: int = 4
    num_encoder_points: int = 4
    num_decoder_points: int = 4
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    ffn_dim: int = 1024
    dropout: float = 0.1
    num_queries: int = 300
    num_classes: int = 91
    with_box_refine: bool = False
    two_stage: bool = False
    category_ids: tuple[int, ...] = ()
    category_names: tuple[str, ...] = ()
    resize_shortest: int = 800
    resize_longest: int = 1333
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN
    pixel_std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.backbone_block not in ("bottleneck", "basic"):
            raise ValueError(f"backbone_block must be 'bottleneck' or 'basic', not {self.backbone_block!r}")
        if self.backbone_norm not in ("frozen", "batch"):
            raise ValueError(f"backbone_norm must be 'frozen' or 'batch', not {self.backbone_norm!r}")
        if len(self.backbone_depths) != 4 or len(self.backbone_widths) != 4:
            raise ValueError(
                f"a backbone has four stages; got depths {self.backbone_depths} and widths {self.backbone_widths}"
            )
        if self.hidden_dim % self.num_heads or self.hidden_dim % 32:
            raise ValueError(
                f"hidden_dim {self.hidden_dim} must be a multiple of num_heads {self.num_heads} and of 32 (GroupNorm)"
            )
        if self.num_feature_levels < 1:
            raise ValueError(f"num_feature_levels must be at least 1, not {self.num_feature_levels}")
        if self.two_stage and not self.with_box_refine:
            raise ValueError("two_stage needs with_box_refine: the proposals are boxes that the decoder refines")
        for name in ("category_ids", "category_names"):
            if (count := len(getattr(self, name))) and count != self.num_classes:
                raise ValueError(f"{name} has {count} entries for {self.num_classes} classes")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DeformableDetrConfig":
        """The inverse of `to_dict`; lists become tuples, and an unknown key is a ValueError that names it."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown configuration keys: {', '.join(unknown)}")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)


_R50 = DeformableDetrConfig()

VARIANTS: dict[str, DeformableDetrConfig] = {
    "r50-single-scale": replace(_R50, num_feature_levels=1),
    "r50-single-scale-dc5": replace(_R50, num_feature_levels=1, dilation=True),
    "r50": _R50,
    "r50-refine": replace(_R50, with_box_refine=True),
    "r50-two-stage": replace(_R50, with_box_refine=True, two_stage=True),
}
"""The rows of the paper's table, by name."""
