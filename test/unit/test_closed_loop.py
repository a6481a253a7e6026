"""Driving the simulated arm by a policy, and counting."""

import json
from dataclasses import replace

import numpy as np
import pytest
from rendering import seen_world  # noqa: F401 (a fixture)

from pi05_ros.cli.evaluate import read_earlier
from pi05_ros.cli.main import main
from pi05_ros.errors import ConfigError
from pi05_ros.runtime.chunking import JointLimits
from pi05_ros.runtime.joining import Joining, JoinSettings
from pi05_ros.runtime.policy import Policy
from pi05_ros.schema import CAMERAS, ActionChunk, Guidance, Observation
from pi05_ros.sim import closed_loop
from pi05_ros.sim.closed_loop import evaluate, evaluate_expert, may_lack, together
from pi05_ros.sim.contact_sheet import save_contact_sheet
from pi05_ros.sim.episode import Ablation, Loop, Trial, begin
from pi05_ros.sim.evaluation import Driver, Evaluation, run_all
from pi05_ros.sim.expert import ScriptedExpert
from pi05_ros.sim.scores import compare, median, paired_ratio
from pi05_ros.sim.tasks import Task
from pi05_ros.sim.world import TabletopWorld
from pi05_ros.transforms.robot_loader import load_robot

TASKS = {1_000_000: Task("touch", "red"), 1_000_001: Task("forward", "blue"), 1_000_002: Task("touch", "green", 1)}


@pytest.fixture(scope="module")
def policy():
    return Policy.load(robot=may_lack(load_robot("tabletop"), "base_0_rgb"))


@pytest.fixture
def knowing(monkeypatch):
    """Instead of inference what a policy without fault would say: the expert's motion from where the arm is on it."""
    plans: dict[int, np.ndarray] = {}

    def know(policy, runs, loop, index, ablation):
        chunks = []
        for run in runs:
            if index == 0:
                expert = ScriptedExpert(run.world).plan(np.random.default_rng([run.seed, 4]))
                plans[run.seed] = np.concatenate([run.world.command[None], expert])
            plan = plans[run.seed]
            fine = np.arange(0, len(plan) - 1, 0.02)
            dense = np.array([np.interp(fine, np.arange(len(plan)), column) for column in plan.T]).T
            here = fine[np.abs(dense - run.world.command).sum(axis=1).argmin()]
            rows = [np.interp(here + np.arange(20), np.arange(len(plan)), column) for column in plan.T]
            run.seen = Observation({}, run.world.state, run.prompt, run.world.time_ns)
            chunks.append(ActionChunk(np.array(rows).T, np.zeros((20, 32), np.float32), run.world.time_ns, 0.05,
                                      run.prompt, 1, run.seed, index))
        return chunks

    monkeypatch.setattr(closed_loop, "_infer", know)


@pytest.mark.parametrize("mode", ["delay_aware", "ensembled"])
@pytest.mark.parametrize("delay", [0, 2, 4])
def test_chunks_of_the_experts_motion_move_as_the_expert_does(policy, knowing, mode, delay):
    trials = evaluate(policy, [TabletopWorld(), TabletopWorld()], TASKS, Loop(delay=delay, join=JoinSettings(mode)))
    expert = evaluate_expert(TabletopWorld(), TASKS)
    assert [trial.seed for trial in trials] == list(TASKS)
    assert [trial.outcome for trial in trials] == ["success"] * 3
    assert [trial.prompt for trial in trials] == [task.prompt for task in TASKS.values()]
    for trial, best in zip(trials, expert, strict=True):
        assert best.steps <= trial.steps <= best.steps + delay + 8  # it sets out when the first chunk is there
        assert trial.jerk_peak < 1.5 * best.jerk_peak and trial.jerk_rms < 1.2 * best.jerk_rms


def test_played_from_its_first_action_every_chunk_falls_behind_and_jerks(policy, knowing):
    plain, aware = (evaluate(policy, [TabletopWorld()], TASKS, Loop(delay=4, join=JoinSettings(mode)))
                    for mode in ("plain", "delay_aware"))
    assert sum(t.jerk_peak for t in plain) > 1.5 * sum(t.jerk_peak for t in aware)


