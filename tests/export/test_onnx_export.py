"""A checkpoint's way into a bundle: every variant, and what stops it."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import plugins
from bundle import BundleOccupied, Canvas, read_bundle
from export import onnx_export
from export.native_layers import NAMES
from export.onnx_export import ExportError, Request, export, main, parse_canvases, variant_of
from export.trace import trace
from export.verify import FUNCTION, KERNEL, MAX_BOX_ERROR, MAX_SCORE_ERROR, draw_pictures
from models import VARIANTS, save_checkpoint
from models.postprocess import top_detections
from tests.export.conftest import Exported
from tests.export.small import CANVASES, CATEGORY_IDS, TRACED, build, small
from tests.export.test_verify import nudged

ALONE_ATOL = 1e-5  # measured 4e-7: other summation orders, the same arithmetic


def session(path: Path) -> onnxruntime.InferenceSession:
    """As any ONNX Runtime opens it: no library is registered, so the op is its function."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("variant", TRACED)
def test_every_variant_is_exported_and_agrees(exported: Callable[[str], Exported], variant: str) -> None:
    done = exported(variant)
    manifest = done.bundle.manifest
    engines = [FUNCTION, KERNEL] if plugins.onnxruntime_library() else [FUNCTION]
    assert [(record.canvas, record.batch_size, record.engine) for record in manifest.parity] == [
        (canvas, size, engine) for canvas in (CANVASES[1], CANVASES[0]) for size in (1, 3) for engine in engines
    ]
    for record in manifest.parity:
        assert 0 < record.max_box_error <= MAX_BOX_ERROR / 10  # well inside the limit, or something is off
        assert 0 < record.max_score_error <= MAX_SCORE_ERROR / 10
        assert record.detections_compared == 48 * record.batch_size
    layers = done.model.config.num_encoder_layers + done.model.config.num_decoder_layers
    assert [node.op_type for node in done.proto().graph.node].count("MSDeformAttn") == layers


@pytest.mark.parametrize("variant", TRACED)
def test_the_graph_is_laid_out_for_a_cpu(exported: Callable[[str], Exported], variant: str) -> None:
    """Layers as ops of the native library; late values where the model's pictures are large enough."""
    done = exported(variant)
    proto, config = done.proto(), done.model.config
    types = Counter(node.op_type for node in proto.graph.node)
    assert types["LinearRelu"] >= config.num_encoder_layers + config.num_decoder_layers  # of the feed-forward networks
    assert types["LinearAdd"] >= 2 * config.num_encoder_layers + 3 * config.num_decoder_layers  # the shortcuts
    assert {function.name for function in proto.functions} == set(types) & {"MSDeformAttn", *NAMES}
    late = [tensor.name for tensor in proto.graph.initializer if tensor.name.endswith("value_weight")]
    assert len(late) == (config.num_decoder_layers if variant == "r50-refine" else 0)
    if variant == "r50-refine":
        plain = trace(done.model)
        assert {node.op_type for node in plain.graph.node if node.domain} == {"MSDeformAttn"}
        assert [function.name for function in plain.functions] == ["MSDeformAttn"]
        assert not [tensor.name for tensor in plain.graph.initializer if tensor.name.endswith("value_weight")]


@pytest.mark.parametrize("variant", ["r50-two-stage", "r50-single-scale"])
def test_inputs_and_outputs_are_the_contract(exported: Callable[[str], Exported], variant: str) -> None:
    opened = session(exported(variant).bundle.onnx_path)
    assert [(i.name, i.type, i.shape) for i in opened.get_inputs()] == [
        ("images", "tensor(uint8)", ["N", "H", "W", 3]),
        ("sizes", "tensor(int64)", ["N", 2]),
    ]
    assert [(o.name, o.type, o.shape) for o in opened.get_outputs()] == [
        ("boxes", "tensor(float)", ["N", 48, 4]),
        ("scores", "tensor(float)", ["N", 48]),
        ("labels", "tensor(int64)", ["N", 48]),
    ]


