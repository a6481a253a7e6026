#!/usr/bin/env bash
# Makes .venv in the project root ready: scripts/setup.sh [EXTRA...], extras as in setup.py.
#
#   PYTHON  the interpreter; by default the first of python3, python3.12 and python3.11 that is Python 3.11 or 3.12
#   TORCH   what pip installs as PyTorch, for another version or build: TORCH="torch==2.8.0 --index-url URL"
#
# Where a ROS 2 environment is sourced, .venv uses its packages; elsewhere pip installs the Jazzy wheels.
# Quick when nothing changed. It can be interrupted and started again at any moment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
torch=${TORCH:-torch==2.13.0}

find_python() {  # prints "VERSION PATH"; passes over what cannot run. The path is the one behind a virtual environment.
    local name
    for name in ${PYTHON:-python3 python3.12 python3.11}; do
        "$name" -c 'import os, sys
version = "%d.%d" % sys.version_info[:2]
if version not in ("3.11", "3.12"): sys.exit(1)
print(version, os.path.realpath(sys.executable))' 2>/dev/null && return
    done
    return 1
}

install_system_packages() {  # anyone but root is told what to run
    if ! command -v apt-get >/dev/null; then
        echo "setup: needs the system packages $* or what your distribution calls them" >&2
        exit 1
    elif [ "$(id -u)" != 0 ]; then
        echo "setup: system packages are missing. Run this, then start again:" >&2
        echo "    sudo apt-get update && sudo apt-get install $*" >&2
        exit 1
    fi
    echo "setup: installing the system packages $*"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# One at a time: a second run waits here for the first. The lock ends with this process.
exec 9<setup.py
if command -v flock >/dev/null; then flock 9; fi

if [ -z "${PYTHON:-}" ] && ! command -v python3 >/dev/null; then
    install_system_packages python3 python3-venv
fi
read -r version python <<<"$(find_python)" || true
if [ -z "$python" ]; then
    echo "setup: none of '${PYTHON:-python3 python3.12 python3.11}' is Python 3.11 or 3.12." \
         "Install one, or name it: PYTHON=/path/to/python3.12" >&2
    exit 1
fi
"$python" -c 'import ensurepip, venv' 2>/dev/null || install_system_packages "python$version-venv"

# The simulated robot's cameras are drawn by OpenGL without a screen: by a GPU's driver, or in software.
if [[ " $* " == *" sim "* && -z "${MUJOCO_GL:-}" ]] && ! ldconfig -p | grep 'libEGL_\(mesa\|nvidia\)' >/dev/null; then
    install_system_packages libegl1 libegl-mesa0 libgl1-mesa-dri
fi

extras="ros $*" site=()
if [ -n "${ROS_DISTRO:-}" ]; then
    "$python" -c 'import rclpy' 2>/dev/null || {
        echo "setup: ROS 2 $ROS_DISTRO is sourced, but $python cannot import rclpy." \
             "Name the interpreter it was built for (PYTHON=...), or start without ROS sourced." >&2
        exit 1
    }
    extras="$*" site=(--system-site-packages)  # the wheels beside a sourced ROS would be two of every library
fi
extras=$(tr ' ' ',' <<<"${extras% }")

# `base` says what .venv was made of: anything else (another Python, a moved folder, an interrupted run) is made anew.
base="$python $version ${ROS_DISTRO:-wheels} $PWD"
stamp=.venv/ready-for-${extras:-nothing-more}
wanted=$({ cat setup.py setup.cfg pyproject.toml; echo "$torch $base"; } | sha256sum)
if [ "$(cat .venv/base 2>/dev/null)" = "$base" ]; then
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
else
    echo "setup: making .venv with Python $version"
    "$python" -m venv --clear "${site[@]}" .venv
fi
rm -f .venv/base  # back when pip is done: after an interruption some packages may be there in part
pip=(.venv/bin/python -m pip install -qq --disable-pip-version-check --use-pep517)
echo "setup: installing ${torch%% *}, pi05_ros and what they need; the first time this takes minutes"
# PyTorch first: it alone decides between its CPU and CUDA builds. Unquoted, because TORCH may hold options.
# shellcheck disable=SC2086
"${pip[@]}" $torch
"${pip[@]}" -e ".${extras:+[$extras]}"
echo "$base" >.venv/base
echo "$wanted" >"$stamp"
