"""The way in for `--backend tensorrt_rtx`: the same with the flavour for RTX desktops."""

from functools import partial

from pi05_ros.backends.tensorrt import load

build = partial(load.build, flavour="tensorrt_rtx")
