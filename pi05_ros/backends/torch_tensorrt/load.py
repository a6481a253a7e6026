"""The way in for `--backend torch_tensorrt`: engines that torch_tensorrt made, run as every engine is.

torch_tensorrt is needed to build them, not to run them: an engine wants the TensorRT release that built it.
"""

from functools import partial

from pi05_ros.backends.tensorrt import load

build = partial(load.build, flavour="torch_tensorrt")
