"""Many subscribers of one probe: each gets all hits, or is told how many it does not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.engines.host import untouched
from tests.support import needs
from tests.system.stack import GETPPID, Stack, Subscription, caller

pytestmark = [needs.ptrace_any, needs.x86_64]


@pytest.fixture(scope="module")
def narrow() -> Iterator[Stack]:
    """A service that keeps little for a slow subscriber."""
    with Stack(service_env={"TRAPLINE_SUBSCRIBER_QUEUE_BYTES": str(64 * 1024)}) as stack:
        yield stack


def test_all_subscribers_get_the_same(stack: Stack) -> None:
    with caller() as target, untouched(target.pid), contextlib.ExitStack() as sockets:
        probe = stack.arm(f"{GETPPID} @ pid={target.pid}")
        streams = [sockets.enter_context(Subscription(stack, [probe.id], binary=n % 2 == 1)) for n in range(6)]
        streams.append(sockets.enter_context(Subscription(stack, [probe.name])))
        other = sockets.enter_context(Subscription(stack, ["no-such-probe"]))
        count = int(target.ask("call 3000"))
        first, *others = [stream.take(count) for stream in streams]
        assert [hit.seq for hit in first] == list(range(count))
        assert all(hits == first for hits in others)
        assert not any(stream.gaps for stream in streams)
        stack.exactly(probe.id, count)
        assert stack.recorded(probe.id, count) == first
        # One that came late gets what comes from then on.
        late = sockets.enter_context(Subscription(stack, [probe.id], binary=True))
        target.ask("call 10")
        assert [hit.seq for hit in late.take(10)] == list(range(count, count + 10))
        assert streams[0].take(count + 10)[count:] == late.hits
        stack.client.delete_probe(probe.id)
        assert (other.hits, other.gaps) == ([], [])


@pytest.mark.parametrize("binary", [False, True])
def test_a_stuck_subscriber_is_told_what_it_missed(narrow: Stack, binary: bool) -> None:
    stack = narrow
    with caller() as target, untouched(target.pid):
        probe = stack.arm(f"{GETPPID} @ pid={target.pid}")
        with (
            Subscription(stack, [probe.id], binary=binary, receive_bytes=4096) as stuck,
            Subscription(stack, [probe.id], binary=True) as brisk,
        ):
            count = 0
            while count < 30_000:  # while it does not read: far beyond its queue, the socket's buffers and its own
                count = int(target.ask("call 2000"))
                brisk.take(count)
            stack.exactly(probe.id, count)
            stuck.take(count)
            assert len(brisk.hits) == count
            assert not brisk.gaps
            # Every hit once: delivered, or in a gap. No more and no less.
            assert stuck.missing > 0
            assert len(stuck.hits) + stuck.missing == count
            assert {(gap.stage, gap.probe, gap.host) for gap in stuck.gaps} == {
                ("subscriber-queue", probe.id, stack.host)
            }
            told = {n for gap in stuck.gaps for n in range(gap.seq_from or 0, (gap.seq_to or 0) + 1)}
            came = [hit.seq for hit in stuck.hits]
            assert came == sorted(set(came))
            assert len(told) == stuck.missing
            assert told.isdisjoint(came)
            assert len(told | set(came)) == count
            # It is not punished for ever.
            target.ask("call 5")
            assert [hit.seq for hit in stuck.take(count + 5)[-5:]] == list(range(count, count + 5))
        stack.client.delete_probe(probe.id)


def test_what_is_paused_is_counted(stack: Stack) -> None:
    with caller() as target, untouched(target.pid):
        probe = stack.arm(f"{GETPPID} @ pid={target.pid}")
        with Subscription(stack, [probe.id]) as stream, Subscription(stack, [probe.id]) as other:
            target.ask("call 100")
            stream.take(100)
            stream.socket.send('{"type":"pause","id":"t"}')
            # A message is answered after those before it.
            stream.socket.send("{")
            assert "error" in str(stream.socket.recv())
            target.ask("call 250")
            other.take(350)
            stream.socket.send('{"type":"resume","id":"t"}')
            target.ask("call 10")
            stream.take(360)
            assert [(gap.count, gap.stage, gap.seq_from, gap.seq_to) for gap in stream.gaps] == [
                (250, "paused", 100, 349)
            ]
            assert [hit.seq for hit in stream.hits] == [*range(100), *range(350, 360)]
        stack.exactly(probe.id, 360)
        stack.client.delete_probe(probe.id)
