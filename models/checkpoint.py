"""Checkpoints: any of the three formats into a DeformableDetr, and out as one safetensors file of our own."""

import json
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.config import DeformableDetrConfig
from models.deformable_detr import DeformableDetr, build_model
from models.huggingface import huggingface_weights, is_huggingface
from models.official import is_official, official_weights
from models.pickled import is_pickled, read_pickled
from models.structure import check_variant, named, structure
from models.weights import CheckpointError, Weights, drop_shared_heads

FORMAT = "ddetr"
FORMAT_VERSION = "1"
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_NAMED_IN_A_MESSAGE = 8  # keys


def save_checkpoint(model: DeformableDetr, path: str | Path) -> None:
    """Write the weights and, in the metadata, the config; beside first, then renamed: never a half-written file."""
    path = Path(path)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "config": json.dumps(model.config.to_dict())}
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, fresh, metadata=metadata)
        _sort_metadata(fresh)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _sort_metadata(path: Path) -> None:
    """Put the metadata, which safetensors writes in a random order, in one order: the same network, the same file."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(content) <= length:  # it always is: the same words, escaped alike
            file.seek(8)
            file.write(content.ljust(length))


def load_checkpoint(path: str | Path, variant: str | None = None) -> DeformableDetr:
    """Load a network, in eval mode, float32, on the CPU.

    `path` is an official `.pth` (with its "args", or a bare state dict), a folder or weight file of the Hugging Face
    format (sharded or not, `config.json` beside it), or a file of `save_checkpoint`; its content tells which.
    `variant` (a name of VARIANTS) is only needed for single-scale checkpoints without settings, where nothing else
    tells dilation; given for others, it is checked. Without category names a config gets COCO's (91 classes) or
    "class 0", "class 1", ...

    Raises FileNotFoundError, and CheckpointError (a ValueError) for all that is wrong with the content: it names a
    missing or surplus key, a shape, a contradiction. No code of a pickle is ever run.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        return _load(path, variant)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _load(path: Path, variant: str | None) -> DeformableDetr:
    file = _weight_file(path) if path.is_dir() else path
    tensors, stored = _read(file)
    if isinstance(stored, DeformableDetrConfig):
        weights = Weights(tensors)
        check_variant(stored, variant)
        config = named(stored)
    else:
        weights = _translated(tensors, stored, file.parent)
        config = structure(weights, variant)

    with torch.device("meta"):
        model = build_model(config)
    tensors = dict(weights.tensors)
    if config.backbone_norm == "frozen":
        tensors = {key: value for key, value in tensors.items() if not key.endswith(".num_batches_tracked")}
    _check(tensors, model.state_dict(), weights)
    types = {key: tensor.dtype for key, tensor in model.state_dict().items()}
    own = {key: tensor.to(types[key], copy=True).contiguous() for key, tensor in tensors.items()}
    model.load_state_dict(own, assign=True)
    return model.eval()


def _weight_file(folder: Path) -> Path:
    for name in _FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"the folder has none of {', '.join(_FOLDER_FILES)}")


def _read(file: Path) -> tuple[dict[str, Tensor], DeformableDetrConfig | dict[str, Any]]:
    """A file's tensors, and our config or the official arguments where it has them (else an empty dict)."""
    if file.name.endswith(".index.json"):
        return _read_shards(file), {}
    with file.open("rb") as opened:
        start = opened.read(16)
    if start[8:9] == b"{":  # first, for a header's length may look like a pickle's beginning
        return _read_safetensors(file)
    if is_pickled(start):
        return _unpacked(read_pickled(file))
    raise CheckpointError("not a checkpoint: neither a file of torch.save nor a safetensors file")


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], DeformableDetrConfig | dict[str, Any]]:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise CheckpointError(f"damaged or cut short ({error})") from error
    if metadata.get("format") != FORMAT:
        return tensors, {}
    if (version := metadata.get("format_version")) != FORMAT_VERSION:
        raise CheckpointError(f"format version {version!r} is not known here; this release reads {FORMAT_VERSION!r}")
    try:
        return tensors, DeformableDetrConfig.from_dict(json.loads(metadata.get("config", "")))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the config in its metadata cannot be read ({error})") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index.name} is not an index of shards ({error!r})") from error
    tensors: dict[str, Tensor] = {}
    for name in sorted(files):
        if Path(name).name != name or not (index.parent / name).is_file() or name.endswith(".json"):
            raise CheckpointError(f"{index.name} names a shard {name!r} that is not in the folder")
        tensors.update(_read(index.parent / name)[0])
    return tensors


def _unpacked(content: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict and the arguments in what was unpickled: {"model": ..., "args": ...}, or a bare state dict."""
    args: dict[str, Any] = {}
    if isinstance(content, Mapping) and "model" in content:
        stored = content.get("args")
        if isinstance(stored, Namespace | Mapping):
            args = dict(stored) if isinstance(stored, Mapping) else vars(stored)
        content = content["model"]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"holds a {type(content).__name__}, not a state dict of tensors")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"not a state dict: {key!r} is a {type(value).__name__}, not a tensor")
    tensors = dict(content)
    if all(key.startswith("module.") for key in tensors):  # saved from DistributedDataParallel
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors, args


def _translated(tensors: dict[str, Tensor], args: dict[str, Any], folder: Path) -> Weights:
    if is_official(tensors):
        return official_weights(tensors, args)
    if is_huggingface(tensors):
        return huggingface_weights(tensors, _read_config(folder / "config.json"))
    if any(key.startswith("backbone.layer1.") for key in tensors):  # our own names, saved without the config
        own = dict(tensors)
        return Weights(own, {"with_box_refine": drop_shared_heads(own, None)})
    some = ", ".join(repr(key) for key in sorted(tensors)[:3])
    raise CheckpointError(f"not a Deformable DETR in a known format; its {len(tensors)} keys begin with {some}")


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"config.json beside it is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError("config.json beside it is not a JSON object")
    return config


def _check(tensors: dict[str, Tensor], wanted: dict[str, Tensor], weights: Weights) -> None:
    """Raise CheckpointError that names the missing and surplus keys, else the first tensor of a wrong shape or type."""
    problems = []
    for what, keys in (("missing", wanted.keys() - tensors.keys()), ("surplus", tensors.keys() - wanted.keys())):
        if keys:
            names = [repr(weights.theirs(key)) for key in sorted(keys)]
            more = f" and {len(names) - _NAMED_IN_A_MESSAGE} more" if len(names) > _NAMED_IN_A_MESSAGE else ""
            label = f"{what} key{'s' if len(names) > 1 else ''}"
            problems.append(f"{label}: {', '.join(names[:_NAMED_IN_A_MESSAGE])}{more}")
    if problems:
        raise CheckpointError("; ".join(problems))
    for key, tensor in tensors.items():
        if tensor.shape != wanted[key].shape:
            got, expected = list(tensor.shape), list(wanted[key].shape)
            raise CheckpointError(f"{weights.theirs(key)!r} should be of shape {expected}, is {got}")
        if tensor.is_floating_point() != wanted[key].is_floating_point():
            raise CheckpointError(f"{weights.theirs(key)!r} should be {wanted[key].dtype}, is {tensor.dtype}")
