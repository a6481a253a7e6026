"""pi0.5 on a real robot, in real time, from ROS 2. Importing this package imports nothing heavy."""

__version__ = "0.1.0"
