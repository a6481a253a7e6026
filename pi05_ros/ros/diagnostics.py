"""What the node says of itself: counts, ages and stage times on /diagnostics, and errors once per cause."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.node import Node

from pi05_ros.errors import Pi05Error
from pi05_ros.ros.conversions import status
from pi05_ros.runtime.inference_loop import Delivery

REPEAT_S = 5.0  # the same cause is logged again after so long


class Diagnostics:
    """Collects on the executor's thread; `publish` is called by a timer once a second."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._logged_s: dict[str, float] = {}
        self.refused: Counter[str] = Counter()
        self.counted: Counter[str] = Counter()  # what the parts of earlier configurations counted, and the node itself
        self._published: deque[int] = deque(maxlen=200)  # times of publication, ns
        self.chunks = 0
        self._last: Delivery | None = None
        self._latency_s = 0.0
        self.over_budget = 0
        self._problem = ""

    def refuse(self, error: Pi05Error) -> None:
        """Count an error and log it, at most once per cause in REPEAT_S."""
        self.refused[error.cause] += 1
        self._problem = str(error)
        self._warn(error.cause, str(error), self.refused[error.cause])

    def published(self, delivery: Delivery, now_ns: int, budget_s: float) -> None:
        """A trajectory went out. `budget_s`: what its latency, from stamp to publication, may be; 0: anything."""
        self.chunks += 1
        self._published.append(now_ns)
        self._last, self._latency_s, self._problem = delivery, (now_ns - delivery.chunk.stamp_ns) * 1e-9, ""
        if budget_s and self._latency_s > budget_s:
            self.over_budget += 1
            self._problem = f"latency {self._latency_s:.4f} s, above latency_budget_s = {budget_s}"
            self._warn("over budget", f"{self._problem}: lower denoising_steps, or see the stage times in /diagnostics",
                       self.over_budget)

    def publish(self, state: str, fault: str, shown: Mapping[str, object], counted: Counter[str]) -> None:
        """`shown`: more values, among them `held` where there is a robot; `counted`: by the present configuration."""
        now, held = self._node.get_clock().now(), bool(shown.get("held"))
        level, text = DiagnosticStatus.OK, state
        if fault:
            level, text = DiagnosticStatus.ERROR, f"{state}: {fault}"
        elif state == "active" and (held or self._problem):
            level, text = DiagnosticStatus.ERROR if held else DiagnosticStatus.WARN, self._problem or "held"
        values: dict[str, object] = {
            "state": state,
            "held": held,
            "chunks": self.chunks,
            "rate_hz": f"{self._rate_hz(now.nanoseconds):.2f}",
            "latency_s": f"{self._latency_s:.4f}",
            "over_budget": self.over_budget,
            **shown,
            **dict(sorted((self.counted + counted).items())),
            **{f"refused.{cause}": count for cause, count in sorted(self.refused.items())},
        }
        if self._last is not None:
            chunk = self._last.chunk
            values["last_denoising_steps"] = chunk.num_steps
            values["stage_ms.queue"] = f"{(self._last.started_ns - self._last.complete_ns) * 1e-6:.3f}"
            values |= {f"stage_ms.{stage}": f"{ms:.3f}" for stage, ms in chunk.stage_times_ms.items()}
        message = DiagnosticArray(status=[status(f"{self._node.get_name()}: policy", level, text, values)])
        message.header.stamp = now.to_msg()
        self._publisher.publish(message)

    def _warn(self, cause: str, text: str, count: int) -> None:
        """At most once per cause in REPEAT_S, on a clock that a simulation does not stop."""
        now, last = time.monotonic(), self._logged_s.get(cause)
        if last is None or now - last >= REPEAT_S:
            self._logged_s[cause] = now
            self._node.get_logger().warning(f"{text} [{cause}, {count} so far]")

    def _rate_hz(self, now_ns: int, window_s: float = 5.0) -> float:
        recent = [t for t in self._published if now_ns - t <= window_s * 1e9]
        span_s = (recent[-1] - recent[0]) * 1e-9 if recent else 0.0
        return (len(recent) - 1) / span_s if span_s > 0 else 0.0

    def destroy(self) -> None:
        self._node.destroy_publisher(self._publisher)
