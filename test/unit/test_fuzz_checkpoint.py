"""Checkpoints broken at random: configs, pipelines, statistics, headers, file layouts and options."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
from checkpoint_samples import NORMALIZER_FILE, WEIGHTS, openpi_stats, save_lerobot, save_tiny, write_json
from fuzzing import MISPLACED, SCALARS, broken, damaged, fuzz, misplace, refused_or_read
from hypothesis import given
from hypothesis import strategies as st

from pi05_ros.model.checkpoint import open_checkpoint

JSONS = ("config.json", "policy_preprocessor.json", "policy_postprocessor.json")
ASSET = "assets/robot/norm_stats.json"
SHARD_INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def lerobot(tmp_path_factory):
    directory = save_lerobot(tmp_path_factory.mktemp("lerobot"), use_relative_actions=True,
                             relative_exclude_joints=["a"], action_feature_names=list("abcdef"))
    before = json.loads((directory / JSONS[1]).read_text())
    before["steps"].insert(2, {"registry_name": "relative_actions_processor",
                               "config": {"enabled": True, "exclude_joints": ["a"], "action_names": list("abcdef")}})
    write_json(directory / JSONS[1], before)
    open_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def openpi(tmp_path_factory):
    directory = save_tiny(tmp_path_factory.mktemp("openpi"), stats=openpi_stats(), asset_id="robot")
    open_checkpoint(directory)
    return directory


def check(directory: Path, file: str, content: bytes) -> None:
    """Open the sample with another `file`, and put back what was there."""
    path = directory / file
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        refused_or_read(open_checkpoint, directory)
    finally:
        path.write_bytes(before)


def encoded(value: object) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize("file", JSONS)
@fuzz(120)
@given(data=st.data())
def test_json_of_lerobot(lerobot, file, data):
    check(lerobot, file, encoded(data.draw(broken(json.loads((lerobot / file).read_text())))))


@pytest.mark.parametrize("file", ["config.json", ASSET])
@fuzz(120)
@given(data=st.data())
def test_json_of_openpi(openpi, file, data):
    check(openpi, file, encoded(data.draw(broken(json.loads((openpi / file).read_text())))))


@fuzz(60)
@given(file=st.sampled_from((*JSONS, NORMALIZER_FILE)), data=st.data())
def test_damaged_files_of_lerobot(lerobot, file, data):
    check(lerobot, file, data.draw(damaged((lerobot / file).read_bytes())))


@fuzz(80)
@given(data=st.data())
def test_headers_of_statistics(lerobot, data):
    content = (lerobot / NORMALIZER_FILE).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = encoded(data.draw(broken(json.loads(content[8:8 + size]))))
    check(lerobot, NORMALIZER_FILE, struct.pack("<Q", len(header)) + header + content[8 + size:])


@fuzz(60)
@given(data=st.data())
def test_names_types_and_shapes_of_weights(openpi, tmp_path_factory, data):
    """The header of the weights with one entry changed; the numbers behind it are as long as it says, and absent."""
    with (openpi / WEIGHTS).open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(size))
    name = data.draw(st.sampled_from(sorted(header)))
    shape = data.draw(st.lists(st.sampled_from((0, 1, 2, 3, 32, 64, 96)), max_size=5))
    dtype, width = data.draw(st.sampled_from((("F32", 4), ("BF16", 2), ("I8", 1), ("F64", 8), ("BOOL", 1))))
    described = header.pop(name)
    if data.draw(st.booleans()) and name != "__metadata__":
        header[data.draw(st.sampled_from((name, "model." + name, "a", "", "\0", name + ".lora_A")))] = {
            **described, "dtype": dtype, "shape": shape}
    end = 0
    for entry in header.values():
        if "shape" in entry:
            count = {"F32": 4, "BF16": 2, "F64": 8}.get(entry["dtype"], width)
            for length in entry["shape"]:
                count *= length
            entry["data_offsets"], end = [end, end + count], end + count
    directory = tmp_path_factory.mktemp("weights")
    (directory / "config.json").write_bytes((openpi / "config.json").read_bytes())
    written = encoded(header)
    with (directory / WEIGHTS).open("wb") as stream:
        stream.write(struct.pack("<Q", len(written)) + written)
        stream.truncate(8 + len(written) + end)  # a hole
    refused_or_read(open_checkpoint, directory)
    (directory / WEIGHTS).unlink()


@fuzz(60)
@given(index=broken({"weight_map": {"action_in_proj.weight": WEIGHTS, "action_in_proj.bias": WEIGHTS}}))
def test_shard_indexes(openpi, tmp_path_factory, index):
    directory = tmp_path_factory.mktemp("shards")
    write_json(directory / SHARD_INDEX, index)
    os.link(openpi / WEIGHTS, directory / "one.safetensors")
    refused_or_read(open_checkpoint, directory, action_horizon=10)


@pytest.mark.parametrize("trainer", ["openpi", "lerobot"])
@fuzz(40)
@given(data=st.data())
def test_layouts(trainer, request, tmp_path_factory, data):
    sample, directory = request.getfixturevalue(trainer), tmp_path_factory.mktemp("layout")
    files = sorted(file.relative_to(sample) for file in sample.rglob("*") if file.is_file())
    for file in files:
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        os.link(sample / file, directory / file)
    for file in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=2, unique=True)):
        misplace(directory / file, data.draw(st.sampled_from(MISPLACED)))
    refused_or_read(open_checkpoint, directory)


@fuzz(60)
@given(path=st.sampled_from([value for value in SCALARS if isinstance(value, str)] + ["~nobody", "~nobody/x"]),
       where=st.sampled_from(("path", "tokenizer", "asset_id")))
def test_paths_and_names_given_by_the_user(openpi, path, where):
    refused_or_read(open_checkpoint, path if where == "path" else openpi,
                    **{} if where == "path" else {where: path})
