"""Installs pi05_ros with colcon (ament_python) or with plain pip, with or without ROS."""

from pathlib import Path

from setuptools import find_packages, setup

NAME = "pi05_ros"
ROOT = Path(__file__).resolve().parent
X86_LINUX = "; platform_system == 'Linux' and platform_machine == 'x86_64'"


def share_files() -> list[tuple[str, list[str]]]:
    """launch/, config/ and models/ with their folders, under share/pi05_ros."""
    found: dict[str, list[str]] = {}
    for top in ("launch", "config", "models"):
        for path in sorted((ROOT / top).rglob("*")):
            relative = path.relative_to(ROOT)
            if path.is_file() and "__pycache__" not in relative.parts:
                found.setdefault(f"share/{NAME}/{relative.parent}", []).append(str(relative))
    return list(found.items())


setup(
    name=NAME,
    version="0.1.0",  # also in package.xml and pi05_ros/__init__.py; a test compares them
    description="The pi0.5 vision-language-action model in real time, from ROS 2",
    license="Apache-2.0",
    maintainer="pi05_ros maintainers",
    maintainer_email="maintainers@example.org",
    packages=find_packages(exclude=["test", "test.*"]),
    package_data={NAME: ["backends/cuda/csrc/*.cu", "backends/cuda/csrc/*.cuh", "sim/*.xml"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        *share_files(),
    ],
    zip_safe=False,
    python_requires=">=3.11",
    # Lower bounds are what Ubuntu 24.04 ships, so that a sourced ROS 2 Jazzy keeps its own NumPy (cv_bridge needs it).
    install_requires=[
        "numpy>=1.26",
        "pillow>=10.2",
        "pyyaml>=6.0",
        "rich>=13.7",
        "safetensors>=0.4.3",
        "sentencepiece>=0.2.0",
        "torch>=2.8",
    ],
    extras_require={
        # ROS 2 Jazzy without a ROS installation. Pinned: the bare names install a later distribution.
        "ros": [
            "ros-rclpy[fastrtps]==7.1.6",
            "ros-builtin-interfaces==2.0.3",
            "ros-diagnostic-msgs==5.3.6",
            "ros-lifecycle-msgs==2.0.3",
            "ros-rcl-interfaces==2.0.3",
            "ros-rosgraph-msgs==2.0.3",
            "ros-sensor-msgs==5.3.6",
            "ros-std-msgs==5.3.6",
            "ros-std-srvs==5.3.6",
            "ros-trajectory-msgs==5.3.6",
        ],
        "sim": ["mujoco>=3.1"],
        "bag": ["mcap>=1.6", "rosbags>=0.10.6", "zstandard>=0.22"],
        # PyTorch's CUDA build brings the first two; the last: temperature in /diagnostics
        "cuda": [f"triton>=3.2{X86_LINUX}", f"cuda-bindings>=12.9{X86_LINUX}", "nvidia-ml-py>=12.535"],
        "lerobot": ["av>=12", "pyarrow>=15"],  # data sets as calibration source
        "export": ["onnx>=1.18", "onnxruntime>=1.20", "onnxscript>=0.7"],
        "tensorrt": [f"tensorrt-cu13>=11.0{X86_LINUX}"],
        "tensorrt_rtx": [f"tensorrt-rtx-cu13>=1.7{X86_LINUX}"],
        "torch_tensorrt": [f"torch-tensorrt>=2.10{X86_LINUX}"],  # its minor version follows PyTorch's
        "quantize": ["nvidia-modelopt>=0.47", "requests", "huggingface_hub"],  # ModelOpt uses both undeclared
        "test": [
            "av>=12",
            "hypothesis>=6.98",
            "mcap-ros2-support>=0.6",
            "mujoco>=3.1",
            "onnx>=1.18",
            "onnxruntime>=1.20",
            "onnxscript>=0.7",
            "psutil>=5.9",
            "pyarrow>=15",
            "pytest>=7.4",
            # Builds engines without a GPU: 96 MB to download.
            f"tensorrt-rtx-cu13-bindings==1.7.1.116{X86_LINUX}",
            f"tensorrt-rtx-cu13-libs==1.7.1.116{X86_LINUX}",
            # Pinned: another version finds other things.
            "mypy==2.4.1",
            "ruff==0.17.6",
            "types-PyYAML",
        ],
    },
    entry_points={
        "console_scripts": [
            "pi05 = pi05_ros.cli.main:main",
            "policy_node = pi05_ros.ros.node:main",
            "sim_robot = pi05_ros.sim.sim_robot:main",
        ],
    },
)
