"""Messages to a bag on a thread of its own: a slow disk never holds up a callback."""

from __future__ import annotations

from collections import Counter, deque
from threading import Condition, Thread

from pi05_ros.bag.writer import BagWriter, Topic
from pi05_ros.errors import BagError

FINISH_EVERY_S = 1.0


class WriterThread:
    """`put` queues at most `most_bytes`; what comes on top, or after a failure, is dropped and counted by topic.

    `failure` is why writing stopped, or None. `close` writes what is queued and ends the bag.
    """

    def __init__(self, writer: BagWriter, most_bytes: int = 256 << 20) -> None:
        self.writer, self._most_bytes = writer, most_bytes
        self.dropped: Counter[str] = Counter()
        self.failure: BagError | None = None
        self._queue: deque[tuple[Topic, int, bytes]] = deque()
        self._bytes, self._closing = 0, False
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="pi05_bag", daemon=True)
        self._thread.start()

    def put(self, topic: Topic, time_ns: int, data: bytes) -> None:
        """Never waits for the disk."""
        with self._changed:
            if self.failure is not None or self._closing or self._bytes + len(data) > self._most_bytes:
                self.dropped[topic.name] += 1
                return
            self._queue.append((topic, time_ns, data))
            self._bytes += len(data)
            self._changed.notify()

    def close(self) -> None:
        """Raises BagError if the bag could not be written whole."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        in_hand: Topic | None = None
        unfinished_ns: int | None = None  # time of the first message of the open chunk
        try:
            while (item := self._next()) is not None:
                topic, time_ns, data = item
                if data:
                    in_hand = topic
                    self.writer.write(topic, time_ns, data)
                    in_hand = None
                    unfinished_ns = unfinished_ns or time_ns
                if unfinished_ns is not None and (not data or time_ns - unfinished_ns >= FINISH_EVERY_S * 1e9):
                    self.writer.finish_chunk()
                    unfinished_ns = None
            self.writer.close()
        except BagError as error:
            with self._changed:
                self.failure = error
                self.dropped.update(topic.name for topic, _, _ in self._queue)
                self.dropped.update([in_hand.name] if in_hand else [])
                self._queue.clear()

    def _next(self) -> tuple[Topic, int, bytes] | None:
        """The oldest message; an empty one after FINISH_EVERY_S of silence; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing, FINISH_EVERY_S)
            if not self._queue:
                return None if self._closing else (Topic("", ""), 0, b"")
            item = self._queue.popleft()
            self._bytes -= len(item[2])
            return item
