"""Valid samples broken in a few places, and the one property of every reader: only our own errors come out.

`PI05_FUZZ_EXAMPLES=20000` makes a campaign of the same tests, with new examples each time.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from pi05_ros.errors import Pi05Error

CAMPAIGN = int(os.environ.get("PI05_FUZZ_EXAMPLES", 0))
NESTED: list = []
for _ in range(200):
    NESTED = [NESTED]
# Values where a number, a name, a list or an object should be.
SCALARS = [None, True, False, 0, -1, 1, 2, 3.5, 2**63, 2**70, -2**70, 10**400, 1e308, -0.0, 1e-320, float("nan"),
           float("inf"), "", " ", "0", "a", "..", "../x", "/", "a/b", "\0", "\ud800", "\u202e", "é" * 300, "x" * 5000]
ODD = [*SCALARS, [], {}, [[]], [{}], [None], [1, "a"], {"": {}}, {"a": None}, [0] * 40, [10**400, 2], NESTED]


def fuzz(examples: int) -> Callable:
    """`examples` fixed ones in the test suite."""
    return settings(max_examples=CAMPAIGN or examples, derandomize=not CAMPAIGN, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


def refused_or_read(read: Callable, *args: Any, **options: Any) -> Any:
    """What `read` gives, or our error with all that it has to say; any other exception fails the test."""
    try:
        return read(*args, **options)
    except Pi05Error as error:
        assert error.subject and error.expected and error.received and error.way_out and error.cause
        return error


@st.composite
def broken(draw: st.DrawFn, sample: Any) -> Any:
    """A copy of lists, dicts and scalars with one to three places replaced, removed, doubled or renamed."""
    holder = [copy.deepcopy(sample)]
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(holder))
        container, key = places[draw(st.integers(0, len(places) - 1))]
        how = draw(st.sampled_from(("replace", "replace", "remove", "double", "rename", "wrap")))
        if how == "wrap":
            container[key] = draw(st.sampled_from(([container[key]], {"a": container[key]})))
        elif how == "double" and isinstance(container[key], list):
            container[key] = container[key] * 2
        elif how == "remove" and container is not holder:
            del container[key]
        elif how == "rename" and isinstance(container, dict):
            container[draw(st.sampled_from(("", "a", "\0", "\ud800", "x" * 300)))] = container.pop(key)
        else:
            container[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
    return holder[0]


def _places(holder: list) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) at whose place something else could stand; odd nests are not walked into."""
    stack = [(holder, 0, 0)]
    while stack:
        container, key, depth = stack.pop()
        yield container, key
        value = container[key]
        keys = range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ()
        if depth < 12:
            stack += [(value, inner, depth + 1) for inner in keys]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes cut, overwritten, doubled or in another encoding."""
    how = draw(st.sampled_from(("cut", "overwrite", "insert", "utf-16", "bom", "swap")))
    at = draw(st.integers(0, len(content)))
    noise = draw(st.binary(min_size=1, max_size=9))
    return {"cut": content[:at], "overwrite": content[:at] + noise + content[at + len(noise):],
            "insert": content[:at] + noise + content[at:], "utf-16": content.decode("latin-1").encode("utf-16"),
            "bom": b"\xef\xbb\xbf" + content, "swap": content[at:] + content[:at]}[how]


MISPLACED = ("absent", "directory", "loop", "dangling", "empty", "half", "pointer", "noise", "to_directory")


def misplace(file: Path, how: str) -> None:
    """Put something else where `file` is; its content is not written to, so that it may be a hard link."""
    content = file.read_bytes()
    file.unlink()
    if how == "directory":
        file.mkdir()
    elif how in ("loop", "dangling", "to_directory"):
        file.symlink_to({"loop": file.name, "dangling": "nowhere", "to_directory": "."}[how])
    elif how != "absent":
        file.write_bytes({"empty": b"", "half": content[:len(content) // 2], "noise": bytes(range(256)),
                          "pointer": b"version https://git-lfs.github.com/spec/v1\n"}[how])
