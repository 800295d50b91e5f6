import pytest
from pydantic import SecretStr
from starlette.datastructures import Headers

from bundle import Canvas
from server.admit import Admission, check_api_key, check_length, timeout_ms
from server.errors import BadParameter, BodyTooLarge, DeadlineUnmeetable, Draining, QueueFull, Unauthorized
from server.estimate import Estimate

NOW_S, NEVER_S = 50.0, 1e9
CANVAS = Canvas(height=64, width=96)


@pytest.fixture
def estimate() -> Estimate:
    return Estimate(engine_instances=1)


@pytest.fixture
def admission(estimate: Estimate) -> Admission:
    return Admission(3, estimate, clock=lambda: NOW_S)


def test_places_are_given_back(admission: Admission) -> None:
    with admission.admit(NEVER_S) as ticket:
        ticket.extend(3, NEVER_S)
        assert (admission.waiting, admission.unanswered) == (3, 3)
        ticket.dispatched()
        assert (admission.waiting, admission.unanswered) == (2, 3)
    assert (admission.waiting, admission.unanswered) == (0, 0)


def test_places_are_given_back_on_errors_too(admission: Admission) -> None:
    with pytest.raises(KeyError), admission.admit(NEVER_S):
        raise KeyError
    assert (admission.waiting, admission.unanswered) == (0, 0)


def test_dispatching_more_than_was_admitted_counts_nothing_twice(admission: Admission) -> None:
    with admission.admit(NEVER_S) as ticket:
        ticket.dispatched()
        ticket.dispatched()
        assert admission.waiting == 0
    assert (admission.waiting, admission.unanswered) == (0, 0)


def test_a_full_queue_refuses_with_the_time_to_work_it_off(admission: Admission, estimate: Estimate) -> None:
    estimate.observe(CANVAS, images=1, seconds=2.5)
    with admission.admit(NEVER_S) as first, admission.admit(NEVER_S):
        with pytest.raises(QueueFull, match="2 images are waiting and 3 may: no place for 2 more") as caught:
            first.extend(3, NEVER_S)
        assert caught.value.retry_after_s == 5
        assert admission.waiting == 2


def test_images_with_an_engine_take_no_place_in_the_queue(admission: Admission) -> None:
    tickets = [admission.admit(NEVER_S) for _ in range(3)]
    with pytest.raises(QueueFull):
        admission.admit(NEVER_S)
    tickets[0].dispatched()
    admission.admit(NEVER_S)


def test_a_deadline_that_cannot_be_met_is_refused_at_the_door(admission: Admission, estimate: Estimate) -> None:
    estimate.observe(CANVAS, images=1, seconds=2.0)
    with admission.admit(NOW_S + 0.1):  # nobody ahead: whoever comes is let in
        with pytest.raises(DeadlineUnmeetable, match="1 images ahead take about 4000 ms, 1500 are left") as caught:
            admission.admit(NOW_S + 1.5)
        assert caught.value.retry_after_s == 3
        admission.admit(NOW_S + 5)


def test_a_request_does_not_queue_behind_itself(admission: Admission, estimate: Estimate) -> None:
    estimate.observe(CANVAS, images=1, seconds=60.0)  # gone wrong: only a request that is let in can correct it
    with admission.admit(NOW_S + 1) as ticket:
        ticket.extend(3, NOW_S + 1)
        assert admission.unanswered == 3


def test_others_ahead_count_when_a_request_turns_out_to_be_large(admission: Admission, estimate: Estimate) -> None:
    estimate.observe(CANVAS, images=1, seconds=2.0)
    refusal = pytest.raises(DeadlineUnmeetable, match="1 images ahead take about 6000 ms, 5000 are left")
    with admission.admit(NEVER_S), admission.admit(NOW_S + 5) as ticket, refusal:
        ticket.extend(2, NOW_S + 5)


def test_draining_refuses_everyone(admission: Admission) -> None:
    admission.draining = True
    with pytest.raises(Draining) as caught:
        admission.admit(NEVER_S)
    assert caught.value.retry_after_s == 1


def test_estimate_follows_what_is_measured_and_shares_among_engines() -> None:
    estimate = Estimate(engine_instances=2)
    assert estimate.seconds_for(100) == 0
    estimate.observe(CANVAS, images=4, seconds=4.0)
    assert estimate.seconds_for(10) == pytest.approx(5.0)
    for _ in range(50):
        estimate.observe(CANVAS, images=4, seconds=0.4)
    assert estimate.seconds_for(10) == pytest.approx(0.5, rel=0.01)
    assert estimate.slowest_batch_s == 4.0
    assert estimate.retry_after_s(0) == 1


@pytest.mark.parametrize(("given", "expected"), [("250", 250), ("0.5", 0.5), (None, 99)])
def test_timeouts(given: str | None, expected: float) -> None:
    assert timeout_ms(Headers({"X-Timeout-Ms": given} if given else {}), 99) == expected


@pytest.mark.parametrize("given", ["0", "-1", "soon", "nan", "inf", "1e99", ""])
def test_timeouts_that_are_none(given: str) -> None:
    with pytest.raises(BadParameter, match="X-Timeout-Ms"):
        timeout_ms(Headers({"X-Timeout-Ms": given}), 99)


def test_length_is_refused_by_the_header() -> None:
    check_length(Headers({}), 10)
    check_length(Headers({"Content-Length": "10"}), 10)
    check_length(Headers({"Content-Length": "many"}), 10)
    for given in ("11", "9" * 5000):
        with pytest.raises(BodyTooLarge, match="exceed 10"):
            check_length(Headers({"Content-Length": given}), 10)


KEYS = (SecretStr("first"), SecretStr("zweiter Schlüssel"))


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": "Bearer first"}, {"authorization": "bearer first"}, {"X-API-Key": "first"}],
)
def test_keys_open(headers: dict[str, str]) -> None:
    check_api_key(Headers(headers), KEYS)
    check_api_key(Headers({}), ())


def test_keys_are_compared_as_the_bytes_that_are_sent() -> None:
    check_api_key(Headers(raw=[(b"x-api-key", "zweiter Schlüssel".encode())]), KEYS)


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Basic first"}, {"Authorization": "Bearer "}, {"X-API-Key": "firs"}, {"X-API-Key": "é"}],
)
def test_everything_else_stays_outside(headers: dict[str, str]) -> None:
    with pytest.raises(Unauthorized):
        check_api_key(Headers(headers), KEYS)
