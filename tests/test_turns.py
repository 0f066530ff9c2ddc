"""Two engines of one device: whose piece is next."""

from __future__ import annotations

import threading

import pytest
from stand_in import make_engine, prompt, until

from qvlfast.request import Terms
from qvlfast.turns import Turns, turns_of


class Line:
    """Threads that stand in line behind a turn that is taken."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.order: list[str] = []
        self.threads: list[threading.Thread] = []

    def join(self, name: str, level: int) -> None:
        def stand() -> None:
            with self.turns.take(level):
                self.order.append(name)

        self.threads.append(threading.Thread(target=stand))
        self.threads[-1].start()
        until(lambda: len(self.turns._waiting) == len(self.threads))

    def served(self) -> list[str]:
        for thread in self.threads:
            thread.join(10)
        return self.order


def test_the_urgent_first_then_by_arrival() -> None:
    line = Line(Turns())
    with line.turns.take(1):
        for name, level in (("bulk", 2), ("first", 1), ("second", 1), ("urgent", 0)):
            line.join(name, level)
    assert line.served() == ["urgent", "first", "second", "bulk"]


def test_who_has_waited_long_enough_passes_the_urgent() -> None:
    now = 0.0
    line = Line(Turns(ageing=5.0, clock=lambda: now))
    with line.turns.take(0):
        line.join("bulk", 2)
        now = 9.9
        line.join("urgent", 0)
        now = 10.1
        line.join("late", 0)
    assert line.served() == ["urgent", "bulk", "late"]


def test_an_error_gives_the_turn_back() -> None:
    turns = Turns()
    with pytest.raises(KeyError), turns.take(0):
        raise KeyError
    with turns.take(0):
        assert turns._taken
    assert not turns._taken


def test_devices_have_their_own() -> None:
    assert turns_of("cpu") is turns_of("cpu")
    assert turns_of("cpu") is not turns_of("cuda:0")


def test_an_urgent_request_to_one_model_passes_the_bulk_job_of_another() -> None:
    bulk, other = make_engine(), make_engine()
    order: list[str] = []
    for engine, name in ((bulk, "bulk"), (other, "urgent")):
        model = engine.model
        text = model.text

        def noted(*given, text=text, name=name, **named):
            order.append(name)
            yield from ()
            return (yield from text(*given, **named))

        model.text = noted
    try:
        bulk.model.gate.clear()
        jobs = [bulk.submit(lambda: prompt(*range(40)), Terms(priority="bulk")) for _ in range(3)]
        until(lambda: bulk.model.begun)
        urgent = other.submit(lambda: prompt(1, 2), Terms(priority="interactive"))
        until(lambda: other._turns._waiting)
        assert not other.model.begun, "two pieces at once"
        bulk.model.gate.set()
        assert urgent.result(10).value[0] == 2
        assert all(job.result(10) for job in jobs)
        assert order == ["bulk", "urgent", "bulk", "bulk"]
    finally:
        bulk.model.gate.set()
        bulk.close()
        other.close()
