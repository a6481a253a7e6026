"""Robot files, data sets, prompts and pictures broken at random."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import yaml
from fuzzing import MISPLACED, SCALARS, broken, damaged, fuzz, misplace, refused_or_read
from hypothesis import given
from hypothesis import strategies as st
from toy_episodes import record

from pi05_ros.config import share_directory
from pi05_ros.errors import ConfigError, Pi05Error
from pi05_ros.schema import ACTION_DIM
from pi05_ros.train.dataset import INDEX, read_episodes
from pi05_ros.transforms.images import decompress
from pi05_ros.transforms.prompt import PromptTokenizer
from pi05_ros.transforms.robot_file import Robot
from pi05_ros.transforms.robot_loader import load_robot
from pi05_ros.transforms.tiny_tokenizer import tiny_tokenizer

ROBOTS = sorted((share_directory() / "config" / "robots").glob("*.yaml"))


@pytest.mark.parametrize("robot", ["aloha", "droid", "libero"])
@fuzz(60)
@given(data=st.data())
def test_robots_of_another_structure(tmp_path_factory, robot, data):
    file = tmp_path_factory.mktemp("robot") / "r.yaml"
    sample = yaml.safe_load((share_directory() / "config" / "robots" / f"{robot}.yaml").read_text())
    file.write_text(yaml.dump(data.draw(broken(sample)), allow_unicode=False), encoding="utf-8")
    made = refused_or_read(load_robot, str(file))
    assert isinstance(made, Robot | ConfigError)


YAML_ODDITIES = (
    b"{", b"- a", b"a: &x [*x]", b"a: &x {b: *x}", b"<<: {a: 1}", b"? [a]\n: b", b"!!python/name:os.system",
    b"a: !!timestamp 2001-13-99", b"a: 2001-13-99", b"a: !!binary x", b"a: !!int x", b"a: !!float .", b"a: 1:99:99",
    b"a: !!set [1]", b"a: !!omap {a: b}", b"a: 0x", b"a: !!bool x", b"a: 0b", b"? {a: b}\n: c", b"%YAML 9.9\n---\na",
    b"---\na\n---\nb", b"[" * 3000, b"a: " * 3000, b"<<: 1", b"<<: [1]", b"a: " + b"9" * 6000,
    b"a: !!int " + b"9" * 6000, b"? !!set {a}\n: c", b"&x ? *x : 1", b"\xff\xfea")


@pytest.mark.parametrize("text", YAML_ODDITIES, ids=range(len(YAML_ODDITIES)))
def test_what_yaml_knows_and_a_robot_file_does_not(tmp_path, text):
    (tmp_path / "r.yaml").write_bytes(text)
    assert isinstance(refused_or_read(load_robot, str(tmp_path / "r.yaml")), ConfigError)
    (tmp_path / "r.yaml").write_bytes(ROBOTS[0].read_bytes() + b"\n" + text)
    refused_or_read(load_robot, str(tmp_path / "r.yaml"))


@fuzz(80)
@given(robot=st.sampled_from(ROBOTS), data=st.data())
def test_damaged_robot_files(tmp_path_factory, robot, data):
    file = tmp_path_factory.mktemp("robot") / "r.yaml"
    file.write_bytes(data.draw(damaged(robot.read_bytes())))
    refused_or_read(load_robot, str(file))


@pytest.mark.parametrize("name", [value for value in SCALARS if isinstance(value, str)] + ["~nobody/x"])
def test_names_of_robots(name):
    assert isinstance(refused_or_read(load_robot, name), ConfigError)
    assert isinstance(refused_or_read(load_robot, name + ".yaml"), ConfigError)


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    return record(tmp_path_factory.mktemp("toys"), count=4, size=4)


def episodes(directory):
    return list(read_episodes(directory))


@fuzz(150)
@given(data=st.data())
def test_indexes_of_data_sets(data_set, tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("index")
    for file in data_set.glob("*.npz"):
        os.link(file, directory / file.name)
    (directory / INDEX).write_text(json.dumps(data.draw(broken(json.loads((data_set / INDEX).read_text())))))
    refused_or_read(episodes, directory)


@fuzz(80)
@given(file=st.sampled_from((INDEX, "episodes_00000.npz")), data=st.data())
def test_damaged_data_sets(data_set, tmp_path_factory, file, data):
    directory = tmp_path_factory.mktemp("damaged")
    for each in data_set.iterdir():
        os.link(each, directory / each.name)
    misplace(directory / file, "absent")
    (directory / file).write_bytes(data.draw(damaged((data_set / file).read_bytes())))
    refused_or_read(episodes, directory)


@pytest.mark.parametrize("how", MISPLACED)
@pytest.mark.parametrize("file", [INDEX, "episodes_00000.npz"])
def test_layouts_of_data_sets(data_set, tmp_path, file, how):
    for each in data_set.iterdir():
        os.link(each, tmp_path / each.name)
    misplace(tmp_path / file, how)
    assert isinstance(refused_or_read(episodes, tmp_path), Pi05Error)


ARRAYS = st.sampled_from([np.zeros(()), np.zeros((12, 2)), np.zeros((12, 2), np.float32), np.zeros(12, "M8[s]"),
                          np.array(["a"] * 12), np.zeros(12, [("a", "f4")]), np.zeros((0, 2), np.float32),
                          np.zeros(12, complex), np.full((12, 2), np.nan, np.float32), np.array([None] * 12)])


@fuzz(40)
@given(name=st.sampled_from(("images", "frame_steps", "state", "actions")), array=ARRAYS)
def test_arrays_of_data_sets(data_set, tmp_path_factory, name, array):
    directory = tmp_path_factory.mktemp("arrays")
    for each in data_set.iterdir():
        os.link(each, directory / each.name)
    with np.load(data_set / "episodes_00000.npz") as content:
        arrays = dict(content) | {name: array}
    (directory / "episodes_00000.npz").unlink()
    np.savez(directory / "episodes_00000.npz", **arrays)
    refused_or_read(episodes, directory)


TOKENIZER = PromptTokenizer(tiny_tokenizer(), 48)
FORMATS = st.sampled_from(("pi05", "pi05_padded_state", "pi0", "pi0_joined"))
STATES = st.lists(st.floats(width=32) | st.floats(-1, 1), min_size=0, max_size=ACTION_DIM)


@fuzz(150)
@given(prompt=st.text(st.characters(exclude_categories=()), max_size=60), state=STATES, prompt_format=FORMATS)
def test_prompts_of_any_unicode(prompt, state, prompt_format):
    tokens = refused_or_read(TOKENIZER.tokenize, prompt, np.array(state), prompt_format)
    if not isinstance(tokens, Pi05Error):
        assert tokens.ids.shape == tokens.mask.shape == (48,)
        assert (0 <= tokens.ids).all() and (tokens.ids < TOKENIZER.vocab_size).all()


@pytest.mark.parametrize("letter", ["a", " ", "\0", "\n", "é", "漢", "🤖", "\u0301", "\u202e", "\ud800", "\uffff"])
def test_prompts_of_100_kB(letter):
    tokens = refused_or_read(TOKENIZER.tokenize, letter * (100_000 // len(letter.encode("utf-8", "surrogatepass"))),
                             np.zeros(7), "pi05")
    assert isinstance(tokens, Pi05Error) or tokens.ids.shape == (48,)


def picture(encoding):
    import io

    from PIL import Image
    out = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(out, encoding)
    return out.getvalue()


@pytest.mark.parametrize("encoding", ["JPEG", "PNG"])
@fuzz(80)
@given(data=st.data())
def test_damaged_pictures(encoding, data):
    frame = refused_or_read(decompress, data.draw(damaged(picture(encoding))), encoding, "cam")
    assert isinstance(frame, Pi05Error) or frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3
