"""ONNX Runtime's adapter of the native kernel: against the op's reference, and with inputs that are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from onnx import TensorProto, helper

import plugins
from export import op
from export.trace import trace
from models import DeformableDetrConfig, build_model
from plugins import build
from tests.models.seeded import seed_weights
from tests.plugins import cases
from tests.plugins.cases import CASES, WRONG, Case

ATOL = 1e-5  # of the function; measured 6e-6
ATOL_NETWORK = 1e-5  # of boxes in 0..1 and scores; measured 2e-7


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that was built, else one that is built now."""
    built = plugins.onnxruntime_library()
    if built is not None:
        return built
    if build.compiler() is None:
        pytest.skip("no C++ compiler to build the native library with")
    libraries = {path.name: path for path in build.build(tmp_path_factory.mktemp("native"))}
    return libraries["libmsda_onnxruntime.so"]


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


def one_node(with_function: bool = False, dtype: type[np.floating] = np.float32) -> onnx.ModelProto:
    """A graph of nothing but the op, every axis dynamic."""
    ranks = dict(zip(op.INPUTS, (4, 2, 4, 6, 4), strict=True))
    kind = TensorProto.FLOAT16 if dtype == np.float16 else TensorProto.FLOAT
    kinds = {"spatial_shapes": TensorProto.INT64, "reference_points": TensorProto.FLOAT}
    inputs = [helper.make_tensor_value_info(name, kinds.get(name, kind), [None] * rank) for name, rank in ranks.items()]
    graph = helper.make_graph(
        [helper.make_node(op.NAME, list(op.INPUTS), ["output"], domain=op.DOMAIN)],
        "one",
        inputs,
        [helper.make_tensor_value_info("output", kind, [None] * 3)],
    )
    opsets = [helper.make_opsetid("", op.OPSET), helper.make_opsetid(op.DOMAIN, op.VERSION)]
    functions = [op.function()] if with_function else []
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_case(library: Path, dtype: type[np.floating]) -> None:
    runs = session(one_node(dtype=dtype), library)
    for case in CASES:
        inputs = case.draw(dtype)
        cases.check(runs.run(None, inputs)[0], inputs)


@settings(max_examples=40, deadline=None)
@given(case=cases.any_case())
def test_any_case(library: Path, case: Case) -> None:
    for dtype in (np.float32, np.float16):
        inputs = case.draw(dtype)
        cases.check(_session_of_one_node(library, dtype).run(None, inputs)[0], inputs)


@cache
def _session_of_one_node(library: Path, dtype: type[np.floating]) -> ort.InferenceSession:
    return session(one_node(dtype=dtype), library)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_function_of_the_file_computes_the_same(dtype: type[np.floating]) -> None:
    """But for what is not a number in a value or a location: GridSample lets it reach further."""
    runs = session(one_node(with_function=True, dtype=dtype), None)
    for case in CASES:
        spoiled = case.poison is not None and case.poison[0] != "attention_logits" and not np.isfinite(case.poison[1])
        if spoiled or case.place == "far" or 0 in (case.batch, case.queries, case.heads, case.channels):
            continue
        inputs = case.draw(dtype)
        cases.check(runs.run(None, inputs)[0], inputs)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(library: Path, threads: int) -> None:
    inputs = Case("two", batch=2, channels=16).draw()
    (alone,) = session(one_node(), library, threads=1).run(None, inputs)
    for _ in range(3):
        (got,) = session(one_node(), library, threads=threads).run(None, inputs)
        assert np.array_equal(got, alone)


def test_one_session_answers_many_callers_at_once(library: Path) -> None:
    shared = session(one_node(), library)
    inputs = [Case("", batch=batch, queries=queries).draw() for batch in (1, 2) for queries in (3, 40, 77)]
    alone = [shared.run(None, each)[0] for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = list(pool.map(lambda each: shared.run(None, each)[0], inputs))
            assert all(np.array_equal(mine, other) for mine, other in zip(together, alone, strict=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("what", WRONG)
def test_wrong_shapes_are_errors_that_say_which(library: Path, what: str, dtype: type[np.floating]) -> None:
    runs = _session_of_one_node(library, dtype)
    inputs, message = cases.spoiled(what, dtype)
    with pytest.raises(Exception, match=message):
        runs.run(None, inputs)
    sound = cases.WRONG_CASE.draw(dtype)
    cases.check(runs.run(None, sound)[0], sound)  # the next call is none the worse


def test_too_many_points_are_refused(library: Path) -> None:
    inputs = Case("too many", points=68, queries=5).draw()
    with pytest.raises(Exception, match=r"L=4 levels of P=68 points; L\*P must be 1 to 256"):
        _session_of_one_node(library, np.float32).run(None, inputs)


def node_types(runs: ort.InferenceSession) -> set[str]:
    """What a profiled session has run."""
    events = json.loads(Path(runs.end_profiling()).read_text())
    return {event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")}


def test_the_kernel_wins_over_the_function_of_the_file(library: Path, tmp_path: Path) -> None:
    inputs = Case("two", batch=2, channels=16).draw()
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


# RegisterCustomOps with a runtime of Python functions, whose call number argv[2] fails, and then once more.
FAILING_RUNTIME = """
import ctypes, sys
from ctypes import c_char_p, c_void_p
DOMAIN, FAILURE = 4096, 1234
calls, fails_at = [], int(sys.argv[2])

def answer(what):
    calls.append(what)
    return FAILURE if len(calls) == fails_at else None

@ctypes.CFUNCTYPE(c_void_p, c_char_p, ctypes.POINTER(c_void_p))
def create_domain(name, domain):
    failure = answer("create")
    domain[0] = None if failure else DOMAIN
    return failure

@ctypes.CFUNCTYPE(c_void_p, c_void_p, c_void_p)
def add_op(domain, op):
    assert domain == DOMAIN
    return answer("op")

@ctypes.CFUNCTYPE(c_void_p, c_void_p, c_void_p)
def add_domain(options, domain):
    assert domain == DOMAIN
    return answer("domain")

table = (c_void_p * 500)()
table[26:29] = [ctypes.cast(each, c_void_p) for each in (create_domain, add_op, add_domain)]
get_api = ctypes.CFUNCTYPE(c_void_p, ctypes.c_uint32)(lambda version: ctypes.addressof(table))
base = (c_void_p * 2)(ctypes.cast(get_api, c_void_p))
register = ctypes.CDLL(sys.argv[1]).RegisterCustomOps
register.restype, register.argtypes = c_void_p, [c_void_p, c_void_p]

assert register(None, ctypes.addressof(base)) == FAILURE, calls
print(calls[-1], len(calls) == fails_at)
del calls[:]
fails_at = 0
assert register(None, ctypes.addressof(base)) is None
print(calls[-1])
"""


@pytest.mark.parametrize(("call", "name"), [(1, "create"), (2, "op"), (5, "op")])
def test_a_runtime_that_makes_no_domain_is_quoted_and_asked_again(library: Path, call: int, name: str) -> None:
    """The status that it gave is returned, nothing is called after it, and the next session may well work."""
    done = subprocess.run(
        [sys.executable, "-c", FAILING_RUNTIME, str(library), str(call)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.split() == [name, "True", "domain"], done.stderr
