"""Checkpoints: read from a file or folder into a DeformableDetr, written as one safetensors file."""

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from models.config import DeformableDetrConfig
from models.deformable_detr import DeformableDetr, build_model

FORMAT = "ddetr"
FORMAT_VERSION = "1"


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file and what is wrong with it."""


def save_checkpoint(model: DeformableDetr, path: str | Path) -> None:
    """Write the weights and, in the metadata, the config; beside first, then renamed: never a half-written file."""
    path = Path(path)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "config": json.dumps(model.config.to_dict())}
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, fresh, metadata=metadata)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def load_checkpoint(path: str | Path, variant: str | None = None) -> DeformableDetr:
    """Our own format so far."""
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    config = DeformableDetrConfig.from_dict(json.loads(metadata["config"]))
    model = build_model(config)
    model.load_state_dict(load_file(path))
    return model.eval()
