"""Engines on the disk: the key, atomic writes, damage, and which engine is the one asked for."""

import dataclasses
import json
from dataclasses import replace

import pytest

from pi05_ros.backends.tensorrt import plan_cache
from pi05_ros.backends.tensorrt.names import TensorSpec
from pi05_ros.backends.tensorrt.plan_cache import PlanEntry, PlanKey, gpu_name, read_entries, read_plan, write_plan
from pi05_ros.backends.tensorrt.select import Wanted, select
from pi05_ros.cli.main import main
from pi05_ros.errors import BackendError

GPU = gpu_name("NVIDIA H200", (9, 0), 132)
KEY = PlanKey("step", "abc", {"keys": [[1], [2], [3]]}, {"dtype": "bfloat16", "quantisation": "none"}, "tensorrt",
              "10.3.0", GPU, 10**9, 3)
SPEC = TensorSpec("keys", "bfloat16", (2, "prefix_rows"), (2, 1), (2, 3), (2, 5))
ENTRY = PlanEntry(KEY, "", "", 0, (SPEC,), (), {"action_horizon": 50}, {"fingerprint": "f00d", "checkpoint": "mine"})
WANTED = Wanted("tensorrt", "10.3.0", GPU, "bfloat16", "f00d", {"action_horizon": 50})


@pytest.mark.parametrize("change", [
    {"graph": "loop"}, {"weights_hash": "abd"}, {"profile": {"keys": [[1], [2], [4]]}}, {"flavour": "tensorrt_rtx"},
    {"precision": {"dtype": "bfloat16", "quantisation": "fp8"}}, {"version": "10.3.1"}, {"gpu": "sm_90"},
    {"workspace_bytes": None}, {"level": 5}])
def test_the_key_depends_on_everything(change):
    assert set(change) <= {field.name for field in dataclasses.fields(PlanKey)}
    assert replace(KEY, **change).digest != KEY.digest == replace(KEY).digest


def test_a_written_engine_comes_back(tmp_path):
    written = write_plan(tmp_path / "engines", ENTRY, b"engine" * 1000)
    (read,) = read_entries(tmp_path / "engines")
    assert read == written and read.inputs == (SPEC,)
    assert read_plan(read) == b"engine" * 1000
    assert sorted(path.suffix for path in (tmp_path / "engines").iterdir()) == [".json", ".plan"]


def test_a_new_engine_of_a_key_takes_the_place_of_the_old_one(tmp_path):
    old, new = (write_plan(tmp_path, ENTRY, contents) for contents in (b"old", b"new"))
    (read,) = read_entries(tmp_path)
    assert read_plan(read) == b"new" and read.file == new.file != old.file
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("at", [0, 1])
def test_an_interrupted_write_leaves_the_old_engine(tmp_path, monkeypatch, at):
    write_plan(tmp_path, ENTRY, b"old")
    replaced = iter(range(3))
    real = plan_cache.os.replace

    def breaks(*paths):
        if next(replaced) == at:
            raise OSError(28, "No space left on device")
        real(*paths)

    monkeypatch.setattr(plan_cache.os, "replace", breaks)
    with pytest.raises(BackendError, match="No space left"):
        write_plan(tmp_path, ENTRY, b"new")
    (read,) = read_entries(tmp_path)
    assert read_plan(read) == b"old" and not list(tmp_path.glob(".part-*"))


@pytest.mark.parametrize("damage", [
    lambda plan: plan.write_bytes(plan.read_bytes()[:-1]), lambda plan: plan.write_bytes(b"x" + plan.read_bytes()[1:]),
    lambda plan: plan.unlink()])
def test_a_damaged_engine_is_refused_with_the_way_out(tmp_path, damage):
    entry = write_plan(tmp_path, ENTRY, b"engine")
    damage(entry.path)
    with pytest.raises(BackendError, match=rf"rm '{entry.path}'.*pi05 build"):
        read_plan(entry)


@pytest.mark.parametrize("damage", [
    lambda text: text[:40], lambda text: text.replace('"sha256"', '"sha"'), lambda text: text.replace("abc", "abd"),
    lambda text: text.replace("engine 1", "engine 2"), lambda text: text.replace('"step-', '"../step-')])
