"""Runs on disk: recorded as rosbag2 directories, replayed bit for bit, compared."""
