"""The queue over random traces with a virtual clock: nothing lost, nobody starved, in budget."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvlfast.cost import Budget, Cost, Media, Rates
from qvlfast.errors import QueueFull
from qvlfast.fair import FairQueue, Ledger
from qvlfast.lane import Lane, Planned, Ticket
from qvlfast.scheduler import LEVELS, Scheduler

AGEING = 5.0
# Two models of one device, of which the second costs four times as much.
RATES = (
    Rates(pair=0.01, patch=0.2, patch_pair=0.001),
    Rates(pair=0.004, patch=0.1, patch_pair=0.0005, unit=4.0),
)
BUDGETS = (Budget(tokens=50, patches=60, work=120), Budget(tokens=40, patches=80, work=90))


@dataclass
class Named:
    """Something that waits."""

    name: str
    gone: bool = False


@dataclass
class Request:
    """One request of a trace."""

    arrival: float
    tokens: int
    patches: int
    level: int
    client: int
    model: int
    patience: float
    cancelled_after: float
    batch_tokens: int | None


requests = st.builds(
    Request,
    arrival=st.floats(0, 60),
    tokens=st.integers(1, 80),
    patches=st.sampled_from([0, 0, 8, 40]),
    level=st.integers(0, 2),
    client=st.integers(0, 3),
    model=st.integers(0, 1),
    patience=st.sampled_from([math.inf, math.inf, 3.0, 0.0]),
    cancelled_after=st.sampled_from([math.inf, math.inf, 2.0]),
    batch_tokens=st.sampled_from([None, None, 30]),
)
traces = st.lists(requests, max_size=60)


@dataclass
class Outcome:
    """What became of a trace, by number of the request."""

    batches: list[tuple[float, Planned[int]]] = field(default_factory=list)
    expired: list[tuple[float, int]] = field(default_factory=list)
    cancelled: set[int] = field(default_factory=set)
    waiting: list[dict[int, float]] = field(default_factory=list)  # before each batch


def two_models() -> tuple[Scheduler[int], list[Lane[int]]]:
    scheduler: Scheduler[int] = Scheduler(ageing=AGEING)
    return scheduler, [scheduler.add_lane(b, r) for b, r in zip(BUDGETS, RATES, strict=True)]


def replay(
    trace: list[Request], scheduler: Scheduler[int], lanes: list[Lane[int]], seconds: float
) -> Outcome:
    """Run a trace; a batch takes ``seconds`` for each hundred units of work."""
    outcome = Outcome()
    pending = sorted(range(len(trace)), key=lambda i: trace[i].arrival)
    tickets: dict[int, Ticket[int]] = {}
    now = 0.0
    while pending or len(scheduler):
        if not len(scheduler):
            now = max(now, trace[pending[0]].arrival)
        while pending and trace[pending[0]].arrival <= now:
            i = pending.pop(0)
            r = trace[i]
            lanes[r.model].admit()
            media = (Media(("one", i), r.patches, r.patches),) if r.patches else ()
            tickets[i] = scheduler.push(
                lanes[r.model],
                i,
                Cost(r.tokens, media),
                r.arrival,
                level=r.level,
                client=r.client,
                deadline=r.arrival + r.patience,
                batch_tokens=r.batch_tokens,
            )
        for i, ticket in tickets.items():
            if now >= trace[i].arrival + trace[i].cancelled_after and not ticket.gone:
                scheduler.cancel(ticket)
                outcome.cancelled.add(i)
        late = scheduler.expired(now)
        outcome.expired += [(now, i) for i in late]
        waiting = {i: trace[i].arrival for i, ticket in tickets.items() if not ticket.gone}
        batch = scheduler.pop(now)
        assert (batch is None) == (not waiting)
        if batch is None:
            continue
        outcome.waiting.append(waiting)
        outcome.batches.append((now, batch))
        taken = seconds * batch.work / 100
        now += taken
        scheduler.finished(batch, now, taken)
    return outcome


def work(request: Request) -> float:
    rates = RATES[request.model]
    tower = request.patches * (rates.patch + rates.patch_pair * request.patches)
    return request.tokens + rates.pair * request.tokens**2 / 2 + tower


@given(traces, st.sampled_from([0.0, 0.3, 4.0]))
def test_every_request_once_in_budget_and_in_order(trace: list[Request], seconds: float) -> None:
    scheduler, lanes = two_models()
    outcome = replay(trace, scheduler, lanes, seconds)
    ran = [i for _, batch in outcome.batches for i in batch.jobs]
    expired = [i for _, i in outcome.expired]
    assert Counter(ran + expired + list(outcome.cancelled)) == Counter(range(len(trace)))
    for now, batch in outcome.batches:
        of = [trace[i] for i in batch.jobs]
        assert batch.tokens == sum(r.tokens for r in of)
        assert batch.patches == sum(r.patches for r in of)
        assert batch.work == pytest.approx(sum(map(work, of)))
        assert {r.level for r in of} == {batch.level}
        assert {lanes[r.model] for r in of} == {batch.lane}
        assert batch.operations == batch.work * RATES[of[0].model].unit
        assert all(now < r.arrival + r.patience for r in of)  # nothing that is too late
        if len(of) > 1:
            budget = BUDGETS[of[0].model]
            limits = [r.batch_tokens for r in of if r.batch_tokens]
            assert batch.tokens <= min([budget.tokens, *limits])
            assert batch.patches <= budget.patches and batch.work <= budget.work + 1e-9
    assert all(now >= trace[i].arrival + trace[i].patience for now, i in outcome.expired)
    for line in {(r.level, r.client, r.model) for r in trace}:
        ordered = [i for i in ran if (trace[i].level, trace[i].client, trace[i].model) == line]
        assert ordered == sorted(ordered, key=lambda i: (trace[i].arrival, i))
    assert (len(scheduler), scheduler.waiting_patches) == (0, 0)
    assert scheduler.pop(1e9) is None
    for lane in lanes:
        assert (lane.waiting_work, lane.preparing, lane.age(1e9)) == (0, 0, 0)


@given(traces, st.sampled_from([0.3, 4.0]))
def test_priority_and_no_starvation(trace: list[Request], seconds: float) -> None:
    outcome = replay(trace, *two_models(), seconds)
    served = [-math.inf] * 3
    waiting_since: list[float | None] = [None] * 3
    longest = max((seconds * batch.work / 100 for _, batch in outcome.batches), default=0.0)
    for (now, batch), waiting in zip(outcome.batches, outcome.waiting, strict=True):
        claims: dict[int, float] = {}
        for level in range(3):
            arrivals = [at for i, at in waiting.items() if trace[i].level == level]
            if arrivals:
                claims[level] = max(min(arrivals), served[level])
                waiting_since[level] = claims[level]
            else:
                waiting_since[level] = None
        chosen = batch.level
        for level, claim in claims.items():
            if level < chosen:  # passed over only by what has aged
                assert claims[chosen] + chosen * AGEING < claim + level * AGEING
            # The others have one batch each after this one has aged, and one may have been running.
            assert now - claim <= level * AGEING + len(LEVELS) * longest + 1e-9
        served[chosen] = now + seconds * batch.work / 100


@given(
    st.lists(st.lists(st.integers(1, 20), min_size=30, max_size=30), min_size=2, max_size=4),
    st.integers(20, 60),
)
def test_clients_take_turns_by_work(clients: list[list[int]], budget: int) -> None:
    """While all have work waiting, none gets ahead by more than its largest requests."""
    scheduler: Scheduler[tuple[int, int]] = Scheduler()
    lane = scheduler.add_lane(Budget(tokens=budget))
    for c, sizes in enumerate(clients):  # the first client has queued everything before the second
        for tokens in sizes:
            lane.admit()
            scheduler.push(lane, (c, tokens), Cost(tokens), 0.0, client=c)
    done, left = [0] * len(clients), [len(sizes) for sizes in clients]
    while all(left):
        batch = scheduler.pop(0.0)
        assert batch is not None
        for c, tokens in batch.jobs:
            done[c] += tokens
            left[c] -= 1
        assert max(done) - min(done) <= 2 * 20 + budget


def test_a_client_that_pauses_neither_saves_nor_loses_turns() -> None:
    scheduler: Scheduler[str] = Scheduler()
    lane = scheduler.add_lane(Budget(tokens=10))

    def push(client: str, count: int) -> None:
        for _ in range(count):
            lane.admit()
            scheduler.push(lane, client, Cost(10), 0.0, client=client)

    def run(count: int) -> str:
        return "".join(batch.jobs[0] for _ in range(count) if (batch := scheduler.pop(0.0)))

    push("a", 20)
    assert run(10) == "a" * 10
    push("b", 10)  # has had nothing yet, and gets half from now on
    assert run(8).count("b") == 4
    push("c", 1)
    assert "c" in run(3)
    push("c", 1)  # one at a time is no way to get more
    assert run(9).count("c") == 1


def test_what_others_of_the_batch_have_is_not_counted_again() -> None:
    scheduler: Scheduler[int] = Scheduler()
    lane = scheduler.add_lane(Budget(tokens=200, patches=100))
    for i in range(6):
        lane.admit()
        media = (Media("query", 64, 64),)
        own = (hash(("own", i)), 110)
        cost = Cost(120, media, ((1, 8), (2, 100), own))
        scheduler.push(lane, i, cost, 0.0)
    batch = scheduler.pop(0.0)
    assert batch is not None
    # The first in full; of the others 20 tokens, and up to 7 that are not worth sharing.
    assert batch.jobs == [0, 1, 2] and batch.tokens == 120 + 2 * 27 and batch.patches == 64


def test_work_counts_squares() -> None:
    scheduler: Scheduler[int] = Scheduler()
    lane = scheduler.add_lane(Budget(tokens=10_000, work=3000), Rates(pair=0.002))
    for i in range(4):
        lane.admit()
        scheduler.push(lane, i, Cost(1000), 0.0)  # 1000 linear, 1000 in attention
    assert [scheduler.pop(0.0).jobs for _ in range(4)] == [[0], [1], [2], [3]]  # type: ignore[union-attr]


def test_only_the_more_urgent_and_the_small_pass() -> None:
    scheduler: Scheduler[str] = Scheduler()
    lane = scheduler.add_lane(Budget(tokens=100))
    for job, level, tokens in [("bulk", 2, 5), ("long", 0, 50), ("short", 0, 5), ("usual", 1, 5)]:
        lane.admit()
        scheduler.push(lane, job, Cost(tokens), 0.0, level=level, client=job)
    small = scheduler.pop(0.0, above=2, most=10)
    assert small is not None and small.jobs == ["short"]
    assert [scheduler.pop(0.0, above=2).jobs for _ in range(2)] == [["long"], ["usual"]]  # type: ignore[union-attr]
    assert scheduler.pop(0.0, above=2) is None and len(scheduler) == 1


def test_a_full_queue_says_when_to_come_back() -> None:
    scheduler: Scheduler[int] = Scheduler()
    lane = scheduler.add_lane(Budget(tokens=100), queue_work=250)
    for i in range(3):
        lane.admit()
        scheduler.push(lane, i, Cost(100), 0.0)
    with pytest.raises(QueueFull, match=r"try again in 1\.0 s") as refused:
        lane.admit()
    assert refused.value.queued == 300
    batch = scheduler.pop(0.0)
    assert batch is not None
    scheduler.finished(batch, 2.0, 2.0)  # 50 a second
    lane.admit()  # one is being prepared: 200 waiting and 100 to come
    with pytest.raises(QueueFull) as refused:
        lane.admit()
    assert refused.value.retry_after == pytest.approx(150 / 50)
    lane.withdraw()
    lane.admit()


def test_a_lull_is_short_beside_what_waits() -> None:
    scheduler: Scheduler[int] = Scheduler()
    lane = scheduler.add_lane(Budget(tokens=100))

    def push(tokens: int, level: int = 1) -> None:
        lane.admit()
        scheduler.push(lane, 0, Cost(tokens), 0.0, level=level)

    push(10)
    assert scheduler.lull() == 0  # nothing is being prepared
    lane.admit()
    assert scheduler.lull() == 0.01  # no speed is known
    batch = scheduler.pop(0.0)
    assert batch is not None
    scheduler.finished(batch, 0.0, 0.01)  # 1,000 a second
    push(10)
    assert scheduler.lull() == pytest.approx(0.001)
    push(89)
    assert scheduler.lull() == pytest.approx(0.0099)
    push(1)
    assert scheduler.lull() == 0  # a batch is full
    scheduler.pop(0.0)
    push(10, level=0)
    assert scheduler.lull() == 0  # it is urgent


def test_the_budget_shrinks_and_grows_again() -> None:
    scheduler: Scheduler[int] = Scheduler()
    lane = scheduler.add_lane(Budget(tokens=8, patches=3, work=100))
    for _ in range(5):
        lane.shrink()
    assert lane.budget == Budget(1, 1, 3.125)
    for _ in range(64 * 5):
        scheduler.finished(Planned(lane, 0), 0.0, 0.0)
    assert lane.budget == Budget(8, 3, 100)


def test_clients_take_turns_whichever_models_they_use() -> None:
    """One who uses two models gets no more than one who uses one, by what the work costs."""
    scheduler, lanes = two_models()
    for client, model in (("both", 0), ("both", 1), ("cheap", 0), ("dear", 1)):
        for _ in range(100):
            lanes[model].admit()
            number = ["both", "cheap", "dear"].index(client)
            scheduler.push(lanes[model], number, Cost(30), 0.0, client=client)
    given = [0.0] * 3
    for _ in range(60):
        batch = scheduler.pop(0.0)
        assert batch is not None and len(batch.jobs) == 1
        given[batch.jobs[0]] += batch.operations
    dearest = Cost(30).work(RATES[1]) * RATES[1].unit
    assert max(given) - min(given) <= 2 * dearest


def test_turns_that_were_had_elsewhere_count() -> None:
    """Of two queues with one ledger, also where a client had entered both before."""
    ledger = Ledger()
    one, other = FairQueue[Named](ledger), FairQueue[Named](ledger)
    one.push("a", Named("first"))
    for name in ("a", "b"):
        other.push(name, Named(name))
    assert one.turn() < other.turn()  # type: ignore[operator]
    one.take(10.0)
    assert [other.peek().name, other.take(1.0).name, other.take(1.0).name] == ["b", "b", "a"]  # type: ignore[union-attr]
    assert other.peek() is None and other.turn() is None


def test_a_batch_is_of_the_model_whose_client_is_in_turn() -> None:
    scheduler, lanes = two_models()
    for number, model in enumerate([1, 0, 0, 1]):
        lanes[model].admit()
        scheduler.push(lanes[model], number, Cost(10), 0.0, client=number)
    assert [scheduler.pop(0.0).jobs for _ in range(2)] == [[0, 3], [1, 2]]  # type: ignore[union-attr]


def test_what_passes_is_small_by_what_it_costs() -> None:
    """A request to a dearer model is not small because it has few tokens."""
    scheduler, lanes = two_models()
    for model, tokens in ((1, 20), (0, 20)):
        lanes[model].admit()
        scheduler.push(lanes[model], model, Cost(tokens), 0.0, client=model)
    small = scheduler.pop(0.0, most=50)
    assert small is not None and small.jobs == [0] and scheduler.pop(0.0, most=50) is None
    assert scheduler.pop(0.0) is not None


def test_a_model_that_goes_leaves_the_others() -> None:
    scheduler, lanes = two_models()
    for model in (0, 1):
        lanes[model].admit()
        scheduler.cancel(scheduler.push(lanes[model], model, Cost(1), 0.0, deadline=1.0))
        lanes[model].admit()
        scheduler.push(lanes[model], model, Cost(1), 0.0)
    assert scheduler.pop(0.0).jobs == [0]  # type: ignore[union-attr]
    scheduler.remove_lane(lanes[0])
    assert len(scheduler) == 1 and scheduler.pop(2.0).jobs == [1]  # type: ignore[union-attr]
    assert scheduler.pop(2.0) is None and scheduler.expired(2.0) == []


def test_tickets_that_left_out_of_turn_are_forgotten() -> None:
    scheduler: Scheduler[int] = Scheduler()
    lane = scheduler.add_lane(Budget())
    lane.admit()
    scheduler.push(lane, 0, Cost(1), 0.0)
    for i in range(1, 5000):
        lane.admit()
        scheduler.cancel(scheduler.push(lane, i, Cost(1), 0.0, client=i, deadline=1e6))
        scheduler.pop(0.0, above=1)
    assert len(scheduler._deadlines) <= 1030 and len(lane.arrivals[1]) <= 1030


@pytest.mark.parametrize(("tokens", "patches"), [(0, 1), (1, 0), (-5, 1)])
def test_bad_budget(tokens: int, patches: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Budget(tokens, patches)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.booleans(), st.booleans()), min_size=1, max_size=12),
    st.sampled_from([0, 4]),
)
def test_what_is_left_of_a_batch_costs_what_it_would_alone(
    made: list[tuple[int, bool, bool]], picture: int
) -> None:
    """Each request has a length, perhaps a beginning and a picture of all, and stays or not."""
    scheduler: Scheduler[int] = Scheduler()
    lane = scheduler.add_lane(Budget(), RATES[0])
    media = (Media("one", picture, picture),) if picture else ()
    costs = [
        Cost(20 + n, media, ((1, 20),) if shared else ((2 + i, 20),))
        for i, (n, shared, _) in enumerate(made)
    ]

    def batch_of(jobs: list[int]) -> Planned[int]:
        for i in jobs:
            lane.admit()
            scheduler.push(lane, i, costs[i], 0.0)
        batch = scheduler.pop(0.0)
        assert batch is not None and batch.jobs == jobs
        return batch

    whole = batch_of(list(range(len(costs))))
    left = [i for i, (_, _, stays) in enumerate(made) if stays]
    rest = scheduler.remainder(whole, [(i, costs[i]) for i in left])
    alone = batch_of(left) if left else Planned[int](lane, 1)
    assert (rest.level, rest.jobs) == (1, left)
    assert (rest.tokens, rest.patches) == (alone.tokens, alone.patches)
    assert math.isclose(rest.work, alone.work)
