"""The node in a process of its own under faults over DDS, on a simulated clock faster than the real one.

Time stands still only while a new node process starts. In the last third of a run the node is ended again and again,
by SIGKILL or SIGTERM at a random moment; before, one process lives on, and its memory, threads and descriptors must not
grow.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import TransitionEvent
from rclpy.experimental import EventsExecutor
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.errors import WorkerError
from pi05_ros.ros.subscriptions import TOPICS
from pi05_ros.sim.accounts import Account, broken, conservation, counts_of, wire_accounts
from pi05_ros.sim.faults import ON_THE_WIRE, Fault, FaultPlan
from pi05_ros.sim.faulty_inputs import PROMPTS, SETTINGS
from pi05_ros.sim.soaked_process import NodeProcess
from pi05_ros.sim.standing import Standing, standing
from pi05_ros.sim.travel import TravelJudge
from pi05_ros.sim.wire import Wire
from pi05_ros.sim.wire_inputs import WireInputs
from pi05_ros.transforms.robot_loader import load_robot

START_NS = 1_000_000_000_000
TICKS = 2  # of the clock, a control period
PICTURE_EVERY = 4  # control periods
LEAD_S = 0.1  # command_lead_s: what a command may travel, in simulated time
COMMITTED_S = 1.0  # max_committed_s, at most
HORIZON_S = 1.0  # of a chunk: later there is nothing left to execute
LIFE_S = 40.0  # of a node process in the last third, on average
PATIENCE_S = 60.0  # of real time
COUNTERS = ("received.", "taken.", "dropped.", "lost.", "refused.", "injected.", "chunks", "activations", "clock ",
            "over_budget")
REQUESTS = ("lifecycle", "reset", "parameters")
STEPS_UP = {"unconfigured": "configure", "inactive": "activate"}


class WireSoak:
    """Args: seed, share: of FaultPlan; speed: simulated seconds a real one, at most; say: takes what happens."""

    def __init__(self, robot: str = "arm6", seed: int = 0, share: float = 0.05, speed: float = 5.0,
                 say: Callable[[str], object] = lambda text: None) -> None:
        self._name, self._robot, self._seed, self._share, self._speed = robot, load_robot(robot), seed, share, speed
        self._say = say
        self._slots = (*(camera for camera in TOPICS if camera in self._robot.cameras), "state")
        self._plan = FaultPlan(seed, self._slots, share, ON_THE_WIRE).cycles()
        self._rng = np.random.default_rng(seed + 1)
        self._steady_ns, self._offset_ns, self._cycle = START_NS, 0, 0
        self.judge = TravelJudge(self._robot, START_NS, lambda: f"{self.seconds:.2f} s", lead_s=LEAD_S,
                                 committed_s=COMMITTED_S, at_rest_s=COMMITTED_S + 0.05)
        self.found = self.judge.found
        self.standing: list[tuple[float, Standing]] = []
        self.first_life: list[Standing] = []
        self.starts: dict[float, str] = {}
        self.counted: Counter[str] = Counter()  # by all processes, as they reported last
        self._counts: dict[str, int] = {}  # of the present one
        self._sums: dict[str, Account] = {}  # of all processes that have ended
        self._reported: list[Account] = []  # last, by the present one
        self._state, self._asking, self._may_command = "", False, False
        self._ending = False  # it was asked to
        self._newest_epoch, self._ended = 0, (0, 0)  # of the process; (epoch, when it had surely ended)
        self._domain = int(os.environ.get("ROS_DOMAIN_ID", 1 + os.getpid() % 100))  # no other node shall hear this
        self._context = rclpy.Context()
        rclpy.init(context=self._context, domain_id=self._domain)
        self._wire = Wire(self._context, self._slots, self._on_trajectory, self._on_provenance, self._on_diagnostics,
                          self._on_transition)
        self._inputs = WireInputs(self._wire, self._robot, self._slots, self._domain)
        self._executor = EventsExecutor(context=self._context)
        self._executor.add_node(self._wire)
        self._node: NodeProcess | None = None
        self._next_s = time.monotonic()

    @property
    def seconds(self) -> float:
        """Simulated, since the beginning."""
        return (self._steady_ns - START_NS) * 1e-9

    @property
    def period_s(self) -> float:
        return self._robot.control_period_s

    @property
    def life_s(self) -> float:
        """Of the first node process."""
        return sorted([*self.starts, self.seconds])[1]

    def accounts(self) -> list[Account]:
        """Of all processes that have ended, as each reported last."""
        return list(self._sums.values())

    def run(self, seconds: float, kill_from: float = 2 / 3) -> None:
        """Raises WorkerError if the node does not come up."""
        self._start("begin")
        end_at = seconds * kill_from
        while self.seconds < seconds:
            self._one_cycle()
            if self._node is not None and self._node.ended() is not None:
                self.judge.violation("the node ended by itself", f"status {self._node.ended()}\n{self._node.log()}")
                self._replace("death")
            elif self.seconds >= end_at:
                end_at = self.seconds + float(np.clip(self._rng.exponential(LIFE_S), 2.0, 4 * LIFE_S))
                self._end("kill" if self._rng.random() < 0.7 else "terminate")
        self._end("terminate", again=False)

    def close(self) -> None:
        if self._node is not None:
            self._node.kill()
        self._inputs.close()
        self._executor.remove_node(self._wire)
        self._wire.destroy_node()
        self._context.try_shutdown()

    # ------------------------------------------------------------------ the node's process

    def _start(self, why: str) -> None:
        self._say(f"{self.seconds:.1f} s: a new node ({why})")
        self.starts[self.seconds] = why
        self._inputs.sent.clear()
        self._counts, self._newest_epoch, self._ended, self._state = {}, 0, (0, self._steady_ns), ""
        self._wire.forget_requests(0.0)
        self._asking = False
        settings = {"use_sim_time": "true", "robot": self._name, "command_lead_s": LEAD_S,
                    "max_committed_s": COMMITTED_S}
        words = ["--seed", self._seed + len(self.starts), "--share", self._share, "--speed", self._speed,
                 "--ros-args", "--log-level", "pi05_policy:=fatal"]
        words += [word for name, value in settings.items() for word in ("-p", f"{name}:={value}")]
        self._node = NodeProcess(list(map(str, words)), self._domain)
        end_s = time.monotonic() + PATIENCE_S
        while not self._state:
            if time.monotonic() > end_s or self._node.ended() is not None:
                raise WorkerError("node", expected=f"to answer within {PATIENCE_S} s", way_out="Its log says why.",
                                  received=f"status {self._node.ended()}, log: {self._node.log()[-2000:]}")
            self._wire.forget_requests(1.0)
            self._wire.ask_state(lambda label: setattr(self, "_state", label))
            self._wire.tick(self._now_ns())
            self._spin(time.monotonic() + 1.0, lambda: bool(self._state))
        self._next_s = time.monotonic()

    def _end(self, how: str, again: bool = True) -> None:
        """The node's process, and a new one."""
        assert self._node is not None
        self.found.injected[how] += 1
        if how == "kill":
            self._node.kill()
        else:
            self._node.terminate()
            self._ending = True
            end_s = time.monotonic() + PATIENCE_S
            while self._node.ended() is None and time.monotonic() < end_s:
                self._one_cycle()
            if (status := self._node.ended()) != 0:
                self.judge.violation("SIGTERM is not obeyed", f"status {status}\n{self._node.log()}")
                self._node.kill()
        self._replace(how, again)

    def _replace(self, why: str, again: bool = True) -> None:
        """After a while in which what was commanded last must have come to rest."""
        self._node, self._may_command, self._ending = None, False, False
        self.judge.lost_track()
        for _ in range(int(2 * COMMITTED_S / self._robot.control_period_s)):
            self._one_cycle()
        self.counted.update({key: n for key, n in self._counts.items() if key.startswith(COUNTERS)})
        for one in self._reported:
            self._sums[one.counter] = self._sums[one.counter] + one if one.counter in self._sums else one
        self._reported = []
        if again:
            self._start(why)

    # ------------------------------------------------------------------ a control period

    def _one_cycle(self) -> None:
        self._cycle += 1
        for fault in next(self._plan):
            self.found.injected[fault.kind] += 1
            self._inject(fault)
        positions, _ = self.judge.controller.at(self._steady_ns)
        self._inputs.send(self._steady_ns, self._now_ns(), positions, pictures=self._cycle % PICTURE_EVERY == 0)
        for _ in range(TICKS):
            self._pass_time(self._robot.control_period_s / TICKS)
        if self._cycle % 10 == 0:
            self._keep_up()
        living = self._node is not None and not self._ending and self._node.ended() is None
        if self._cycle % 50 == 0 and self._node is not None and living:
            self.standing.append((self.seconds, standing(self._node.pid)))
            if len(self.starts) == 1:
                self.first_life.append(self.standing[-1][1])

    def _pass_time(self, seconds: float) -> None:
        for _ in range(2):
            self._steady_ns += int(seconds * 1e9 / 2)
            if self._may_command:
                self.judge.active(self._steady_ns)
            self.judge.look(self._steady_ns)
        self._wire.tick(self._now_ns())
        now_s = time.monotonic()
        self._next_s = max(self._next_s + seconds / self._speed, now_s + 0.0005)
        self._spin(self._next_s)

    def _spin(self, until_s: float, done: Callable[[], bool] = lambda: False) -> None:
        while (left_s := until_s - time.monotonic()) > 0 and not done():
            self._executor.spin_once(timeout_sec=left_s)

    def _now_ns(self) -> int:
        return self._steady_ns + self._offset_ns

    def _keep_up(self) -> None:
        """Back to active, whatever brought the node down."""
        self._wire.forget_requests()
        if self._node is not None and self._state in STEPS_UP and not self._asking:
            self._ask(STEPS_UP[self._state])

    # ------------------------------------------------------------------ faults

    def _inject(self, fault: Fault) -> None:
        amount, sent = fault.amount, self._inputs.sent
        if fault.kind == "clock_jump":
            self._offset_ns += int((amount - 0.5) * 2e9)
            self.judge.clock_jumped(self._steady_ns)
        elif fault.kind == "prompt":
            self._wire.prompt.publish(String(data=PROMPTS[int(amount * len(PROMPTS))]))
        elif fault.kind not in REQUESTS:
            self._inputs.inject(fault, self._steady_ns)
        elif self._node is None:
            pass  # nobody to ask
        elif fault.kind == "lifecycle":
            self._ask(("deactivate", "cleanup", "configure", "activate")[int(amount * 4)])  # allowed or not
        elif fault.kind == "reset":
            epoch = self._newest_epoch
            self._wire.reset(lambda done: self._activation_ended(epoch if done else 0))
        else:
            storm = [SETTINGS[n] for n in self._rng.integers(len(SETTINGS), size=5)]
            values = [(name, choices[self._rng.integers(len(choices))]) for name, choices in storm]
            self._wire.storm(values, lambda done: sent.update({"bad parameter": done.count(False)}))

    def _ask(self, transition: str) -> None:
        """For a transition. After `deactivate` has succeeded nothing of its activation may follow."""
        self._asking = True
        self._may_command |= transition == "activate"

        def answered(done: bool) -> None:
            self._asking = False
            if done and transition == "deactivate":
                self._may_command = False
                self._activation_ended(self._newest_epoch)

        self._wire.transition(transition, answered)

    def _activation_ended(self, epoch: int) -> None:
        if epoch:
            self._ended = (epoch, self._steady_ns)

    # ------------------------------------------------------------------ outputs

    def _on_trajectory(self, message: JointTrajectory) -> None:
        self.judge.execute(message, self._steady_ns, self._offset_ns)

    def _on_provenance(self, message: DiagnosticArray) -> None:
        made = {pair.key: pair.value for pair in message.status[0].values}
        stamp_ns, published_ns = (int(made[key]) - self._offset_ns for key in ("observation_stamp_ns", "published_ns"))
        self.judge.published(stamp_ns, published_ns)
        used = {f"{key.removeprefix('input_stamp_ns.')} {value}" for key, value in made.items()}
        if not used.isdisjoint(self._inputs.damaged):
            self.judge.violation("a damaged picture", f"used: {used & set(self._inputs.damaged)}")
        epoch, (ended, ended_ns) = int(made["epoch"]), self._ended
        if epoch < self._newest_epoch:
            self.judge.violation("a chunk of a past activation", f"{epoch} after {self._newest_epoch}")
        self._newest_epoch = max(epoch, self._newest_epoch)
        if not self.judge.settled(self._steady_ns):
            return  # stamps are of another time
        if epoch <= ended and published_ns > ended_ns:
            late_s = (published_ns - ended_ns) * 1e-9
            self.judge.violation("a chunk of a past activation", f"{epoch}, {late_s:.3f} s after its end")
        if published_ns - stamp_ns > HORIZON_S * 1e9:
            self.judge.violation("a stale command", f"{(published_ns - stamp_ns) * 1e-9:.3f} s")

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        if self._node is None:
            return
        self._counts = counts_of(message)
        cameras = {slot: topic for slot, topic in TOPICS.items() if slot in self._slots}
        self._reported = [*conservation(self._counts, cameras, open_sets=3),
                          *wire_accounts(self._counts, self._inputs.sent)]
        for line in broken(self._reported):
            self.judge.violation("not counted", line)

    def _on_transition(self, message: TransitionEvent) -> None:
        if self._node is not None:
            self._state = message.goal_state.label
