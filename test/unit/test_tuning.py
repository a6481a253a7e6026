"""Choices of tiles: which candidates count, which wins, and the file they are kept in."""

import json
import logging
import os

import pytest

from pi05_ros.backends.cuda import tuning
from pi05_ros.backends.cuda.tuning import Gpu, Tiles
from pi05_ros.errors import BackendError

KIB = 1024
SMALL, LARGE = Tiles(16, 16, 64), Tiles(64, 64, 128)
ALLOWED = {"product": [LARGE, SMALL], "attention": [SMALL]}


def gpu(**changes):
    return Gpu(**{**dict(name="RTX 4090", capability=(8, 9), multiprocessors=128, shared_bytes=99 * KIB), **changes})


def shared_bytes(tiles, gpu):
    return tiles.rows * tiles.inner * gpu.buffers(tiles.stages) * KIB // 64


@pytest.fixture
def file(tmp_path):
    return tmp_path / "cache" / "tuning.json"


def test_candidates_are_those_that_shared_memory_holds_in_their_order():
    assert tuning.fitting([LARGE, SMALL], shared_bytes, gpu(shared_bytes=128 * KIB)) == [LARGE, SMALL]
    assert tuning.fitting([LARGE, SMALL], shared_bytes, gpu()) == [SMALL]
    with pytest.raises(BackendError, match="128 KiB of shared memory a block, received 99 KiB"):
        tuning.fitting([LARGE], shared_bytes, gpu())


@pytest.mark.parametrize(("capability", "buffers"), [((8, 0), 2), ((9, 0), 3), ((10, 0), 3), ((12, 0), 2)])
def test_asynchronous_products_hold_one_tile_more(capability, buffers):
    assert gpu(capability=capability).buffers(3) == buffers


def measured(times, until=float("inf"), clock=lambda: 0.0):
    """`fastest` with a clock that answers for the device; an exception in `times` is raised by its candidate."""
    ran = []

    def seconds(work):
        work()
        found = times[ran[-1]]
        if isinstance(found, Exception):
            raise found
        return found

    return tuning.fastest(list(times), ran.append, seconds, until, clock), ran


def test_the_fastest_candidate_wins():
    assert measured({LARGE: 3e-6, SMALL: 2e-6}) == (SMALL, [LARGE, SMALL])


def test_what_does_not_compile_is_skipped():
    assert measured({LARGE: RuntimeError("out of resources"), SMALL: 2e-6})[0] == SMALL
    with pytest.raises(BackendError, match="a kernel that this GPU runs"):
        measured({LARGE: RuntimeError("no"), SMALL: ValueError("no")})


def test_out_of_time_the_best_so_far_wins_and_one_is_always_timed():
    assert measured({LARGE: 3e-6, SMALL: 2e-6}, until=-1.0) == (LARGE, [LARGE])


def test_choices_come_back_as_they_were_kept(file):
    tuning.write_choices(file, "one GPU", {"product": SMALL, "attention": SMALL})
    tuning.write_choices(file, "another", {"product": LARGE})
    assert tuning.read_choices(file, "one GPU", ALLOWED) == {"product": SMALL, "attention": SMALL}
    assert tuning.read_choices(file, "another", ALLOWED) == {"product": LARGE}
    assert tuning.read_choices(file, "a third", ALLOWED) == {}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"3", b'{"format": "other", "entries": {}}',
                                     b'{"format": "pi05_ros tuning 1"}',
                                     b'{"format": "pi05_ros tuning 1", "entries": {"one GPU": 3}}',
                                     b'{"format": "pi05_ros tuning 1", "entries": []}'])
def test_a_damaged_or_foreign_file_is_named_and_written_anew(file, content, caplog):
    file.parent.mkdir()
    file.write_bytes(content)
    assert tuning.read_choices(file, "one GPU", ALLOWED) == {}
    assert f"{file} is damaged or not ours" in caplog.text
    tuning.write_choices(file, "one GPU", {"product": SMALL})
    assert tuning.read_choices(file, "one GPU", ALLOWED) == {"product": SMALL}


@pytest.mark.parametrize("values", [{"rows": 1}, 3, [], None, {"rows": "large"}])
def test_a_choice_that_is_no_candidate_is_not_taken(file, values, caplog):
    tuning.write_choices(file, "one GPU", {"product": SMALL, "attention": SMALL})
    content = json.loads(file.read_text())
    content["entries"]["one GPU"]["product"] = values
    file.write_text(json.dumps(content))
    assert tuning.read_choices(file, "one GPU", ALLOWED) == {"attention": SMALL}
    assert "product that are no candidates" in caplog.text


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(file, monkeypatch, caplog):
    tuning.write_choices(file, "one GPU", {"product": SMALL})
    seen = []

    def replace(new, old):
        seen.append((json.loads(old.read_text())["entries"].keys(), json.loads(new.read_text())["entries"].keys()))
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", replace)
    tuning.write_choices(file, "another", {"product": LARGE})
    assert seen == [({"one GPU"}, {"one GPU", "another"})] and "disk full" in caplog.text
    assert tuning.read_choices(file, "one GPU", ALLOWED) == {"product": SMALL}
    assert [path.name for path in file.parent.iterdir()] == ["tuning.json"]


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the directory should be")
    tuning.write_choices(tmp_path / "cache" / "tuning.json", "one GPU", {"product": SMALL})
    assert "could not be kept" in caplog.text


def test_the_key_holds_all_that_a_choice_depends_on(monkeypatch):
    monkeypatch.setattr(tuning.importlib.metadata, "version", lambda name: "3.6.0")
    key = tuning.key(gpu(), "18 layers")
    assert key == tuning.key(gpu(), "18 layers") and "RTX 4090, 8.9, 128 SMs; 18 layers; triton 3.6.0" in key
    others = [tuning.key(gpu(**change), "18 layers") for change in (
        {"name": "RTX 4080"}, {"capability": (8, 6)}, {"multiprocessors": 76})] + [tuning.key(gpu(), "3 layers")]
    monkeypatch.setattr(tuning.importlib.metadata, "version", lambda name: "3.7.0")
    others.append(tuning.key(gpu(), "18 layers"))
    monkeypatch.setattr(tuning.torch, "__version__", "3.0")
    others.append(tuning.key(gpu(), "18 layers"))
    assert len({key, *others}) == 7


def test_where_the_file_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("PI05_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.cache_file() == tmp_path / ".cache" / "pi05_ros" / "tuning.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning.cache_file() == tmp_path / "xdg" / "pi05_ros" / "tuning.json"
    monkeypatch.setenv("PI05_CACHE_DIR", str(tmp_path / "ours"))
    assert tuning.cache_file() == tmp_path / "ours" / "tuning.json"


@pytest.fixture(autouse=True)
def all_log_lines(caplog):
    caplog.set_level(logging.INFO)
