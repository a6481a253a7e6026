"""config/policy.yaml is the documentation of the parameters: it must list exactly those there are."""

from pathlib import Path

import yaml
from rclpy.parameter import Parameter

from pi05_ros.config import share_directory
from pi05_ros.ros.parameters import PARAMETERS


def test_the_parameter_file_has_every_parameter_with_its_default():
    text = (share_directory() / "config" / "policy.yaml").read_text()
    listed = yaml.safe_load(text)["/**"]["ros__parameters"]
    assert listed == {spec.name: spec.default for spec in PARAMETERS}
    for spec in PARAMETERS:
        line = next(line for line in text.splitlines() if line.strip().startswith(spec.name + ":"))
        assert ("live" in line) == spec.live, line


def test_every_parameter_has_a_description_and_numbers_have_a_range():
    for spec in PARAMETERS:
        assert len(spec.text) > 10
        if isinstance(spec.default, int | float) and not isinstance(spec.default, bool):
            assert spec.low is not None and spec.low <= spec.default <= spec.high


def test_the_readme_lists_every_parameter_with_its_default():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for spec in PARAMETERS:
        row = next((line for line in readme.splitlines() if line.startswith(f"| `{spec.name}` |")), None)
        assert row is not None, spec.name
        default, live = row.split("|")[2].strip(), row.split("|")[4].strip()
        assert default in (f"`{spec.default}`", str(spec.default).lower(), '`""`' if spec.default == "" else "",
                           f"{spec.default:g}" if isinstance(spec.default, float) else ""), row
        assert (live == "live") == spec.live, row


def test_an_execution_horizon_beyond_what_is_committed_is_refused(node):
    def horizon(actions):
        return node.set_parameters([Parameter("execution_horizon", value=actions)])[0]

    assert horizon(41).successful  # the robot is not known yet
    assert node.trigger_configure().name == "FAILURE"
    assert horizon(40).successful and node.trigger_configure().name == "SUCCESS"  # 0.8 s at 50 Hz, then it brakes
    refused = horizon(41)
    assert not refused.successful and "at most 40 actions of 0.02 s" in refused.reason