def test_an_arm_that_is_not_moved_runs_out_of_time(policy, monkeypatch):
    def rest(policy, runs, loop, index, ablation):
        for run in runs:
            run.seen = Observation({}, run.world.state, run.prompt, run.world.time_ns)
        return [ActionChunk(np.repeat(run.world.command[None], 20, 0), np.zeros((20, 32)), run.world.time_ns, 0.05, "",
                            1, 0, index) for run in runs]

    monkeypatch.setattr(closed_loop, "_infer", rest)
    trials = evaluate(policy, [TabletopWorld()], TASKS, Loop(limit=12))
    assert [(trial.outcome, trial.steps) for trial in trials] == [("running", 12)] * 3


@pytest.mark.parametrize("loop", [Loop(execute=46, delay=5), Loop(execute=2, delay=3), Loop(execute=17)])
def test_a_loop_that_does_not_fit_is_refused(policy, loop):
    with pytest.raises(ConfigError, match="horizon less the delay"):
        evaluate(policy, [TabletopWorld()], TASKS, loop)


def test_what_an_ablation_keeps_from_the_policy():
    seen = Observation({camera: np.zeros((2, 2, 3), np.uint8) for camera in CAMERAS}, np.arange(7.0, dtype="f4"), "", 5)
    kept = Ablation("base_0_rgb", shuffled_state=True).seen(seen)
    assert list(kept.images) == list(CAMERAS[1:]) and kept.state.tolist() == [5, 0, 1, 2, 3, 4, 6]
    assert Ablation().seen(seen).state is seen.state
    assert Ablation(wrong_colour=True).told(Task("touch", "red")) == "touch the green block"
    assert evaluate_expert(TabletopWorld(), {5: Task("touch", "red")})[0].success


def test_guided_chunks_of_a_batch_are_those_of_each_alone(policy, seen_world):  # noqa: F811
    """Four chunks each, the last of them guided: two episodes at once, and the second one alone."""
    loop, limits = Loop(2, execute=4, delay=1, join=JoinSettings("guided")), JointLimits(policy.robot)

    def last_of(seeds):
        worlds = [TabletopWorld() for _ in seeds]
        runs = [begin(world, seed, TASKS[seed]) for world, seed in zip(worlds, seeds, strict=True)]
        for run in runs:
            run.joining = Joining(policy.transforms.encode_actions)
        for index in range(4):
            chunks = closed_loop._infer(policy, runs, loop, index, Ablation())
            for run, chunk in zip(runs, chunks, strict=True):
                run.waiting = 0, chunk
                run.world.advance(0.05)
                run.arrive(0, limits, loop.join)
                run.world.advance(0.15)
        for world in worlds:
            world.close()
        return chunks[-1]

    both, alone = last_of(list(TASKS)[:2]), last_of(list(TASKS)[1:2])
    assert both.guidance is not None and both.guidance.delay == 2 and alone.guidance is not None
    np.testing.assert_allclose(both.actions, alone.actions, atol=1e-4)


def test_a_batch_has_one_guidance_or_none():
    one = Guidance(np.zeros((1, 20, 32), np.float32), 2, 10)
    assert together([None, None]) is None
    assert together([one, replace(one, previous=one.previous + 1)]).previous[:, 0, 0].tolist() == [0, 1]


def test_a_batch_gives_each_episode_what_it_gets_alone(policy, seen_world):  # noqa: F811
    worlds = [TabletopWorld(), TabletopWorld()]
    runs = [begin(world, seed, task) for world, (seed, task) in zip(worlds, TASKS.items(), strict=False)]
    for run in runs:
        run.joining = Joining(policy.transforms.encode_actions)
    both = closed_loop._infer(policy, runs, Loop(2), 3, Ablation())
    for run, chunk in zip(runs, both, strict=True):
        assert len(run.frames) == 1 and run.frames[0].shape == (224, 224, 3)
        alone = policy.infer(run.world.observe(), 2, seed=run.seed, chunk_index=3).actions
        np.testing.assert_allclose(chunk.actions, alone, atol=1e-4)
        masked = closed_loop._infer(policy, [run], Loop(2), 3, Ablation("base_0_rgb"))[0]
        assert np.abs(masked.actions - alone).max() > 1e-4
    for world in worlds:
        world.close()


