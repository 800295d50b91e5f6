"""`ddetr train`: from a command line to checkpoints; fine-tuning, and every refusal with its reason."""

from __future__ import annotations

import csv
import json
from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cli.main import main
from models import VARIANTS, DeformableDetrConfig, build_model, load_checkpoint, save_checkpoint
from tests.models.seeded import seed_weights
from tests.training.tiny import TINY, TWO_STAGE, part, tiny_model, write_annotations, write_data
from training.coco import read_split
from training.recipe import Recipe
from training.train import _parser, load_backbone, start_model, with_categories

OFFICIAL = replace(
    TINY,
    backbone_block="bottleneck",
    backbone_widths=(8, 8, 8, 8),
    num_heads=8,
    num_classes=91,
    category_ids=(),
    category_names=(),
)


def official_file(path: Path, config: DeformableDetrConfig = OFFICIAL) -> dict[str, Tensor]:
    """Save seeded weights as the official release names and packs them; returns them under our names."""
    model = build_model(config)
    seed_weights(model)
    tensors: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        head, _, rest = key.partition(".")
        if head == "backbone":
            tensors["backbone.0.body." + rest] = tensor
        elif head in ("class_embed", "bbox_embed"):  # shared: a copy for every layer
            for layer in range(config.num_decoder_layers):
                tensors[f"{head}.{layer}.{rest.partition('.')[2]}"] = tensor
        else:
            tensors[key] = tensor
    args = Namespace(
        dilation=False, nheads=config.num_heads, enc_n_points=4, dec_n_points=4, dropout=0.1, two_stage=False,
        with_box_refine=False, num_queries=config.num_queries, dim_feedforward=config.ffn_dim, masks=False,
        position_embedding="sine", num_feature_levels=config.num_feature_levels, hidden_dim=config.hidden_dim,
    )  # fmt: skip
    torch.save({"model": tensors, "args": args, "epoch": 49}, path)
    return model.state_dict()


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def arguments(data: Path, output: Path, *more: str) -> list[str]:
    small = ["--device", "cpu", "--workers", "0", "--shortest", "64", "--longest", "96"]
    return ["train", "--data", str(data), "--output", str(output), *small, *more]


