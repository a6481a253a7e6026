"""Start the policy node and bring it to `active`.

    ros2 launch pi05_ros policy.launch.py robot:=aloha checkpoint:=/path/to/checkpoint device:=cuda dtype:=bfloat16
    ros2 launch pi05_ros policy.launch.py sim:=true prompt:="touch the red block"

Topics are the node's private names; connect a robot by remapping with the *_topic arguments.
"""

from pathlib import Path

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, ExecuteProcess, OpaqueFunction, RegisterEventHandler
from launch.events import matches_action
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode, Node
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from lifecycle_msgs.msg import Transition

PARAMS_FILE = str(Path(__file__).resolve().parents[1] / "config" / "policy.yaml")

# name: (default, description, allowed values or None). Those of PARAMETERS override the parameter file when given.
PARAMETERS = {
    "robot": ("", "Robot: a name from config/robots or the path of a YAML file.", None),
    "checkpoint": ("", "Checkpoint directory (openpi or lerobot, safetensors), or `tabletop`, which comes with the "
                   "package. Empty: that one with sim, else the embedded tiny model.", None),
    "tokenizer": ("", "SentencePiece model. Empty: the one in the checkpoint's directory.", None),
    "backend": ("", "Backend, eager or cuda, or one a stage: vision=cuda,expert=eager.", None),
    "device": ("", "auto, cpu, cuda or cuda:<number>.", None),
    "dtype": ("", "Precision of the weights: float32 or bfloat16.", ("", "float32", "bfloat16")),
    "denoising_steps": ("", "Flow-matching steps of a chunk, 1 to 50; changes live with `ros2 param set`.", None),
    "prompt": ("", "Instruction; ~/prompt changes it live.", None),
}
TOPICS = {
    "base_image_topic": "~/base_image",
    "left_wrist_image_topic": "~/left_wrist_image",
    "right_wrist_image_topic": "~/right_wrist_image",
    "joint_states_topic": "~/joint_states",
    "trajectory_topic": "~/trajectory",
}
OTHERS = {
    "namespace": ("", "Namespace of the node.", None),
    "params_file": (PARAMS_FILE, "Parameter file; the arguments above override it.", None),
    "sim": ("false", "Start the simulated tabletop too; its robot and its clock are then the policy's.",
            ("true", "false")),
    "sim_seed": ("0", "With sim: its first episode; the service /tabletop/reset begins the next.", None),
    "sim_speed": ("1.0", "With sim: simulated seconds in a second; 0: as fast as it goes.", None),
    "sim_lockstep": ("false", "With sim: its time stands still until the policy answers a set of images.",
                     ("true", "false")),
    "autostart": ("true", "Configure and activate at once.", ("true", "false")),
    "use_sim_time": ("false", "Take the time from /clock.", ("true", "false")),
    "use_respawn": ("false", "Start the node again if it dies (it comes back unconfigured).", ("true", "false")),
    "record": ("false", "Record the run with `pi05 record`, into a bag in the working directory.", ("true", "false")),
    "bag": ("", "With record: the directory to make. Empty: a name with the date.", None),
    "log_level": ("info", "Log level of the node.", ("debug", "info", "warn", "error", "fatal")),
}


def generate_launch_description() -> LaunchDescription:
    topics = {name: ("", f"Topic to use instead of {private}.", None) for name, private in TOPICS.items()}
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=text, choices=choices)
        for name, (default, text, choices) in {**PARAMETERS, **topics, **OTHERS}.items()
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=start)])


def start(context) -> list:
    def given(name: str) -> str:
        return LaunchConfiguration(name).perform(context)

    overrides = {name: given(name) for name in PARAMETERS if given(name)}
    if "denoising_steps" in overrides:
        overrides["denoising_steps"] = whole_number("denoising_steps", overrides["denoising_steps"], 1, 50)
    sim = given("sim") == "true"
    if sim:
        overrides = {"robot": "tabletop", "checkpoint": "tabletop", **overrides}
    node = LifecycleNode(
        package="pi05_ros",
        executable="policy_node",
        name="pi05_policy",
        namespace=given("namespace"),
        parameters=[given("params_file"), {"use_sim_time": sim or given("use_sim_time") == "true"}, overrides],
        remappings=[(private, given(name)) for name, private in TOPICS.items() if given(name)],
        arguments=["--ros-args", "--log-level", given("log_level")],
        respawn=given("use_respawn") == "true",
        output="screen",
        emulate_tty=True,
    )
    first = [recording(given)] if given("record") == "true" else []
    first += [simulated(given)] if sim else []
    if given("autostart") != "true":
        return [*first, node]
    activate = RegisterEventHandler(OnStateTransition(
        target_lifecycle_node=node, start_state="configuring", goal_state="inactive",
        entities=[change(node, Transition.TRANSITION_ACTIVATE)]))
    return [*first, node, activate, change(node, Transition.TRANSITION_CONFIGURE)]


def policy_name(given) -> str:
    name = f"{given('namespace').rstrip('/')}/pi05_policy"
    return name if name.startswith("/") else f"/{name}"


def simulated(given) -> Node:
    """On the node's own topics, whatever they are remapped to."""
    name = policy_name(given)
    return Node(package="pi05_ros", executable="sim_robot", name="tabletop", output="screen",
                parameters=[{"policy": name, "seed": whole_number("sim_seed", given("sim_seed"), 0, 2**31 - 1),
                             "speed": float(given("sim_speed")), "lockstep": given("sim_lockstep") == "true",
                             "image_rate_hz": 2.0 if given("sim_lockstep") == "true" else 10.0}],
                remappings=[(f"{name}/{private[2:]}", given(topic)) for topic, private in TOPICS.items()
                            if given(topic)])


def recording(given) -> ExecuteProcess:
    """It finds the node's topics, also remapped ones, by asking ROS."""
    return ExecuteProcess(cmd=["ros2", "run", "pi05_ros", "pi05", "record", *filter(None, [given("bag")]), "--node",
                               policy_name(given)], output="screen", sigterm_timeout="30")


def change(node: LifecycleNode, transition: int) -> EmitEvent:
    return EmitEvent(event=ChangeState(lifecycle_node_matcher=matches_action(node), transition_id=transition))


def whole_number(name: str, text: str, low: int, high: int) -> int:
    if not text.isdigit() or not low <= int(text) <= high:
        raise ValueError(f"launch argument {name}: expected a whole number from {low} to {high}, received '{text}'")
    return int(text)
