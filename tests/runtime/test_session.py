"""A session on doubles of CUDA and TensorRT, which check every buffer, shape, copy, event and the order of calls."""

from __future__ import annotations

import gc
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from runtime import CudaFailed, EngineRefused, OutOfGpuMemory, Staged, TensorRTSession
from tests.runtime.conftest import Open
from tests.runtime.double import FakeCuda, FakeTrt, IRuntimeCache, Plan
from tests.runtime.smears import Batch, batch, check


def staged(session: TensorRTSession, given: Batch) -> Staged:
    """The batch, laid and on its way."""
    room = session.stage(len(given[0]), *given[0].shape[1:3])
    room.images[...], room.sizes[...] = given
    session.upload(room)
    return room


@pytest.mark.parametrize("times", [1, 2, 3])
def test_every_canvas_and_batch_size_answers_for_its_own_pictures(open_session: Open, times: int) -> None:
    session = open_session()
    for time in range(times):  # as it is, captured, replayed
        for count in (1, 4, 2):
            for canvas in ((64, 96), (96, 64)):
                given = batch(10 * time + count, count, *canvas)
                check(session.infer(*given), given)


def test_it_tells_what_the_engine_says_of_its_layers_in_the_shapes_that_were_run(open_session: Open) -> None:
    session = open_session()
    session.infer(*batch(1, 2))
    told = json.loads(session.layer_information())
    assert told["Layers"][0]["Outputs"][0]["Format/Datatype"] == "Half"
    assert "images (2, 64, 96, 3)" in told["Bindings"]


def test_a_batch_is_copied_while_another_is_computed(open_session: Open, cuda: FakeCuda) -> None:
    session = open_session()
    batches = [batch(seed, 3) for seed in range(6)]
    ahead = staged(session, batches[0])
    for index, given in enumerate(batches):
        running = session.run(ahead)
        if index + 1 < len(batches):
            ahead = staged(session, batches[index + 1])  # nothing of the running one is done yet
        check(session.fetch(running), given)
    assert cuda.calls.count("allocate_host") == 3, "two places for batches, one for answers, and no more"


def test_one_thread_lays_while_another_runs(open_session: Open) -> None:
    session = open_session()
    batches = [batch(seed, 1 + seed % 4) for seed in range(40)]
    with ThreadPoolExecutor(1) as laying, ThreadPoolExecutor(1) as running:
        ahead = laying.submit(staged, session, batches[0])
        for index, given in enumerate(batches):
            ready = ahead.result()
            if index + 1 < len(batches):
                ahead = laying.submit(staged, session, batches[index + 1])
            answer = running.submit(lambda ready=ready: session.fetch(session.run(ready))).result()
            del ready
            check(answer, given)


def test_what_was_run_twice_is_a_graph(open_session: Open, cuda: FakeCuda) -> None:
    session = open_session()
    for count in (1, 2, 1, 2, 1):
        given = batch(count, count)
        check(session.infer(*given), given)
    assert session.graphs
    assert cuda.calls.count("capture") == 2
    assert cuda.graphs_launched == 3
    check(session.infer(*batch(3, 3)), batch(3, 3))
    assert cuda.graphs_launched == 3, "the first of its kind"


def test_warmed_the_first_batch_is_a_graph(open_session: Open, cuda: FakeCuda) -> None:
    session = open_session()
    session.warm(2, 64, 96)
    launched = cuda.graphs_launched
    check(session.infer(*batch(1, 2)), batch(1, 2))
    assert cuda.graphs_launched == launched + 1


