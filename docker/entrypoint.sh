#!/usr/bin/env bash
# ROS 2 in the environment, then the command.
set -e
# shellcheck source=/dev/null
source /opt/ros/jazzy/setup.bash
export AMENT_PREFIX_PATH=/usr/local:$AMENT_PREFIX_PATH # where pip put pi05_ros
exec "$@"
