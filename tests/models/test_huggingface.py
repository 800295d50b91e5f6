"""The network and its loader against the Hugging Face port, which neither torchvision nor timm must be there for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import VARIANTS, CheckpointError, load_checkpoint
from models.coco import COCO_NAMES
from tests.models.seeded import seeded_batch, seeded_tensor

transformers = pytest.importorskip("transformers")

ATOL_LOGITS = 1e-4  # the contract; measured 6e-6
ATOL_BOXES = 1e-5  # the contract; measured 7e-7
# The best 50 proposals, so that no two scores are close enough to change places between two orders of summation.
PROPOSALS = 50


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def port(variant: str, **changes: Any) -> nn.Module:
    """The port's network of a variant with seeded weights, its backbone transformers' own ResNet."""
    config = VARIANTS[variant]
    levels = config.num_feature_levels
    stages = ["stage2", "stage3", "stage4"] if levels > 1 else ["stage4"]
    settings: dict[str, Any] = {
        "backbone_config": transformers.ResNetConfig(out_features=stages),
        "use_timm_backbone": False,
        "num_feature_levels": levels,
        "with_box_refine": config.with_box_refine,
        "two_stage": config.two_stage,
        "two_stage_num_proposals": PROPOSALS,
        "num_labels": 91,
    }
    network = transformers.DeformableDetrForObjectDetection(
        transformers.DeformableDetrConfig(**settings | changes, attn_implementation="eager")
    )
    if config.with_box_refine:  # transformers 5 ties the class heads then; the official code and its checkpoints do not
        heads = [nn.Linear(network.config.d_model, network.config.num_labels) for _ in network.class_embed]
        network.class_embed = nn.ModuleList(heads)
        if config.two_stage:
            network.model.decoder.class_embed = network.class_embed
    if config.dilation:  # which transformers' ResNet does not know
        dilate(network.model.backbone.model)
    weights = {}
    for key, tensor in network.state_dict().items():
        head = re.sub(r"^model\.decoder\.(?=(bbox|class)_embed)", "", key)
        if not config.with_box_refine:
            head = re.sub(r"^((?:bbox|class)_embed)\.\d+", r"\1.0", head)
        # The names by which seeded_tensor knows what it scales in its own way.
        name = re.sub(r"layer\.2\.normalization", "bn3", head).replace("query_position_embeddings", "query_embed")
        weights[key] = seeded_tensor(name, tuple(tensor.shape))
    network.load_state_dict(weights)
    return network.eval()


def dilate(resnet: nn.Module) -> None:
    """Turn the last stage's stride into dilation, from its second block on."""
    for index, block in enumerate(resnet.encoder.stages[3].layers):
        block.layer[1].convolution.stride = (1, 1)
        if index == 0:
            block.shortcut.convolution.stride = (1, 1)
        else:
            block.layer[1].convolution.dilation = block.layer[1].convolution.padding = (2, 2)


def released_name(key: str) -> str:
    """A key that transformers writes today as the released SenseTime checkpoints have it, the backbone timm's."""
    key = key.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1")
    key = re.sub(r"encoder\.stages\.(\d+)\.layers\.(\d+)", lambda m: f"layer{int(m[1]) + 1}.{m[2]}", key)
    key = re.sub(r"layer\.(\d+)\.convolution", lambda m: f"conv{int(m[1]) + 1}", key)
    key = re.sub(r"layer\.(\d+)\.normalization", lambda m: f"bn{int(m[1]) + 1}", key)
    return key.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")


