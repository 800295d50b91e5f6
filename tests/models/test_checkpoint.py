"""Checkpoints: the official and our own format round trip, and everything that can be wrong has its error."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import VARIANTS, CheckpointError, DeformableDetrConfig, build_model, load_checkpoint, save_checkpoint
from models.coco import COCO_NAMES
from models.structure import named
from tests.models.seeded import seed_weights, seeded_batch

TINY = replace(
    VARIANTS["r50"],
    backbone_depths=(1, 2, 1, 1),
    backbone_widths=(8, 8, 16, 16),
    hidden_dim=64,
    ffn_dim=48,
    num_encoder_layers=2,
    num_decoder_layers=3,
    num_queries=12,
    num_classes=5,
)
SHAPES_OF_VARIANTS = {
    name: {
        column: getattr(config, column) for column in ("num_feature_levels", "with_box_refine", "two_stage", "dilation")
    }
    for name, config in VARIANTS.items()
}


def seeded(config: DeformableDetrConfig) -> Any:
    model = build_model(config)
    seed_weights(model)
    return model.eval()


def official_keys(config: DeformableDetrConfig, *, aliases: bool = True) -> dict[str, Tensor]:
    """The state dict that the official code would save of a seeded model."""
    layers = config.num_decoder_layers + config.two_stage
    tensors: dict[str, Tensor] = {}
    for key, tensor in seeded(config).state_dict().items():
        head, _, rest = key.partition(".")
        if head == "backbone":
            tensors["backbone.0.body." + rest] = tensor
        elif head in ("class_embed", "bbox_embed"):
            index, _, rest = rest.partition(".")
            for copy in [index] if config.with_box_refine else range(layers):
                tensors[f"{head}.{copy}.{rest}"] = tensor
                if aliases and config.with_box_refine and (head == "bbox_embed" or config.two_stage):
                    tensors[f"transformer.decoder.{head}.{copy}.{rest}"] = tensor
        else:
            tensors[key] = tensor
    return tensors


def official_args(config: DeformableDetrConfig, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **{
            "lr": 2e-4,
            "lr_backbone_names": ["backbone.0"],
            "backbone": "resnet50",
            "dilation": config.dilation,
            "position_embedding": "sine",
            "num_feature_levels": config.num_feature_levels,
            "hidden_dim": config.hidden_dim,
            "nheads": config.num_heads,
            "enc_layers": config.num_encoder_layers,
            "num_queries": config.num_queries,
            "with_box_refine": config.with_box_refine,
            "two_stage": config.two_stage,
            "masks": False,
            "frozen_weights": None,
            "output_dir": pathlib.PurePosixPath("exps"),
        }
        | changes
    )


def assert_same(loaded: Any, config: DeformableDetrConfig) -> None:
    """The loaded network has the config, and answers as the seeded one does."""
    assert loaded.config == named(config)
    assert not loaded.training
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in loaded.parameters())
    pixels, mask = seeded_batch(((96, 128), (64, 96)))
    with torch.no_grad():
        wanted, got = seeded(config)(pixels, mask), loaded(pixels, mask)
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(got[key], wanted[key], atol=0, rtol=0)


# --- the official format ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_official_checkpoint_with_its_arguments(variant: str, tmp_path: Path) -> None:
    config = replace(TINY, **SHAPES_OF_VARIANTS[variant])
    file = tmp_path / "checkpoint.pth"
    content = {
        "model": official_keys(config),
        "args": official_args(config),
        "epoch": 49,
        "optimizer": {"state": {0: {"step": 5, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 2e-4}]},
    }
    torch.save(content, file)
    assert_same(load_checkpoint(file), config)
    assert_same(load_checkpoint(file, variant), config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bare_state_dict(variant: str, tmp_path: Path) -> None:
    config = replace(TINY, **SHAPES_OF_VARIANTS[variant])
    if config.two_stage:
        config = replace(config, num_queries=300)  # which nothing in a bare state dict says
    file = tmp_path / "weights.pth"
    torch.save(official_keys(config, aliases=False), file)
    loaded = load_checkpoint(file, variant)
    assert loaded.config == named(config)
    if config.num_feature_levels > 1:
        assert load_checkpoint(file).config == named(config)
        return
    with pytest.raises(CheckpointError, match="'r50-single-scale' or 'r50-single-scale-dc5'"):
        load_checkpoint(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_feature_levels": 2},
        {"num_feature_levels": 5},
        {"num_encoder_points": 2, "num_decoder_points": 6, "num_heads": 4},
        {"hidden_dim": 96, "ffn_dim": 10, "num_heads": 3},
        {"num_classes": 1, "num_queries": 3},
        {"backbone_block": "basic", "backbone_depths": (2, 1, 1, 1), "backbone_widths": (16, 16, 32, 64)},
        {"num_encoder_layers": 1, "num_decoder_layers": 1, "with_box_refine": True},
        {"dilation": True},
    ],
)
def test_other_structures(changes: dict[str, Any], tmp_path: Path) -> None:
    config = replace(TINY, **changes)
    file = tmp_path / "checkpoint.pth"
    torch.save({"model": official_keys(config), "args": official_args(config)}, file)
    assert_same(load_checkpoint(file), config)


def test_as_old_versions_and_wrappers_wrote_it(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pth"
    tensors = {"module." + key: tensor for key, tensor in official_keys(TINY).items()}
    tensors["module.backbone.0.body.bn1.num_batches_tracked"] = torch.tensor(7)
    torch.save({"model": tensors, "args": official_args(TINY)}, file, _use_new_zipfile_serialization=False)
    assert_same(load_checkpoint(file), TINY)


def test_half_precision_is_widened(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pth"
    torch.save({key: tensor.half() for key, tensor in official_keys(TINY).items()}, file)
    loaded = load_checkpoint(file)
    assert all(tensor.dtype == torch.float32 for tensor in loaded.state_dict().values())


def test_official_keys_in_safetensors(tmp_path: Path) -> None:
    save_file({key: tensor.clone() for key, tensor in official_keys(TINY).items()}, tmp_path / "a.safetensors")
    assert_same(load_checkpoint(tmp_path / "a.safetensors"), TINY)


def test_category_names(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pth"
    torch.save(official_keys(replace(TINY, num_classes=91)), file)
    config = load_checkpoint(file).config
    assert config.category_names == COCO_NAMES
    assert config.category_ids == ()
    assert (COCO_NAMES[0], COCO_NAMES[1], COCO_NAMES[12], COCO_NAMES[90]) == ("N/A", "person", "N/A", "toothbrush")
    assert len(set(COCO_NAMES) - {"N/A"}) == 80
    torch.save(official_keys(TINY), file)
    assert load_checkpoint(file).config.category_names == ("class 0", "class 1", "class 2", "class 3", "class 4")


# --- our own format --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_own_format_round_trip(variant: str, tmp_path: Path) -> None:
    changes = SHAPES_OF_VARIANTS[variant]
    config = replace(TINY, **changes, category_ids=(2, 3, 5, 7, 11), category_names=("a", "b", "c", "d", "é"))
    file = tmp_path / "model.safetensors"
    save_checkpoint(seeded(config).train(), file)
    assert_same(load_checkpoint(file, variant), config)
    assert_same(load_checkpoint(tmp_path), config)  # the folder of a bundle
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"], "nothing is left beside it"


def test_own_format_with_trainable_batch_norm(tmp_path: Path) -> None:
    config = replace(TINY, backbone_norm="batch", backbone_block="basic", category_names=tuple("abcde"))
    model = build_model(config)
    model.train()(torch.randn(2, 3, 64, 64))
    save_checkpoint(model, tmp_path / "a.safetensors")
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
        assert loaded.state_dict()[key].dtype == tensor.dtype


def test_own_state_dict_saved_by_hand(tmp_path: Path) -> None:
    config = replace(TINY, with_box_refine=True)
    torch.save({"model": seeded(config).state_dict()}, tmp_path / "a.pt")
    assert_same(load_checkpoint(tmp_path / "a.pt"), config)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    save_checkpoint(seeded(TINY), file)
    before = file.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        (tmp_path / f".model.safetensors.{os.getpid()}").write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("models.checkpoint.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(seeded(TINY), file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def rewritten(file: Path, metadata: dict[str, str]) -> None:
    save_file(load_file(file), file, metadata=metadata)


def test_metadata_that_cannot_be_understood(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_checkpoint(seeded(TINY), file)
    rewritten(file, {"format": "ddetr", "format_version": "2", "config": "{}"})
    with pytest.raises(CheckpointError, match="format version '2'"):
        load_checkpoint(file)
    for config in ("{", "[]", '{"queries": 3}', '{"num_heads": 7}'):
        rewritten(file, {"format": "ddetr", "format_version": "1", "config": config})
        with pytest.raises(CheckpointError, match="config in its metadata"):
            load_checkpoint(file)


# --- what is wrong is named ------------------------------------------------------------------------------------------


def failing(tensors: dict[str, Tensor], tmp_path: Path, **args: Any) -> str:
    file = tmp_path / "checkpoint.pth"
    torch.save({"model": tensors, "args": official_args(TINY, **args)}, file)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(file)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).startswith(f"{file}: ")
    return str(caught.value)


def test_missing_key(tmp_path: Path) -> None:
    tensors = official_keys(TINY)
    kinds = {re.sub(r"\d+", "#", key): key for key in reversed(tensors)}  # the first key of every kind
    assert len(kinds) >= 50
    for key in kinds.values():
        without = {name: tensor for name, tensor in tensors.items() if name != key}
        if key.startswith(("class_embed", "bbox_embed")):  # shared: any of the copies is enough, but there is none
            without = {
                name: t for name, t in without.items() if re.sub(r"\.\d+", "", name) != re.sub(r"\.\d+", "", key)
            }
        assert key.removesuffix(".weight").removesuffix(".bias") in failing(without, tmp_path), key


def test_surplus_keys(tmp_path: Path) -> None:
    message = failing(official_keys(TINY) | {"backbone.0.body.fc.weight": torch.zeros(1)}, tmp_path)
    assert "surplus key: 'backbone.0.body.fc.weight'" in message
    many = {f"extra.{index}": torch.zeros(1) for index in range(20)}
    message = failing(official_keys(TINY) | many, tmp_path)
    assert "surplus keys: 'extra.0', " in message
    assert message.endswith("and 12 more")


def test_wrong_shape_and_type(tmp_path: Path) -> None:
    key = "transformer.decoder.layers.2.linear1.weight"
    assert f"'{key}' should be of shape [48, 64], is [47, 64]" in failing(
        official_keys(TINY) | {key: torch.zeros(47, 64)}, tmp_path
    )
    message = failing(official_keys(TINY) | {key: torch.zeros(48, 64, dtype=torch.int32)}, tmp_path)
    assert f"'{key}' should be torch.float32, is torch.int32" in message
    message = failing(official_keys(TINY) | {"transformer.level_embed": torch.zeros(4)}, tmp_path)
    assert "'transformer.level_embed' should have 2 dimensions, has 1" in message


def test_heads_that_should_be_one(tmp_path: Path) -> None:
    tensors = official_keys(TINY)
    tensors["class_embed.2.bias"] = tensors["class_embed.2.bias"] + 1
    assert "'class_embed.2.bias' differs from 'class_embed.0.bias'" in failing(tensors, tmp_path)
    tensors = official_keys(replace(TINY, with_box_refine=True))
    tensors["transformer.decoder.bbox_embed.1.layers.0.bias"] = torch.zeros(64)
    message = failing(tensors, tmp_path, with_box_refine=True)
    assert "'transformer.decoder.bbox_embed.1.layers.0.bias' and 'bbox_embed.1.layers.0.bias' are one tensor" in message


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_feature_levels": 1}, "num_feature_levels = 1, its tensors 4"),
        ({"nheads": 16, "enc_n_points": 4}, "num_encoder_points = 4, its tensors 2"),
        ({"nheads": 5}, "has 128 rows, no multiple of 5 heads x 4 levels"),
        ({"num_queries": 300}, "num_queries = 300, its tensors 12"),
        ({"two_stage": True}, "two_stage = True, its tensors False"),
        ({"masks": True}, "segmentation"),
        ({"position_embedding": "learned"}, "position embedding is learned"),
    ],
)
def test_arguments_that_contradict_the_tensors(args: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in failing(official_keys(TINY), tmp_path, **args)


def test_segmentation_and_learned_positions_are_seen_in_the_keys(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    torch.save({"detr." + key: tensor for key, tensor in official_keys(TINY).items()}, file)
    with pytest.raises(CheckpointError, match="segmentation"):
        load_checkpoint(file)
    torch.save(official_keys(TINY) | {"backbone.1.row_embed.weight": torch.zeros(50, 32)}, file)
    with pytest.raises(CheckpointError, match="learned"):
        load_checkpoint(file)


def test_a_plain_detr_is_recognised(tmp_path: Path) -> None:
    tensors = official_keys(TINY)
    del tensors["transformer.level_embed"]
    assert "no Deformable DETR" in failing(tensors, tmp_path)


def test_variant_that_contradicts(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    torch.save(official_keys(TINY), file)
    with pytest.raises(CheckpointError, match="not of variant 'r50-refine': with_box_refine is False, not True"):
        load_checkpoint(file, "r50-refine")
    with pytest.raises(CheckpointError, match="unknown variant 'r101'; there are r50-single-scale, "):
        load_checkpoint(file, "r101")
    single = replace(TINY, num_feature_levels=1, dilation=True)
    torch.save({"model": official_keys(single), "args": official_args(single)}, file)
    with pytest.raises(CheckpointError, match="dilation is True, not False"):
        load_checkpoint(file, "r50-single-scale")
    save_checkpoint(seeded(TINY), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="two_stage|with_box_refine"):
        load_checkpoint(tmp_path / "a.safetensors", "r50-two-stage")


# --- files that are none, and files that are traps ------------------------------------------------------------------


def test_no_file_no_folder_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match="has none of model.safetensors"):
        load_checkpoint(tmp_path)
    for content in (b"", b"hello, this is text and no checkpoint", b"\x89PNG\r\n\x1a\n" + bytes(50), bytes(100)):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            load_checkpoint(tmp_path / "file")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "file")
    with pytest.raises(CheckpointError, match="keys begin with 'weight'"):
        load_checkpoint(tmp_path / "file")
    for content, message in (([1, 2], "holds a list"), ({"model": {"a": 1}}, "'a' is a int"), ({}, "holds a dict")):
        torch.save(content, tmp_path / "file")
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / "file")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_cut_anywhere_is_one_clear_error(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    if kind == "safetensors":
        save_checkpoint(seeded(TINY), file)
    else:
        torch.save({"model": official_keys(TINY)}, file, _use_new_zipfile_serialization=kind == "zip")
    whole = file.read_bytes()
    for length in {1, 9, 20, 100, 1000, 5000, len(whole) // 2, len(whole) - 1000, len(whole) - 1}:
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            load_checkpoint(file)


def test_flipped_bytes_are_never_more_than_an_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    torch.save(
        {"args": official_args(TINY), "model": {"a": torch.zeros(2)}}, file, _use_new_zipfile_serialization=False
    )
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with pytest.raises(CheckpointError):
            load_checkpoint(file)


class Trap:
    """Unpickled by a careless reader, it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> Any:
        return open, (self.file, "w")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["alone", "in args", "beside the weights"])