@pytest.mark.parametrize("variant", ["r50-two-stage", "r50-single-scale-dc5"])
@pytest.mark.parametrize(("height", "width", "count"), [(128, 160, 2), (100, 77, 1)])
def test_batch_and_canvas_are_dynamic(
    exported: Callable[[str], Exported], variant: str, height: int, width: int, count: int
) -> None:
    """Sizes never traced, one of them no multiple of any stride, against PyTorch on the same pixels."""
    done = exported(variant)
    pictures = draw_pictures(Canvas(height=height, width=width), [(1.0, 0.8), (0.6, 1.0)][:count], seed=5)
    boxes, scores, labels = session(done.bundle.onnx_path).run(
        None, {"images": pictures.images, "sizes": pictures.sizes}
    )
    config = done.model.config
    mean, std = torch.tensor(config.pixel_mean), torch.tensor(config.pixel_std)
    values = torch.zeros(count, 3, height, width)
    mask = torch.zeros(count, height, width, dtype=torch.bool)
    for slot, (h, w) in enumerate(pictures.sizes.tolist()):
        pixels = torch.from_numpy(pictures.images[slot, :h, :w]) / 255
        values[slot, :, :h, :w] = ((pixels - mean) / std).permute(2, 0, 1)
        mask[slot, :h, :w] = True
    with torch.inference_mode():
        outputs = done.model(values, mask)
    want = top_detections(outputs["pred_logits"], outputs["pred_boxes"], 100)
    np.testing.assert_allclose(scores, want[1].numpy(), atol=1e-4)
    clear = np.flatnonzero(np.abs(np.diff(scores, axis=1)).min(0) > 1e-4)[:10]  # ranks that no rounding swaps
    clear = clear[np.isin(clear - 1, clear) | (clear == 0)]
    ids = np.asarray(config.category_ids or range(config.num_classes))
    np.testing.assert_array_equal(labels[:, clear], ids[want[2].numpy()][:, clear])
    np.testing.assert_allclose(boxes[:, clear], want[0].numpy()[:, clear], atol=1e-4)


@pytest.mark.parametrize("variant", TRACED)
def test_a_picture_alone_and_in_a_batch_gives_the_same(exported: Callable[[str], Exported], variant: str) -> None:
    opened = session(exported(variant).bundle.onnx_path)
    pictures = draw_pictures(CANVASES[0], [(1.0, 1.0), (0.5, 0.7), (0.8, 0.4)], seed=6)
    together = opened.run(None, {"images": pictures.images, "sizes": pictures.sizes})
    for slot in range(3):
        one = slice(slot, slot + 1)
        alone = opened.run(None, {"images": pictures.images[one], "sizes": pictures.sizes[one]})
        np.testing.assert_allclose(alone[1][0], together[1][slot], atol=ALONE_ATOL)


def test_what_lies_beyond_the_size_is_not_seen(exported: Callable[[str], Exported]) -> None:
    """A canvas may be handed on with an old picture's pixels in the padding."""
    opened = session(exported("r50-two-stage").bundle.onnx_path)
    pictures = draw_pictures(CANVASES[0], [(0.6, 0.7)], seed=7)
    clean = opened.run(None, {"images": pictures.images, "sizes": pictures.sizes})
    h, w = pictures.sizes[0]
    pictures.images[0, h:], pictures.images[0, :, w:] = 200, 90
    for a, b in zip(clean, opened.run(None, {"images": pictures.images, "sizes": pictures.sizes}), strict=True):
        np.testing.assert_array_equal(a, b)


def test_labels_are_category_ids_and_scores_descend(exported: Callable[[str], Exported]) -> None:
    done = exported("r50-two-stage")
    pictures = draw_pictures(CANVASES[0], [(1.0, 1.0)], seed=8)
    _, scores, labels = session(done.bundle.onnx_path).run(None, {"images": pictures.images, "sizes": pictures.sizes})
    assert set(labels.ravel().tolist()) == set(CATEGORY_IDS)
    assert (np.diff(scores) <= 0).all()


def test_the_manifest_says_what_was_exported(exported: Callable[[str], Exported]) -> None:
    done = exported("r50-two-stage")
    manifest = done.bundle.manifest
    assert (manifest.model.name, manifest.model.version) == ("cells", "7")
    assert manifest.variant == "custom-two-stage"
    assert manifest.categories == dict(zip(CATEGORY_IDS, "abcd", strict=True))
    assert (manifest.resize.shortest, manifest.resize.longest) == (64, 96)
    assert manifest.canvases == CANVASES
    assert (manifest.max_detections, manifest.precision) == (48, "fp32")
    assert manifest.built_with["torch"] == torch.__version__
    assert set(manifest.hashes) == {"onnx", "checkpoint", "proof"}
    assert done.bundle.checkpoint_path is None
    figures = "\n".join(done.said)
    for record in manifest.parity:
        assert f"{record.max_score_error:.1e}" in figures


@pytest.mark.parametrize("variant", TRACED)
def test_the_file_names_nothing_of_its_makers_machine(exported: Callable[[str], Exported], variant: str) -> None:
    done = exported(variant)
    content = done.bundle.onnx_path.read_bytes()
    assert not re.findall(rb"(?<![\w.])/\w+/[\w./-]+|[\w/]+\.py\b", content)
    proto = done.proto()
    assert not proto.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
    assert not proto.graph.value_info
    assert {tensor.data_type for tensor in proto.graph.initializer} <= {
        onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL,
    }  # fmt: skip


@pytest.mark.slow
def test_the_same_weights_give_the_same_bytes(exported: Callable[[str], Exported]) -> None:
    done = exported("r50-single-scale")
    assert trace(done.model, for_cpu=True).SerializeToString(deterministic=True) == done.bundle.onnx_path.read_bytes()


