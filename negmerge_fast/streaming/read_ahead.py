"""How files that are not cached are read: with the system's own read-ahead, or each chunk requested as a whole before."""

from __future__ import annotations

from threading import Lock

# Chunks read in each way before one is chosen, and chunks before each that do not count: the disk has to start, and what the first
# way had the system read ahead is there for the second.
_PROBED, _UNCOUNTED = 16, 16
_EACH = _UNCOUNTED + _PROBED
# Requested pages are single pages, which take the system twice the time of those it reads ahead: requests have to be so much faster.
_MIN_GAIN = 0.3


class ReadAhead:
    """Chooses whether chunks are requested, by the time that the first ones took; shared by all workers."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._begun = False
        self._number = 0
        self._seconds, self._bytes = [0.0, 0.0], [0, 0]
        self.requests = False

    def record(self, cached: bool, nbytes: int, seconds: float, requested: bool) -> None:
        """Add a chunk that was read.

        Args:
            cached: Whether all of it was cached.
            nbytes: Its bytes.
            seconds: The time that it took.
            requested: Whether it was requested. Many workers may be under way with chunks as they were read before.
        """
        with self._lock:
            self._begun = self._begun or not cached
            if not self._begun or self._number >= 2 * _EACH or requested != self.requests:
                return
            if self._number % _EACH >= _UNCOUNTED:
                self._seconds[self.requests] += seconds
                self._bytes[self.requests] += nbytes
            self._number += 1
            if self._number == _EACH:
                self.requests = True
            elif self._number == 2 * _EACH:
                plain, asked = (s / max(b, 1) for s, b in zip(self._seconds, self._bytes, strict=True))
                self.requests = asked < (1 - _MIN_GAIN) * plain
