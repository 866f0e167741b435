"""The queue between driver and workers, by calling the plain class: no Ray is needed for that."""

import asyncio

import pytest

from dist_tl.cluster.mailbox import Mailbox
from dist_tl.errors import ConfigError, NumericsError


def run(scenario):
    """Play `scenario(mailbox)`; a wait that nobody ends fails instead of hanging."""

    async def play():
        return await asyncio.wait_for(scenario(Mailbox()), timeout=5)

    return asyncio.run(play())


async def waiting(mailbox, after):
    """A worker that asks, and is given time to fall asleep."""
    inputs = asyncio.create_task(mailbox.take(after))
    await asyncio.sleep(0.01)
    return inputs


def test_workers_take_the_stages_in_the_order_in_which_they_were_posted():
    async def scenario(mailbox):
        tickets = [await mailbox.post(name) for name in "abc"]
        taken, after = [], None
        for _ in tickets:
            task = await mailbox.take(after)
            taken.append(task.spec)
            after = task.index
        return tickets, taken

    assert run(scenario) == ([0, 1, 2], ["a", "b", "c"])


def test_all_ranks_are_given_the_same_stage_although_one_finishes_first():
    async def scenario(mailbox):
        for name in "ab":
            await mailbox.post(name)
        assert (await mailbox.take(None)).spec == "a"
        slow = (await mailbox.take(None)).spec
        await mailbox.finish(0, "result of a")
        return slow, (await mailbox.take(0)).spec, (await mailbox.take(0)).spec

    assert run(scenario) == ("a", "b", "b")


def test_a_worker_waits_for_the_next_stage():
    async def scenario(mailbox):
        fresh, experienced = await waiting(mailbox, None), await waiting(mailbox, 0)
        assert not fresh.done()
        await mailbox.post("a")
        first = await fresh
        await asyncio.sleep(0.01)
        assert not experienced.done(), "it has done the first one"
        await mailbox.post("b")
        return first.spec, (await experienced).spec

    assert run(scenario) == ("a", "b")


def test_a_restarted_group_takes_the_first_unfinished_stage_again():
    async def scenario(mailbox):
        for name in "abc":
            await mailbox.post(name)
        for index in range(2):
            await mailbox.take(index - 1 if index else None)
            await mailbox.finish(index, f"result {index}")
        await mailbox.take(1)  # c begins; then the group is lost
        return (await mailbox.take(None)).spec

    assert run(scenario) == "c"


@pytest.mark.parametrize("end", ["close", "give_up"])
def test_the_end_releases_whoever_waits_and_turns_away_whoever_comes(end):
    async def scenario(mailbox):
        inputs = [await waiting(mailbox, after) for after in (None, 0, 4)]
        await (mailbox.close() if end == "close" else mailbox.give_up(ConfigError("no")))
        await mailbox.post("late")
        return [await task for task in inputs] + [await mailbox.take(None)]

    assert run(scenario) == [None] * 4


def test_the_first_error_is_the_one_that_counts():
    async def scenario(mailbox):
        await mailbox.give_up(NumericsError("cause"))
        await mailbox.give_up(ConfigError("consequence"))
        return (await mailbox.snapshot(0)).error

    assert str(run(scenario)) == "cause"


def test_a_snapshot_holds_the_one_result_that_is_waited_for():
    async def scenario(mailbox):
        for index in range(3):
            await mailbox.post(f"stage {index}")
        await mailbox.finish(1, "result 1")
        return [(await mailbox.snapshot(index)).result for index in range(3)]

    assert run(scenario) == [None, "result 1", None]


def test_a_snapshot_stays_as_it_was():
    async def scenario(mailbox):
        await mailbox.progress("a", 0, 1, 0.5, None, None)
        before = await mailbox.snapshot(0)
        await mailbox.progress("a", 0, 2, 0.25, None, None)
        await mailbox.take(None) if await mailbox.post("x") else None
        return before, await mailbox.snapshot(0)

    before, after = run(scenario)
    assert (before.step, before.loss) == ({"a": 1}, {"a": 0.5})
    assert (after.step, after.loss) == ({"a": 2}, {"a": 0.25})


def test_the_group_is_ready_once_a_worker_has_asked():
    async def scenario(mailbox):
        before = (await mailbox.snapshot(0)).ready
        await mailbox.post("a")
        await mailbox.take(None)
        return before, (await mailbox.snapshot(0)).ready

    assert run(scenario) == (False, True)


def test_generators_follow_the_slowest_rank():
    async def scenario(mailbox):
        for rank, position in [(0, 3), (1, 2), (0, 9), (1, 4)]:
            await mailbox.progress("pp", rank, 1, 0.0, "shards", position)
        await mailbox.progress("scratch", 0, 1, 0.0, None, None)
        return await mailbox.positions()

    assert run(scenario) == {"shards": 4}


def test_a_restart_does_not_take_a_position_back():
    async def scenario(mailbox):
        for position in (5, 2):
            await mailbox.progress("pp", 0, 1, 0.0, "shards", position)
        return await mailbox.positions()

    assert run(scenario) == {"shards": 5}
