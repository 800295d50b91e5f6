"""TensorRT's adapter, called as an engine that runs would call it; that engines are built with it: tests/export."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import plugins
from export import op
from plugins import build
from tests.conftest import has_gpu
from tests.plugins import cases
from tests.plugins.cases import CASES, WRONG, Case

FLOAT, HALF, INT32, INT64, BFLOAT16 = 0, 1, 3, 8, 7  # nvinfer1::DataType
LINEAR, CHANNELS_OF_TWO = 0, 1  # nvinfer1::TensorFormat: kLINEAR, kCHW2
RANK = 6
TYPES = {np.dtype(np.float32): FLOAT, np.dtype(np.float16): HALF, np.dtype(np.int64): INT64}
# The sides of the levels are values, on the device: what only they contradict, no host can see.
UNSEEN = {"a pixel too few", "a side of zero", "negative sides", "sides that overflow", "smaller levels"}


@pytest.fixture(scope="module")
def library() -> Path:
    built = plugins.tensorrt_library()
    if built is None:
        pytest.skip("the TensorRT plugin was not built: no nvcc, or no TensorRT headers")
    return built


class Host:
    """tensorrt_host.cpp, compiled: a TensorRT of the headers' version, without its library."""

    def __init__(self, program: Path, library: Path, with_logger: bool = True) -> None:
        self.c = ctypes.CDLL(str(program))
        for name in ("host_creator_name", "host_creator_version", "host_creator_namespace", "host_logged"):
            getattr(self.c, name).restype = ctypes.c_char_p
        self.creators = self.c.host_open(str(library).encode(), with_logger)
        assert self.c.host_create(0) == 0

    def logged(self) -> list[str]:
        text: bytes = self.c.host_logged()
        return text.decode().splitlines()

    def creator(self, index: int) -> tuple[str, str, str]:
        texts = (self.c.host_creator_name, self.c.host_creator_version, self.c.host_creator_namespace)
        return tuple(text(index).decode() for text in texts)

    def output_type(self, types: Sequence[int]) -> int:
        return self.c.host_output_type((ctypes.c_int32 * 5)(*types))

    def supports(self, position: int, types: Sequence[int], formats: Sequence[int] = (LINEAR,) * 6) -> bool:
        described = self._described([(1, 1, 1, 1)] * 6, types, formats)
        return bool(self.c.host_supports(position, *described))

    def on_shape_change(self, shapes: Sequence[tuple[int, ...]], value_type: int = FLOAT) -> int:
        return self.c.host_on_shape_change(*self._described(shapes, types_of(value_type)))

    def enqueue(self, shapes: Sequence[tuple[int, ...]], value_type: int, pointers: Sequence[int | None]) -> int:
        """`pointers` are those of the five inputs and of the output, on the device."""
        described = self._described(shapes, types_of(value_type))
        return self.c.host_enqueue(*described, (ctypes.c_void_p * 5)(*pointers[:5]), ctypes.c_void_p(pointers[5]))

    def _described(
        self, shapes: Sequence[tuple[int, ...]], types: Sequence[int], formats: Sequence[int] = (LINEAR,) * 6
    ) -> tuple[ctypes.Array[ctypes.c_int64] | ctypes.Array[ctypes.c_int32], ...]:
        sizes = [size for shape in shapes for size in (*shape, *(0,) * (RANK - len(shape)))]
        ranks = [len(shape) for shape in shapes]
        return (
            (ctypes.c_int64 * 36)(*sizes),
            *((ctypes.c_int32 * 6)(*numbers) for numbers in (ranks, types, formats)),
        )


def types_of(value: int) -> tuple[int, ...]:
    """Of the five inputs and the output."""
    return (value, INT64, FLOAT, value, value, value)


def shapes_of(inputs: cases.Arrays) -> list[tuple[int, ...]]:
    value, offsets = inputs["value"], inputs["sampling_offsets"]
    output = (value.shape[0], offsets.shape[1], value.shape[-2] * value.shape[-1])
    return [*(array.shape for array in inputs.values()), output]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    command, headers = build.compiler(), build.tensorrt_includes()
    if command is None or headers is None:
        pytest.skip("no C++ compiler, or no TensorRT headers, to compile the host with")
    built = tmp_path_factory.mktemp("host") / "host.so"
    source = Path(__file__).with_name("tensorrt_host.cpp")
    flags = ["-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *(f"-isystem{path}" for path in headers)]
    subprocess.run([*command, *flags, str(source), "-o", str(built), "-ldl"], check=True)
    return built


@pytest.fixture(scope="module")
def host(program: Path, library: Path) -> Host:
    return Host(program, library)


@pytest.fixture(autouse=True)
def nothing_logged(request: pytest.FixtureRequest) -> None:
    if "host" in request.fixturenames:
        request.getfixturevalue("host").logged()


def test_parsers_that_look_in_either_namespace_find_it(host: Host) -> None:
    assert host.creators == 2
    assert {host.creator(index) for index in range(2)} == {(op.NAME, "1", ""), (op.NAME, "1", op.DOMAIN)}
    assert [host.c.host_field_count(index) for index in range(2)] == [0, 0], "the op has no attributes"
    assert [host.c.host_create(index) for index in (1, 0)] == [0, 0]


def test_the_library_shows_its_two_functions_and_links_nothing_of_tensorrt(library: Path) -> None:
    listing = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-2:] for line in listing.splitlines()]
    shown = {name for kind, name in symbols if kind in "TWVBD"}
    assert {name for name in shown if not name.startswith("msda_")} == {"getCreators", "setLoggerFinder"}
    assert not [name for kind, name in symbols if kind == "U" and ("nvinfer" in name or "Plugin" in name)]


