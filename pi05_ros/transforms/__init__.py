"""Robot units to model inputs and back, ordered once in robot.py."""
