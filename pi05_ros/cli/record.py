"""Records what goes into the policy node and comes out of it as a rosbag2 directory (mcap), for `pi05 replay`,
`ros2 bag` and Foxglove. SIGINT or SIGTERM ends it; after a kill all but the last second can be read.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from pi05_ros.cli.options import positive
from pi05_ros.cli.report import Report, console, table
from pi05_ros.errors import ConfigError

HELP = "record a run of the policy node"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bag", nargs="?", type=Path, help="directory to make (default: pi05_<date>_<time>)")
    parser.add_argument("--node", default="/pi05_policy", help="full name of the node (default: /pi05_policy)")
    parser.add_argument("--topics", type=Path, metavar="FILE", help="YAML map of topics, where they were remapped")
    parser.add_argument("--duration", type=float, default=0.0, metavar="S", help="seconds; 0: until a signal (default)")
    parser.add_argument("--split-mb", type=float, default=0.0, metavar="MB", help="begin a new file at this size")
    parser.add_argument("--split-s", type=float, default=0.0, metavar="S", help="begin a new file after this time")
    parser.add_argument("--compression", choices=("none", "zstd"), default="none", help="of mcap's chunks")
    parser.add_argument("--queue-mb", type=positive, default=256, metavar="MB",
                        help="memory for what waits for the disk; beyond it messages are dropped and counted")


def run(args: argparse.Namespace) -> Report:
    from pi05_ros.config import share_directory

    os.environ.setdefault("FASTRTPS_DEFAULT_PROFILES_FILE", str(share_directory() / "config" / "fastdds.xml"))
    try:
        from pi05_ros.bag.recorder import record
        from pi05_ros.bag.topics import topic_map
        from pi05_ros.bag.writer import BagWriter, Splits
        from pi05_ros.bag.writing import WriterThread
    except ImportError as error:
        raise ConfigError("recording", expected="ROS and the extra `bag`", received=str(error),
                          way_out="pip install 'pi05_ros[ros,bag]'") from error
    topics = topic_map(args.topics, args.node)
    directory = args.bag or Path(time.strftime("pi05_%Y_%m_%d-%H_%M_%S"))
    writer = BagWriter(directory, Splits(int(args.split_mb * 1e6), args.split_s), args.compression,
                       {"node": args.node, "topics": json.dumps(topics)})
    out = WriterThread(writer, args.queue_mb << 20)
    try:
        recorder = record(args.node, topics, out, args.duration, lambda line: console.print(line, highlight=False))
    finally:
        out.close()
    counts = {topic.name: count for topic, count in writer.counts.items()}
    table(f"Recorded to {directory}", ("topic", "messages", "dropped (slow disk)", "lost (middleware)"),
          [(name, count, out.dropped[name], recorder.lost[name]) for name, count in sorted(counts.items())])
    if not recorder.parameters_known:
        console.print(f"[bold red]{args.node} never told its parameters[/]: replaying needs --robot and its model",
                      highlight=False)
    return Report(ok=bool(counts) and not out.dropped, data={
        "bag": str(directory), "files": len(writer.files), "messages": counts, "dropped": dict(out.dropped),
        "lost": dict(recorder.lost), "parameters_known": recorder.parameters_known})
