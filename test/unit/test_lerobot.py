"""LeRobot data sets of every format, written here as lerobot lays them out, and read as observations of a robot."""

import io
import json
from dataclasses import replace

import av
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from toy_episodes import TOY

from pi05_ros.cli.main import main
from pi05_ros.config import tiny_config
from pi05_ros.errors import ConfigError
from pi05_ros.model.recipe import RecipeSource
from pi05_ros.quantize.lerobot import LeRobotDataset
from pi05_ros.quantize.recorded import lerobot_samples, transforms_for
from pi05_ros.schema import Observation
from pi05_ros.transforms.robot_file import CameraSpec

CONFIG, FPS, TASKS, LENGTHS = tiny_config(), 10, ("go left", "go right"), (7, 5)
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
ROBOT = replace(TOY, cameras={"base_0_rgb": CameraSpec(key="front", rotate_180=True),
                              "left_wrist_0_rgb": CameraSpec(key=WRIST, required=False)},
                joints=tuple(replace(joint, scale=0.5, offset=0.25) for joint in TOY.joints))


def state_of(number):
    """Of frame `number` of the whole data set, in the numbers of the training data."""
    return [number / 20, -number / 20]


def picture(number):
    """Grey that tells the frame, its upper left quarter lighter."""
    frame = np.full((48, 64, 3), 40 + 13 * number, np.uint8)
    frame[:24, :32] += 60
    return frame


def rows(episode, **more):
    first = sum(LENGTHS[:episode])
    return [{"observation.state": state_of(n), "action": state_of(n + 1), "timestamp": (n - first) / FPS,
             "frame_index": n - first, "episode_index": episode, "index": n, "task_index": episode,
             **{key: value(n) for key, value in more.items()}} for n in range(first, first + LENGTHS[episode])]


