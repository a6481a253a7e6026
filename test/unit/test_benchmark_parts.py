"""The arithmetic behind `pi05 benchmark`: floors, gates, turns, kernel sums, errors."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fp8_models import described

from pi05_ros.benchmark import accuracy, clock, compare, energy, measure, profile
from pi05_ros.benchmark.ceiling import Ceiling
from pi05_ros.benchmark.error import relative_error
from pi05_ros.benchmark.findings import Gate
from pi05_ros.benchmark.inputs import STANDARD_SHAPES, Shape
from pi05_ros.benchmark.profile import Kernel
from pi05_ros.benchmark.recipes import split_choice
from pi05_ros.benchmark.setting import AtHorizon
from pi05_ros.benchmark.work import Work, stage_products, stage_work
from pi05_ros.config import Pi05Config, tiny_config
from pi05_ros.errors import BackendError, ConfigError
from pi05_ros.model.recipe import RecipeSource
from pi05_ros.model.weights import load, parameter_counts

CPU = torch.device("cpu")


def test_products_read_every_weight_of_a_stage_once():
    config = Pi05Config()
    work = stage_work(config, Shape(3, 200, 1), 2)
    counts = parameter_counts(config)
    matrices = {"vision": counts["vision"] + counts["projector"], "prefix": counts["prefix"]}
    assert work["vision"].bytes / 2 == pytest.approx(matrices["vision"], rel=2e-3)  # all but positions, biases, norms
    last = 2048 * 2 * 2048 + 3 * 2048 * 16384  # Q, out and MLP of the last layer: nobody reads them
    assert work["prefix"].bytes / 2 == pytest.approx(matrices["prefix"] - last, rel=1e-4)


def test_expert_work_grows_with_the_steps_and_prefix_work_does_not():
    once, ten = (stage_work(Pi05Config(), Shape(3, 200, steps), 2) for steps in (1, 10))
    assert ten["expert"].flop == 10 * once["expert"].flop and ten["expert"].bytes == 10 * once["expert"].bytes
    assert ten["prefix"] == once["prefix"] and ten["vision"] == once["vision"]


def test_work_of_a_stage_is_the_sum_of_its_products():
    shape = Shape(2, 48, 10)
    for stage, products in stage_products(tiny_config(), shape, 4).items():
        assert stage_work(tiny_config(), shape, 4)[stage].flop == sum(p.calls * p.work.flop for p in products)


@pytest.mark.parametrize(("recipe", "floors"), [("fp8_mlp", {"vision": 0.84, "prefix": 2.83, "expert": 1.50}),
                                                ("fp8", {"vision": 0.47, "prefix": 2.65, "expert": 0.77})])
def test_floors_of_a_recipe_are_those_of_its_precisions(recipe, floors):
    """On the ceilings measured on an H200, at 3 cameras, 200 tokens, 10 steps."""
    h200, shape = Ceiling(4.26e12, 783e12, fp8_flop_per_s=1461e12), Shape(3, 200, 10)
    work = stage_work(Pi05Config(), shape, 2, described(Pi05Config(), recipe))
    assert {stage: work[stage].floor_ms(h200) for stage in floors} == pytest.approx(floors, abs=0.01)
    assert work["prefix"].bound(h200) == "compute" and work["expert"].bound(h200) == "memory"
    whole = stage_work(Pi05Config(), shape, 2)["prefix"].flop
    assert work["prefix"].flop + work["prefix"].flop_fp8 == pytest.approx(whole)
    slow = Ceiling(4.26e12, 783e12)  # no FP8: its products take as long as the others
    assert work["prefix"].limits_ms(slow)["compute"] == pytest.approx(1e3 * whole / 783e12)


@pytest.mark.parametrize("wrong", ["cuda@", "cuda@int8", "cpu@fp8"])
def test_unknown_recipes_and_backends_are_refused(wrong):
    assert split_choice("vision=cuda,prefix=cuda@fp8") == ("vision=cuda,prefix=cuda", "fp8")
    assert split_choice("cuda") == ("cuda", "")
    with pytest.raises((BackendError, ConfigError)):
        split_choice(wrong)


def test_a_quantised_backend_is_held_to_what_eager_makes_of_the_same_weights(monkeypatch):
    truth, made = torch.ones(4), {"eager@fp8": 1.1, "eager@fp8_mlp": 1.02}
    monkeypatch.setattr(measure, "run_stages", lambda stages, given, steps: truth * stages)
    built = []
    setting = SimpleNamespace(dtype="bfloat16", build=lambda choice: (built.append(choice), made[choice])[1])
    shape = Shape(1, 2, 3)
    limits = measure._error_limits(setting, ["eager", "cuda", "eager@fp8", "cuda@fp8", "cuda@fp8_mlp"], {shape: None},
                                   {shape: truth})
    assert limits == {("eager", shape): 2e-2, ("cuda", shape): 2e-2, ("eager@fp8", shape): None,
                      ("cuda@fp8", shape): pytest.approx(0.12), ("cuda@fp8_mlp", shape): pytest.approx(0.024)}
    assert built == ["eager@fp8", "eager@fp8_mlp"]
    row = measure.Row("cuda@fp8", shape, {}, {}, None, 0.13, limits["cuda@fp8", shape], True)
    assert [gate.ok for gate in measure.sound(row)] == [False, True]
    assert len(measure.sound(replace(row, error_limit=None))) == 1  # eager's says what the recipe costs


def test_the_slowest_resource_sets_the_floor():
    ceiling = Ceiling(bytes_per_s=1e12, flop_per_s=1e14, upload_bytes_per_s=1e10)
    assert Work(flop=1e12, bytes=1e9).floor_ms(ceiling) == pytest.approx(10.0)
    assert Work(flop=1e9, bytes=1e9).floor_ms(ceiling) == pytest.approx(1.0)
    assert Work(bytes=1e9, upload=1e8).bound(ceiling) == "upload"
    assert Work(bytes=1e9, upload=1e8).bound(Ceiling(1e12, 1e14)) == "memory"  # no way up without a GPU


def test_a_gate_does_not_hold_for_nan():
    assert Gate("x", 1.0, 1.0).ok and not Gate("x", 1.1, 1.0).ok and not Gate("x", math.nan, 1.0).ok


@pytest.mark.parametrize("runs", [1, 3, 10, 23])
def test_works_take_turns_and_each_is_timed_as_often_as_asked(runs):
    order, seen = [], []
    times = clock.in_turns({name: lambda name=name: order.append(name) for name in "ab"}, CPU, runs,
                           lambda done, total: seen.append((done, total)))
    assert {name: len(t.runs) for name, t in times.items()} == {"a": runs, "b": runs}
    blocks = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    rounds = min(runs, clock.ROUNDS)
    assert blocks == list("ab" + "ab" * rounds)[: rounds + 1]  # ab ba ab ..., so that neighbours are one block
    assert seen[-1] == (2 * rounds, 2 * rounds)


def test_on_a_beat_a_run_that_takes_longer_leaves_beats_out():
    now, began = 0.0, []
    lengths = iter([0.01, 0.04, 0.25, 0.01])

    def wait(seconds):
        nonlocal now
        now += seconds

    def work():
        began.append(now)
        wait(next(lengths))

    times = clock.on_a_beat(work, CPU, 3, 10.0, warmup=1, now=lambda: now, wait=wait)
    assert len(times.runs) == 3 and began == pytest.approx([0.0, 0.1, 0.2, 0.5])


def test_works_on_a_beat_take_turns_too(monkeypatch):
    asked = []
    monkeypatch.setattr(clock, "on_a_beat", lambda work, device, runs, rate_hz, warmup: asked.append((rate_hz, warmup))
                        or clock.milliseconds(work, device, runs, 0))
    times = clock.in_turns({name: lambda: None for name in "ab"}, CPU, 12, rate_hz=60.0)
    assert {name: len(t.runs) for name, t in times.items()} == {"a": 12, "b": 12}
    assert asked == [(60.0, 3)] * 2 + [(60.0, 1)] * 18


def test_energy_is_what_the_counter_moved_by_over_the_runs(monkeypatch):
    ran, counter = [], iter([5_000, 13_000])
    nvml = SimpleNamespace(NVMLError=ValueError, nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counter),
                           nvmlDeviceGetPowerManagementLimit=lambda handle: 700_000)
    monkeypatch.setattr(energy, "open_nvml", lambda device: (nvml, "gpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    found = energy.measure_energy(lambda: ran.append(1), torch.device("cuda:0"), run_ms=1e3 * energy.SECONDS / 4)
    assert len(ran) == 5 and found.joules == pytest.approx(2.0) and found.limit_watts == 700.0  # the first is untimed
    assert found.shortest_ms == pytest.approx(2.0 / 0.7)


@pytest.mark.parametrize(("opened", "says"), [("not readable: install nvidia-ml-py", "install nvidia-ml-py"),
                                              (None, "no counter")])
def test_energy_that_cannot_be_read_says_why(monkeypatch, opened, says):
    def refuse(handle):
        raise ValueError("no counter")

    nvml = SimpleNamespace(NVMLError=ValueError, nvmlDeviceGetTotalEnergyConsumption=refuse)
    monkeypatch.setattr(energy, "open_nvml", lambda device: opened or (nvml, "gpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert says in energy.measure_energy(lambda: None, torch.device("cuda:0"), 10.0)


def test_kernels_of_one_name_are_summed_per_run():
    kernels = [Kernel("a", 0, 4), Kernel("b", 4, 5), Kernel("a", 10, 16), Kernel("b", 17, 18)]
    assert profile.by_name(kernels, runs=2) == [
        {"name": "a", "calls": 1.0, "us_per_call": 5.0, "us": 5.0, "share": 10 / 12},
        {"name": "b", "calls": 1.0, "us_per_call": 1.0, "us": 1.0, "share": 2 / 12}]


@pytest.mark.parametrize(("kernels", "busy"), [
    ([(0, 4), (6, 7)], 5), ([(6, 7), (0, 4)], 5), ([(0, 4), (2, 6)], 6), ([(0, 9), (2, 3), (5, 12)], 12), ([], 0),
])
def test_busy_time_counts_kernels_that_run_together_once(kernels, busy):
    assert profile.busy_us(Kernel("k", start, end) for start, end in kernels) == busy


def test_relative_error():
    x = torch.randn(3, 4)
    assert relative_error(x * 1.5, x) == pytest.approx(0.5) and relative_error(x, x) == 0.0
    assert relative_error(x[:2], x) == math.inf and math.isnan(relative_error(x * math.nan, x))


def test_the_accuracy_gate_is_on_every_input():
    drawn = accuracy.draws(tiny_config(), 3, (10,), seed=1)
    eager = {draw: dict.fromkeys(accuracy.WHAT, 1e-3) for draw in drawn}
    ours = {draw: dict.fromkeys(accuracy.WHAT, 1.1e-3) for draw in drawn}
    assert accuracy.report("x", "bfloat16", drawn, ours, eager, 1).ok
    ours[drawn[1]] = {**ours[drawn[1]], "keys": 1.3e-3}
    found = accuracy.report("x", "bfloat16", drawn, ours, eager, 1)
    assert [gate.name for gate in found.gates if not gate.ok] == ["keys: error over eager's own"]
    assert found.data["errors"]["keys"] == {"backend": {"median": 1.1e-3, "worst": 1.3e-3},
                                            "eager": {"median": 1e-3, "worst": 1e-3},
                                            "worst_ratio": pytest.approx(1.3)}


def test_draws_cover_the_shapes_and_repeat_by_seed():
    config = Pi05Config()
    drawn = accuracy.draws(config, 60, accuracy.HORIZONS, seed=3)
    assert drawn == accuracy.draws(config, 60, accuracy.HORIZONS, seed=3)
    assert drawn != accuracy.draws(config, 60, accuracy.HORIZONS, seed=4)
    assert {d.shape.cameras for d in drawn} == {1, 2, 3} and {d.horizon for d in drawn} == {10, 15, 50}
    assert all(1 <= d.shape.tokens <= 200 and 1 <= d.shape.steps <= 20 for d in drawn)


def test_another_horizon_has_the_same_weights():
    source = RecipeSource(tiny_config())
    longer = AtHorizon(source, 50)
    assert longer.config.action_horizon == 50 and longer.config.expert == source.config.expert
    weights, again = (load(s).state_dict() for s in (source, longer))
    assert all(torch.equal(weights[name], again[name]) for name in weights) and weights.keys() == again.keys()


def test_backends_and_cases_are_read_from_a_line():
    assert compare.parse_backends("eager,vision=cuda+prefix=cuda") == ["eager", "vision=cuda,prefix=cuda"]
    assert compare.parse_shapes("3/200/10, 2/48/3") == [Shape(3, 200, 10), Shape(2, 48, 3)]
    assert compare.parse_shapes("standard") == list(STANDARD_SHAPES)
    with pytest.raises(ConfigError, match="CAMERAS/TOKENS/STEPS"):
        compare.parse_shapes("3/200/10,3/200/10")
