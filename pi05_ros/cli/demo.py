"""A simulated robot and the policy node, as separate processes over DDS, with the embedded tiny model.

The tiny model's weights are random: the arm moves, smoothly and inside its limits, but to no purpose. What the demo
shows is the whole path at work: cameras and joints in, pi0.5, joint trajectory out.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time

from pi05_ros.cli.options import add_model_options, positive
from pi05_ros.cli.report import Report, console, table

HELP = "see the whole path at work on a simulated robot"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--duration", type=float, default=20.0, metavar="S", help="seconds of motion (default: 20)")
    parser.add_argument("--robot", default="arm6", help="robot name or YAML file (default: arm6)")
    add_model_options(parser)
    parser.add_argument("--steps", type=positive, default=10, help="denoising steps (default: 10)")
    parser.add_argument("--prompt", default="pick up the red block")


def run(args: argparse.Namespace) -> Report:
    from pi05_ros.config import share_directory

    profile = share_directory() / "config" / "fastdds.xml"
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    os.environ.setdefault("FASTRTPS_DEFAULT_PROFILES_FILE", str(profile))
    # On a CPU: threads that wait for a core at PyTorch's barriers cost seconds, so leave one to the other processes.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) - 1)))
    settings = {"robot": args.robot, "checkpoint": str(args.checkpoint or ""), "backend": args.backend,
                "device": args.device, "dtype": args.dtype, "size": args.size, "seed": args.seed,
                "action_horizon": args.horizon or 0, "denoising_steps": args.steps, "prompt": args.prompt,
                "command_lead_s": 0.06}  # the simulated controller is Python on a shared CPU, slower than a real one
    processes = {
        "robot": start("pi05_ros.sim.robot_node", {"robot": args.robot}),
        "policy": start("pi05_ros.ros.node", settings),
    }
    try:
        seen, problems = watch(args.robot, args.duration, processes)
    finally:
        codes = {name: stop(process) for name, process in processes.items()}
    problems += [f"process '{name}' ended with code {code}" for name, code in codes.items() if code != 0]
    summary = seen.summary() if seen else {}
    table("Summary", ("what", "value"), summary.items())
    for problem in problems:
        console.print(f"[bold red]failed:[/] {problem}", highlight=False)
    return Report(ok=not problems, data={**summary, "problems": problems})


def start(module: str, parameters: dict[str, object]) -> subprocess.Popen:
    """A ROS process of this package with the given parameters."""
    words = {name: repr(value) if isinstance(value, str) else value for name, value in parameters.items()}
    arguments = [word for name, value in words.items() for word in ("-p", f"{name}:={value}")]
    return subprocess.Popen([sys.executable, "-m", module, "--ros-args", "--log-level", "warn", *arguments])


def stop(process: subprocess.Popen, patience_s: float = 20.0) -> int:
    """SIGINT, then wait; kill only what does not obey."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        return process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def watch(robot: str, duration_s: float, processes: dict[str, subprocess.Popen]):
    """Drive the lifecycle, look on, and judge: (what was seen, problems)."""
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from rich.live import Live

    from pi05_ros.errors import Pi05Error
    from pi05_ros.ros.lifecycle_client import LifecycleClient
    from pi05_ros.sim.onlooker import Onlooker
    from pi05_ros.transforms.robot_loader import load_robot

    rclpy.init()
    onlooker = Onlooker(load_robot(robot))
    executor = SingleThreadedExecutor()
    executor.add_node(onlooker)
    lifecycle = LifecycleClient(onlooker, executor, "/pi05_policy")
    problems: list[str] = []
    try:
        lifecycle.wait(30.0)
        for transition in ("configure", "activate"):
            with console.status(f"{transition} ..."):
                if not lifecycle.change(transition, timeout_s=600.0):
                    return onlooker, [f"{transition} was refused; the policy node's log above says why"]
        end = time.monotonic() + duration_s
        with Live(onlooker.live_table(), console=console, refresh_per_second=4, transient=True) as live:
            while time.monotonic() < end and all(p.poll() is None for p in processes.values()):
                executor.spin_once(timeout_sec=0.1)
                live.update(onlooker.live_table())
        for transition in ("deactivate", "cleanup"):
            if not lifecycle.change(transition):
                problems.append(f"{transition} was refused")
    except (Pi05Error, TimeoutError) as error:
        problems.append(str(error))
    except KeyboardInterrupt:
        console.print("interrupted: stopping the robot", highlight=False)
    finally:
        onlooker.destroy_node()
        rclpy.try_shutdown()
    return onlooker, problems + onlooker.problems()
