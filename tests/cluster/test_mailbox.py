"""The mailbox between driver and workers; tests call the plain class without Ray."""

import asyncio

import pytest

from dist_tl.cluster.mailbox import Mailbox
from dist_tl.errors import ConfigError, NumericsError


def run(scenario):
    """Runs `scenario(mailbox)` with a timeout, so that a deadlock fails."""

    async def with_timeout():
        return await asyncio.wait_for(scenario(Mailbox()), timeout=5)

    return asyncio.run(with_timeout())


async def waiting(mailbox, after):
    """Starts a worker that waits for a stage."""
    worker = asyncio.create_task(mailbox.take(after))
    await asyncio.sleep(0.01)
    return worker


def test_workers_take_stages_in_the_order_of_posting():
    async def scenario(mailbox):
        indices = [await mailbox.post(name) for name in "abc"]
        taken, after = [], None
        for _ in indices:
            stage = await mailbox.take(after)
            taken.append(stage.spec)
            after = stage.index
        return indices, taken

    assert run(scenario) == ([0, 1, 2], ["a", "b", "c"])


def test_all_ranks_take_the_same_stage_even_if_one_finishes_first():
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
        new, returning = await waiting(mailbox, None), await waiting(mailbox, 0)
        assert not new.done()
        await mailbox.post("a")
        first = await new
        await asyncio.sleep(0.01)
        assert not returning.done(), "it has finished the first stage"
        await mailbox.post("b")
        return first.spec, (await returning).spec

    assert run(scenario) == ("a", "b")


def test_a_restarted_group_takes_the_first_unfinished_stage_again():
    async def scenario(mailbox):
        for name in "abc":
            await mailbox.post(name)
        for index in range(2):
            await mailbox.take(index - 1 if index else None)
            await mailbox.finish(index, f"result {index}")
        await mailbox.take(1)  # c starts; then the group is lost
        return (await mailbox.take(None)).spec

    assert run(scenario) == "c"


@pytest.mark.parametrize("end", ["close", "fail"])
def test_closing_releases_waiting_and_later_workers(end):
    async def scenario(mailbox):
        workers = [await waiting(mailbox, after) for after in (None, 0, 4)]
        await (mailbox.close() if end == "close" else mailbox.fail(ConfigError("no")))
        await mailbox.post("late")
        return [await worker for worker in workers] + [await mailbox.take(None)]

    assert run(scenario) == [None] * 4


def test_the_first_error_is_kept():
    async def scenario(mailbox):
        await mailbox.fail(NumericsError("cause"))
        await mailbox.fail(ConfigError("consequence"))
        return (await mailbox.snapshot(0)).error

    assert str(run(scenario)) == "cause"


def test_a_snapshot_holds_only_the_awaited_result():
    async def scenario(mailbox):
        for index in range(3):
            await mailbox.post(f"stage {index}")
        await mailbox.finish(1, "result 1")
        return [(await mailbox.snapshot(index)).result for index in range(3)]

    assert run(scenario) == [None, "result 1", None]


def test_a_snapshot_does_not_change_later():
    async def scenario(mailbox):
        await mailbox.report_progress("a", 0, 1, 0.5, None, None)
        before = await mailbox.snapshot(0)
        await mailbox.report_progress("a", 0, 2, 0.25, None, None)
        await mailbox.take(None) if await mailbox.post("x") else None
        return before, await mailbox.snapshot(0)

    before, after = run(scenario)
    assert (before.step, before.loss) == ({"a": 1}, {"a": 0.5})
    assert (after.step, after.loss) == ({"a": 2}, {"a": 0.25})


def test_the_group_is_ready_once_a_worker_has_requested_a_stage():
    async def scenario(mailbox):
        before = (await mailbox.snapshot(0)).ready
        await mailbox.post("a")
        await mailbox.take(None)
        return before, (await mailbox.snapshot(0)).ready

    assert run(scenario) == (False, True)


def test_positions_are_those_of_the_slowest_rank():
    async def scenario(mailbox):
        for rank, position in [(0, 3), (1, 2), (0, 9), (1, 4)]:
            await mailbox.report_progress("pp", rank, 1, 0.0, "shards", position)
        await mailbox.report_progress("scratch", 0, 1, 0.0, None, None)
        return await mailbox.positions()

    assert run(scenario) == {"shards": 4}


def test_a_restart_does_not_decrease_a_position():
    async def scenario(mailbox):
        for position in (5, 2):
            await mailbox.report_progress("pp", 0, 1, 0.0, "shards", position)
        return await mailbox.positions()

    assert run(scenario) == {"shards": 5}
