"""Convolutions and linear layers of the native library: every case on every path of the kernel, in ONNX Runtime."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export import native_layers, op
from tests.plugins.test_onnxruntime_op import library, node_types, session

__all__ = ["library"]  # the fixture

Array = NDArray[np.float32]

PATHS = ("avx512", "avx2", "portable")
# Of outputs of order one, against float64. Measured 2e-6, and 1e-5 of Winograd's at 512 channels.
ATOL, ATOL_WINOGRAD = 1e-5, 4e-5


@dataclass(frozen=True)
class Case:
    """A convolution, or with `window` 0 a linear layer over `size`'s last axes but one."""

    name: str
    size: tuple[int, ...] = (1, 12, 20)  # N, H, W; of a linear layer any axes
    channels: tuple[int, int] = (32, 64)  # C, K
    window: int = 3
    stride: int = 1
    dilation: int = 1
    pads: tuple[int, int, int, int] = (1, 1, 1, 1)
    tail: str = ""  # "", "Relu", "Add", "AddRelu"
    seed: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def op_name(self) -> str:
        return ("NhwcConv" if self.window else "Linear") + self.tail

    @property
    def atol(self) -> float:
        return ATOL_WINOGRAD if (self.window, self.stride, self.dilation) == (3, 1, 1) else ATOL

    def draw(self) -> dict[str, Array]:
        """x, the weight as ONNX's Conv or MatMul has it, the bias, and the shortcut where one is added."""
        random = np.random.default_rng([self.seed, *self.size, *self.channels, self.window])
        c, k = self.channels
        taps = max(1, self.window) ** 2
        weight = random.standard_normal((k, c, self.window, self.window) if self.window else (c, k))
        inputs = {
            "x": np.maximum(random.standard_normal((*self.size, c)), 0),
            "weight": weight * np.sqrt(2 / (c * taps)),
            "bias": random.standard_normal(k) / 4,
        }
        if "Add" in self.tail:
            inputs["shortcut"] = random.standard_normal(self.answer(inputs, shape_only=True).shape)
        return {name: array.astype(np.float32) for name, array in inputs.items()}

    def answer(self, inputs: dict[str, Array], shape_only: bool = False) -> NDArray[np.float64]:
        """In float64, as plainly as the formula."""
        x, weight = inputs["x"].astype(np.float64), inputs["weight"].astype(np.float64)
        if not self.window:
            result = x @ weight
        else:
            top, left, bottom, right = self.pads
            x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
            reach = self.dilation * (self.window - 1) + 1
            height, width = ((side - reach) // self.stride + 1 for side in x.shape[1:3])
            result = np.zeros((x.shape[0], height, width, weight.shape[0]))
            for i in range(self.window if not shape_only else 0):
                for j in range(self.window):
                    y0, x0 = i * self.dilation, j * self.dilation
                    rows = slice(y0, y0 + (height - 1) * self.stride + 1, self.stride)
                    columns = slice(x0, x0 + (width - 1) * self.stride + 1, self.stride)
                    result += x[:, rows, columns] @ weight[:, :, i, j].T
        if shape_only:
            return result
        result = result + inputs["bias"]
        if "Add" in self.tail:
            result = result + inputs["shortcut"]
        return np.maximum(result, 0) if "Relu" in self.tail else result

    def model(self, inputs: dict[str, Array], with_function: bool = False) -> onnx.ModelProto:
        """A graph of nothing but the op; weight and bias are constants, every axis is dynamic."""
        c, k = self.channels
        weight = inputs["weight"]
        if self.window:
            lanes_last = weight.reshape(k // 32, 32, c, self.window, self.window).transpose(0, 3, 4, 2, 1)
        else:
            lanes_last = weight.reshape(c, k // 32, 32).transpose(1, 0, 2)
        return one_node(self.op_name, lanes_last, inputs["bias"], len(self.size) + 1, self.attributes(), with_function)

    def attributes(self) -> dict[str, Sequence[int]]:
        if not self.window:
            return {}
        return {"strides": [self.stride] * 2, "dilations": [self.dilation] * 2, "pads": list(self.pads)}


def one_node(
    name: str,
    weight: Array,
    bias: Array,
    rank: int = 4,
    attributes: dict[str, Sequence[int]] | None = None,
    with_function: bool = False,
) -> onnx.ModelProto:
    names = ["x", "shortcut"] if "Add" in name else ["x"]
    node = helper.make_node(
        name, ["x", "weight", "bias", *names[1:]], ["y"], domain=op.DOMAIN, **(attributes or {})
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(each, TensorProto.FLOAT, [None] * rank) for each in names],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        [
            numpy_helper.from_array(np.ascontiguousarray(weight), "weight"),
            numpy_helper.from_array(np.ascontiguousarray(bias), "bias"),
        ],
    )
    opsets = [helper.make_opsetid("", op.OPSET), helper.make_opsetid(op.DOMAIN, op.VERSION)]
    functions = native_layers.functions({name}) if with_function else []
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)


def run(runs: ort.InferenceSession, inputs: dict[str, Array]) -> Array:
    answer: Array = runs.run(None, {name: inputs[name] for name in ("x", "shortcut") if name in inputs})[0]
    return answer


NO_PADS = (0, 0, 0, 0)
CASES = [
    Case("one tile", size=(1, 4, 4)),
    Case("one pixel", size=(1, 1, 1)),
    Case("one row", size=(1, 1, 37), tail="Relu"),
    Case("one column", size=(1, 53, 1), tail="Add"),
    Case("no multiple of a tile", size=(2, 13, 19), tail="AddRelu"),
    Case("no padding", size=(1, 9, 11), pads=NO_PADS),
    Case("uneven padding", size=(1, 9, 11), pads=(0, 2, 1, 0)),
    Case("fewest channels", channels=(16, 32), tail="Relu"),
    Case("channels that the lanes do not divide", channels=(48, 96)),
    Case("tiles are shared out by output channels", size=(2, 15, 20), channels=(256, 128), tail="AddRelu"),
    Case("tiles are shared out by place", size=(1, 60, 80), tail="Relu"),
    Case("deep", size=(1, 7, 10), channels=(512, 64)),
    Case("stride 2", size=(2, 15, 22), stride=2, tail="Relu"),
    Case("dilation 2", size=(1, 9, 11), dilation=2, pads=(2, 2, 2, 2)),
    Case("window 1", window=1, pads=NO_PADS, tail="AddRelu"),
    Case("window 1, stride 2", size=(2, 15, 22), window=1, pads=NO_PADS, stride=2),
    Case("window 1, few pixels and many channels", size=(1, 3, 5), window=1, pads=NO_PADS, channels=(1024, 512)),
    Case("window 5", size=(1, 8, 9), window=5, pads=(2, 2, 2, 2), tail="Add"),
    Case("linear", size=(2, 77), window=0),
    Case("linear of one row", size=(), window=0, tail="Relu"),
    Case("linear of four axes", size=(2, 3, 5), window=0, tail="Add"),
    Case("linear, wide", size=(1, 500), window=0, channels=(256, 1024), tail="AddRelu"),
    Case("linear, deep", size=(1, 500), window=0, channels=(2048, 96)),
]
SOME = CASES[4], CASES[9], CASES[12], CASES[18]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, library: Path) -> Iterator[str]:
    """A path of the kernel, chosen for the test."""
    native = ctypes.CDLL(str(library))
    native.conv_cpu_path.restype = ctypes.c_char_p
    best = native.conv_cpu_path()
    if native.conv_set_cpu_path(request.param.encode()):
        pytest.skip(f"this processor has no {request.param}")
    assert native.conv_cpu_path().decode() == request.param
    yield request.param
    native.conv_set_cpu_path(best)


