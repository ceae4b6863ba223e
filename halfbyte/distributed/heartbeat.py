"""Noticing a rank that has vanished: its host lost power or its cable, or the process is frozen.

A process that dies closes its connections, and the others' collectives fail at once. One that vanishes closes nothing:
the others wait in gloo or NCCL, where ranks may rightly wait for minutes for one that is busy alone. So each rank has
two threads beside the one that trains:

    the talker   every few seconds writes this rank's beat, a number that grows, into the store where the ranks met, and
                 reads what it needs of the others; over a connection of its own, so that nothing else delays it
    the judge    adds up for how long each beat has stood still, and ends this process where that is too long

They are two because no time limit of a TCPStore's client is kept when the store's host vanishes in the middle of an
answer: the talker may wait forever, and the judge must not.

Rank 0 listens to all and publishes whom it has lost; the others listen to rank 0 alone. All reading all would be a
square of messages; so it is two writes or reads of a few bytes a rank and beat, and one read of all beats by rank 0:
for 64 ranks about fifty messages a second. All ranks also give the same name for what has happened.

No two hosts' clocks are compared. A silence is the sum of what passed between the judge's own looks, and each of these
counts as two beats at most: where all ranks were suspended together, or this one alone, no silence has grown meanwhile.
Beats that cannot be read because the store does not answer count against the store only.

A rank that is busy alone goes on beating, since threads take turns. A rank whose main thread holds Python's lock for
longer than the limit, in one call of a library that never lets go of it, counts as lost. That is accepted: no call
here takes nearly as long, and a beat from another process would go on while the rank itself is frozen.

The first to end for this reason closes its connections, and may be taken for the cause by those whose verdict is still
to come. So a rank ends a beat after it was told, and one whose connections fail while a verdict is near hears it out.

A rank that ends in order says goodbye and is no longer missed. After rank 0's goodbye, nobody listens any more. A rank
that an exception ends says none: should its process linger, it must not keep the others waiting.
"""

from __future__ import annotations

import atexit
import dataclasses
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from halfbyte.distributed.world import WorldError

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

# With what telling the others takes, all have ended a minute after a rank fell silent; and it is longer than a busy
# host's pauses: swapping, a network that finds another way, a file system that does not answer.
SILENCE_SECONDS = 40.0
# Beats in that time: one that is late, or several, must not matter.
BEATS = 15
# So many beats before somebody counts as lost, whoever loses a connection waits for the verdict that names the cause.
NEAR_BEATS = 4
# What the talker's calls may take, as a part of the limit: so that one lost answer is asked for again in time.
CALL_SHARE = 1 / 3
FLUSH_SECONDS = 2.0
GOODBYE = "goodbye"
LOST = "lost"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where the ranks meet, and who this one is."""

    host: str
    port: int
    prefix: str
    """Of keys in the store; another for each time that ranks are started."""
    rank: int
    size: int
    keeps_store: bool
    """Whether the store ends with this process; torchrun's agent keeps it otherwise."""

    @property
    def listened_to(self) -> tuple[int, ...]:
        """Ranks whose beats this one follows."""
        return tuple(range(1, self.size)) if self.rank == 0 else (0,)

    def key(self, name: object) -> str:
        """Return a key of the store: of a rank's beat, or of the verdict."""
        return f"{self.prefix}/heartbeat/{name}"


