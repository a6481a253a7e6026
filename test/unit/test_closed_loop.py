"""Driving the simulated arm by a policy, and counting."""

import json
from dataclasses import replace

import numpy as np
import pytest
from rendering import seen_world  # noqa: F401 (a fixture)

from pi05_ros.cli.main import main
from pi05_ros.errors import ConfigError
from pi05_ros.runtime.policy import Policy
from pi05_ros.sim import closed_loop
from pi05_ros.sim.closed_loop import Loop, Run, evaluate, evaluate_expert, may_lack
from pi05_ros.sim.contact_sheet import save_contact_sheet
from pi05_ros.sim.evaluation import Driver, Evaluation, run_all
from pi05_ros.sim.expert import ScriptedExpert
from pi05_ros.sim.tasks import Task
from pi05_ros.sim.world import TabletopWorld
from pi05_ros.transforms.robot_loader import load_robot

TASKS = {1_000_000: Task("touch", "red"), 1_000_001: Task("forward", "blue"), 1_000_002: Task("touch", "green", 1)}


@pytest.fixture(scope="module")
def policy():
    return Policy.load(robot=may_lack(load_robot("tabletop"), "base_0_rgb"))


def test_a_policy_that_knows_succeeds_and_one_that_rests_runs_out_of_time(policy, monkeypatch):
    def know(policy, runs, loop, index, masked):
        plans = [ScriptedExpert(run.world).plan(np.random.default_rng(0)) for run in runs]
        return [plan[index * loop.execute:] for plan in plans] if index == 0 else [plan[:1] for plan in plans]

    monkeypatch.setattr(closed_loop, "_infer", know)
    loop = Loop(execute=policy.config.action_horizon, limit=policy.config.action_horizon)
    trials = evaluate(policy, [TabletopWorld(), TabletopWorld()], TASKS, loop)
    assert [trial.seed for trial in trials] == list(TASKS)
    assert [trial.outcome for trial in trials] == ["success"] * 3
    assert [trial.prompt for trial in trials] == [task.prompt for task in TASKS.values()]
    monkeypatch.setattr(closed_loop, "_infer", lambda policy, runs, *rest: [run.world.command[None] for run in runs])
    trials = evaluate(policy, [TabletopWorld()], TASKS, Loop(limit=12))
    assert [(trial.outcome, trial.steps) for trial in trials] == [("running", 12)] * 3


def test_a_late_chunk_loses_its_first_actions(policy):
    class World:
        command = np.full(7, -1.0)

    run = Run(World(), 0, Task("touch", "red"), "")
    chunk = np.arange(50.0)[:, None] + np.zeros(7)
    played = []
    for step in range(8):
        if step % 4 == 0:
            run.waiting = step, chunk + 100 * step
        played.append(run.command(step, delay=2)[0])
    assert played == [-1, -1, 2, 3, 4, 5, 402, 403]


def test_a_horizon_too_short_for_the_loop_is_refused(policy):
    with pytest.raises(ConfigError, match="horizon less the delay"):
        evaluate(policy, [TabletopWorld()], TASKS, Loop(execute=46, delay=5))


def test_wrong_colours_are_told_but_not_judged(policy, monkeypatch):
    monkeypatch.setattr(closed_loop, "_infer", lambda policy, runs, *rest: [run.world.command[None] for run in runs])
    trials = evaluate(policy, [TabletopWorld()], {5: Task("touch", "red")}, Loop(limit=1), wrong_colour=True)
    assert trials[0].prompt == "touch the green block"
    assert evaluate_expert(TabletopWorld(), {5: Task("touch", "red")})[0].success


def test_a_batch_gives_each_episode_what_it_gets_alone(policy, seen_world):  # noqa: F811
    worlds = [TabletopWorld(), TabletopWorld()]
    runs = []
    for world, (seed, task) in zip(worlds, TASKS.items(), strict=False):
        world.reset(seed, task)
        runs.append(Run(world, seed, task, task.prompt))
    both = closed_loop._infer(policy, runs, Loop(2), 3, None)
    for run, chunk in zip(runs, both, strict=True):
        assert len(run.frames) == 1 and run.frames[0].shape == (224, 224, 3)
        alone = policy.infer(run.world.observe(), 2, seed=run.seed, chunk_index=3).actions
        np.testing.assert_allclose(chunk, alone, atol=1e-4)
        masked = closed_loop._infer(policy, [run], Loop(2), 3, "base_0_rgb")[0]
        assert np.abs(masked - alone).max() > 1e-4
    for world in worlds:
        world.close()


def test_evaluate_counts_and_gates(seen_world, capsys, tmp_path):  # noqa: F811
    sheet = tmp_path / "sheet.png"
    words = ["evaluate", "--expert", "--episodes", "3", "--tasks", "touch", "--sheet", str(sheet)]
    assert main([*words, "--at-least", "1"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    (setting,) = report["settings"]
    assert setting["successes"] == 3 and setting["trials"] == [1, 1, 1] and setting["kinds"] == {"touch": [3, 3]}
    assert setting["low"] < 1 and sheet.read_bytes().startswith(b"\x89PNG")
    assert main([*words, "--at-least", "1.1"]) == 1


def test_every_setting_runs_and_processes_change_nothing(policy, seen_world, monkeypatch):  # noqa: F811
    loops = (Loop(1, limit=3, execute=2), Loop(2, limit=3, execute=2, delay=1))
    evaluation = Evaluation(None, loops, batch=1, film=True)
    monkeypatch.setattr(Policy, "load", lambda *args, **options: policy)
    driven = Driver(replace(evaluation, checkpoint="x", batch=2)).play(TASKS)
    assert [[trial.steps for trial in trials] for trials in driven[0]] == [[3, 3, 3]] * 2
    assert [len(frames) for _, frames in driven[1]] == [3, 3, 3] and "time is up after 3 steps" in driven[1][0][0]
    one, two = (run_all(replace(evaluation, loops=loops[:1]), TASKS, workers) for workers in (1, 2))
    assert one[0] == two[0] and [trial.seed for trial in one[0][0]] == list(TASKS)
    assert [caption for caption, _ in one[1]] == [caption for caption, _ in two[1]]


@pytest.mark.parametrize("words", [[], ["--expert", "--checkpoint", "x"], ["--expert", "--mask", "top"],
                                   ["--expert", "--tasks", "pull"], ["--expert", "--first", "-1"]])
def test_evaluate_refuses(words, capsys):
    assert main(["evaluate", *words]) == 2
    assert "expected" in json.loads(capsys.readouterr().out.splitlines()[-1])["message"]


def test_a_contact_sheet_needs_pictures(tmp_path):
    with pytest.raises(ConfigError, match="frames"):
        save_contact_sheet(tmp_path / "x.png", [("nothing", [])])
