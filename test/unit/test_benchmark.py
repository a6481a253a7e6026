"""`pi05 benchmark`: every mode on the tiny model, what its JSON says, and what its gates do to the exit status."""

import json
import sys
from types import SimpleNamespace

import pytest

from pi05_ros.backends import base, eager
from pi05_ros.cli.main import main

SMALL = ["--device", "cpu", "--cameras", "1", "--tokens", "9", "--steps", "1", "--runs", "2"]
STAGES = {"images", "vision", "prefix", "expert"}


class OffStages(eager.EagerStages):
    """Eager with planted faults: image tokens 0.2 % too large, actions 0.1 %, and more on every call if `drift`."""

    drift = 0.0

    def encode_images(self, pixels):
        return super().encode_images(pixels) * 1.002

    def denoise(self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return super().denoise(*args, **kwargs) * (1.001 + self.calls * self.drift)


@pytest.fixture
def off(monkeypatch):
    """The backend `off` beside the others."""

    def build(stages, source, device, dtype, resize, on_progress):
        return OffStages(eager.build(stages, source, device, dtype, resize, on_progress).model, device, resize)

    monkeypatch.setitem(sys.modules, "planted_backend", SimpleNamespace(build=build))
    monkeypatch.setitem(base.BACKENDS, "off", "planted_backend")
    return OffStages


@pytest.fixture
def pi05(capsys):
    """Run `pi05 benchmark ...`: exit status and the JSON object."""

    def call(*words):
        code = main(["benchmark", *words])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


def failed(report):
    return {gate["name"] for gate in report["gates"] if not gate["ok"]}


def test_latency_reports_times_floors_and_error(pi05, tmp_path):
    code, report = pi05("latency", *SMALL, "--json", str(tmp_path / "out.json"))
    assert code == 0 and json.loads((tmp_path / "out.json").read_text()) == report
    assert set(report["median_ms"]) == set(report["floor_ms"]) == {*STAGES, "total"}
    assert all(0 < report["floor_ms"][name] and 0 < report["median_ms"][name] <= report["p99_ms"][name]
               for name in report["median_ms"])
    assert report["error"] == 0.0 and report["repeats"] is True and report["memory"] is None
    assert report["rate_hz"] == 0.0 and report["energy"] == "energy is measured on a GPU only"
    assert report["p99_ratio"] == pytest.approx(report["p99_ms"]["total"] / report["median_ms"]["total"])
    assert {"bytes_per_s", "flop_per_s"} <= set(report["ceiling"]) and report["environment"]["dtype"] == "float32"


def test_runs_on_a_beat_say_so(pi05):
    code, report = pi05("compare", *SMALL, "--backends", "eager", "--rate", "1000")
    assert code == 0 and report["rate_hz"] == 1000.0 and report["rows"][0]["median_ms"]["total"] > 0.0


@pytest.mark.parametrize(("targets", "broken"), [
    (["--max-ms", "1e-6"], {"eager 1/9/1: total ms"}), (["--max-p99", "1e-6"], {"eager 1/9/1: p99 / median"}),
    (["--max-memory-gb", "9999"], {"eager 1/9/1: reserved GB"}),  # not measured on a CPU, so it cannot hold
    (["--max-ms", "1e6", "--max-p99", "1e6"], set()),
])
def test_a_target_that_is_missed_exits_one(pi05, targets, broken):
    code, report = pi05("latency", *SMALL, *targets)
    assert failed(report) == broken and code == int(bool(broken)) and report["ok"] is not bool(broken)


def test_latency_finds_a_planted_error_and_actions_that_do_not_repeat(pi05, off, monkeypatch):
    monkeypatch.setattr(off, "drift", 1e-6)
    code, report = pi05("latency", *SMALL, "--backend", "expert=off")
    assert code == 1 and report["error"] == pytest.approx(1e-3, rel=0.01) and report["repeats"] is False
    assert failed(report) == {"expert=off 1/9/1: relative error", "expert=off 1/9/1: repeats that differ"}


def test_stages_finds_the_planted_error_in_each_stage_alone(pi05, off):
    code, report = pi05("stages", *SMALL, "--backend", "off")
    assert code == 1 and failed(report) == {"vision: relative error", "expert: relative error"}
    errors = {name: stage["error"] for name, stage in report["stages"].items()}
    assert errors == {"images": 0.0, "vision": pytest.approx(2e-3, rel=1e-3), "prefix": 0.0,
                      "expert": pytest.approx(1e-3, rel=1e-3)}
    fields = {"median_ms", "p99_ms", "flop", "bytes", "upload_bytes", "bound", "floor_ms", "gap", "error"}
    assert all(set(stage) == fields for stage in report["stages"].values())


def test_accuracy_of_eager_is_eagers_own(pi05):
    code, report = pi05("accuracy", "--device", "cpu", "--dtype", "bfloat16", "--inputs", "3")
    assert code == 0 and report["errors"]["actions"]["worst_ratio"] == 1.0
    assert 1e-4 < report["errors"]["keys"]["eager"]["median"] < 2e-2
    assert [i["horizon"] for i in report["inputs"]] == [10, 15, 50]


def test_accuracy_finds_a_planted_error_by_its_size(pi05, off):
    code, report = pi05("accuracy", "--device", "cpu", "--inputs", "2", "--backend", "vision=off,expert=off",
                        "--horizon", "10", "--seed", "5")
    assert code == 1 and report["seed"] == 5
    assert failed(report) == {f"{what}: error over eager's own" for what in ("actions", "vision", "expert")}
    for what, planted in (("vision", 2e-3), ("expert", 1e-3), ("keys", 0.0)):
        assert report["errors"][what]["backend"]["worst"] == pytest.approx(planted, rel=1e-3)
        assert all(i["backend"][what] == pytest.approx(planted, rel=1e-3) and i["eager"][what] == 0.0
                   for i in report["inputs"])


def test_accuracy_draws_other_inputs_every_time(pi05):
    seeds = {pi05("accuracy", "--device", "cpu", "--inputs", "1", "--horizon", "10")[1]["seed"] for _ in range(2)}
    assert len(seeds) == 2


def test_compare_puts_backends_and_cases_side_by_side(pi05, off):
    code, report = pi05("compare", *SMALL, "--backends", "eager,vision=eager+expert=off", "--cases", "1/9/1,2/5/2",
                        "--max-ms", "1e6,1e-6")
    mixed = "vision=eager,expert=off"
    assert [(row["backend"], tuple(row["shape"].values())) for row in report["rows"]] == [
        ("eager", (1, 9, 1)), (mixed, (1, 9, 1)), ("eager", (2, 5, 2)), (mixed, (2, 5, 2))]
    assert [row["error"] for row in report["rows"]] == pytest.approx([0.0, 1e-3, 0.0, 1e-3], rel=1e-3)
    assert set(report["rows"][0]["median_ms"]) == {*STAGES, "total"} and "round" in report["order"]
    assert code == 1 and failed(report) == {f"{mixed} 1/9/1: relative error", f"{mixed} 2/5/2: relative error",
                                            f"{mixed} 2/5/2: total ms"}


@pytest.mark.parametrize("words", [
    ["latency", "--cameras", "9"], ["latency", "--tokens", "0"], ["latency", "--backend", "cuda"],
    ["latency", "--backend", "fast"], ["latency", "--device", "tpu"], ["stages", "--tokens", "999"],
    ["compare", "--backends", "eager,eager"], ["compare", "--backends", "eager,,eager"],
    ["compare", "--backends", "eager", "--cases", "3/200"], ["compare", "--backends", "eager", "--cases", "1/9/0"],
    ["compare", "--backends", "eager", "--cases", "standard"],  # more tokens than the tiny model takes
    ["compare", "--backends", "eager", "--max-ms", "1,2"], ["accuracy", "--backend", "sight=eager"], ["profile"],
])
def test_what_cannot_be_exits_two_and_says_the_way_out(pi05, words):
    device = [] if "--device" in words else ["--device", "cpu"]
    code, report = pi05(*words, *device, *(["--runs", "1"] if words[0] != "accuracy" else []))
    assert code == 2 and "expected" in report["message"]


@pytest.mark.parametrize("words", [["latency", "--runs", "0"], ["latency", "--max-ms", "-1"], ["speed"], [],
                                   ["stages", "--max-ms", "5"], ["compare", "--cases"], ["accuracy", "--inputs", "0"]])
def test_words_that_no_mode_knows_exit_two(words):
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", *words])
    assert stop.value.code == 2


@pytest.mark.parametrize("mode", ["latency", "stages", "accuracy", "compare", "profile"])
def test_every_mode_documents_its_json(mode, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", mode, "--help"])
    assert stop.value.code == 0 and "\nJSON: " in capsys.readouterr().out


def test_pipeline_compares_both_ways_draws_and_has_gates(pi05, tmp_path):
    small = ["--device", "cpu", "--cameras", "1", "--tokens", "9", "--chunks", "3"]
    trace, picture = tmp_path / "trace.json", tmp_path / "chunks.png"
    code, report = pi05("pipeline", *small, "--steps", "1,2", "--trace", str(trace), "--picture", str(picture))
    assert code == 0 and [row["steps"] for row in report["rows"]] == [1, 2]
    assert all(row["identical"] and row["pipelined"]["period_ms"] > 0 for row in report["rows"])
    assert json.loads(trace.read_text())["traceEvents"] and picture.read_bytes().startswith(b"\x89PNG")
    code, report = pi05("pipeline", *small, "--steps", "1", "--max-period-ms", "0.001", "--max-latency-ratio", "1000")
    assert code == 1 and failed(report) == {"1 steps: period, ms"}
