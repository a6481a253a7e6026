"""Streams whose marks are reached when the test says so, and a log of what was issued where."""

from __future__ import annotations

import dataclasses


class ScriptedMark:
    def __init__(self, stream, number):
        self.stream, self.number = stream, number

    def reached(self):
        return self.stream.done >= self.number

    def wait(self):
        self.stream.log.append(("host waits", self.stream.name))
        assert self.reached(), "the host waits for what the test has not finished"

    def ms_until(self, later):
        return float(later.number - self.number)


class ScriptedStream:
    """`finish()` reaches every mark made so far."""

    current: list = []

    def __init__(self, name, log):
        self.name, self.log, self.made, self.done = name, log, 0, 0

    def __enter__(self):
        self.current.append(self.name)
        return self

    def __exit__(self, *error):
        self.current.pop()

    def mark(self):
        self.made += 1
        return ScriptedMark(self, self.made)

    def wait(self, mark):
        self.log.append((self.name, "waits for", mark.stream.name, mark.number))

    def finish(self):
        self.done = self.made


class ScriptedDevice:
    """Makes the two streams of a pipeline, front first."""

    def __init__(self):
        self.log = []
        self.streams = []

    def __call__(self, device, priority):
        self.streams.append(ScriptedStream("front" if not self.streams else "back", self.log))
        return self.streams[-1]

    @property
    def front(self):
        return self.streams[0]

    @property
    def back(self):
        return self.streams[1]


class LoggedStages:
    """Stages that answer from static memory, as graphs do, and log the stream each call was issued on."""

    overlaps = True

    def __init__(self, stages, log):
        self._stages, self._log, self._memory = stages, log, {}

    def prepare_images(self, frames):
        self._call("images")
        return self._stages.prepare_images(frames)

    def encode_images(self, pixels):
        self._call("vision")
        return self._static("tokens", self._stages.encode_images(pixels))

    def prefill(self, *args):
        self._call("prefix")
        cache = self._stages.prefill(*args)
        return dataclasses.replace(cache, keys=self._static("keys", cache.keys),
                                   values=self._static("values", cache.values))

    def denoise(self, *args):
        self._call("expert")
        return self._stages.denoise(*args)

    def _call(self, stage):
        self._log.append((ScriptedStream.current[-1] if ScriptedStream.current else "none", stage))

    def _static(self, name, value):
        held = self._memory.setdefault(name, value.clone())
        return held.copy_(value) if held.shape == value.shape else value
