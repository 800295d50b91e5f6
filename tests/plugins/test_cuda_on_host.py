"""The CUDA kernel without a GPU: its own source, compiled for the host, where a block's threads are fibers.

It shows that the kernel computes the op, reads nothing but its inputs, and waits where it has to; not how fast it is,
nor that nvcc compiles it.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray

from plugins import build
from plugins.torch_op import Params
from tests.plugins.cases import CASES, Array, Arrays, Case, any_case, check

HERE = Path(__file__).parent
FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2  # MsdaType
NUMPY = {FLOAT32: np.float32, FLOAT16: np.float16, BFLOAT16: np.float32}
MAP_NORESERVE = 0x4000  # Linux's; Python's mmap names it from 3.12 on
GUARD = 64  # elements around the output that nobody may touch
INVALID_VALUE = 1  # cudaErrorInvalidValue

TOLERANCE_BFLOAT16 = (2e-5, 2**-8)  # as float32, and half a unit in the last place: sums are float32 in every type


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library that holds the kernel and the emulation."""
    compiler = build.compiler()
    if compiler is None:
        pytest.skip("no C++ compiler to build the kernel for the host with")
    path = tmp_path_factory.mktemp("cuda") / "libmsda_cuda_on_host.so"
    headers = [f"-I{HERE / 'cuda_on_host'}", f"-I{build.SOURCE}"]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    source = str(build.SOURCE / "msda_cuda.cu")
    subprocess.run([*compiler, *flags, *headers, "-x", "c++", source, "-o", str(path)], check=True)
    loaded = ctypes.CDLL(str(path))
    for name in ("msda_forward_cuda", "msda_forward_cuda_host_shapes"):
        getattr(loaded, name).argtypes = [ctypes.POINTER(Params), ctypes.c_void_p, ctypes.c_void_p]
    loaded.msda_cuda_error.restype = ctypes.c_char_p
    loaded.emulation_readable.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    loaded.emulation_blocks.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
    return loaded


