"""The queue: first in, first out, never over budget unless a job alone is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvlfast.scheduler import Budget, Scheduler

costs = st.lists(
    st.tuples(st.integers(1, 60), st.integers(0, 60), st.one_of(st.none(), st.integers(1, 60))),
    max_size=40,
)


@given(costs, st.integers(1, 50), st.integers(1, 50))
def test_every_job_once_in_order_within_budget(jobs, tokens, patches) -> None:
    scheduler: Scheduler[int] = Scheduler(Budget(tokens, patches))
    for i, (t, p, limit) in enumerate(jobs):
        scheduler.push(i, tokens=t, patches=p, batch_tokens=limit)
    assert len(scheduler) == len(jobs)
    assert scheduler.waiting_patches == sum(p for _, p, _ in jobs)
    seen = []
    while len(scheduler):
        batch = scheduler.pop_batch()
        assert batch
        if len(batch) > 1:
            limits = [limit for i in batch if (limit := jobs[i][2])]
            assert sum(jobs[i][0] for i in batch) <= min([tokens, *limits])
            assert sum(jobs[i][1] for i in batch) <= patches
        seen += batch
    assert seen == list(range(len(jobs)))
    assert scheduler.waiting_patches == 0
    assert scheduler.pop_batch() == []


def test_batches_are_filled() -> None:
    scheduler: Scheduler[int] = Scheduler(Budget(tokens=10, patches=100))
    for i in range(5):
        scheduler.push(i, tokens=4, patches=0)
    assert [scheduler.pop_batch() for _ in range(3)] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(("tokens", "patches"), [(0, 1), (1, 0), (-5, 1)])
def test_bad_budget(tokens, patches) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Budget(tokens, patches)