def test_evaluate_counts_and_gates(seen_world, capsys, tmp_path):  # noqa: F811
    sheet = tmp_path / "sheet.png"
    kept = tmp_path / "run.json"
    words = ["evaluate", "--expert", "--episodes", "3", "--tasks", "touch", "--sheet", str(sheet), "--json", str(kept)]
    assert main([*words, "--at-least", "1"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    (setting,) = report["settings"]
    assert setting["successes"] == 3 and setting["trials"] == [1, 1, 1] and setting["kinds"] == {"touch": [3, 3]}
    assert setting["low"] < 1 and 0 < setting["jerk_rms"] < setting["jerk_peak"] and report["expert"] == setting
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert main([*words, "--at-least", "1.1"]) == 1


def test_an_earlier_run_is_held_against_where_it_has_the_same_episodes(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"first": 0, "episodes": 2, "kinds": ["touch"], "settings": [{"trials": [1, 0]}]}))
    assert read_earlier(file, 0, 2, ("touch",)) == [True, False]
    for first, episodes, kinds in ((1, 2, ("touch",)), (0, 3, ("touch",)), (0, 2, ("left",))):
        with pytest.raises(ConfigError, match="the same episodes"):
            read_earlier(file, first, episodes, kinds)
    file.write_text("{}")
    with pytest.raises(ConfigError, match="of pi05 evaluate"):
        read_earlier(file, 0, 2, ("touch",))


def test_settings_are_compared_with_the_last_one_or_another_run():
    def trials(*won):
        return [Trial(seed, "touch", "", "success" if one else "failure", 9, 2.0 + seed, 8.0)
                for seed, one in enumerate(won)]

    loops = (Loop(), Loop(delay=2, join=JoinSettings("plain")))
    one, other = compare([trials(1, 1, 0, 1), trials(1, 0, 0, 0)], loops, trials(1, 1, 1, 1), 0.05)
    assert one["difference"][0] == 0.5 and other["difference"][0] == 0 and other["delay_s"] == 0.1
    assert (one["mode"], other["mode"]) == ("delay_aware", "plain")
    assert (one["jerk_peak"], one["jerk_rms_times_expert"][0]) == (8, 1)
    assert compare([trials(1, 1, 0, 1)], loops[:1], trials(1, 1, 1, 1), 0.05, [True] * 4)[0]["difference"][0] == -0.25
    low, high = paired_ratio(np.array([2.0, 4, 6]), np.array([1.0, 2, 3]), median)[1:]
    assert low == high == 2


def test_every_setting_runs_and_processes_change_nothing(policy, seen_world, monkeypatch):  # noqa: F811
    loops = (Loop(1, limit=3, execute=2), Loop(2, limit=3, execute=2, delay=1, join=JoinSettings("guided")))
    evaluation = Evaluation(None, loops, batch=1, film=True)
    monkeypatch.setattr(Policy, "load", lambda *args, **options: policy)
    driven = Driver(replace(evaluation, checkpoint="x", batch=2)).play(TASKS)
    assert [[trial.steps for trial in trials] for trials in driven[0][1:]] == [[3, 3, 3]] * 2
    assert [trial.success for trial in driven[0][0]] == [True] * 3  # the expert, to hold them against
    assert [len(frames) for _, frames in driven[1]] == [3, 3, 3] and "time is up after 3 steps" in driven[1][0][0]
    one, two = (run_all(evaluation, TASKS, workers) for workers in (1, 2))
    assert one[0] == two[0] and [trial.seed for trial in one[0][0]] == list(TASKS)
    assert [caption for caption, _ in one[1]] == [caption for caption, _ in two[1]]


@pytest.mark.parametrize("words", [[], ["--expert", "--checkpoint", "x"], ["--expert", "--mask", "top"],
                                   ["--expert", "--tasks", "pull"], ["--expert", "--first", "-1"],
                                   ["--expert", "--over-ros"]])
def test_evaluate_refuses(words, capsys):
    assert main(["evaluate", *words]) == 2
    assert "expected" in json.loads(capsys.readouterr().out.splitlines()[-1])["message"]


def test_a_contact_sheet_needs_pictures(tmp_path):
    with pytest.raises(ConfigError, match="frames"):
        save_contact_sheet(tmp_path / "x.png", [("nothing", [])])
