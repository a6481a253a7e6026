"""The files that describe the package agree with each other and with the code."""

from __future__ import annotations

import configparser
import re
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path

import pytest

import pi05_ros

ROOT = Path(__file__).resolve().parents[1]
SETUP = (ROOT / "setup.py").read_text()


def test_one_version_everywhere():
    in_setup = re.search(r'version="([^"]+)"', SETUP)
    assert in_setup and in_setup[1] == pi05_ros.__version__
    assert ElementTree.parse(ROOT / "package.xml").findtext("version") == pi05_ros.__version__


@pytest.mark.parametrize("module", sorted(set(re.findall(r"= (pi05_ros[\w.]*):main", SETUP))))
def test_entry_points_exist(module):
    spec = find_spec(module)
    assert spec and spec.origin
    assert re.search(r"^(from .* import .*\bmain\b|def main\()", Path(spec.origin).read_text(), re.MULTILINE)


def test_executables_are_where_ros2_run_looks():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["install"]["install_scripts"] == config["develop"]["script_dir"] == "$base/lib/pi05_ros"
    assert (ROOT / "resource" / "pi05_ros").is_file()


def test_fast_dds_profile_has_a_large_segment_and_udp():
    text = ElementTree.parse(ROOT / "config" / "fastdds.xml").getroot()
    sizes = [int(node.text or 0) for node in text.iter() if node.tag.endswith("segment_size")]
    assert sizes == [16 * 2**20]
    transports = {node.text for node in text.iter() if node.tag.endswith("}type")}
    assert transports == {"SHM", "UDPv4"}
