"""Engines of TensorRT-RTX, really built: its builder needs no GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

import plugins
from bundle import Canvas
from export import op
from export.build import PLUGIN_LAYER, SAMPLE_LAYER, NotBuilt, NotParsed, PluginMissing, Profile, build, parse
from export.flavour import FLAVOURS, Flavour, NotInstalled, TargetError
from tests.conftest import has_gpu
from tests.export.conftest import Exported
from tests.export.small import CANVASES, TRACED

TARGETS = ("sm86", "sm89")
SHAPES: dict[str, list[int | str]] = {
    "value": ["N", 20, 8, 4],
    "spatial_shapes": [2, 2],
    "reference_points": ["N", 7, 2, 2],
    "sampling_offsets": ["N", 7, 8, 2, 4, 2],
    "attention_logits": ["N", 7, 8, 8],
}


@pytest.fixture(scope="module")
def rtx() -> Flavour:
    flavour = FLAVOURS["rtx"]
    try:
        flavour.load()
    except NotInstalled as error:
        pytest.skip(str(error))
    if plugins.tensorrt_library() is None:
        pytest.skip("the TensorRT plugin was not built: no nvcc, or no TensorRT headers")
    return flavour


def one_node(shapes: dict[str, list[int | str]] = SHAPES, op_type: str = op.NAME, **types: int) -> onnx.ModelProto:
    """A graph of nothing but the op, without the function."""
    node = helper.make_node(op_type, op.INPUTS, ["output"], name="attention", domain=op.DOMAIN)
    types = {"spatial_shapes": TensorProto.INT64} | types
    inputs = [
        helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), shape) for name, shape in shapes.items()
    ]
    return model_of(node, inputs)


def model_of(node: onnx.NodeProto, inputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", op.OPSET), helper.make_opsetid(op.DOMAIN, op.VERSION)]
    return helper.make_model(helper.make_graph([node], "one", inputs, [output]), opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("variant", TRACED)
def test_every_attention_is_a_plugin_layer(rtx: Flavour, exported: Callable[[str], Exported], variant: str) -> None:
    done = exported(variant)
    model = done.proto()
    assert model.functions, "the file has the function, too, which the parser would take"
    before = model.SerializeToString()
    report = parse(model, rtx).report()
    config = done.model.config
    assert report.count(PLUGIN_LAYER) == config.num_encoder_layers + config.num_decoder_layers
    assert report.count(SAMPLE_LAYER) == 0
    assert set(report.plugin_inputs) == {("float", "int64", "float", "float", "float")}
    assert report.count("CONVOLUTION", "float") == report.count("CONVOLUTION") > 0
    assert model.SerializeToString() == before, "the caller's model is left as it was"


def test_an_engine_for_two_gpus(rtx: Flavour, exported: Callable[[str], Exported]) -> None:
    model = exported("r50").proto()
    engine = build(parse(model, rtx), [Profile(CANVASES[0], max_batch_size=4, best_batch_size=2)], TARGETS)
    assert engine.targets == TARGETS
    assert (engine.flavour, engine.version) == ("rtx", rtx.load().__version__)
    assert engine.report.count(PLUGIN_LAYER) == 2
    # Once a layer and GPU: by this name the engine finds the plugin again.
    assert engine.content.count(op.NAME.encode()) == 2 * len(TARGETS)
    library = plugins.tensorrt_library()
    assert library is not None
    assert library.read_bytes() not in engine.content


def test_an_engine_can_bring_the_plugin(rtx: Flavour, exported: Callable[[str], Exported]) -> None:
    model = exported("r50").proto()
    engine = build(parse(model, rtx), [Profile(CANVASES[0], 1)], ["sm86"], embed_plugin=True)
    library = plugins.tensorrt_library()
    assert library is not None
    assert library.read_bytes() in engine.content


def test_a_half_node_has_half_inputs_and_float_points(rtx: Flavour) -> None:
    half = TensorProto.FLOAT16
    model = one_node(value=half, sampling_offsets=half, attention_logits=half)
    model.graph.output[0].type.tensor_type.elem_type = half
    report = parse(model, rtx).report()
    assert report.plugin_inputs == (("half", "int64", "float", "half", "half"),)
    assert report.count(PLUGIN_LAYER, "half") == report.total == 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param(
            one_node(SHAPES | {"reference_points": ["N", 6, 2, 2]}),
            r"MSDeformAttn: reference_points must be \[\?, 7, 2, 2\], got \[\?, 6, 2, 2\]",
            id="shapes",
        ),
        pytest.param(
            one_node(SHAPES | {"attention_logits": ["N", 7, 8, 9]}),
            r"MSDeformAttn: attention_logits must be \[\?, 7, 8, 8\], got \[\?, 7, 8, 9\]",
            id="weights",
        ),
        pytest.param(
            one_node(reference_points=TensorProto.FLOAT16),
            "MSDeformAttn: reference_points must be float, is half",
            id="types",
        ),
    ],
)
def test_what_the_plugin_refuses_is_named(rtx: Flavour, model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(NotParsed, match=rf"^node attention \(MSDeformAttn\): {message}$"):
        parse(model, rtx)


def test_a_plugin_nobody_registered_is_named(rtx: Flavour) -> None:
    with pytest.raises(NotParsed, match=r"^node attention \(OtherAttn\): Plugin not found, are the plugin name"):
        parse(one_node(op_type="OtherAttn"), rtx)


def test_grid_sample_is_refused(rtx: Flavour) -> None:
    node = helper.make_node("GridSample", ["x", "grid"], ["output"])
    shapes = {"x": [1, 3, 8, 8], "grid": [1, 5, 5, 2]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    with pytest.raises(NotParsed, match="^0 MSDeformAttn nodes became 0 plugin layers and 1 GridSample layers$"):
        parse(model_of(node, inputs), rtx)


def test_without_the_plugin_nothing_is_parsed(rtx: Flavour, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = tmp_path / "libmissing.so"
    with pytest.raises(PluginMissing, match=r"libmissing\.so brings no plugin MSDeformAttn: Unable to load library"):
        parse(one_node(), rtx, library=missing)
    monkeypatch.setattr(plugins, "tensorrt_library", lambda: None)
    with pytest.raises(PluginMissing, match=r"was not built.*python -m plugins\.build"):
        parse(one_node(), rtx)


def test_a_network_of_other_inputs_is_refused(rtx: Flavour) -> None:
    with pytest.raises(NotBuilt, match="input 'value'; those of a bundle are images, sizes"):
        build(parse(one_node(), rtx), [Profile(CANVASES[0], 1)], TARGETS)


def test_targets(rtx: Flavour) -> None:
    assert rtx.targets(["sm120", "sm86", "sm86"]) == ("sm120", "sm86")
    for unknown in ("sm90", "current", "86"):
        with pytest.raises(TargetError, match=rf"^TensorRT-RTX builds for sm75, sm80, .*sm120.*, not for {unknown}$"):
            rtx.targets(["sm86", unknown])


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
@pytest.mark.parametrize("name", FLAVOURS)
def test_without_a_gpu_targets_must_be_named(name: str) -> None:
    with pytest.raises((TargetError, NotInstalled), match="no NVIDIA GPU to build for|not installed"):
        FLAVOURS[name].targets([])


@pytest.mark.parametrize(
    ("name", "modules", "command"),
    [
        ("tensorrt", ["tensorrt"], "pip install tensorrt"),
        ("rtx", ["tensorrt_rtx", "tensorrt_rtx_bindings"], r"pip install 'ddetr\[rtx\]'"),
    ],
)
def test_what_is_not_installed_is_said(
    monkeypatch: pytest.MonkeyPatch, name: str, modules: list[str], command: str
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(NotInstalled, match=f"is not installed: {command}$"):
        FLAVOURS[name].load()


def test_a_parser_that_would_end_the_process_is_not_used(rtx: Flavour) -> None:
    """The wheel's parser, loaded by its own folder, looks for a library that is not there, and terminates."""
    code = (
        "import tensorrt_rtx_libs, pathlib, sys\n"
        "folder = pathlib.Path(tensorrt_rtx_libs.__file__).parent\n"
        "from export.flavour import FLAVOURS, NotInstalled\n"
        "try:\n    FLAVOURS['rtx'].load()\nexcept NotInstalled as error:\n    print(error)\n"
        "else:\n    print('has the name' if (folder / 'libtensorrt_rtx.so').exists() else 'loaded')\n"
    )
    pytest.importorskip("tensorrt_rtx_libs", reason="TensorRT-RTX is not installed from wheels")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "imported before runtime.flavour" in done.stdout or "has the name" in done.stdout


def test_who_runs_an_engine_for_rtx_gives_it_its_memory(rtx: Flavour) -> None:
    trt = rtx.load()
    config = trt.Builder(trt.Logger()).create_builder_config()
    rtx.aim(config, TARGETS)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION), "or its batches could not be CUDA graphs"


def test_a_profile_is_checked() -> None:
    with pytest.raises(ValueError, match=r"best batch size 5 is not in 1\.\.4"):
        Profile(Canvas(height=64, width=96), max_batch_size=4, best_batch_size=5)
