"""Settings of torch_tensorrt.dynamo.compile against its recorded signature: which are taken, which are refused."""

import inspect

import pytest
import yaml
from scripted_torch_tensorrt import RECORDED, signature

from pi05_ros.backends.torch_tensorrt.settings import NOT_TO_SET, OURS, arguments
from pi05_ros.cli.build import read_settings
from pi05_ros.config import share_directory
from pi05_ros.errors import BackendError, ConfigError

SHIPPED = share_directory() / "config" / "torch_tensorrt.yaml"


def recorded(more=(), without=()):
    def compile(*args, **kwargs):
        raise AssertionError("only its signature is asked for")

    compile.__signature__ = signature(more, without)
    return compile


def test_the_recorded_signature_is_that_of_the_installed_release():
    library = pytest.importorskip("torch_tensorrt", reason="needs the extra `torch_tensorrt`")
    if library.__version__ != RECORDED["version"]:
        pytest.skip(f"recorded is {RECORDED['version']}, installed {library.__version__}")
    found = inspect.signature(library.dynamo.compile).parameters
    assert [*RECORDED["defaults"], "kwargs"] == list(found)


def test_the_shipped_settings_are_arguments_that_compile_has():
    settings = read_settings(SHIPPED)
    told = arguments(recorded(), settings, RECORDED["version"])
    assert set(told) <= set(RECORDED["defaults"]) and told.items() >= {**settings, **OURS}.items()
    wanted = {"disable_tf32": True, "truncate_double": False, "require_full_compilation": True,
              "immutable_weights": True, "cache_built_engines": False, "reuse_cached_engines": False}
    assert told.items() >= wanted.items()
    left_out = yaml.safe_load("\n".join(line.removeprefix("# ") for line in SHIPPED.read_text().splitlines()
                                        if line.startswith(("# workspace_size", "# optimization", "# decompose"))))
    assert set(left_out) == {"workspace_size", "optimization_level", "decompose_attention"} <= set(RECORDED["defaults"])


@pytest.mark.parametrize(("name", "words"), [
    ("disable_tf23", "disable_tf32.*would ignore it"), ("enable_tf32", "a name that it does not have"),
    ("truncate_long_and_double", "truncate_double"), ("debug", "a name that it does not have")])
def test_a_setting_that_compile_would_swallow_is_refused(name, words):
    with pytest.raises(ConfigError, match=f"'{name}'.*dynamo.compile of torch_tensorrt 2.13.0.*{words}|{words}"):
        arguments(recorded(), {name: True}, "2.13.0")


@pytest.mark.parametrize("name", sorted(NOT_TO_SET - {"kwargs"}))
def test_what_follows_from_the_engine_is_not_to_be_set(name):
    with pytest.raises(ConfigError, match=f"'{name}': expected not to be set"):
        arguments(recorded(), {name: False}, "2.13.0")


def test_types_are_the_programs_in_every_release_that_is_taken():
    older = recorded(more=("enabled_precisions", "use_explicit_typing"),  # as release 2.10; 2.11 and 2.12 have more
                     without=("decompose_attention", "attn_bias_is_causal", "dynamically_allocate_resources",
                              "fallback_data_dependent_ops"))
    assert arguments(older, read_settings(SHIPPED), "2.12.0")["use_explicit_typing"] is True
    assert "use_explicit_typing" not in arguments(recorded(), {}, "2.13.0")
    with pytest.raises(BackendError, match="strongly typed networks.*use_explicit_typing"):
        arguments(recorded(more=("enabled_precisions",)), {}, "2.5.0")
    with pytest.raises(BackendError, match="min_block_size"):
        arguments(recorded(without=("min_block_size",)), {}, "3.0.0")


@pytest.mark.parametrize("text", ["- disable_tf32", "disable_tf32: [1]", "disable_tf32: {a: 1}", ":\n :", "dryrun: 1"])
def test_a_file_of_settings_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(ConfigError):
        read_settings(tmp_path / "settings.yaml")
    with pytest.raises(ConfigError, match="copy of config/torch_tensorrt.yaml"):
        read_settings(tmp_path / "none.yaml")
