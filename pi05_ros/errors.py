"""The one exception tree. Every message says what was expected, what came, and the way out."""

from __future__ import annotations


class Pi05Error(Exception):
    """Base of every error this package raises on purpose.

    Args:
        subject: what the error is about: a key, a topic, a parameter.
        expected: what would have been right.
        received: what came instead.
        way_out: what the user can do now.
        cause: short stable word for counting and throttling ("encoding", "stale"); the class name if not given.
    """

    def __init__(self, subject: str, *, expected: str, received: str, way_out: str, cause: str = "") -> None:
        self.subject, self.expected, self.received, self.way_out = subject, expected, received, way_out
        self.cause = cause or type(self).__name__
        super().__init__(f"{subject}: expected {expected}, received {received}. {way_out}")


class ConfigError(Pi05Error):
    """A robot file, parameter, option or model size that cannot be right."""


class CheckpointError(Pi05Error):
    """A checkpoint that is broken, incomplete, of another model, or of an unsupported kind."""


class BackendError(Pi05Error):
    """A backend, precision, shape or device that is not available."""


class ObservationError(Pi05Error):
    """An input that must not reach the model: wrong encoding, missing joint, NaN, stale stamp."""


class WorkerError(Pi05Error):
    """The worker thread failed or was used after it stopped."""


class BagError(Pi05Error):
    """A recording that cannot be written, read or replayed."""
