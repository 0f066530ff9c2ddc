"""The engine's promises with a stand-in for the model: every request is answered, once."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import CancelledError, Future, wait
from typing import Any

import pytest

from qvlfast.cost import Budget
from qvlfast.errors import BackendError, DeadlineError, InputError, QueueFull
from qvlfast.prompt import Prompt
from qvlfast.request import DEFAULT_TERMS, Answer, Terms
from tests.stand_in import Serving, prompt, until


@pytest.fixture
def serving():
    made = Serving()
    yield made
    made.close()


def hold(serving: Serving, terms: Terms = DEFAULT_TERMS) -> Future[Answer]:
    """A batch that stays in the model until the gate opens."""
    serving.model.gate.clear()
    begun = len(serving.model.begun)
    future = serving.submit(lambda: prompt(1), terms)
    until(lambda: len(serving.model.begun) > begun)
    return future


def test_answers_and_usage(serving: Serving) -> None:
    future = serving.submit(lambda: prompt(1, 2, 3, 4, patches=8))
    answer = future.result(10)
    assert answer.value.tolist() == [4, 4, 4]
    assert (answer.usage.tokens, answer.usage.visual_tokens) == (4, 2)
    assert answer.usage.truncated_tokens == 0 and not answer.usage.video_reduced


def test_many_threads(serving: Serving) -> None:
    def client(base: int) -> None:
        futures = [serving.submit(lambda i=i: prompt(1, base + i)) for i in range(50)]
        results.extend(f.result(10).value[0] == base + i for i, f in enumerate(futures))

    results: list[bool] = []
    threads = [threading.Thread(target=client, args=(100 * t + 1,)) for t in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 300 and all(results)


def test_one_bad_request_costs_no_other_its_answer(serving: Serving) -> None:
    serving.model.gate.clear()
    ids = [1, 2, 900, 4, 5, 800, 7, 901, 902, 903]
    futures = [serving.submit(lambda i=i: prompt(i)) for i in ids]
    serving.model.gate.set()
    for i, future in zip(ids, futures, strict=True):
        error = future.exception(10)
        if i == 900:
            assert isinstance(error, RuntimeError)
        elif i == 901:
            assert isinstance(error, MemoryError)
        elif i == 800:
            assert isinstance(error, InputError) and error.code == "non_finite"
        else:
            assert error is None and future.result().value[0] == i
    metrics = serving.metrics()
    assert metrics.errors == {"RuntimeError": 1, "MemoryError": 1, "non_finite": 1}
    assert (metrics.answered, metrics.failed) == (7, 3)


def test_a_vector_of_zeros_is_no_answer(serving: Serving) -> None:
    """Such as what a cut leaves of a row with infinity beyond it."""
    with pytest.raises(InputError, match="zeros alone"):
        serving.submit(lambda: prompt(0)).result(10)
    assert serving.metrics().errors == {"non_finite": 1}


def test_running_out_of_memory_shrinks_the_budget_and_goes_on(serving: Serving) -> None:
    assert serving.submit(lambda: prompt(902)).result(10).value[0] == 902
    assert serving.metrics().memory_faults == 1 and serving.metrics().budget_tokens == 20
    hold(serving)
    futures = [serving.submit(lambda: prompt(*range(10))) for _ in range(6)]
    until(lambda: serving.metrics().waiting == 6)
    serving.model.gate.set()
    for future in futures:
        future.result(10)
    assert max(map(len, serving.model.batches)) == 2


def test_an_error_in_preparation_is_that_requests(serving: Serving) -> None:
    def broken() -> Prompt:
        raise InputError("unreadable", "no picture")

    bad, good = serving.submit(broken), serving.submit(lambda: prompt(6))
    assert good.result(10).value[0] == 6
    with pytest.raises(InputError, match="no picture"):
        bad.result(10)
    assert serving.metrics().errors == {"unreadable": 1} and serving.metrics().preparing == 0


def test_an_idle_engine_waits_for_what_is_being_prepared(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    lane = serving.served.lane
    monkeypatch.setattr(serving.engine._scheduler, "lull", lambda: 10.0 if lane.preparing else 0.0)
    gated = serving.submit(lambda: (gate.wait(10), prompt(1))[1])
    others = [serving.submit(lambda: prompt(2)) for _ in range(3)]
    until(lambda: serving.metrics().waiting == 3)
    assert not serving.model.begun
    gate.set()
    for future in (gated, *others):
        future.result(10)
    assert list(map(len, serving.model.begun)) == [4]


def test_budget_and_per_call_budget(serving: Serving) -> None:
    def run(batch_tokens):
        hold(serving)
        serving.model.batches.clear()
        terms = Terms(batch_tokens=batch_tokens)
        futures = [serving.submit(lambda: prompt(*range(10)), terms) for _ in range(9)]
        until(lambda: serving.metrics().waiting == 9)
        serving.model.gate.set()
        for future in futures:
            future.result(10)
        return max(map(len, serving.model.batches))

    assert run(None) == 4
    assert run(20) == 2


def test_a_request_over_the_budget_runs_alone(serving: Serving) -> None:
    assert serving.submit(lambda: prompt(*range(500))).result(10).value[0] == 499


def test_cancelled_work_is_not_run(serving: Serving) -> None:
    first = hold(serving)
    waiting = serving.submit(lambda: prompt(2))
    until(lambda: serving.metrics().waiting == 1)
    assert waiting.cancel() and waiting.cancelled()
    assert serving.metrics().waiting == 0 and serving.metrics().cancelled == 1
    assert wait([waiting], 10).done == {waiting}
    serving.model.gate.set()
    assert first.result(10).value[0] == 1
    assert serving.submit(lambda: prompt(3)).result(10).value[0] == 3
    assert serving.model.batches == [[1], [3]]


def test_a_batch_that_nobody_wants_is_given_up(serving: Serving) -> None:
    running = hold(serving)
    assert not running.cancel()  # too late to take it back
    serving.model.gate.set()
    with pytest.raises(CancelledError):
        running.result(10)
    assert serving.submit(lambda: prompt(3)).result(10).value[0] == 3


def test_what_is_not_prepared_yet_can_be_cancelled() -> None:
    serving = Serving(host_threads=1)
    gate = threading.Event()

    def slow() -> Prompt:
        gate.wait(10)
        return prompt(1)

    def never() -> Prompt:
        raise AssertionError("it was prepared")

    first, second = serving.submit(slow), serving.submit(never)
    assert second.cancel()
    gate.set()
    assert first.result(10).value[0] == 1
    serving.close()
    metrics = serving.metrics()
    assert (metrics.preparing, metrics.cancelled, metrics.failed) == (0, 1, 0)


def test_a_deadline_that_passes_costs_nothing(serving: Serving) -> None:
    first = hold(serving)
    soon = Terms(deadline=time.monotonic() + 0.05)
    late = serving.submit(lambda: prompt(2), soon)
    until(lambda: time.monotonic() > soon.deadline)
    unprepared = serving.submit(lambda: prompt(2), soon)
    serving.model.gate.set()
    for future in (late, unprepared):
        with pytest.raises(DeadlineError, match="timeout"):
            future.result(10)
    assert first.result(10).value[0] == 1
    assert serving.model.batches == [[1]] and serving.metrics().expired == 2


def test_the_urgent_pass_a_running_batch(serving: Serving) -> None:
    bulk = hold(serving, Terms(priority="bulk"))
    done: list[str] = []
    usual = serving.submit(lambda: prompt(2))
    urgent = serving.submit(lambda: prompt(3), Terms(priority="interactive"))
    later = serving.submit(lambda: prompt(4), Terms(priority="bulk"))
    for name, future in {"bulk": bulk, "usual": usual, "urgent": urgent, "later": later}.items():
        future.add_done_callback(lambda _, name=name: done.append(name))
    until(lambda: serving.metrics().waiting == 3)
    serving.model.gate.set()
    for future in (bulk, usual, urgent, later):
        future.result(10)
    # One batch between two pieces; `usual` comes before `bulk` goes on only if pieces are left.
    assert done[0] == "urgent" and done[-1] == "later"
    assert serving.model.batches[1] == [3]


def test_short_requests_pass_a_long_one() -> None:
    serving = Serving(Budget(tokens=10_000))
    serving.model.gate.clear()
    long = serving.submit(lambda: prompt(*[1] * 5000))
    until(lambda: bool(serving.model.begun))
    short = serving.submit(lambda: prompt(5))
    until(lambda: serving.metrics().waiting == 1)
    done: list[str] = []
    for name, future in {"long": long, "short": short}.items():
        future.add_done_callback(lambda _, name=name: done.append(name))
    serving.model.gate.set()
    serving.close()
    assert done == ["short", "long"]


def test_a_full_queue_refuses() -> None:
    serving = Serving(queue_work=5)
    first = hold(serving)
    waiting = [serving.submit(lambda: prompt(1, 2, 3))]
    until(lambda: serving.metrics().waiting == 1)
    waiting.append(serving.submit(lambda: prompt(1, 2, 3)))
    until(lambda: serving.metrics().waiting == 2)
    with pytest.raises(QueueFull) as refused:
        serving.submit(lambda: prompt(4))
    assert refused.value.retry_after > 0 and serving.metrics().refused == 1
    serving.model.gate.set()
    for future in (first, *waiting):
        future.result(10)
    assert serving.submit(lambda: prompt(4)).result(10).value[0] == 4
    serving.close()


def test_a_fault_in_the_engines_own_thread_is_survived(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hold(serving)
    lost = serving.submit(lambda: prompt(2))
    until(lambda: serving.metrics().waiting == 1)

    def broken(*_: Any, **__: Any) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(serving.engine._scheduler, "pop", broken)
    serving.model.gate.set()
    with pytest.raises(AssertionError, match="a bug"):
        lost.result(10)
    assert first.result(10).value[0] == 1
    assert serving.submit(lambda: prompt(3)).result(10).value[0] == 3
    assert serving.metrics().waiting == serving.metrics().preparing == 0


def test_prepared_pixels_are_bounded(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvlfast.engine._MAX_WAITING_PATCHES", 100)
    serving.model.gate.clear()
    prepared = []

    def prepare() -> Prompt:
        prepared.append(1)
        return prompt(*range(16), patches=64)

    futures = [serving.submit(prepare) for _ in range(20)]
    until(lambda: len(prepared) >= 3)
    time.sleep(0.2)
    # One batch in the model, two waiting (128 patches), and what two host threads had begun.
    assert len(prepared) <= 5
    # Urgent text does not wait for pictures that are not.
    urgent = serving.submit(lambda: prompt(7), Terms(priority="interactive"))
    serving.model.gate.set()
    assert urgent.result(10).value[0] == 7
    for future in futures:
        future.result(10)
    assert len(prepared) == 20


def test_cancelled_pictures_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvlfast.engine._MAX_WAITING_PATCHES", 100)
    serving = Serving()
    first = hold(serving)
    waiting = [serving.submit(lambda: prompt(*range(16), patches=64)) for _ in range(2)]
    until(lambda: serving.metrics().waiting == 2)
    prepared = threading.Event()
    serving.submit(lambda: (prepared.set(), prompt(2))[1])
    assert not prepared.wait(0.1)
    for future in waiting:
        assert future.cancel()
    assert prepared.wait(10)
    serving.model.gate.set()
    serving.close()
    assert first.result(0).value[0] == 1


def test_close_answers_what_was_accepted() -> None:
    serving = Serving(Budget(), host_threads=1)
    futures = [serving.submit(lambda i=i: prompt(i)) for i in range(1, 31)]
    serving.close()
    serving.close()
    assert [f.result(0).value[0] for f in futures] == list(range(1, 31))
    with pytest.raises(BackendError, match="closed"):
        serving.submit(lambda: prompt(1))


@pytest.mark.parametrize("refused", ["qvlfast", "qvlfast-host-0", "qvlfast-host-1"])
def test_a_thread_that_does_not_start(refused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    start = threading.Thread.start

    def starting(thread: threading.Thread) -> None:
        if thread.name == refused:
            raise RuntimeError("can't start new thread")
        start(thread)

    serving = Serving(host_threads=2)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", starting)
        with pytest.raises(BackendError, match=r"a thread cannot be started \(can't start new"):
            serving.submit(lambda: prompt(1))
    until(lambda: threading.active_count() == before)
    assert serving.metrics().preparing == serving.metrics().submitted == 0
    assert serving.submit(lambda: prompt(7)).result(10).value[0] == 7
    serving.close()
    assert threading.active_count() == before


def test_a_full_queue_takes_what_must_come() -> None:
    serving = Serving(queue_work=5)
    first = hold(serving)
    second = serving.submit(lambda: prompt(*[2] * 9))
    until(lambda: serving.metrics().waiting == 1)
    with pytest.raises(QueueFull):
        serving.submit(lambda: prompt(3))
    third = serving.submit(lambda: prompt(4), in_any_case=True)
    serving.model.gate.set()
    serving.close()
    assert [f.result(0).value[0] for f in (first, second, third)] == [1, 2, 4]


@pytest.mark.parametrize("begun", [False, True])
def test_dropping_waits_for_no_lock(begun: bool) -> None:
    serving = Serving()
    if begun:
        serving.submit(lambda: prompt(1)).result(10)
    engine, served = serving.engine, serving.served
    with engine._lock:
        dropping = threading.Thread(target=engine.drop, args=(served,))
        dropping.start()
        dropping.join(10)
        assert not dropping.is_alive() and served in engine._models
    if not begun:  # there is no thread yet: whoever comes next finds it
        other = Serving(engine=engine)
        other.close()
    until(lambda: served not in engine._models)
    with pytest.raises(BackendError, match="closed"):
        serving.submit(lambda: prompt(1))


def test_abandon_leaves_no_future_hanging() -> None:
    before = threading.active_count()
    serving = Serving(host_threads=1)
    gate = threading.Event()
    futures = [hold(serving)]
    futures += [serving.submit(lambda: prompt(2))]
    until(lambda: serving.metrics().waiting == 1)
    futures += [serving.submit(lambda: gate.wait(10) and prompt(3)) for _ in range(3)]

    def open_gates() -> None:
        """Only when all were failed: whatever is answered before that is no answer to this test."""
        wait(futures, timeout=10)
        gate.set()
        serving.model.gate.set()

    opener = threading.Thread(target=open_gates)
    opener.start()
    serving.engine.abandon()
    opener.join()
    for future in futures:
        with pytest.raises(BackendError, match="closed before"):
            future.result(0)
    assert threading.active_count() <= before


def test_threads_start_at_the_first_request_only() -> None:
    before = threading.active_count()
    serving = Serving()
    assert threading.active_count() == before
    serving.close()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_works_in_a_forked_child(serving: Serving) -> None:
    assert serving.submit(lambda: prompt(1)).result(10).value[0] == 1
    child = os.fork()
    if child == 0:
        ok = serving.submit(lambda: prompt(7)).result(10).value[0] == 7
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"priority": "high"}, "priority is 'high': use one of interactive, normal, bulk"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
    ],
)
def test_bad_terms(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Terms(**wrong)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "5"])
def test_bad_timeouts(timeout: Any) -> None:
    options = {"priority": "normal", "client": None, "batch_tokens": None, "vision_cache": True}
    with pytest.raises(ValueError, match=f"timeout is {timeout!r}"):
        Terms.make(timeout=timeout, **options)
