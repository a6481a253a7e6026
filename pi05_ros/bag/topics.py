"""Which topics a recording of a policy node has, by what they are to it. A YAML file maps them on other robots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from pi05_ros.errors import ConfigError
from pi05_ros.schema import CAMERAS

STATE, PROMPT, PROVENANCE, PARAMETERS = "state", "prompt", "provenance", "parameters"
WORDS = dict(zip(CAMERAS, ("base_image", "left_wrist_image", "right_wrist_image"), strict=True)) | {
    STATE: "joint_states", PROMPT: "prompt", PROVENANCE: "provenance", PARAMETERS: "parameters"}
WAY_OUT = "One line a topic, for example `base_0_rgb: /front/image_raw`."


def topic_map(path: Path | None = None, node: str = "/pi05_policy") -> dict[str, str]:
    """{role: topic}: the node's own topics, replaced by those of a YAML file `role: /topic`.

    Roles are the cameras' keys, state, prompt, provenance, and parameters (what the node's were when recording began;
    our recorder writes that one).

    Raises:
        ConfigError: the file is no such map.
    """
    topics = {role: f"{node}/{word}" for role, word in WORDS.items()}
    return topics if path is None else topics | _read(path)


def topics_told(about: Mapping[str, str]) -> dict[str, str] | None:
    """Those that the recorder wrote into the bag; None if it did not.

    Raises:
        ConfigError: what is written is no such map.
    """
    return _checked("topic map of the bag", about["topics"]) if "topics" in about else None


def _read(path: Path) -> dict[str, str]:
    try:
        return _checked(f"topic map {path}", path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"topic map {path}", expected="a readable YAML file", received=str(error),
                          way_out=WAY_OUT) from error


def _checked(name: str, text: str) -> dict[str, str]:
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(name, expected="readable YAML", received=str(error), way_out=WAY_OUT) from error
    if not isinstance(found, Mapping):
        raise ConfigError(name, expected="a mapping of roles to topics", received=type(found).__name__, way_out=WAY_OUT)
    for role, topic in found.items():
        if role not in WORDS:
            raise ConfigError(name, expected="roles among " + ", ".join(WORDS), received=repr(role), way_out=WAY_OUT)
        if not isinstance(topic, str) or not topic.startswith("/"):
            raise ConfigError(f"{name}: {role}", expected="a topic's full name", received=repr(topic), way_out=WAY_OUT)
    return dict(found)