def check(case: Case, library: Path) -> None:
    inputs = case.draw()
    got = run(session(case.model(inputs), library), inputs)
    np.testing.assert_allclose(got, case.answer(inputs), atol=case.atol, rtol=0)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_on_every_path(case: Case, library: Path) -> None:
    check(case, library)


def test_many_tiles_of_many_weights_are_done_in_rounds(library: Path) -> None:
    check(Case("", size=(2, 39, 43), channels=(512, 256), tail="Relu"), library)


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    window = draw(st.sampled_from([1, 3, 3, 3, 5]))
    dilation = draw(st.integers(1, 2))
    reach = dilation * (window - 1) + 1
    pads = draw(st.tuples(*[st.integers(0, reach - 1)] * 4))
    side = st.integers(1, 30)
    size = (draw(st.integers(1, 3)), max(reach, draw(side)), max(reach, draw(side)))
    return Case(
        "any",
        size=size,
        channels=(16 * draw(st.integers(1, 5)), 32 * draw(st.integers(1, 3))),
        window=window,
        stride=draw(st.integers(1, 3)),
        dilation=dilation,
        pads=pads,
        tail=draw(st.sampled_from(["", "Relu", "Add", "AddRelu"])),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=40, deadline=None)
@given(case=any_case())
def test_any_case(library: Path, case: Case) -> None:
    check(case, library)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_function_of_the_file_computes_the_same_without_the_library(
    case: Case, library: Path, tmp_path: Path
) -> None:
    inputs = case.draw()
    model = case.model(inputs, with_function=True)
    onnx.checker.check_model(model)
    native, function = (session(model, each, trace_to=tmp_path) for each in (library, None))
    np.testing.assert_allclose(run(function, inputs), run(native, inputs), atol=case.atol, rtol=0)
    assert node_types(native) == {case.op_name}
    assert not node_types(function) & set(native_layers.NAMES)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_any_number_of_threads_gives_the_same_bits(case: Case, library: Path) -> None:
    inputs = case.draw()
    alone = run(session(case.model(inputs), library, threads=1), inputs)
    for threads in (2, 5):
        assert np.array_equal(run(session(case.model(inputs), library, threads=threads), inputs), alone)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("case", SOME, ids=str)