def write_video(path, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS, options={"qscale": "1", "g": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in numbers:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
        container.mux(stream.encode())


def write_table(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(content), path)


def png(number):
    out = io.BytesIO()
    Image.fromarray(picture(number)).save(out, "png")
    return {"bytes": out.getvalue(), "path": f"{number}.png"}


def write_info(directory, version, data_path, cameras, changes):
    numbers = {"dtype": "float32", "shape": [2]}
    features = {"observation.state": numbers, "action": numbers,
                **{name: {"dtype": dtype, "shape": [48, 64, 3]} for name, dtype in cameras.items()}}
    video_path = "videos/" + ("{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4" if version == "v3.0" else
                              "chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4")
    (directory / "meta").mkdir(parents=True)
    (directory / "meta" / "info.json").write_text(json.dumps(
        {"codebase_version": version, "fps": FPS, "chunks_size": 1000, "data_path": data_path, "video_path": video_path,
         "features": features} | changes))


def write_v2(directory, version="v2.1", dtype="video", **changes):
    write_info(directory, version, "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
               {FRONT: dtype}, changes)
    for name, lines in (("tasks", [{"task_index": i, "task": task} for i, task in enumerate(TASKS)]),
                        ("episodes", [{"episode_index": i, "length": n} for i, n in enumerate(LENGTHS)])):
        (directory / "meta" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for i in range(2):
        content = rows(i, **({FRONT: png} if dtype == "image" else {}))
        write_table(directory / f"data/chunk-000/episode_{i:06d}.parquet", content)
        if dtype == "video":
            write_video(directory / f"videos/chunk-000/{FRONT}/episode_{i:06d}.mp4", [row["index"] for row in content])
    return directory


def write_v3(directory):
    """Both episodes in one table and one video, which has other frames before them."""
    write_info(directory, "v3.0", "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
               {FRONT: "video", WRIST: "image"}, {})
    both = [row for episode in range(2) for row in rows(episode, **{WRIST: png})]
    write_table(directory / "data/chunk-000/file-001.parquet", both)
    write_video(directory / f"videos/{FRONT}/chunk-000/file-002.mp4", [0, 0, 0, *range(sum(LENGTHS))])
    tasks = [{"task_index": i, "__index_level_0__": task} for i, task in enumerate(TASKS)]
    write_table(directory / "meta/tasks.parquet", tasks)
    write_table(directory / "meta/episodes/chunk-000/file-000.parquet", [{
        "episode_index": i, "length": n, "tasks": [TASKS[i]], "data/chunk_index": 0, "data/file_index": 1,
        f"videos/{FRONT}/chunk_index": 0, f"videos/{FRONT}/file_index": 2,
        f"videos/{FRONT}/from_timestamp": (3 + sum(LENGTHS[:i])) / FPS} for i, n in enumerate(LENGTHS)])
    return directory


WRITERS = {"v2.0": lambda d: write_v2(d, "v2.0"), "v2.1 images": lambda d: write_v2(d, dtype="image"), "v3.0": write_v3}


@pytest.fixture
def transforms():
    return transforms_for(RecipeSource(CONFIG), ROBOT)


@pytest.mark.parametrize("written", WRITERS)
def test_every_frame_is_encoded_as_the_node_would(tmp_path, transforms, written):
    found = lerobot_samples(WRITERS[written](tmp_path / "data"), transforms, sum(LENGTHS), seed=0)
    order = np.random.default_rng([0, 2]).permutation(sum(LENGTHS))
    for number, sample in zip(order.tolist(), found, strict=True):
        frame, state = picture(number), np.array(state_of(number)) * 0.5 + 0.25
        wanted = transforms.encode(Observation({"base_0_rgb": frame[::-1, ::-1]}, state, TASKS[number >= 7])).trimmed()
        assert np.array_equal(sample.inputs.tokens, wanted.tokens)
        np.testing.assert_allclose(sample.inputs.state, wanted.state, atol=1e-6)
        assert np.abs(sample.inputs.frames[0][0].astype(int) - frame).mean() < 5  # the next frame is 13 lighter
        last = LENGTHS[0] if number < LENGTHS[0] else sum(LENGTHS)
        moves = [state_of(min(number + 1 + k, last)) for k in range(CONFIG.action_horizon)]
        chunk = transforms.encode_actions(np.array(moves) * 0.5 + 0.25, state)
        np.testing.assert_allclose(sample.actions[0], chunk, atol=1e-5)
    assert sum(len(one.inputs.frames) == 2 for one in found) == (sum(LENGTHS) if written == "v3.0" else 0)


def test_a_smaller_count_is_the_beginning_of_a_larger_one(tmp_path, transforms):
    data = write_v2(tmp_path / "data")
    few, more = (lerobot_samples(data, transforms, n, seed=1) for n in (3, 9))
    assert all(np.array_equal(a.inputs.state, b.inputs.state) for a, b in zip(few, more[:3], strict=True))
    with pytest.raises(ConfigError, match="at most 12"):
        lerobot_samples(data, transforms, 13, seed=0)


@pytest.mark.parametrize(("change", "said"), [
    ({"codebase_version": "v1.6"}, "v1.6"), ({"fps": None}, "readable"), ({"features": {}}, "observation.state"),
    ({"data_path": "elsewhere/{episode_index}.parquet"}, "elsewhere"), ({"video_path": "none"}, "none"),
])
def test_what_cannot_be_read_is_said(tmp_path, transforms, change, said):
    data = write_v2(tmp_path / "data", **change)
    with pytest.raises(ConfigError, match=said):
        lerobot_samples(data, transforms, 2, seed=0)


def test_damage_is_said(tmp_path, transforms):
    with pytest.raises(ConfigError, match="info.json"):
        LeRobotDataset(tmp_path)
    data = write_v2(tmp_path / "data")
    video = next(data.glob("videos/*/*/episode_000000.mp4"))
    write_video(video, [0, 1])  # shorter than the table
    with pytest.raises(ConfigError, match="the end before it"):
        lerobot_samples(data, transforms, 12, seed=0)
    video.write_bytes(b"not a video")
    with pytest.raises(ConfigError, match="episode_000000.mp4"):
        lerobot_samples(data, transforms, 12, seed=0)
    write_video(video, range(7))
    table = next(data.glob("data/*/episode_000001.parquet"))
    write_table(table, rows(1)[:-1])
    with pytest.raises(ConfigError, match="5 rows of episode 1"):
        lerobot_samples(data, transforms, 12, seed=0)
    (data / "meta" / "tasks.jsonl").write_text("")
    with pytest.raises(ConfigError, match="text of task 0"):
        lerobot_samples(data, transforms, 12, seed=0)


def test_a_camera_that_the_robot_needs_is_asked_for_by_its_key(tmp_path):
    robot = replace(ROBOT, cameras={"base_0_rgb": CameraSpec(key="cam_high")})
    with pytest.raises(ConfigError, match="'cam_high'"):
        lerobot_samples(write_v2(tmp_path / "data"), transforms_for(RecipeSource(CONFIG), robot), 2, seed=0)


def test_the_command_calibrates_with_it(tmp_path, capsys):
    data, robot = write_v2(tmp_path / "data"), tmp_path / "two.yaml"
    robot.write_text(json.dumps({  # which is YAML, too
        "action_meaning": "joint_position", "control_rate_hz": FPS, "state_dim": 2, "action_dim": 2,
        "cameras": {"base_0_rgb": {"key": "front"}},
        "joints": [{"name": name, "lower": -2, "upper": 2, "max_velocity": 1} for name in "ab"],
        "controllers": [{"topic": "trajectory", "joints": ["a", "b"]}]}))
    words = ["quantize", "--size", "tiny", "--device", "cpu", "--recipe", "fp8_mlp", "--by", "max", "--calibration",
             f"lerobot:{data}", "--samples", "2", "--output", str(tmp_path / "out")]
    assert main(words) == 2 and "the robot of the recording" in capsys.readouterr().err
    assert main([*words, "--robot", "arm6"]) == 2 and "7 numbers, as robot 'arm6' has" in capsys.readouterr().err
    assert main([*words, "--robot", str(robot)]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["calibration"]["observations"] == f"lerobot:{data}"