def test_what_cannot_be_captured_is_queued_as_it_is(
    open_session: Open, cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    plan = Plan(capturable=False)
    session = open_session(plan)
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            for count in (1, 2):
                check(session.infer(*batch(seed, count)), batch(seed, count))
    assert not session.graphs
    assert cuda.graphs_launched == 0
    assert [record.message.split(",")[0] for record in caplog.records] == ["no CUDA graphs"], "said once"


def test_graphs_can_be_left_out(open_session: Open, cuda: FakeCuda) -> None:
    session = open_session(graphs=False)
    for seed in range(3):
        check(session.infer(*batch(seed, 2)), batch(seed, 2))
    assert "capture" not in cuda.calls


def test_batches_taken_back_never_hold_one_up(open_session: Open) -> None:
    session = open_session()
    forgotten = [staged(session, batch(seed, 4)) for seed in range(5)]  # more than there are places
    given = batch(9, 4)
    last = staged(session, given)
    check(session.fetch(session.run(last)), given)
    del forgotten[:]
    gc.collect()
    for seed in range(4):  # in the places that the forgotten ones had, whose copies were never waited for
        given = batch(20 + seed, 4)
        check(session.fetch(session.run(staged(session, given))), given)


def test_a_place_is_free_once_its_batch_is_queued(open_session: Open) -> None:
    session = open_session()
    kept = []  # as a traceback may keep them
    for seed in range(5):
        kept.append(staged(session, batch(seed, 2)))
        check(session.fetch(session.run(kept[-1])), batch(seed, 2))
    assert all(each.slot is not None for each in kept)


def test_a_kind_may_be_dropped_behind_an_answer_that_nobody_fetched(
    open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.session.MOST_PROGRAMS", 1)
    session = open_session()
    session.warm(1, 64, 96)
    session.run(staged(session, batch(1, 1)))
    check(session.infer(*batch(2, 2)), batch(2, 2))


def test_closing_waits_for_a_batch_that_was_never_run(open_session: Open) -> None:
    session = open_session()
    staged(session, batch(1, 4))
    session.close()


def test_a_batch_runs_once(open_session: Open) -> None:
    session = open_session()
    ready = staged(session, batch(1, 1))
    session.fetch(session.run(ready))
    with pytest.raises(ValueError, match="was run already"):
        session.run(ready)


def test_the_kinds_unused_for_longest_are_dropped(
    open_session: Open, trt: FakeTrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.session.MOST_PROGRAMS", 2)
    session = open_session()
    for count in (1, 2, 1, 3, 1, 2, 3):
        for seed in range(3):
            check(session.infer(*batch(seed, count)), batch(seed, count))
        gc.collect()
        assert trt.alive["context"] <= 2


@pytest.mark.parametrize(
    ("count", "canvas", "message"),
    [
        (5, (64, 96), "takes 1 to 4 images of canvas 64x96, not 5"),
        (0, (64, 96), "takes 1 to 4 images of canvas 64x96, not 0"),
        (1, (64, 64), "no profile for canvas 64x64, only for 64x96, 96x64"),
    ],
)
def test_what_no_profile_takes_is_refused(
    open_session: Open, count: int, canvas: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_session().stage(count, *canvas)


def test_profiles_are_read_from_the_engine_in_any_order(open_session: Open) -> None:
    plan = Plan(profiles=((96, 64, 2), (32, 32, 7), (64, 96, 1)), detections=5)
    session = open_session(plan)
    assert [(each.height, each.width, each.most) for each in session.profiles] == list(plan.profiles)
    for height, width, most in plan.profiles:
        given = batch(1, most, height, width)
        check(session.infer(*given), given, plan)


@pytest.mark.parametrize(("call", "nth"), [("allocate", 1), ("allocate", 3), ("allocate_host", 2), ("new_event", 1)])
def test_opening_that_fails_gives_everything_back(open_session: Open, cuda: FakeCuda, call: str, nth: int) -> None:
    cuda.fail(call, OutOfGpuMemory("cudaMalloc of 25 MiB: out of memory"), nth)
    with pytest.raises(OutOfGpuMemory, match="25 MiB"):
        open_session()
    gc.collect()
    assert cuda.left() == []


def test_a_batch_that_could_not_be_queued_leaves_the_rest_in_order(open_session: Open, cuda: FakeCuda) -> None:
    session = open_session()
    check(session.infer(*batch(1, 2)), batch(1, 2))
    for call, nth in (("execute_async_v3", 1), ("on_gpu", 1), ("record", 2), ("to_host", 1), ("record", 3)):
        cuda.fail(call, CudaFailed(call), nth)
        with pytest.raises(CudaFailed, match=call if call != "execute_async_v3" else "did not queue"):
            session.infer(*batch(2, 3))
        for seed in range(3):
            given = batch(seed, 2)
            check(session.infer(*given), given)


def test_after_an_error_that_stays_it_can_still_be_closed(open_session: Open, cuda: FakeCuda) -> None:
    session = open_session()
    ready = staged(session, batch(1, 1))
    running = session.run(ready)
    cuda.fail("await_event", CudaFailed("cudaEventSynchronize: an illegal memory access was encountered"), 1)
    with pytest.raises(CudaFailed, match="illegal memory access"):
        session.fetch(running)
    session.close()
    session.close()


def test_a_graph_that_cannot_be_freed_keeps_no_context(open_session: Open, cuda: FakeCuda, trt: FakeTrt) -> None:
    session = open_session()
    for count in (1, 2, 3):
        session.warm(count, 64, 96)
    cuda.fail("free_graph", CudaFailed("cudaGraphExecDestroy: an illegal memory access was encountered"), 2)
    session.close()
    assert cuda.left() == ["1 graphs"], "the one that could not be"
    cuda._graphs.clear()
    gc.collect()
    assert trt.alive["context"] == trt.alive["engine"] == 0


def test_what_rtx_compiles_is_kept_for_the_next_time(
    open_session: Open, trt: FakeTrt, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = tmp_path / "cache" / "kernels.bin"
    for content in (None, b"kernels of last time", b"of another version"):
        if content is not None and hasattr(trt, "IRuntimeCache"):
            kernels.write_bytes(content)
        with caplog.at_level(logging.INFO):
            session = open_session(kernels=kernels)
        session.warm(1, 64, 96)
        session.keep_kernels()
        assert kernels.exists() == hasattr(trt, "IRuntimeCache"), "TensorRT compiles none here"
        if hasattr(trt, "IRuntimeCache"):
            kept = b"kernels of last time" if content == b"kernels of last time" else b"kernels, compiled here"
            assert kernels.read_bytes() == kept
            assert ("of another GPU or version" in caplog.text) == (content == b"of another version")
            assert [each.name for each in kernels.parent.iterdir()] == ["kernels.bin"]
    open_session().keep_kernels()  # without a file


def test_kernels_that_cannot_be_kept_are_no_error(
    open_session: Open, trt: FakeTrt, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    open_session(kernels=tmp_path / "file" / "kernels.bin").keep_kernels()
    assert ("are not kept" in caplog.text) == hasattr(trt, "IRuntimeCache")


def test_kernels_that_rtx_does_not_hand_out_are_no_error(
    open_session: Open, trt: FakeTrt, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IRuntimeCache, "serialize", lambda _: None)
    open_session(kernels=tmp_path / "kernels.bin").keep_kernels()
    assert not (tmp_path / "kernels.bin").exists()
    assert ("are not kept" in caplog.text) == hasattr(trt, "IRuntimeCache")


def test_kernels_that_cannot_be_read_are_compiled_again(
    open_session: Open, trt: FakeTrt, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kernels.bin").mkdir()
    open_session(kernels=tmp_path / "kernels.bin").infer(*batch(1, 2))
    assert ("kernels.bin cannot be read, kernels are compiled again" in caplog.text) == hasattr(trt, "IRuntimeCache")


def test_answers_are_the_callers_own(open_session: Open) -> None:
    session = open_session()
    first = session.infer(*batch(1, 2))
    session.infer(*batch(2, 2))
    check(first, batch(1, 2))


def test_instances_side_by_side_share_nothing(open_session: Open, cuda: FakeCuda) -> None:
    sessions = [open_session(), open_session()]
    running = [session.run(staged(session, batch(seed, 2))) for seed, session in enumerate(sessions)]
    for seed, (session, each) in reversed(list(enumerate(zip(sessions, running, strict=True)))):
        check(session.fetch(each), batch(seed, 2))
    assert cuda.calls.count("new_stream") == 4


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(host_inputs=("sizes",)), "wants its sizes in the host's memory"),
        (Plan(detections=-1), "does not tell how many detections"),
        (Plan(tensors={"pixels": ("INPUT", "UINT8", [-1, -1, -1, 3])}), "has the tensors pixels; one of a bundle has"),
        (
            Plan(
                tensors={
                    "images": ("INPUT", "FLOAT", [-1, -1, -1, 3]),
                    "sizes": ("INPUT", "INT64", [-1, 2]),
                    "boxes": ("OUTPUT", "FLOAT", [-1, 3, 4]),
                    "scores": ("OUTPUT", "FLOAT", [-1, 3]),
                    "labels": ("OUTPUT", "INT64", [-1, 3]),
                }
            ),
            r"images is INPUT FLOAT \[-1, -1, -1, 3\]; expected INPUT UINT8 \[N, H, W, 3\]",
        ),
        (
            Plan(
                tensors={
                    "images": ("INPUT", "UINT8", [1, -1, -1, 3]),
                    "sizes": ("INPUT", "INT64", [1, 2]),
                    "boxes": ("OUTPUT", "FLOAT", [1, 3, 4]),
                    "scores": ("OUTPUT", "FLOAT", [1, 3]),
                    "labels": ("OUTPUT", "INT64", [1, 3]),
                }
            ),
            r"images is INPUT UINT8 \[1, -1, -1, 3\]",
        ),
    ],
    ids=["host", "detections", "names", "types", "batch baked in"],
)
def test_an_engine_of_something_else_is_refused(open_session: Open, plan: Plan, message: str) -> None:
    with pytest.raises(EngineRefused, match=message):
        open_session(plan)


def test_a_thread_names_its_gpu_first(open_session: Open) -> None:
    session = open_session()
    answers = []
    ready = staged(session, batch(1, 1))
    for work in (lambda: session.run(ready), lambda: answers.append(session.fetch(ready)), session.close):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    check(answers[0], batch(1, 1))
    assert answers[0].labels.dtype == np.int64