def test_disagreement_leaves_the_output_untouched(
    exported: Callable[[str], Exported],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = exported("r50-two-stage")
    output = tmp_path / "bundle"
    monkeypatch.setattr(onnx_export, "trace", lambda _, **__: done.proto())
    argv = ["--checkpoint", str(done.checkpoint), "--output", str(output), "--canvases", "64x96", "--with-checkpoint"]
    assert main(argv) == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    assert set(before) == {"manifest.json", "model.onnx", "model.safetensors", "proof.npz"}
    assert json.loads(before["manifest.json"])["model"] == {"name": "custom-two-stage", "version": "1"}
    assert read_bundle(output).checkpoint_path is not None

    bad = nudged(done.proto(), "model.class_embed.0.bias", 0.5)
    monkeypatch.setattr(onnx_export, "trace", lambda _, **__: bad)
    capsys.readouterr()
    assert main(argv) == 1
    told = capsys.readouterr()
    assert re.fullmatch(
        r".*: score error 0\.\d+ exceeds 0\.001 \(canvas .*, batch of 1, slot 0, onnxruntime\)\n", told.err
    )
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_with_other_things_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleOccupied, match=r"thesis\.txt"):
        export(Request(tmp_path / "none.safetensors", tmp_path))


@pytest.mark.parametrize("name", ["rtx-sm86-fp16.engine", "model-int8.onnx"])
def test_a_bundle_with_what_an_export_does_not_make_is_replaced_only_if_asked_to(tmp_path: Path, name: str) -> None:
    for file in ("manifest.json", "model.onnx", name):
        (tmp_path / file).write_text("{}")
    with pytest.raises(ExportError, match=f"holds {name}.*or --replace it"):
        export(Request(tmp_path / "none.safetensors", tmp_path))
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        export(Request(tmp_path / "none.safetensors", tmp_path, replace=True))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--checkpoint", "none.pth"], "no checkpoint at none.pth"),
        (["--checkpoint", __file__], "not a checkpoint"),
    ],
)
def test_what_is_wrong_is_one_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, "--output", str(tmp_path / "bundle")]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), PermissionError("no"), MemoryError()]
)
def test_what_the_machine_lacks_is_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("export.onnx_export.export", fails)
    assert main(["--checkpoint", "weights.pth", "--output", str(tmp_path / "bundle")]) == 1
    said = capsys.readouterr().err
    assert (str(error) or "MemoryError") in said
    assert said.count("\n") == 1


def test_a_canvas_too_small_for_the_queries_is_refused(tmp_path: Path) -> None:
    save_checkpoint(build(small("r50-two-stage")), tmp_path / "weights.safetensors")
    request = Request(tmp_path / "weights.safetensors", tmp_path / "bundle", canvases=(Canvas(height=16, width=24),))
    with pytest.raises(ExportError, match="canvas 16x24 has 8 pixels on all levels, fewer than 12 queries"):
        export(request)


def test_a_picture_that_no_canvas_holds_is_said(
    exported: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = exported("r50-two-stage")
    monkeypatch.setattr(onnx_export, "trace", lambda _, **__: done.proto())
    said: list[str] = []
    export(Request(done.checkpoint, tmp_path / "bundle", canvases=(Canvas(height=64, width=96),)), said.append)
    warnings = [line for line in said if line.startswith("warning")]
    assert len(warnings) == 2, "pictures 4/3 and 2 times as high as wide"
    assert not [line for line in done.said if line.startswith("warning")]


@pytest.mark.parametrize("text", ["800", "800x", "x800", "0x800", "-1x8", "800x1088;1088x800", "", "axb"])
def test_canvases_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not HEIGHTxWIDTH"):
        parse_canvases(text)


def test_canvases_are_height_by_width() -> None:
    wide, high = Canvas(height=800, width=1088), Canvas(height=1088, width=800)
    assert parse_canvases("800x1088, 1088X800,800x1088") == (wide, high)


def test_variants_are_recognised() -> None:
    assert [variant_of(config) for config in VARIANTS.values()] == list(VARIANTS)
    fine_tuned = replace(VARIANTS["r50-refine"], num_classes=3, num_queries=100, resize_shortest=480)
    assert variant_of(fine_tuned) == "r50-refine"
    assert [variant_of(small(name)) for name in VARIANTS] == [
        "custom-single-scale", "custom-single-scale-dc5", "custom-multi-scale", "custom-refine", "custom-two-stage",
    ]  # fmt: skip


def test_a_card_goes_beside_the_model(
    exported: Callable[[str], Exported],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = exported("r50-two-stage")
    monkeypatch.setattr(onnx_export, "trace", lambda _, **__: done.proto())
    card, output = tmp_path / "README.md", tmp_path / "bundle"
    argv = ["--checkpoint", str(done.checkpoint), "--output", str(output), "--canvases", "64x96", "--attach", str(card)]
    assert main(argv) == 1
    assert f"{card}, to be put beside the model, does not exist" in capsys.readouterr().err
    card.write_text("# a card")
    assert main(argv) == 0
    assert (output / "README.md").read_text() == "# a card"
