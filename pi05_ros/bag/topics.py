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


def topic_map(path: Path | None = None, node: str = "/pi05_policy") -> dict[str, str]:
    """{role: topic}: the node's own topics, replaced by those of a YAML file `role: /topic`.

    Roles are the cameras' keys, state, prompt, provenance, and parameters (what the node's were when recording began;
    our recorder writes that one).

    Raises:
        ConfigError: the file is no such map.
    """
    topics = {role: f"{node}/{word}" for role, word in WORDS.items()}
    return topics if path is None else topics | _read(path)


def _read(path: Path) -> dict[str, str]:
    way_out = "One line a topic, for example `base_0_rgb: /front/image_raw`."
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"topic map {path}", expected="a readable YAML file", received=str(error),
                          way_out=way_out) from error
    if not isinstance(found, Mapping):
        raise ConfigError(f"topic map {path}", expected="a mapping of roles to topics",
                          received=type(found).__name__, way_out=way_out)
    for role, topic in found.items():
        if role not in WORDS:
            raise ConfigError(f"topic map {path}", expected="roles among " + ", ".join(WORDS), received=repr(role),
                              way_out=way_out)
        if not isinstance(topic, str) or not topic.startswith("/"):
            raise ConfigError(f"topic map {path}: {role}", expected="a topic's full name", received=repr(topic),
                              way_out=way_out)
    return dict(found)
