"""The sizes of the three stacks and the kind of model, derived from tensor names and shapes (PI05_SPEC 1 and 11)."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

from pi05_ros.config import GemmaConfig, Pi05Config, SiglipConfig
from pi05_ros.errors import CheckpointError, ConfigError
from pi05_ros.model.checkpoint_config import Kind
from pi05_ros.model.json_fields import JsonFields
from pi05_ros.model.stored_tensors import StoredTensor, layer_indices
from pi05_ros.model.weights import EMBEDDING, OPENPI, PREFIXES
from pi05_ros.schema import ACTION_DIM

VISION, PREFIX, EXPERT = (PREFIXES[name] for name in ("vision_tower.", "language_model.", "action_expert."))
PUBLISHED = Pi05Config()
TINY_VISION_HEADS = 4
Tensors = Mapping[str, StoredTensor]


def model_kind(tensors: Tensors) -> Kind:
    """pi0.5 has a time MLP and adaRMS norms in the expert, pi0 a state projection."""
    if not any(name.startswith(OPENPI) for name in tensors):
        raise CheckpointError("tensor names", expected=f"names that begin with {OPENPI}",
                              received=f"{len(tensors)} tensors such as '{min(tensors, default='')}'",
                              way_out="This is no pi0.5 or pi0 checkpoint of openpi or lerobot.")
    pi05 = any(name.startswith("time_mlp_in.") or ".dense." in name for name in tensors)
    return "pi05" if pi05 else "pi0"


def model_sizes(tensors: Tensors, kind: Kind, config: JsonFields) -> Pi05Config:
    """Sizes of the model in the file; horizon, prompt length and the like are left at their defaults.

    Args:
        tensors: by openpi's names.
        config: config.json, for what shapes cannot tell (`vision_num_heads`) or cannot prove (`depth`).

    Raises:
        CheckpointError: a tensor that fixes a size is missing or mis-shaped, or the sizes contradict each other.
    """
    vocab_size, _ = _shape(tensors, EMBEDDING, 2)
    _, action_dim = _shape(tensors, "action_in_proj.weight", 2)
    if action_dim != ACTION_DIM:
        raise CheckpointError("tensor 'action_in_proj.weight'", expected=f"{ACTION_DIM} columns (action_dim)",
                              received=str(action_dim), way_out="Every pi0 and pi0.5 model has 32; train it with 32.")
    vision = _vision(tensors, config)
    prefix = _gemma(tensors, config, PREFIX, PUBLISHED.prefix, vocab_size)
    expert = _gemma(tensors, config, EXPERT, PUBLISHED.expert, 0)
    try:
        return Pi05Config(vision, prefix, expert, kind, action_dim=action_dim)
    except ConfigError as error:  # here the file is wrong, not the user
        raise CheckpointError(error.subject, expected=error.expected, received=error.received,
                              way_out="The file is incomplete or of another model.") from error


def _vision(tensors: Tensors, config: JsonFields) -> SiglipConfig:
    width, _, patch, _ = _shape(tensors, VISION + "embeddings.patch_embedding.weight", 4)
    patches, _ = _shape(tensors, VISION + "embeddings.position_embedding.weight", 2)
    mlp_dim, _ = _shape(tensors, VISION + "encoder.layers.0.mlp.fc1.weight", 2)
    published = PUBLISHED.vision.depth if width == PUBLISHED.vision.width else None
    depth = _depth(tensors, VISION + "encoder.", config.integer("vision_depth", 1, 1000) or published)
    return SiglipConfig(width, depth, mlp_dim, _vision_heads(width, config), patch, isqrt(patches) * patch)


def _vision_heads(width: int, config: JsonFields) -> int:
    """No shape depends on the number of heads, so it must be known."""
    given = config.integer("vision_num_heads", 1, 1000)
    known = PUBLISHED.vision.num_heads if width == PUBLISHED.vision.width else None
    if known is None and (config.text("paligemma_variant") or "").startswith("tiny"):
        known = TINY_VISION_HEADS
    if given and known and given != known:
        raise config.error("vision_num_heads", f"{known} for a vision width of {width}")
    heads = given or known
    if heads is None:
        raise config.error("vision_num_heads", f"the number of attention heads of a vision tower of width {width}",
                           "nothing", "Add the key to config.json; the shapes of the tensors do not tell it.")
    return heads


def _gemma(tensors: Tensors, config: JsonFields, stack: str, published: GemmaConfig, vocab_size: int) -> GemmaConfig:
    """One KV head, as every published model has, so the rows of k_proj are the head_dim."""
    mlp_dim, width = _shape(tensors, stack + "layers.0.mlp.gate_proj.weight", 2)
    head_dim, _ = _shape(tensors, stack + "layers.0.self_attn.k_proj.weight", 2)
    query_rows, _ = _shape(tensors, stack + "layers.0.self_attn.q_proj.weight", 2)
    known = published.depth if width == published.width else None
    depth = _depth(tensors, stack, config.integer("depth", 1, 1000) or known)
    return GemmaConfig(width, mlp_dim, depth, query_rows // head_dim, 1, head_dim, vocab_size)


def _depth(tensors: Tensors, stack: str, expected: int | None) -> int:
    """Number of layers. Where it is known, a file that lost its last layers does not pass for a smaller model."""
    found = layer_indices(tensors, stack)
    depth = expected or len(found)
    if found != set(range(depth)):
        wrong = min(found ^ set(range(depth)))
        raise CheckpointError(f"tensors '{stack}layers.{wrong}'", expected=f"layers 0 to {depth - 1}",
                              received=f"{len(found)} layers, {'without' if wrong < depth else 'with'} layer {wrong}",
                              way_out="The file is incomplete, or config.json is of another model; download both.")
    return depth


def _shape(tensors: Tensors, name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that fixes sizes: there, of that rank, nothing empty."""
    if name not in tensors:
        raise CheckpointError(f"tensor '{name}'", expected="in the file", received="no such key",
                              way_out="The file is incomplete or of another model; convert or download it again.")
    shape = tensors[name].shape
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(f"tensor '{name}'", expected=f"{rank} axes, none empty", received=f"shape {list(shape)}",
                              way_out="The file is damaged or of another model.")
    return shape