def write_released(network: nn.Module, folder: Path, **settings: Any) -> None:
    """A folder as on the hub: timm's names, one `.bin`, a config of transformers 4."""
    network.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({released_name(key): tensor for key, tensor in tensors.items()}, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    config["backbone_config"] = None
    config["id2label"] = {str(index): name for index, name in enumerate(COCO_NAMES)}
    config |= {"backbone": "resnet50", "use_timm_backbone": True} | settings
    (folder / "config.json").write_text(json.dumps(config))


def write(variant: str, network: nn.Module, folder: Path) -> Path:
    """Each variant in another of the shapes that a Hugging Face checkpoint may have; the path to load."""
    if variant == "r50-single-scale-dc5":
        write_released(network, folder, dilation=True)
        return folder
    if variant == "r50-refine":  # the module's own names (`mlp.fc1`, `o_proj`), unlike what save_pretrained writes
        network.config.save_pretrained(folder)
        torch.save(network.state_dict(), folder / "pytorch_model.bin")
        return folder / "pytorch_model.bin"
    network.save_pretrained(folder, max_shard_size="60MB" if variant == "r50-two-stage" else "5GB")
    return folder / "model.safetensors" if variant == "r50-single-scale" else folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_are_the_ports(variant: str, tmp_path: Path) -> None:
    network = port(variant)
    model = load_checkpoint(write(variant, network, tmp_path), variant)
    assert not model.training
    assert model.config.category_names == COCO_NAMES
    assert model.config.num_queries == (PROPOSALS if model.config.two_stage else 300)
    assert (tmp_path / "model.safetensors.index.json").exists() == (variant == "r50-two-stage")
    pixels, mask = seeded_batch()
    with torch.no_grad():
        wanted = network(pixels, mask.long())
        got = model(pixels, mask)
    assert wanted.logits.std(dim=1).mean() > 0.1  # queries differ: the comparison says something
    torch.testing.assert_close(got["pred_logits"], wanted.logits, atol=ATOL_LOGITS, rtol=0)
    torch.testing.assert_close(got["pred_boxes"], wanted.pred_boxes, atol=ATOL_BOXES, rtol=0)


@pytest.mark.slow
def test_answers_are_the_ports_at_full_size(tmp_path: Path) -> None:
    network = port("r50")
    network.save_pretrained(tmp_path)
    model = load_checkpoint(tmp_path)
    pixels, mask = seeded_batch(((800, 1066), (750, 1000)))
    with torch.no_grad():
        wanted = network(pixels, mask.long())
        got = model(pixels, mask)
    torch.testing.assert_close(got["pred_logits"], wanted.logits, atol=ATOL_LOGITS, rtol=0)
    torch.testing.assert_close(got["pred_boxes"], wanted.pred_boxes, atol=ATOL_BOXES, rtol=0)


def small(variant: str = "r50", **changes: Any) -> nn.Module:
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[32, 32, 64, 64],
        depths=[1, 2, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    settings = {
        "backbone_config": backbone,
        "d_model": 64,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_n_points": 2,
        "decoder_n_points": 3,
        "num_feature_levels": 5,
        "num_queries": 12,
        "num_labels": 3,
    }
    return port(variant, **settings | changes)


def small_answers(network: nn.Module, model: nn.Module) -> tuple[Tensor, Tensor]:
    pixels, mask = seeded_batch(((64, 96), (40, 64)))
    with torch.no_grad():
        wanted, got = network(pixels, mask.long()), model(pixels, mask)
    return (got["pred_logits"] - wanted.logits).abs().max(), (got["pred_boxes"] - wanted.pred_boxes).abs().max()


def test_other_sizes_and_names(tmp_path: Path) -> None:
    network = small(id2label={0: "red", 1: "white", 2: "platelet"}, label2id={"red": 0, "white": 1, "platelet": 2})
    network.save_pretrained(tmp_path)
    model = load_checkpoint(tmp_path)
    config = model.config
    assert config.category_names == ("red", "white", "platelet")
    assert (config.num_heads, config.num_encoder_points, config.num_decoder_points) == (4, 2, 3)
    assert (config.hidden_dim, config.ffn_dim, config.num_feature_levels, config.num_queries) == (64, 48, 5, 12)
    assert (config.backbone_depths, config.backbone_widths) == ((1, 2, 1, 1), (8, 8, 16, 16))
    logits, boxes = small_answers(network, model)
    assert logits < ATOL_LOGITS
    assert boxes < ATOL_BOXES


def test_class_heads_that_transformers_tied_are_shared(tmp_path: Path) -> None:
    """transformers 5 writes one class head of a refined model; its own answers are then those of tied heads."""
    tied = small("r50-refine")
    for head in tied.class_embed:
        head.weight, head.bias = tied.class_embed[0].weight, tied.class_embed[0].bias
    tied.save_pretrained(tmp_path)
    assert "class_embed.1.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_checkpoint(tmp_path)
    assert len(model.class_embed) == 2
    logits, boxes = small_answers(tied, model)
    assert logits < ATOL_LOGITS
    assert boxes < ATOL_BOXES


def test_released_names_with_all_aliases(tmp_path: Path) -> None:
    """Older versions wrote every tied tensor under each of its names."""
    network = small("r50-refine")
    write_released(network, tmp_path)
    file = tmp_path / "pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)
    for key in [key for key in tensors if key.startswith("model.decoder.bbox_embed.")]:
        tensors[key.removeprefix("model.decoder.")] = tensors[key]
    for index in range(2):
        for part in ("weight", "bias"):
            tensors[f"class_embed.{index}.{part}"] = getattr(network.class_embed[index], part).detach()
    tensors["model.backbone.conv_encoder.model.bn1.num_batches_tracked"] = torch.tensor(5)
    torch.save(tensors, file)
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "config.json").read_text()) | {"id2label": {}})
    )
    model = load_checkpoint(tmp_path)
    assert model.config.category_names == ("class 0", "class 1", "class 2")
    logits, _ = small_answers(network, model)
    assert logits < ATOL_LOGITS
    tensors["bbox_embed.0.layers.0.bias"] = tensors["bbox_embed.0.layers.0.bias"] + 1
    torch.save(tensors, file)
    with pytest.raises(CheckpointError, match="one tensor in this network"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "gelu"}, "activation_function = 'gelu'"),
        ({"position_embedding_type": "learned"}, "position_embedding_type = 'learned'"),
        ({"num_queries": 99}, "num_queries = 99, its tensors 12"),
        ({"encoder_attention_heads": 7, "decoder_attention_heads": 7}, "no multiple of 7 heads"),
        ({"decoder_attention_heads": 8}, "decoder_attention_heads = 8"),
        ({"with_box_refine": True}, r"missing keys: 'bbox_embed\.1"),
        ({"model_type": "detr"}, "of type 'detr'"),
        ({"id2label": {"1": "a", "2": "b", "3": "c"}}, "count from 0"),
        ({"id2label": {"0": "a", "1": "b"}}, "2 entries for 3 classes"),
    ],
)
def test_a_config_that_contradicts_is_an_error(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    network = small()
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


def test_missing_and_surplus_keys_are_named_as_in_the_file(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    moved = tensors.pop("model.decoder.layers.1.fc1.bias")
    save_file(tensors | {"model.decoder.layers.1.fc9.bias": moved}, file)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path)
    assert "missing key: 'model.decoder.layers.1.fc1.bias'" in str(caught.value)
    assert "surplus key: 'model.decoder.layers.1.fc9.bias'" in str(caught.value)
    tensors["model.decoder.layers.1.fc1.bias"] = moved
    del tensors["model.decoder.layers.0.self_attn.k_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"missing key: 'model\.decoder\.layers\.0\.self_attn\.k_proj\.weight'"):
        load_checkpoint(tmp_path)


def test_a_broken_index_is_an_error(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="not an index"):
        load_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="not in the folder"):
        load_checkpoint(tmp_path)