class Silences:
    """For how long each rank, and the store, have not been heard, in seconds during which this process was awake."""

    def __init__(self, ranks: Sequence[int], *, limit_seconds: float) -> None:
        self.limit_seconds = limit_seconds
        self.beat_seconds = limit_seconds / BEATS
        self.store_seconds = 0.0
        self._seconds = dict.fromkeys(ranks, 0.0)
        self._beats = dict.fromkeys(ranks, "")

    def add(self, elapsed_seconds: float, beats: Mapping[int, str] | None) -> None:
        """Count what has passed since the last look.

        Args:
            elapsed_seconds: Since then; what is more than two beats was no look at all, see the module.
            beats: By rank, as the store has answered; None where it has not answered since.
        """
        seconds = min(elapsed_seconds, 2 * self.beat_seconds)
        if beats is None:
            self.store_seconds += seconds
            return
        self.store_seconds = 0.0
        for rank, beat in beats.items():
            moved = beat != self._beats[rank] or beat.startswith(GOODBYE)
            self._seconds[rank] = 0.0 if moved else self._seconds[rank] + seconds
        self._beats.update(beats)

    def has_left(self, rank: int) -> bool:
        """Return whether a rank has said goodbye."""
        return self._beats[rank].startswith(GOODBYE)

    def host_of(self, rank: int) -> str:
        """Return the name of the host a rank was last heard from."""
        return self._beats[rank].partition(" ")[2] or "a host that never spoke"

    @property
    def longest_seconds(self) -> float:
        """Of the rank that has been silent for longest, or of the store."""
        return max(self.store_seconds, *self._seconds.values())

    def lost(self) -> str:
        """Return who has been silent for too long and since when; empty if nobody."""
        longest = max(self._seconds.values())
        if longest <= self.limit_seconds:
            return ""
        # The beats of a host's ranks end within a beat of each other: those that fell silent with the first.
        silent = [rank for rank, seconds in self._seconds.items() if seconds > longest - 2 * self.beat_seconds]
        names = " and ".join(f"rank {rank} on {self.host_of(rank)}" for rank in silent)
        return f"{names}: nothing heard {_since(longest)}"