def failure(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 1
    _, named, message = capsys.readouterr().err.rpartition("ddetr train: ")
    assert named
    assert "Traceback" not in message
    return message


def test_fine_tuning_an_official_checkpoint_keeps_all_but_the_class_heads(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "official.pth"
    theirs = official_file(path)
    args = _parser().parse_args(["--data", str(data), "--output", "x", "--checkpoint", str(path), "--shortest", "72"])

    model = start_model(args, read_split(data, "train"))

    assert model.config.category_names == ("RBC", "WBC", "Platelets")
    assert (model.config.resize_shortest, model.config.resize_longest) == (72, 1333)
    ours = model.state_dict()
    assert ours.keys() == theirs.keys()
    changed = {name for name in ours if not same(ours[name], theirs[name])}
    assert changed == {"class_embed.0.weight", "class_embed.0.bias"}
    assert ours["class_embed.0.weight"].shape == (3, OFFICIAL.hidden_dim)
    torch.testing.assert_close(ours["class_embed.0.bias"].sigmoid(), torch.full((3,), 0.01))  # the focal prior


def test_fine_tuning_with_the_same_label_set_keeps_everything(data: Path, tmp_path: Path) -> None:
    save_checkpoint(tiny_model(TWO_STAGE), tmp_path / "own.safetensors")
    model = load_checkpoint(tmp_path / "own.safetensors")
    assert with_categories(model, read_split(data, "train")) is model


@pytest.mark.parametrize("config", [TINY, TWO_STAGE], ids=["plain", "two-stage"])
def test_another_label_set_of_the_same_size_gets_new_heads(data: Path, config: DeformableDetrConfig) -> None:
    model = tiny_model(replace(config, category_ids=(4, 5, 6), category_names=("a", "b", "c")))
    renamed = with_categories(model, read_split(data, "train"))
    assert renamed.config.category_ids == (1, 2, 3)
    before, after = model.state_dict(), renamed.state_dict()
    changed = {name for name in before if not same(before[name], after[name])}
    heads = 1 if not config.two_stage else config.num_decoder_layers + 1
    assert changed == {f"class_embed.{i}.weight" for i in range(heads)}  # each bias is the prior in both


def test_a_run_from_an_official_checkpoint_by_the_command(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official_file(tmp_path / "official.pth")
    output = tmp_path / "run"
    argv = arguments(data, output, "--checkpoint", str(tmp_path / "official.pth"), "--epochs", "1", "--workers", "1")

    assert main(argv) == 0

    printed = capsys.readouterr()
    assert "AP50" in printed.out
    assert "epoch 1/1" in printed.err
    assert load_checkpoint(output / "best.safetensors").config.category_names == ("RBC", "WBC", "Platelets")
    with (output / "log.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["loss"]) > 0

    # A folder with a run in it is not overwritten, and a finished run has nothing left to do.
    again = argv
    assert "holds a run already: add --resume" in failure(again, capsys)
    assert main([*again, "--resume"]) == 0
    assert "another recipe: epochs 1 -> 2" in failure([*again, "--epochs", "2", "--resume"], capsys)


def test_options_of_the_recipe_default_to_the_papers() -> None:
    args = _parser().parse_args(["--data", "d", "--output", "o"])
    assert Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)}) == Recipe()
    changed = _parser().parse_args(
        [
            "--data",
            "d",
            "--output",
            "o",
            "--lr",
            "1e-3",
            "--no-freeze-stem",
            "--quality-targets",
            "--schedule",
            "cosine",
        ]
    )
    assert (changed.lr, changed.freeze_stem, changed.quality_targets, changed.schedule) == (1e-3, False, True, "cosine")


def test_the_variants_are_offered(data: Path) -> None:
    args = _parser().parse_args(
        ["--data", str(data), "--output", "o", "--variant", "r50-two-stage", "--no-freeze-stem"]
    )
    assert args.variant in VARIANTS
    with pytest.raises(SystemExit):
        _parser().parse_args(["--data", "d", "--output", "o", "--variant", "r51"])


def test_backbone_weights_under_torchvisions_names(tmp_path: Path) -> None:
    source = build_model(replace(TINY, backbone_norm="batch")).backbone
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    weights = source.state_dict() | {"fc.weight": torch.zeros(10, 32), "fc.bias": torch.zeros(10)}
    torch.save(weights, tmp_path / "resnet.pth")
    for norm in ("batch", "frozen"):
        model = tiny_model(replace(TINY, backbone_norm=norm))
        load_backbone(model, tmp_path / "resnet.pth")
        assert all(torch.equal(value, weights[name]) for name, value in model.backbone.state_dict().items())

    for name, change, message in (
        ("short.pth", {k: v for k, v in weights.items() if k != "layer1.0.conv1.weight"}, ".*missing .*layer1.0.conv1"),
        ("more.pth", weights | {"layer9.0.conv1.weight": torch.zeros(1)}, ".*surplus .*layer9"),
        ("shape.pth", weights | {"conv1.weight": torch.zeros(64, 3, 7, 7)}, r"conv1.weight is \[64, 3, 7, 7\], not"),
    ):
        torch.save(change, tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name}: not this backbone: {message}"):
            load_backbone(tiny_model(), tmp_path / name)
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"junk\.pth: .*(pickle|damaged)"):
        load_backbone(tiny_model(), tmp_path / "junk.pth")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_without_a_gpu_is_refused(
    data: Path, tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = failure(arguments(data, tmp_path, "--precision", precision), capsys)
    assert f"precision {precision} needs a GPU, device is cpu" in message


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(tiny_model(), path)
    return path


def test_what_cannot_be_trained_is_named(
    data: Path, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, start = tmp_path / "run", ("--checkpoint", str(checkpoint))
    assert "drop_at is a share" in failure(arguments(data, output, "--drop-at", "2", *start), capsys)
    assert "no annotations for 'train'" in failure(arguments(tmp_path, output, *start), capsys)
    assert "no checkpoint at" in failure(arguments(data, output, "--checkpoint", "none.pth"), capsys)
    assert "last.pt does not exist" in failure(arguments(data, output, "--resume", *start), capsys)
    assert "two-stage" in failure(arguments(data, output, "--denoising-groups", "2", *start), capsys)
    (output / "last.pt").write_bytes(b"PK\x03\x04 cut short")
    assert "last.pt: damaged or cut short" in failure(arguments(data, output, "--resume", *start), capsys)
    mine = tmp_path / "data"
    write_data(mine, train=1, val=1)
    document: dict[str, Any] = json.loads((mine / "instances_val.json").read_text())
    write_annotations(mine, "val", part(document, set()) | {"images": document["images"], "categories": [{"id": 8}]})
    assert "instances_val.json lists other categories than" in failure(arguments(mine, output, *start), capsys)
    assert not (output / "log.csv").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_truncated_picture_met_in_training_is_named(
    tmp_path: Path, checkpoint: Path, workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = write_data(tmp_path / "data", train=1, val=1)
    (picture,) = [picture.path for picture in read_split(mine, "train").pictures]
    picture.write_bytes(picture.read_bytes()[:1000])
    argv = arguments(mine, tmp_path / "run", "--checkpoint", str(checkpoint), "--workers", workers)
    message = failure(argv, capsys)
    assert message.startswith(f"{picture} (image 1): ")


def test_a_loss_that_is_no_number_is_one_line(
    data: Path, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(data, tmp_path / "run", "--checkpoint", str(checkpoint), "--lr", "1e30", "--clip-norm", "1e30")
    assert "lower the learning rate" in failure(argv, capsys)


def test_a_random_stem_is_not_frozen_unasked(data: Path) -> None:
    args = _parser().parse_args(["--data", str(data), "--output", "o", "--variant", "r50"])
    with pytest.raises(ValueError, match="--no-freeze-stem"):
        start_model(args, read_split(data, "train"))