def test_a_hostile_pickle_runs_nothing(zipped: bool, place: str, tmp_path: Path) -> None:
    trap = Trap(tmp_path / "sprung")
    content = {
        "alone": trap,
        "in args": {"model": official_keys(TINY), "args": official_args(TINY, output_dir=trap)},
        "beside the weights": {"model": official_keys(TINY), "optimizer": [trap]},
    }[place]
    file = tmp_path / "checkpoint.pth"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"names '(io\.)?open'.*nothing of it was run"):
        load_checkpoint(file)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(trap)).close()  # the trap is a real one
    assert (tmp_path / "sprung").exists()


def test_a_plain_pickle_is_no_checkpoint(tmp_path: Path) -> None:
    for protocol in (2, 4, 5):
        (tmp_path / "file").write_bytes(pickle.dumps(Trap(tmp_path / "sprung"), protocol=protocol))
        with pytest.raises(CheckpointError):
            load_checkpoint(tmp_path / "file")
    assert not (tmp_path / "sprung").exists()


def test_paths_of_another_system_in_the_arguments(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    args = official_args(TINY, output_dir=pathlib.PureWindowsPath("C:/exps"), coco_path=tmp_path)
    torch.save({"model": official_keys(TINY), "args": args}, file)
    assert load_checkpoint(file).config == named(TINY)


def test_an_index_beside_json(tmp_path: Path) -> None:
    """Shards in one folder are read together; the config is ours only where the metadata says so."""
    tensors = {key: tensor.clone() for key, tensor in official_keys(TINY).items()}
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for name, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, tmp_path / name)
    index = {"weight_map": {key: name for name, keys in halves.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(load_checkpoint(tmp_path), TINY)