class Heart:
    """The beats of this rank, and its ear for the others'."""

    def __init__(self, place: Place, *, limit_seconds: float = SILENCE_SECONDS) -> None:
        self._place = place
        self._limit_seconds = limit_seconds
        self._beat_seconds = limit_seconds / BEATS
        self._host = socket.gethostname()
        self._stopped = threading.Event()
        self._says_goodbye = False
        self._heard: dict[int, str] | None = None
        self._told = ""
        """By rank 0, of whom it has lost."""
        self._verdict = ""
        """Of this rank's judge, to be told."""
        self._is_near = False
        """Whether the judge may soon end this process."""
        self._talker = threading.Thread(target=self._talk, name="halfbyte-beats", daemon=True)
        self._judge = threading.Thread(target=self._listen, name="halfbyte-listens", daemon=True)

    def introduce(self, store: Store) -> None:
        """Write the first beat; every rank must have done so before any starts, since reading waits for a key."""
        store.set(self._place.key(self._place.rank), self._beat(0))
        if self._place.rank == 0:
            store.set(self._place.key(LOST), "")

    def start(self) -> None:
        """Beat and listen until `stop`, or until this process ends in order."""
        self._talker.start()
        self._judge.start()
        atexit.register(self._leave_at_exit)

    def stop(self, *, goodbye: bool) -> None:
        """End both threads, with a goodbye where the others are to go on without this rank."""
        atexit.unregister(self._leave_at_exit)
        self._says_goodbye = goodbye
        self._stopped.set()
        # Both return at once, but for a talker that waits for a store that has vanished. Python must not end while a
        # thread is inside torch, which cannot return to it: the process would abort.
        self._judge.join(self._beat_seconds)
        self._talker.join(self._beat_seconds)

    def hear_out(self) -> None:
        """Wait for the verdict that ends this process, where one is near: connections may have failed because of it."""
        if self._is_near or self._told or self._verdict:
            self._judge.join(2 * NEAR_BEATS * self._beat_seconds)

    def _leave_at_exit(self) -> None:
        # In a fork of this process the threads do not run, and the connection is not its own.
        if self._talker.is_alive():
            self.stop(goodbye=True)
            if self._place.keeps_store:
                time.sleep(2 * self._beat_seconds)  # or nobody could read the goodbye

    def _beat(self, number: object) -> str:
        return f"{number} {self._host}"

    def _talk(self) -> None:
        place, store = self._place, None
        names = [*place.listened_to, *([LOST] if place.rank else [])]
        keys = [place.key(name) for name in names]
        number = 0
        while True:
            is_last = self._stopped.wait(self._beat_seconds)
            if is_last and not self._says_goodbye:
                return
            number += 1
            try:
                store = store or self._connect()
                store.set(place.key(place.rank), self._beat(GOODBYE if is_last else number))
                if is_last:
                    return
                if self._verdict:
                    store.set(place.key(LOST), self._verdict)
                answers = [answer.decode() for answer in store.multi_get(keys)]
            except (RuntimeError, OSError):
                # All that torch and sockets raise of a connection. The judge counts the silence; another may succeed.
                if is_last:
                    return
                store = None
                continue
            self._told = answers.pop() if place.rank else ""
            self._heard = dict(zip(place.listened_to, answers, strict=True))
            if 0 in place.listened_to and answers[0].startswith(GOODBYE):
                return  # nobody listens any more, and the store may end

    def _connect(self) -> TCPStore:
        import datetime

        from torch.distributed import TCPStore

        address = (self._place.host, self._place.port)
        # torch would knock again and again at a port that is closed, and write its own stack for each.
        socket.create_connection(address, timeout=self._beat_seconds).close()
        timeout = datetime.timedelta(seconds=self._limit_seconds * CALL_SHARE)
        return TCPStore(*address, is_master=False, timeout=timeout, wait_for_workers=False)

    def _listen(self) -> None:
        silences = Silences(self._place.listened_to, limit_seconds=self._limit_seconds)
        looked = time.monotonic()
        while not self._stopped.wait(self._beat_seconds):
            now = time.monotonic()
            heard, self._heard = self._heard, None
            silences.add(now - looked, heard)
            looked = now
            self._is_near = silences.longest_seconds > self._limit_seconds - NEAR_BEATS * self._beat_seconds
            if 0 in self._place.listened_to and silences.has_left(0):
                return
            if verdict := self._told or silences.lost():
                self._end(verdict, tells=self._place.rank == 0)
            elif silences.store_seconds > self._limit_seconds:
                self._end(self._store_lost(silences), tells=False)

    def _store_lost(self, silences: Silences) -> str:
        host = self._host if self._place.rank == 0 else silences.host_of(0)
        return (
            f"rank 0 on {host}: the meeting point of all ranks that its host keeps, {self._place.host}:"
            f"{self._place.port}, has not answered {_since(silences.store_seconds)}"
        )

    def _end(self, verdict: str, *, tells: bool) -> None:
        """End this process, whatever its main thread waits for."""
        if tells:
            self._verdict = verdict
        # The store may end with rank 0's process: time for one more beat here, and one there.
        if self._stopped.wait((2 if tells else 1) * self._beat_seconds):
            return
        line = (
            f"halfbyte: {WorldError.label}rank {self._place.rank} of {self._place.size} ends, since another was lost. "
            f"{verdict}. Its host or network may be down, or the process frozen. Checkpoints are whole: start all "
            "ranks again to go on from the last one\n"
        )
        end_process(line)


def end_process(line: str) -> None:
    """End this process and those it has started with what a WorldError's exit code is, from any thread.

    Nothing else interrupts a main thread inside gloo or NCCL. A checkpoint that is being written stays under its
    temporary name, and is not taken for one.
    """
    # Not through sys.stderr, whose lock the main thread may hold.
    os.write(2, line.encode())
    flusher = threading.Thread(target=_flush, daemon=True)
    flusher.start()
    flusher.join(FLUSH_SECONDS)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(WorldError.exit_code)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _since(seconds: float) -> str:
    """Return since when, by this host's clock on the wall."""
    return f"since {time.strftime('%H:%M:%S', time.localtime(time.time() - seconds))}, {seconds:.0f} s ago"
