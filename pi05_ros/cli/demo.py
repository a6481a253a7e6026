"""A simulated robot and the policy node, as separate processes over DDS: cameras and joints go out of a physics world,
pi0.5 answers, the arm moves.

The arm does what the prompt says, by a small pi0.5 that comes with the package; of several prompts each is said when
the one before is done, or its share of --duration is over. With --random-weights the arm moves, smoothly and inside its
limits, but to no purpose.

Simulated time waits for the policy, so that the motion does not depend on how fast this machine is; with --real-time
it does not wait.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pi05_ros.cli.options import add_model_options, positive, positive_number
from pi05_ros.cli.report import Report, console, table

if TYPE_CHECKING:
    from pi05_ros.sim.onlooker import Onlooker

HELP = "see the whole path at work on a simulated robot"
PROMPTS = ("touch the red block", "touch the blue block")
LOOKS_A_SECOND = 2.0  # of simulated time
AFTER_SUCCESS_S = 1.5
MEANS_NOTHING = "random weights: the arm's motion means nothing; what you see is the path at work"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--duration", type=positive_number, default=30.0, metavar="S",
                        help="seconds of motion (default: 30)")
    parser.add_argument("--prompt", action="append", metavar="TEXT",
                        help=f"what to do; again and again for several (default: {', then '.join(PROMPTS)})")
    parser.add_argument("--scene", type=int, default=0, metavar="N", help="places, colours and light (default: 0)")
    parser.add_argument("--real-time", action="store_true", help="simulated time does not wait for the policy")
    parser.add_argument("--film", type=Path, default=Path("demo.gif"), metavar="FILE.gif",
                        help="what the base camera saw (default: demo.gif)")
    parser.add_argument("--random-weights", action="store_true", help="a model that has learnt nothing, of --size")
    add_model_options(parser)
    parser.set_defaults(checkpoint=Path("tabletop"))
    parser.add_argument("--steps", type=positive, default=10, help="denoising steps (default: 10)")


def run(args: argparse.Namespace) -> Report:
    import pi05_ros.sim.headless  # noqa: F401 (says so where MuJoCo is missing, before anything starts)
    from pi05_ros.sim.contact_sheet import save_film
    from pi05_ros.sim.processes import share_this_machine, start, stop

    share_this_machine()
    prompts = tuple(args.prompt or PROMPTS)
    if args.random_weights:
        console.print(f"[bold yellow]{MEANS_NOTHING}[/]", highlight=False)
    settings = {"robot": "tabletop", "checkpoint": "" if args.random_weights else str(args.checkpoint),
                "backend": args.backend, "device": args.device, "dtype": args.dtype, "size": args.size,
                "seed": args.seed, "action_horizon": args.horizon or 0, "denoising_steps": args.steps,
                "prompt": prompts[0], "use_sim_time": True, "max_input_age_s": 2.0,
                "command_lead_s": 0.06}  # the simulated controller is Python on a shared CPU, slower than a real one
    scene = {"seed": args.scene, "lockstep": not args.real_time, "image_rate_hz": 10.0 if args.real_time
             else LOOKS_A_SECOND}
    processes = {"robot": start("pi05_ros.sim.sim_robot", scene), "policy": start("pi05_ros.ros.node", settings)}
    try:
        seen, told, problems = watch(prompts, args.duration, processes, lockstep=not args.real_time)
    finally:
        codes = {name: stop(process) for name, process in processes.items()}
    problems += [f"process '{name}' ended with code {code}" for name, code in codes.items() if code != 0]
    table("Told", ("prompt", "outcome"), told.items())
    table("Summary", ("what", "value"), seen.summary().items())
    if seen.frames:
        save_film(args.film, seen.frames, 1.0 / LOOKS_A_SECOND)
        console.print(f"film: {args.film}", highlight=False)
    if args.random_weights:
        console.print(MEANS_NOTHING, highlight=False)
    for problem in problems:
        console.print(f"[bold red]failed:[/] {problem}", highlight=False)
    return Report(ok=not problems, data={**seen.summary(), "told": told, "random_weights": args.random_weights,
                                         "problems": problems})


def watch(prompts: tuple[str, ...], duration_s: float, processes: dict[str, subprocess.Popen],
          lockstep: bool) -> tuple[Onlooker, dict[str, str], list[str]]:
    """Drive the lifecycle, say the prompts, look on, and judge: (what was seen, {prompt: outcome}, problems)."""
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.parameter import Parameter
    from rich.live import Live

    from pi05_ros.errors import Pi05Error
    from pi05_ros.ros.lifecycle_client import LifecycleClient
    from pi05_ros.sim.onlooker import Onlooker
    from pi05_ros.transforms.robot_loader import load_robot

    rclpy.init()
    onlooker = Onlooker(load_robot("tabletop"), parameter_overrides=[Parameter("use_sim_time", value=True)])
    executor = SingleThreadedExecutor()
    executor.add_node(onlooker)
    lifecycle = LifecycleClient(onlooker, executor, "/pi05_policy")
    told, problems = dict[str, str](), list[str]()

    def running() -> bool:
        return all(process.poll() is None for process in processes.values())

    try:
        lifecycle.wait(30.0)
        for transition in ("configure", "activate"):
            with console.status(f"{transition} ..."):
                if not lifecycle.change(transition, timeout_s=600.0):
                    return onlooker, told, [f"{transition} was refused; the policy node's log above says why"]
        with Live(onlooker.live_table(), console=console, refresh_per_second=4, transient=True) as live:
            for prompt in prompts:
                onlooker.say(prompt)
                end_s = time.monotonic() + duration_s / len(prompts)
                while running() and time.monotonic() < end_s:
                    executor.spin_once(timeout_sec=0.1)
                    live.update(onlooker.live_table())
                    outcome = onlooker.outcome_of(prompt)
                    if outcome != told.get(prompt) == "running":
                        end_s = min(end_s, time.monotonic() + AFTER_SUCCESS_S)
                    told[prompt] = outcome
        for transition in ("deactivate", "cleanup") if running() else ():
            if not lifecycle.change(transition):
                problems.append(f"{transition} was refused")
    except (Pi05Error, TimeoutError) as error:
        problems.append(str(error))
    except KeyboardInterrupt:
        console.print("interrupted: stopping the robot", highlight=False)
    finally:
        onlooker.destroy_node()
        rclpy.try_shutdown()
    return onlooker, told, problems + onlooker.problems(lockstep)