def test_an_answer_does_not_depend_on_its_neighbours(case: Case, library: Path) -> None:
    inputs = case.draw()
    runs = session(case.model(inputs), library)
    together = run(runs, inputs)
    for n in range(case.size[0]):
        alone = run(runs, {name: inputs[name][n : n + 1] for name in ("x", "shortcut") if name in inputs})
        assert np.array_equal(alone[0], together[n])


def test_one_session_answers_many_callers_at_once(library: Path) -> None:
    case = CASES[9]
    inputs = case.draw()
    shared = session(case.model(inputs), library)
    alone = run(shared, inputs)
    with ThreadPoolExecutor(4) as pool:
        assert all(np.array_equal(each, alone) for each in pool.map(lambda _: run(shared, inputs), range(20)))


def test_a_batch_of_none_is_an_empty_answer(library: Path) -> None:
    inputs = Case("", size=(1, 5, 6)).draw()
    runs = session(Case("").model(inputs), library)
    assert runs.run(None, {"x": np.zeros((0, 5, 6, 32), np.float32)})[0].shape == (0, 5, 6, 64)


NO_ROOM = [
    Case("too low", size=(1, 2, 9), pads=NO_PADS),
    Case("too narrow", size=(1, 9, 1), pads=(1, 0, 1, 1)),
    Case("too small for a dilated window", size=(1, 4, 4), dilation=2, pads=NO_PADS),
    Case("too small for a stride", size=(1, 2, 6), window=5, stride=3, pads=NO_PADS),
    Case("no rows", size=(2, 0, 6)),
    Case("no rows, window 1", size=(2, 0, 6), window=1, pads=NO_PADS),
    Case("no pictures, too low", size=(0, 2, 9), pads=NO_PADS),
]


@pytest.mark.parametrize("case", NO_ROOM, ids=str)
def test_a_window_that_does_not_fit_is_an_error_as_it_is_of_onnx_runtimes_own(case: Case, library: Path) -> None:
    model = case.model(Case("", channels=case.channels, window=case.window).draw(), with_function=True)
    x = {"x": np.zeros((*case.size, case.channels[0]), np.float32)}
    with pytest.raises(Exception, match="Invalid input shape"):
        session(model, None).run(None, x)
    reach = case.dilation * (case.window - 1) + 1
    shape, pads = (re.escape(str(list(each))) for each in (x["x"].shape, case.pads))
    message = rf"NhwcConv: x, {shape}, has no room with pads {pads} for a window that reaches over \[{reach}, {reach}\]"
    with pytest.raises(Exception, match=message):
        session(model, library).run(None, x)


def test_pads_that_hold_the_window_are_enough(library: Path) -> None:
    """A picture of no rows has outputs then: the bias alone."""
    case = Case("", size=(2, 0, 6), pads=(2, 2, 2, 2))
    inputs = Case("").draw()
    model = case.model(inputs, with_function=True)
    x = {"x": np.zeros((2, 0, 6, 32), np.float32)}
    native, function = (session(model, each).run(None, x)[0] for each in (library, None))
    assert native.shape == function.shape == (2, 2, 8, 64)
    assert np.array_equal(native, np.broadcast_to(inputs["bias"], native.shape))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_shows(library: Path, value: float) -> None:
    """Also through the ReLU; a picture's pixels far from it are none the worse."""
    inputs = Case("", size=(1, 12, 40), tail="Relu").draw()
    inputs["x"][0, 0, 0, 0] = value
    got = run(session(Case("", tail="Relu").model(inputs), library), inputs)
    assert not np.isfinite(got[0, 0, 0]).all()
    assert np.isfinite(got[0, :, 8:]).all()


