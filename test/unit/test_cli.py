"""The command line: exit status, the JSON line, the errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pi05_ros.cli.main import VERBS, main

DATA = Path(__file__).parents[1] / "data" / "conformance"


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_gate_that_holds_exits_zero_with_json_last(capsys):
    assert main(["conformance", str(DATA / "pi05_tiny_float32_case_a_steps3.npz")]) == 0
    report = last_json(capsys)
    assert report["ok"] and report["cases"]["pi05_tiny_float32_case_a_steps3.npz"]["errors"]["actions"] < 1e-5


def test_an_error_of_use_exits_two_and_says_the_way_out(capsys, tmp_path):
    (tmp_path / "no.npz").write_bytes(b"nothing")
    assert main(["conformance", str(tmp_path / "no.npz")]) == 2
    assert "expected a conformance file" in last_json(capsys)["message"]


def test_infer_gives_a_chunk(capsys, tmp_path):
    assert main(["infer", "--steps", "1", "--device", "cpu", "--json", str(tmp_path / "out.json")]) == 0
    report = last_json(capsys)
    assert len(report["actions"]) == 50 and len(report["actions"][0]) == 7
    assert json.loads((tmp_path / "out.json").read_text()) == report


def test_conformance_of_another_backend_says_what_it_cannot_compare(capsys):
    file = "pi05_tiny_float32_case_b_steps3.npz"  # a batch of two
    assert main(["conformance", str(DATA / file), "--backend", "vision=eager"]) == 0
    case = last_json(capsys)["cases"][file]
    assert set(case["errors"]) == {"image_features", "actions", "k0", "k1", "k2", "v0", "v1", "v2"}
    assert max(case["errors"].values()) < 1e-5
    assert {"prefix_embs", "suffix_out_step0", "steps_v_t"} <= set(case["not_compared"])


@pytest.mark.parametrize("words", [["--device", "tpu"], ["--device", "cuda:99"], ["--backend", "fast"],
                                   ["--backend", "cuda"]])
def test_conformance_refuses_a_device_or_backend_that_is_not_there(capsys, words):
    assert main(["conformance", str(DATA / "pi05_tiny_float32_case_a_steps3.npz"), *words]) == 2
    assert "expected" in last_json(capsys)["message"]


def test_conformance_of_guided_runs_is_eagers_alone(capsys):
    assert main(["conformance", str(DATA / "pi05_tiny_float32_rtc_case_a.npz"), "--backend", "vision=eager"]) == 2
    assert "real-time chunking" in last_json(capsys)["message"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0 and len(capsys.readouterr().out) > 200


def test_wrong_use_exits_two(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["conformance"])
    assert stop.value.code == 2


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "pi05_ros", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("pi05_ros ")
