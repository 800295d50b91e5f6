"""How a network is trained: the paper's recipe as the defaults of one frozen dataclass."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """Rates, schedule and options of a run. The defaults are the paper's (for 32 images a step over all processes)."""

    epochs: int = 50
    batch_size: int = 2  # of one process
    lr: float = 2e-4
    lr_backbone: float = 2e-5
    lr_projections: float = 0.1  # times lr, for the projections that give reference points and sampling offsets
    weight_decay: float = 1e-4
    clip_norm: float = 0.1
    schedule: Literal["step", "cosine"] = (
        "step"  # "step": x0.1 at drop_at; "cosine": flat up to drop_at, then down to nothing
    )
    drop_at: float = 0.8  # of all epochs
    warmup_steps: int = 0
    ema_decay: float = 0.0  # 0: no averaging
    quality_targets: bool = False  # classify by the IoU (varifocal) instead of 1
    denoising_groups: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # "bf16" or "fp16": autocast
    evaluate_every: int = 1  # epochs
    freeze_stem: bool = True  # the backbone's first convolution and first stage stay as they were loaded
    seed: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in ("step", "cosine"):
            raise ValueError(f"schedule must be 'step' or 'cosine', not {self.schedule!r}")
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"precision must be 'fp32', 'bf16' or 'fp16', not {self.precision!r}")
        if not 0 < self.drop_at <= 1:
            raise ValueError(f"drop_at is a share of all epochs, above 0 and at most 1; got {self.drop_at}")
        for name in ("epochs", "batch_size", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