ZEROS = {"NhwcConv": np.zeros((2, 3, 3, 32, 32), np.float32), "LinearAdd": np.zeros((2, 32, 32), np.float32)}
WINDOW = {"strides": [1, 1], "dilations": [1, 1], "pads": [1, 1, 1, 1]}


@pytest.mark.parametrize(
    ("name", "shapes", "message"),
    [
        ("NhwcConv", [(1, 5, 6, 48)], r"NhwcConv: x must be \[1, 5, 6, 32\], got \[1, 5, 6, 48\]"),
        ("LinearAdd", [(2, 7, 16), (2, 7, 64)], r"LinearAdd: x must be \[2, 7, 32\], got \[2, 7, 16\]"),
        ("LinearAdd", [(2, 7, 32), (2, 7, 32)], r"LinearAdd: shortcut must be \[2, 7, 64\], got \[2, 7, 32\]"),
        ("LinearAdd", [(2, 7, 32), (1, 7, 64)], r"LinearAdd: shortcut must be \[2, 7, 64\], got \[1, 7, 64\]"),
    ],
)
def test_wrong_shapes_are_errors_that_say_which(
    library: Path, name: str, shapes: list[tuple[int, ...]], message: str
) -> None:
    attributes = WINDOW if name == "NhwcConv" else {}
    model = one_node(name, ZEROS[name], np.zeros(64, np.float32), len(shapes[0]), attributes)
    inputs = {each: np.zeros(shape, np.float32) for each, shape in zip(("x", "shortcut"), shapes, strict=False)}
    with pytest.raises(Exception, match=message):
        session(model, library).run(None, inputs)


@pytest.mark.parametrize(
    ("weight", "attributes", "message"),
    [
        ((2, 3, 3, 20, 32), {}, r"weight must be \[K/32, R, S, C, 32\] with C a multiple of 16, at most 8192"),
        ((2, 3, 3, 32, 16), {}, r"got \[2, 3, 3, 32, 16\]"),
        ((2, 3, 3, 32), {}, r"weight must be \[K/32, R, S, C, 32\], got \[2, 3, 3, 32\]"),
        ((2, 3, 3, 32, 32), {"strides": [0, 1]}, "strides and dilations positive"),
        ((2, 3, 3, 32, 32), {"pads": [1, 1]}, "pads must be 4 numbers, are 2"),
    ],
)
def test_a_node_that_cannot_be_served_is_refused(
    library: Path, weight: tuple[int, ...], attributes: dict[str, list[int]], message: str
) -> None:
    model = one_node("NhwcConv", np.zeros(weight, np.float32), np.zeros(64, np.float32), 4, {**WINDOW, **attributes})
    with pytest.raises(Exception, match=message):
        session(model, library)


def test_a_weight_that_is_computed_is_refused(library: Path) -> None:
    model = one_node("NhwcConv", ZEROS["NhwcConv"], np.zeros(64, np.float32), 4, WINDOW)
    del model.graph.initializer[0]
    model.graph.input.append(helper.make_tensor_value_info("weight", TensorProto.FLOAT, [None] * 5))
    with pytest.raises(Exception, match="NhwcConv: weight must be a constant of the model"):
        session(model, library)


@pytest.mark.parametrize(
    ("files", "paid"),
    [
        pytest.param({}, None, id="no control groups"),
        pytest.param({"cpu.max": "max 100000"}, None, id="no quota"),
        pytest.param({"cpu.max": "100000 100000"}, 1, id="a core"),
        pytest.param({"cpu.max": "100001 100000"}, 2, id="more than a core"),
        pytest.param({"cpu.max": "1000 100000"}, 1, id="a hundredth of a core"),
        pytest.param({"cpu.max": "900000 100000000"}, 1, id="another period"),
        pytest.param({"cpu.max": "100000"}, None, id="half a file"),
        pytest.param({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, id="version 1, no quota"),
        pytest.param({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1, id="version 1, half"),
    ],
)
def test_work_is_cut_for_the_cores_that_the_container_may_use(
    library: Path, tmp_path: Path, files: dict[str, str], paid: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    cores = len(os.sched_getaffinity(0))
    assert ctypes.CDLL(str(library)).conv_cores(str(tmp_path).encode()) == min(cores, paid or cores)


def test_work_is_cut_for_the_cores_that_the_process_may_use(library: Path, tmp_path: Path) -> None:
    program = (
        "import ctypes, os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "print(ctypes.CDLL(sys.argv[1]).conv_cores(sys.argv[2].encode()))"
    )
    command = [sys.executable, "-c", program, str(library), str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout == "1\n"
