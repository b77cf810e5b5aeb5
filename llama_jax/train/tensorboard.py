"""TensorBoard event files, written where the caller stands.

tensorboardX's own SummaryWriter hands events to a thread through a queue of ten. On a full disk the
thread dies, and whoever writes the eleventh waits for ever.
"""

from __future__ import annotations

import time
from pathlib import Path

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

_SECONDS_BETWEEN_FLUSHES = 10


class EventFile:
    """One event file; TensorBoard shows its events instead of earlier ones from `first_step` on."""

    def __init__(self, directory: Path, *, first_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(directory / 'events'))
        self._flushed = time.monotonic()
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add one point to each of these curves. Raises OSError, for example of a full disk."""
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=points)))

    def text(self, step: int, tag: str, text: str) -> None:
        """Add a text."""
        self._write(Event(step=step, summary=summary.text(tag, text)))

    def close(self) -> None:
        self._writer.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            self._writer.flush()
            self._flushed = time.monotonic()
