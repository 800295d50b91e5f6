"""ONNX Runtime's adapter of the native kernel: against the op's reference, and with inputs that are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

import plugins
from export import op
from export.trace import trace
from models import DeformableDetrConfig, build_model
from models.msda import reference_ms_deform_attn
from plugins import build
from tests.models.seeded import seed_weights

ATOL = 1e-5  # against float64, of answers of order one; grows with the sides: 6e-6 at 40 px, 1.2e-5 at 80
ATOL_NETWORK = 1e-5  # of boxes in 0..1 and scores; measured 2e-7
PYRAMID = ((12, 16), (6, 8), (3, 4), (2, 2))

Arrays = dict[str, NDArray[np.generic]]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that was built, else one that is built now."""
    built = plugins.onnxruntime_library()
    if built is not None:
        return built
    if build.compiler() is None:
        pytest.skip("no C++ compiler to build the native library with")
    return build.build(tmp_path_factory.mktemp("native"))[1]


def session(
    model: onnx.ModelProto, library: Path | None, threads: int = 2, trace_to: Path | None = None
) -> ort.InferenceSession:
    """A session on the CPU; with `trace_to`, one that is profiled."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # the errors provoked here are raised as well
    options.intra_op_num_threads = threads
    if trace_to is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(trace_to / "trace")
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def one_node(with_function: bool = False) -> onnx.ModelProto:
    """A graph of nothing but the op, every axis dynamic."""
    ranks = dict(zip(op.INPUTS, (4, 2, 4, 6, 4), strict=True))
    inputs = [
        helper.make_tensor_value_info(
            name, TensorProto.INT64 if name == "spatial_shapes" else TensorProto.FLOAT, [None] * rank
        )
        for name, rank in ranks.items()
    ]
    graph = helper.make_graph(
        [helper.make_node(op.NAME, list(op.INPUTS), ["output"], domain=op.DOMAIN)],
        "one",
        inputs,
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [None] * 3)],
    )
    opsets = [helper.make_opsetid("", op.OPSET), helper.make_opsetid(op.DOMAIN, op.VERSION)]
    functions = [op.function()] if with_function else []
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)


def drawn(
    shapes: tuple[tuple[int, int], ...] = PYRAMID,
    sides: int = 2,
    batch: int = 1,
    queries: int = 50,
    heads: int = 8,
    channels: int = 16,
    points: int = 4,
) -> Arrays:
    """Random inputs; some samples lie outside."""
    random = np.random.default_rng([sides, batch, channels, points])

    def normal(*size: int) -> NDArray[np.float32]:
        return random.standard_normal(size, np.float32)

    levels = len(shapes)
    return {
        "value": normal(batch, sum(h * w for h, w in shapes), heads, channels),
        "spatial_shapes": np.array(shapes, np.int64),
        "reference_points": random.random((batch, queries, levels, sides), np.float32) * np.float32(1.2)
        - np.float32(0.1),
        "sampling_offsets": 3 * normal(batch, queries, heads, levels, points, 2),
        "attention_logits": 2 * normal(batch, queries, heads, levels * points),
    }


def wanted(inputs: Arrays) -> NDArray[np.float64]:
    """The reference, in float64."""
    tensors = [torch.from_numpy(array) for array in inputs.values()]
    exact = [tensor if tensor.dtype == torch.int64 else tensor.double() for tensor in tensors]
    answer: NDArray[np.float64] = reference_ms_deform_attn(*exact).numpy()
    return answer


@pytest.mark.parametrize("sides", [2, 4])
@pytest.mark.parametrize(
    "case",
    [
        {"channels": 16},
        {"channels": 32, "batch": 3},
        {"channels": 7, "heads": 3},
        {"channels": 1, "heads": 1, "queries": 1},
        {"shapes": ((9, 11),), "points": 6},
        {"shapes": ((1, 1),), "points": 1},
        {"shapes": ((1, 7), (5, 1)), "batch": 3, "queries": 301},
        {"points": 64, "queries": 5},
        {"shapes": ((30, 40), (15, 20)), "queries": 1500, "heads": 2},
    ],
    ids=str,
)
def test_the_kernel_agrees_with_the_reference(library: Path, sides: int, case: dict[str, int]) -> None:
    inputs = drawn(sides=sides, **case)  # type: ignore[arg-type]
    (got,) = session(one_node(), library).run(None, inputs)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted(inputs), atol=ATOL, rtol=0)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(library: Path, threads: int) -> None:
    inputs = drawn(batch=2)
    (alone,) = session(one_node(), library, threads=1).run(None, inputs)
    for _ in range(3):
        (got,) = session(one_node(), library, threads=threads).run(None, inputs)
        assert np.array_equal(got, alone)


def test_one_session_answers_many_callers_at_once(library: Path) -> None:
    shared = session(one_node(), library)
    cases = [drawn(batch=batch, queries=queries) for batch in (1, 2) for queries in (3, 40, 77)]
    alone = [shared.run(None, case)[0] for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = list(pool.map(lambda case: shared.run(None, case)[0], cases))
            assert all(np.array_equal(mine, other) for mine, other in zip(together, alone, strict=True))


@pytest.mark.parametrize("case", [{"batch": 0}, {"queries": 0}, {"channels": 0}, {"heads": 0}], ids=str)
def test_nothing_to_do_is_done(library: Path, case: dict[str, int]) -> None:
    inputs = drawn(**case)  # type: ignore[arg-type]
    batch, _, heads, channels = inputs["value"].shape
    (got,) = session(one_node(), library).run(None, inputs)
    assert got.shape == (batch, inputs["sampling_offsets"].shape[1], heads * channels)


@pytest.mark.parametrize("name", ["value", "reference_points", "sampling_offsets", "attention_logits"])
@pytest.mark.parametrize("sides", [2, 4])
def test_what_is_not_a_number_stays_in_its_query(library: Path, name: str, sides: int) -> None:
    runs = session(one_node(), library)
    inputs = drawn(sides=sides, batch=2)
    (sound,) = runs.run(None, inputs)
    for bad in (np.nan, np.inf, -np.inf, 1e30, -3e38):
        broken = inputs[name].copy()
        broken[0, 0] = bad
        (got,) = runs.run(None, inputs | {name: broken})
        assert np.array_equal(got[1], sound[1])
        if name != "value":
            assert np.array_equal(got[0, 1:], sound[0, 1:])


WRONG = {
    "value of rank 3": ("value", lambda a: a[0], r"value must be \[N, S, M, D\], got \[255, 8, 16\]|rank"),
    "fewer heads": ("value", lambda a: a[:, :, :7], r"sampling_offsets must be \[2, 5, 7, 4, 4, 2\], got \[2, 5, 8"),
    "another batch": ("value", lambda a: a[:1], r"reference_points must be \[1, 5, 4, 2\], got \[2, 5, 4, 2\]"),
    "a pixel too few": ("value", lambda a: a[:, 1:], r"level 3 of spatial_shapes, \[2, 2\], .* the 255 pixels"),
    "a level too few": ("spatial_shapes", lambda a: a[:3], r"reference_points must be \[2, 5, 3, 2\]"),
    "no level": ("spatial_shapes", lambda a: a[:0], "L=0 levels of P=4 points"),
    "three sides": ("spatial_shapes", lambda a: np.c_[a, a[:, :1]], r"spatial_shapes must be \[4, 2\], got \[4, 3\]"),
    "a side of zero": ("spatial_shapes", lambda a: a * [[1, 1], [1, 1], [0, 1], [1, 1]], r"level 2 .* is \[0, 4\]"),
    "two negative sides": ("spatial_shapes", lambda a: -a, r"level 0 .* is \[-12, -16\], sides must be positive"),
    "sides that overflow": ("spatial_shapes", lambda a: a << 40, r"level 0 of spatial_shapes, \[13194139533312, "),
    "smaller levels": ("spatial_shapes", lambda a: np.maximum(a - 1, 1), "cover 207 pixels, value has 256"),
    "boxes of 3 sides": ("reference_points", lambda a: np.r_["-1", a, a[..., :1]], r"2 or 4\], got \[2, 5, 4, 3\]"),
    "more queries": ("reference_points", lambda a: np.r_["1", a, a], r"must be \[2, 5, 4, 2\], got \[2, 10, 4, 2\]"),
    "three coordinates": ("sampling_offsets", lambda a: np.r_["-1", a, a[..., :1]], r"got \[2, 5, 8, 4, 4, 3\]"),
    "too many points": ("sampling_offsets", lambda a: np.tile(a, (17, 1)), "L=4 levels of P=68 points; .* 1 to 256"),
    "no point": ("sampling_offsets", lambda a: a[..., :0, :], "P=0 points"),
    "fewer weights": ("attention_logits", lambda a: a[..., 1:], r"must be \[2, 5, 8, 16\], got \[2, 5, 8, 15\]"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_shapes_are_errors_that_say_which(library: Path, what: str) -> None:
    name, spoil, message = WRONG[what]
    runs = session(one_node(), library)
    inputs = drawn(batch=2, queries=5)
    spoiled = np.ascontiguousarray(spoil(inputs[name]))
    with pytest.raises(Exception, match=message):
        runs.run(None, inputs | {name: spoiled})
    (got,) = runs.run(None, inputs)  # the next call is none the worse
    np.testing.assert_allclose(got, wanted(inputs), atol=ATOL, rtol=0)


def node_types(runs: ort.InferenceSession) -> set[str]:
    """What a profiled session has run."""
    events = json.loads(Path(runs.end_profiling()).read_text())
    return {event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")}


def test_the_kernel_wins_over_the_function_of_the_file(library: Path, tmp_path: Path) -> None:
    inputs = drawn(batch=2)
    model = one_node(with_function=True)
    native, function = (session(model, each, trace_to=tmp_path) for each in (library, None))
    np.testing.assert_allclose(native.run(None, inputs)[0], function.run(None, inputs)[0], atol=ATOL, rtol=0)
    assert node_types(native) == {op.NAME}
    assert "GridSample" in node_types(function)


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    """A small network as it is published, function and all."""
    config = DeformableDetrConfig(
        backbone_block="basic",
        backbone_depths=(1, 1, 1, 1),
        backbone_widths=(8, 8, 16, 32),
        hidden_dim=32,
        num_heads=4,
        num_encoder_layers=1,
        num_decoder_layers=2,  # the first with points, the second with boxes
        num_encoder_points=3,
        ffn_dim=32,
        num_queries=20,
        num_classes=3,
        with_box_refine=True,
    )
    model = build_model(config).eval()
    seed_weights(model)
    return trace(model)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_network_answers_the_same_with_and_without(library: Path, network: onnx.ModelProto, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (2, 96, 128, 3), np.uint8)
    sizes = np.array([[96, 128], [70, 90]], np.int64)
    native, function = (session(network, each, trace_to=tmp_path) for each in (library, None))
    answers = zip(
        *(each.run(["boxes", "scores", "labels"], {"images": images, "sizes": sizes}) for each in (native, function)),
        strict=True,
    )
    for mine, theirs in answers:
        np.testing.assert_allclose(mine, theirs, atol=ATOL_NETWORK, rtol=0)
    with_kernel, without = node_types(native), node_types(function)
    assert op.NAME in with_kernel
    assert "GridSample" not in with_kernel
    assert op.NAME not in without
    assert "GridSample" in without


def test_an_older_runtime_is_told_apart(library: Path) -> None:
    """RegisterCustomOps with a table that has no newer version: an error of the runtime's own, and no crash."""
    program = """
import ctypes, sys
TEXT = ctypes.c_char_p
seen = []
@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, TEXT)
def create_status(code, message):
    seen.append((code, message.decode()))
    return 1234
table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))
@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
def get_api(version):
    return ctypes.addressof(table) if version <= 17 else None
version = ctypes.create_string_buffer(b"1.17.3")
@ctypes.CFUNCTYPE(ctypes.c_void_p)
def get_version():
    return ctypes.addressof(version)
base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p), ctypes.cast(get_version, ctypes.c_void_p))
register = ctypes.CDLL(sys.argv[1]).RegisterCustomOps
register.restype = ctypes.c_void_p
register.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
assert register(None, ctypes.addressof(base)) == 1234
print(seen)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(library)], capture_output=True, text=True, check=True, timeout=60
    )
    assert "ONNX Runtime 1.17.3 is too old, 1.24 or newer is needed" in done.stdout


def test_without_a_compiler_nothing_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.build(tmp_path) == []
    assert "no C++ compiler found" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_failing_compiler_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false --flag")
    with pytest.raises(subprocess.CalledProcessError):
        build.build(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_library_is_found_where_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "_BUILT", tmp_path)
    assert plugins.onnxruntime_library() is None
    (tmp_path / list(build.LIBRARIES)[1]).touch()
    assert plugins.onnxruntime_library() == tmp_path / "libmsda_onnxruntime.so"