def test_a_damaged_description_is_refused_with_the_way_out(tmp_path, damage):
    entry = write_plan(tmp_path, ENTRY, b"engine")
    path = tmp_path / f"step-{KEY.digest}.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(BackendError, match="rm .*pi05 build") as raised:
        list(read_entries(tmp_path))
    assert raised.value.cause == "damaged_engine" and entry.path.is_file()


def test_other_json_in_the_directory_is_passed_over(tmp_path):
    (tmp_path / "export.json").write_text(json.dumps({"format": 1}))
    assert not list(read_entries(tmp_path))


def test_the_layers_of_an_engine_are_listed(tmp_path, capsys):
    entry = write_plan(tmp_path, replace(ENTRY, report={"inspected": True, "fallbacks": ["step/mlp: float32"]}),
                       b"plan")
    assert main(["engines", str(tmp_path), "--layers", "step"]) == 0
    assert "its layers are not known" in capsys.readouterr().err
    layer = {"Name": "step/layer0/mlp/gate", "LayerType": "gemm", "Inputs": [{"Format/Datatype": "BFloat16"}]}
    plan_cache.write_text(tmp_path / f"step-{KEY.digest}.layers", json.dumps({"Layers": [layer]}))
    assert main(["engines", str(tmp_path), "--layers", "step"]) == 0
    said = capsys.readouterr()
    assert "step/layer0/mlp/gate" in said.err and "bfloat16" in said.err
    (told,) = json.loads(said.out)["engines"]
    assert told["file"] == entry.file and told["fallbacks"] == ["step/mlp: float32"] and not told["problem"]
    assert main(["engines", str(tmp_path / "none")]) == 2


def test_timing_caches_are_kept_by_flavour_release_and_gpu(tmp_path):
    plan_cache.write_timing_cache(tmp_path, "tensorrt", "10.3.0", GPU, b"times")
    assert plan_cache.read_timing_cache(tmp_path, "tensorrt", "10.3.0", GPU) == b"times"
    for other in (("tensorrt_rtx", "10.3.0", GPU), ("tensorrt", "10.4.0", GPU), ("tensorrt", "10.3.0", "sm_90")):
        assert plan_cache.read_timing_cache(tmp_path, *other) == b""


@pytest.mark.parametrize(("change", "reason"), [
    ({"key": replace(KEY, version="10.7.0")}, "built by tensorrt 10.7.0, installed is 10.3.0"),
    ({"key": replace(KEY, gpu="Orin, sm_87, 16 SMs")}, "for Orin, sm_87, 16 SMs, this is NVIDIA H200"),
    ({"key": replace(KEY, precision={"dtype": "float16"})}, "of dtype float16"),
    ({"source": {"fingerprint": "beef", "checkpoint": "theirs"}}, r"of other weights \(theirs\)"),
    ({"source": {}}, "origin not told"),
    ({"config": {"action_horizon": 10}}, "of another model: action_horizon differ")])
def test_an_engine_that_does_not_fit_is_named_with_the_reason(tmp_path, change, reason):
    entry = write_plan(tmp_path, replace(ENTRY, **change), b"engine")
    with pytest.raises(BackendError, match=reason) as raised:
        select(tmp_path, ["step"], WANTED)
    assert entry.file in str(raised.value) and raised.value.cause == "engine_missing"
    assert "pi05 build" in str(raised.value)


def test_the_engine_that_fits_is_found_among_others(tmp_path):
    for change in ({"weights_hash": "other", "precision": {"dtype": "float32"}}, {"graph": "loop"},
                   {"version": "8.6.0"}):
        write_plan(tmp_path, replace(ENTRY, key=replace(KEY, **change)), b"other")
    wanted = write_plan(tmp_path, ENTRY, b"engine")
    assert select(tmp_path, ["step"], WANTED) == {"step": wanted}
    with pytest.raises(BackendError, match="received none"):
        select(tmp_path / "nowhere", ["step"], WANTED)


def test_of_two_engines_that_fit_none_is_chosen_silently(tmp_path):
    for level in (1, 2):
        write_plan(tmp_path, replace(ENTRY, key=replace(KEY, level=level)), b"engine")
    with pytest.raises(BackendError, match="PI05_ENGINES") as raised:
        select(tmp_path, ["step"], WANTED)
    assert raised.value.cause == "engine_ambiguous"