@pytest.fixture
def clean(kernel: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    """The kernel; what a test asks of the emulation ends with it."""
    kernel.emulation_reset()
    yield kernel
    kernel.emulation_reset()


def to_bfloat16(array: Array) -> Array:
    """The nearest bfloat16 of float32 numbers, as its bits."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(array), 0x7FFF, rounded).astype(np.uint16)


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def params(inputs: Arrays, kind: int) -> Params:
    """How the C ABI is told of them."""
    value, offsets = inputs["value"], inputs["sampling_offsets"]
    n, s, m, d = value.shape
    _, queries, _, levels, points, _ = offsets.shape
    sizes = (n, s, m, d, queries, levels, points, inputs["reference_points"].shape[3], kind)
    names = ("spatial_shapes", "value", "reference_points", "sampling_offsets", "attention_logits")
    return Params(*sizes, *(inputs[name].ctypes.data for name in names))


def run(kernel: ctypes.CDLL, inputs: Arrays, kind: int = FLOAT32, entry: str = "msda_forward_cuda") -> Array:
    """The kernel's answer, as numpy has it; each test's inputs are all that it may read."""
    narrow = {"value", "sampling_offsets", "attention_logits"} if kind == BFLOAT16 else set()
    held = {
        name: to_bfloat16(array) if name in narrow else np.ascontiguousarray(array) for name, array in inputs.items()
    }
    for name, array in held.items():
        if not (name == "spatial_shapes" and entry.endswith("host_shapes")):
            kernel.emulation_readable(array.ctypes.data, array.nbytes)
    n, _, m, d = inputs["value"].shape
    shape = (n, inputs["sampling_offsets"].shape[1], m * d)
    size = int(np.prod(shape))
    stored = np.full(
        size + 2 * GUARD, 0x7B7B7B7B if kind == FLOAT32 else 0x7B7B, np.uint32 if kind == FLOAT32 else np.uint16
    )
    before = stored[0]
    status = getattr(kernel, entry)(params(held, kind), stored[GUARD:].ctypes.data, None)
    assert status == 0, kernel.msda_cuda_error(status).decode()
    assert (stored[:GUARD] == before).all(), "written before the output"
    assert (stored[GUARD + size :] == before).all(), "written after the output"
    assert not (stored[GUARD : GUARD + size] == before).any(), "not written"
    answer = stored[GUARD : GUARD + size]
    return (from_bfloat16(answer) if kind == BFLOAT16 else answer.view(NUMPY[kind])).reshape(shape)


def error(kernel: ctypes.CDLL, case: Case, kind: int, entry: str = "msda_forward_cuda") -> float:
    """The largest error of the case's answer; raises an AssertionError beyond the type's tolerance."""
    inputs = case.draw(NUMPY[kind])
    if kind == BFLOAT16:
        narrow = ("value", "sampling_offsets", "attention_logits")
        inputs |= {name: from_bfloat16(to_bfloat16(inputs[name])) for name in narrow}
        got = run(kernel, inputs, kind, entry)
        return check(got, inputs, TOLERANCE_BFLOAT16)
    return check(run(kernel, inputs, kind, entry), inputs)


@pytest.mark.parametrize("kind", [FLOAT32, FLOAT16, BFLOAT16], ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_agrees_with_the_formula(clean: ctypes.CDLL, case: Case, kind: int) -> None:
    error(clean, case, kind)


# Lq = S and N * Lq is enough for blocks to take squares of pixels; levels that squares do not divide.
ENCODER = Case(
    "squares", levels=((41, 50), (20, 26), (9, 13), (5, 7), (3, 1), (1, 1)), batch=4, queries=2726, heads=1, channels=8
)


@pytest.mark.parametrize(
    ("kind", "entry"), [(FLOAT32, "msda_forward_cuda"), (FLOAT16, "msda_forward_cuda_host_shapes")], ids=str
)
def test_queries_that_are_the_pixels_go_by_squares(clean: ctypes.CDLL, kind: int, entry: str) -> None:
    assert ENCODER.queries == sum(h * w for h, w in ENCODER.levels)
    error(clean, ENCODER, kind, entry)
    assert clean.emulation_grid(0) == -(-ENCODER.queries // 16)


def test_a_lane_that_has_read_a_number_that_is_none_forgets_it(clean: ctypes.CDLL) -> None:
    """A lane of a square does one query after another, and samples outside of a level load nothing new."""
    error(clean, replace(ENCODER, poison=("value", float("nan"))), FLOAT32)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_shapes_in_the_hosts_memory(clean: ctypes.CDLL, case: Case) -> None:
    error(clean, case, FLOAT32, "msda_forward_cuda_host_shapes")


@pytest.mark.parametrize("channels", [1, 8, 32, 130])
def test_the_order_of_threads_does_not_matter(clean: ctypes.CDLL, channels: int) -> None:
    inputs = Case("", channels=channels, queries=20).draw()
    forward = run(clean, inputs)
    clean.emulation_reverse()
    assert np.array_equal(run(clean, inputs), forward)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=any_case())
def test_any_shape(clean: ctypes.CDLL, case: Case) -> None:
    clean.emulation_reset()
    for kind in (FLOAT32, FLOAT16, BFLOAT16):
        error(clean, case, kind)


@pytest.mark.parametrize("name", ["value", "sampling_offsets", "output"])
@pytest.mark.parametrize("kind", [FLOAT32, FLOAT16], ids=["float32", "float16"])
def test_an_address_that_is_not_of_16_bytes(clean: ctypes.CDLL, kind: int, name: str) -> None:
    """As a view into another array has it: one element at a time, and no load or store that would fault."""
    inputs = Case("", queries=9).draw(NUMPY[kind])
    wanted = run(clean, inputs, kind)
    held = {each: np.concatenate([array.ravel()[:1], array.ravel()])[1:] for each, array in inputs.items()}
    for array in held.values():
        clean.emulation_readable(array.ctypes.data, array.nbytes)
    told = params(inputs, kind)
    aligned = {each: np.ascontiguousarray(array) for each, array in inputs.items()}
    for each in inputs:
        setattr(told, each, (held if each == name else aligned)[each].ctypes.data)
    for array in aligned.values():
        clean.emulation_readable(array.ctypes.data, array.nbytes)
    output = np.zeros(wanted.size + 1, NUMPY[kind])
    start = 1 if name == "output" else 0
    assert clean.msda_forward_cuda(told, output[start:].ctypes.data, None) == 0, clean.msda_cuda_error(719).decode()
    got = output[start : start + wanted.size].reshape(wanted.shape)
    np.testing.assert_allclose(got.astype(np.float64), wanted, atol=2e-5, rtol=1e-3 if kind == FLOAT16 else 0)


@pytest.mark.parametrize("entry", ["msda_forward_cuda", "msda_forward_cuda_host_shapes"])
@pytest.mark.parametrize(
    "levels",
    [((12, 16), (6, 8), (3, 4), (2, 3)), ((1 << 40, 1 << 40),) * 4, ((-12, -16),) * 4, ((0, 5),) * 4, ((64, 64),) * 4],
    ids=str,
)
def test_shapes_beyond_the_pixels_read_nothing(
    clean: ctypes.CDLL, entry: str, levels: tuple[tuple[int, int], ...]
) -> None:
    """An adapter that has the shapes on the device alone cannot check them: no fault, whatever they are."""
    inputs = Case("", queries=256, batch=40, heads=1, channels=8).draw()
    inputs["spatial_shapes"] = np.array(levels, np.int64)
    assert np.isfinite(run(clean, inputs, entry=entry)).all()


def spare(elements: int) -> NDArray[np.float16]:
    """Zeros that take no memory until they are touched."""
    memory = mmap.mmap(-1, 2 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return np.frombuffer(memory, np.float16)


def test_a_value_of_more_than_2_to_the_31_elements(clean: ctypes.CDLL) -> None:
    n, h, w, m, d = 2, 4096, 8192, 2, 32
    value = spare(n * h * w * m * d).reshape(n, h, w, m, d)
    corner = np.arange(m * d, dtype=np.float16).reshape(m, d) + 1
    value[1, -1, -1] = corner
    inputs: Arrays = {
        "value": value.reshape(n, h * w, m, d),
        "spatial_shapes": np.array([[h, w]], np.int64),
        "reference_points": np.full((n, 1, 1, 2), [1 - 0.5 / w, 1 - 0.5 / h], np.float32),  # the last pixel's centre
        "sampling_offsets": np.zeros((n, 1, m, 1, 1, 2), np.float16),
        "attention_logits": np.zeros((n, 1, m, 1), np.float16),
    }
    got = run(clean, inputs, FLOAT16)
    assert (got[0] == 0).all()
    assert np.array_equal(got[1, 0], corner.ravel())


def test_offsets_of_more_than_2_to_the_31_elements(clean: ctypes.CDLL) -> None:
    queries, m, points, d = 1 << 20, 8, 256, 8
    value = np.zeros((1, 2, m, d), np.float16)
    value[0, 1] = 1
    inputs: Arrays = {
        "value": value,
        "spatial_shapes": np.array([[1, 2]], np.int64),
        "reference_points": np.full((1, queries, 1, 2), [0.25, 0.5], np.float32),  # the first pixel's centre
        "sampling_offsets": spare(queries * m * points * 2).reshape(1, queries, m, 1, points, 2),
        "attention_logits": spare(queries * m * points).reshape(1, queries, m, points),
    }
    inputs["sampling_offsets"][0, -1, -1, 0, 7] = [1, 0]  # on to the second pixel
    inputs["attention_logits"][0, -1, -1, 7] = 100
    for array in inputs.values():
        clean.emulation_readable(array.ctypes.data, array.nbytes)
    output = np.full((queries, m, d), 7, np.float16)
    clean.emulation_blocks(1 << 62, 1)
    assert clean.msda_forward_cuda(params(inputs, FLOAT16), output.ctypes.data, None) == 0
    clean.emulation_blocks(clean.emulation_grid(0) - 1, 1)
    assert clean.msda_forward_cuda(params(inputs, FLOAT16), output.ctypes.data, None) == 0
    assert (output[-1, -1] == 1).all()
    assert (output[-1, :-1] == 0).all()
    assert (output[0] == 7).all()


def test_more_images_than_a_grid_has_rows(clean: ctypes.CDLL) -> None:
    inputs = Case("", batch=70_001, queries=1, heads=1, channels=1, levels=((1, 1),), points=1).draw()
    for array in inputs.values():
        clean.emulation_readable(array.ctypes.data, array.nbytes)
    output = np.zeros(70_001, np.float32)
    clean.emulation_blocks(69_990, 1 << 20)
    assert clean.msda_forward_cuda(params(inputs, FLOAT32), output.ctypes.data, None) == 0
    last = {name: array if name == "spatial_shapes" else array[69_990:] for name, array in inputs.items()}
    check(output[69_990:].reshape(-1, 1, 1), last)


WRONG = [
    *({name: number} for name, number in (("levels", 0), ("points", 0), ("points", 65), ("points", 1 << 62))),
    *({name: number} for name, number in (("reference_dim", 3), ("type", 3), ("batch", -1))),
    *({name: number} for name, number in (("pixels", 1 << 31), ("channels", 1 << 40))),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_it_cannot_serve_is_refused(clean: ctypes.CDLL, wrong: dict[str, int]) -> None:
    told = params(Case("").draw(), FLOAT32)
    for name, number in wrong.items():
        setattr(told, name, number)
    assert clean.msda_forward_cuda(told, None, None) == INVALID_VALUE
    assert b"cudaErrorInvalidValue" in clean.msda_cuda_error(INVALID_VALUE)


def test_the_emulation_tells_of_a_load_outside(clean: ctypes.CDLL) -> None:
    """What the other tests stand on: without the value among what may be read, there is an error."""
    inputs = Case("", queries=4).draw()
    for name in inputs.keys() - {"value"}:
        clean.emulation_readable(inputs[name].ctypes.data, inputs[name].nbytes)
    output = np.zeros((1, 4, 256), np.float32)
    assert clean.msda_forward_cuda(params(inputs, FLOAT32), output.ctypes.data, None) != 0
    assert b"outside of every array" in clean.msda_cuda_error(719)
