"""The simulated world as a library: an arm, a table with blocks, three cameras, steps faster than real time. MuJoCo."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pi05_ros.errors import ConfigError
from pi05_ros.runtime.trajectory import JointTrajectoryPlan
from pi05_ros.schema import IMAGE_SIZE, Observation
from pi05_ros.sim.headless import mujoco
from pi05_ros.sim.joint_integrator import JointIntegrator
from pi05_ros.sim.tasks import COLOURS, BlockRecord, Outcome, Task, draw_task, judge
from pi05_ros.sim.variation import Appearance, draw_layout, draw_start
from pi05_ros.sim.views import Views
from pi05_ros.transforms.robot_loader import load_robot

MODEL_FILE = Path(__file__).with_name("tabletop.xml")
BLOCK_HEIGHT_M = 0.04
UPRIGHT = 0.7  # of a contact's normal: between a finger and the top of a block, not its side
SETTLE_STEPS = 20  # physics steps in which the blocks come to rest


class TabletopWorld:
    """One world; an episode begins with `reset`. The same seed, task and commands give the same numbers.

    Commands have the semantics of a joint trajectory: `step` is one point, reached at the end of its control period;
    `execute` takes a whole trajectory, which `advance` runs. The servos follow the command about 25 ms behind.

    Args:
        image_size: height and width of each camera's frame, pixels.
    """

    def __init__(self, image_size: int = IMAGE_SIZE) -> None:
        self.robot = load_robot("tabletop")
        self.model = mujoco.MjModel.from_xml_path(str(MODEL_FILE))
        self.data = mujoco.MjData(self.model)
        self._appearance = Appearance(self.model)
        self._views = Views(self.model, image_size)
        self._step_ns = round(self.model.opt.timestep * 1e9)
        self._period_ns = round(self.robot.control_period_s * 1e9)
        names = [joint.name for joint in self.robot.joints]
        self.qpos = np.array([self.model.joint(name).qposadr[0] for name in names])
        self.dofs = np.array([self.model.joint(name).dofadr[0] for name in names])
        self._mimic = self.model.joint("gripper_mimic").qposadr[0]
        self._blocks = np.array([self.model.body(colour).id for colour in COLOURS])
        self._block_qpos = [self.model.joint(self.model.body(c).jntadr[0]).qposadr[0] for c in COLOURS]
        self._block_geoms = [self.model.geom(colour).id for colour in COLOURS]
        self._fingers = {self.model.geom(f"{side}_finger").id for side in ("left", "right")}
        self.lower, self.upper, self._speed = np.array(
            [(j.lower, j.upper, j.max_velocity) for j in self.robot.joints]).T
        self.seed, self.task = -1, Task("touch", "red")
        self.reset(0)

    def reset(self, seed: int, task: Task | None = None) -> Task:
        """Begin an episode: layout, appearance and start of the arm by `seed`; without a task, that too. Returns it."""
        if seed < 0:
            raise ConfigError("seed", expected="0 or more", received=str(seed), way_out="Give another seed.")
        # Streams of their own, so that a seed looks the same and begins alike whatever the task.
        tasks, layout, start, looks = (np.random.default_rng([seed, stream]) for stream in range(4))
        self.seed, self.task = seed, task or draw_task(tasks)
        mujoco.mj_resetData(self.model, self.data)
        self._appearance.vary(looks)
        for address, centre, angle in zip(self._block_qpos, *draw_layout(layout, self.task), strict=True):
            self.data.qpos[address:address + 7] = [*centre, BLOCK_HEIGHT_M / 2, np.cos(angle / 2), 0, 0,
                                                   np.sin(angle / 2)]
        self._command = draw_start(start)
        self.data.qpos[self.qpos] = self._command
        self.data.qpos[self._mimic] = self._command[-1]
        self._time_ns = 0
        self._touched, self._pressed = np.zeros((2, len(COLOURS)), bool)
        self._touching = self._left_behind = np.zeros(len(COLOURS), bool)
        self.data.ctrl[:] = self._command
        mujoco.mj_step(self.model, self.data, SETTLE_STEPS)
        mujoco.mj_forward(self.model, self.data)
        self._start = self._block_positions()
        self._trajectory = JointIntegrator(self._command)
        return self.task

    def ask(self, task: Task) -> None:
        """Another task from here on, judged by what happens to the blocks from now. A block that a finger is at counts
        as touched only once the finger has left it."""
        self.task, self._start, self._left_behind = task, self._block_positions(), self._touching
        self._touched, self._pressed = np.zeros((2, len(COLOURS)), bool)

    @property
    def time_ns(self) -> int:
        """Since reset."""
        return self._time_ns

    @property
    def command(self) -> np.ndarray:
        """float64 [7]: what the servos are told now."""
        return self._command.copy()

    @property
    def state(self) -> np.ndarray:
        """float32 [7]: measured joints, in the robot's units and order."""
        return self.data.qpos[self.qpos].astype(np.float32)

    @property
    def velocity(self) -> np.ndarray:
        """float64 [7]: measured, per second."""
        return self.data.qvel[self.dofs].copy()

    @property
    def blocks(self) -> BlockRecord:
        return BlockRecord(self._start, self._block_positions(), self._touched.copy(), self._pressed.copy())

    @property
    def outcome(self) -> Outcome:
        return judge(self.task, self.blocks)

    def observe(self) -> Observation:
        """The three images, the joints, the prompt; the stamp is the time since reset."""
        return Observation(self._views.render(self.data), self.state, self.task.prompt, self._time_ns)

    def change_looks(self, random: np.random.Generator) -> None:
        """Other colours, light and camera mounts from now on; nothing moves."""
        self._appearance.vary(random)
        mujoco.mj_camlight(self.model, self.data)

    def place(self, command: np.ndarray) -> None:
        """Put the arm at rest at joint targets (float [7], rad and m) at once; it must hit nothing there."""
        self._command = np.clip(command, self.lower, self.upper)
        self.data.qpos[self.qpos], self.data.qpos[self._mimic] = self._command, self._command[-1]
        self.data.qvel[self.dofs], self.data.ctrl[:] = 0.0, self._command
        mujoco.mj_forward(self.model, self.data)
        self._trajectory = JointIntegrator(self._command)

    def step(self, target: np.ndarray) -> Outcome:
        """One control period towards a point: float [7], rad and m. Limits of position and speed cut it.

        Raises:
            ConfigError: another shape, or not finite.
        """
        target = np.asarray(target, np.float64)
        if target.shape != self._command.shape or not np.isfinite(target).all():
            raise ConfigError("joint targets", expected=f"{len(self._command)} finite numbers",
                              received=f"shape {target.shape}: {target}", way_out="Correct what commands the arm.")
        reach = self._speed * self.robot.control_period_s
        begin = self._command
        end = np.clip(np.clip(target, self.lower, self.upper), begin - reach, begin + reach)
        steps = self._period_ns // self._step_ns
        for k in range(1, steps + 1):
            self._physics_step(begin + (end - begin) * (k / steps))
        self._trajectory = JointIntegrator(self._command)
        return self.outcome

    def execute(self, plan: JointTrajectoryPlan) -> bool:
        """Take over a trajectory of all joints, stamped in `time_ns`; False if it is refused, as a
        joint_trajectory_controller would. Positions are cut at the limits."""
        return self._trajectory.execute(plan, self._time_ns)

    def advance(self, seconds: float) -> Outcome:
        """Run the trajectory that was taken over, in whole steps of 2.5 ms; after its end the arm holds."""
        for _ in range(round(seconds * 1e9) // self._step_ns):
            positions, _ = self._trajectory.at(self._time_ns + self._step_ns)
            self._physics_step(np.clip(positions, self.lower, self.upper))
        return self.outcome

    def close(self) -> None:
        """Free what rendering holds."""
        self._views.close()

    def _physics_step(self, command: np.ndarray) -> None:
        self._command = command
        self.data.ctrl[:] = command
        mujoco.mj_step(self.model, self.data)
        self._time_ns += self._step_ns
        touching, on_top = np.zeros((2, len(COLOURS)), bool)
        for contact, pair in enumerate(self.data.contact.geom[:self.data.ncon].tolist()):
            if not self._fingers.isdisjoint(pair):
                upright = abs(self.data.contact.frame[contact, 2]) > UPRIGHT  # its normal's z
                for block, geom in enumerate(self._block_geoms):
                    touching[block] |= geom in pair
                    on_top[block] |= upright and geom in pair
        self._touching, self._left_behind = touching, self._left_behind & touching
        self._touched |= touching & ~self._left_behind
        self._pressed |= on_top & ~self._left_behind

    def _block_positions(self) -> np.ndarray:
        return self.data.xpos[self._blocks, :2].copy()
