"""The node as `pi05_ros.ros.node` starts it, with a scripted policy that fails at random: for `pi05 soak --dds`."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from threading import Event
from typing import Any

import numpy as np

from pi05_ros.ros.node import main as run_node
from pi05_ros.ros.policy_node import PolicyNode
from pi05_ros.schema import ActionChunk, Guidance, Observation
from pi05_ros.sim.faults import OF_POLICY, Fault
from pi05_ros.sim.soaked_node import ScriptedPolicy

MODULE = "pi05_ros.sim.soaked_process"


class TroubledPolicy(ScriptedPolicy):
    """Before a chunk, at random, its fault. What was injected stands in /diagnostics beside what the node counted."""

    def __init__(self, injected: Counter[str], rng: np.random.Generator, share: float, **kwargs: Any) -> None:
        super().__init__(failed=lambda counter: injected.update([f"injected.{counter}"]), **kwargs)
        self._rng, self._share, self._injected = rng, share, injected

    def infer(self, observation: Observation, num_steps: int, *, chunk_index: int,
              guidance: Guidance | None = None) -> ActionChunk:
        if self._rng.random() < self._share:
            kind = OF_POLICY[self._rng.integers(len(OF_POLICY))]
            self.trouble = Fault(kind, "", float(self._rng.random()))
            self._injected[f"injected.{kind}"] += 1
        return super().infer(observation, num_steps, chunk_index=chunk_index, guidance=guidance)

    def sensors(self) -> Any:
        return self._injected.copy


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the policy's faults")
    parser.add_argument("--share", type=float, default=0.0, help="of the chunks that have one")
    parser.add_argument("--speed", type=float, default=1.0, help="of the simulated clock")
    args, rest = parser.parse_known_args(argv)
    injected: Counter[str] = Counter()
    rng, stop = np.random.default_rng(args.seed), Event()

    def load(**kwargs: Any) -> TroubledPolicy:
        return TroubledPolicy(injected, rng, args.share, robot=kwargs["robot"],
                              during=lambda seconds: stop.wait(seconds / args.speed) and None)

    return run_node([sys.argv[0], *rest], lambda: PolicyNode(load_policy=load))  # type: ignore[arg-type, return-value]


class NodeProcess:
    """That process, from outside. Linux.

    Args:
        arguments: of `main`, and --ros-args.
        domain: ROS_DOMAIN_ID.
    """

    def __init__(self, arguments: list[str], domain: int) -> None:
        self._log = tempfile.TemporaryFile("w+")
        alone = os.environ | {"OMP_NUM_THREADS": "1", "ROS_DOMAIN_ID": str(domain)}
        self._process = subprocess.Popen([sys.executable, "-m", MODULE, *arguments], stderr=self._log, env=alone)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> int | None:
        """The exit status, if it has ended."""
        return self._process.poll()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()


if __name__ == "__main__":
    sys.exit(main())