@pytest.mark.parametrize("value", [FLOAT, HALF])
def test_types_served(host: Host, value: int) -> None:
    types = types_of(value)
    assert host.output_type(types[:5]) == value
    assert all(host.supports(position, types) for position in range(6))
    for position in range(6):
        formats = [LINEAR] * 6
        formats[position] = CHANNELS_OF_TWO
        assert not host.supports(position, types, formats)
        for other in {FLOAT, HALF, INT32, INT64} - {types[position]}:
            changed = [*types[:position], other, *types[position + 1 :]]
            assert host.supports(position, changed) == (position == 0 and other in (FLOAT, HALF))
    assert host.logged() == []


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ((BFLOAT16, INT64, FLOAT, BFLOAT16, BFLOAT16), "value must be float or half, is bfloat16"),
        ((FLOAT, INT32, FLOAT, FLOAT, FLOAT), "spatial_shapes must be int64, is int32"),
        ((HALF, INT64, HALF, HALF, HALF), "reference_points must be float, is half"),
        ((HALF, INT64, FLOAT, FLOAT, HALF), "sampling_offsets must be of value's type, is float"),
        ((FLOAT, INT64, FLOAT, FLOAT, 1000), "attention_logits must be of value's type, is another type"),
    ],
)
def test_a_wrong_type_is_named(host: Host, types: Sequence[int], message: str) -> None:
    assert host.output_type(types) == -1
    assert host.logged() == [f"MSDeformAttn: {message}"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes_of_every_case(host: Host, case: Case) -> None:
    assert host.on_shape_change(shapes_of(case.draw())) == 0
    assert host.logged() == []


@pytest.mark.parametrize("what", sorted(WRONG.keys() - UNSEEN))
def test_wrong_shapes_are_named(host: Host, what: str) -> None:
    inputs, message = cases.spoiled(what)
    shapes = shapes_of(inputs)
    assert host.on_shape_change(shapes) != 0
    (line,) = host.logged()
    assert line.startswith("MSDeformAttn: ")
    assert re.search(message, line), line
    assert host.enqueue(shapes, FLOAT, [None] * 6) != 0, "refused before it is launched"


@pytest.mark.parametrize("case", [case for case in CASES if 0 in shapes_of(case.draw())[-1]], ids=str)
def test_no_work_is_no_launch(host: Host, case: Case) -> None:
    assert host.enqueue(shapes_of(case.draw()), FLOAT, [None] * 6) == 0
    assert host.logged() == []


@pytest.mark.skipif(has_gpu(), reason="there is a GPU, and the launch would not fail")
def test_a_failed_launch_is_returned_and_logged(host: Host) -> None:
    assert host.enqueue(shapes_of(Case("any", queries=3).draw()), HALF, [None] * 6) != 0
    (line,) = host.logged()
    assert line.startswith("MSDeformAttn: cuda")
    assert line.endswith("with value half [1, 256, 8, 32] and sampling_offsets [1, 3, 8, 4, 4, 2]")


def test_without_a_logger_errors_go_to_the_error_stream(
    program: Path, library: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = tmp_path / "other.so"  # the same library again, with statics of its own
    other.write_bytes(library.read_bytes())
    host = Host(program, other, with_logger=False)
    assert host.on_shape_change([(1,)] * 6) != 0
    assert capfd.readouterr().err == "MSDeformAttn: value must be [N, S, M, D], got [1]\n"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_answers_to_every_case(host: Host, dtype: type[np.floating]) -> None:
    for case in CASES:
        inputs = case.draw(dtype)
        shapes = shapes_of(inputs)
        tensors = [torch.from_numpy(array).cuda() for array in inputs.values()]
        output = torch.full(shapes[-1], float("nan"), dtype=tensors[0].dtype, device="cuda")
        torch.cuda.synchronize()
        pointers = [tensor.data_ptr() for tensor in (*tensors, output)]
        assert host.enqueue(shapes, TYPES[np.dtype(dtype)], pointers) == 0
        torch.cuda.synchronize()
        assert host.logged() == []
        cases.check(output.cpu().numpy(), inputs)
