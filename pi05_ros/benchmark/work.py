"""What a stage cannot avoid: its matrix products by shape, the bytes they must read, and the floor both set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import filter as matching

from pi05_ros.benchmark.ceiling import Ceiling
from pi05_ros.benchmark.inputs import CAMERA_FRAME, Shape
from pi05_ros.config import GemmaConfig, Pi05Config
from pi05_ros.model.quant_config import Quantisation


@dataclass(frozen=True)
class Work:
    """Floating-point operations, bytes of device memory, bytes that come from the host; flop_fp8: operations on FP8
    numbers, beside `flop`."""

    flop: float = 0.0
    bytes: float = 0.0
    upload: float = 0.0
    flop_fp8: float = 0.0

    def limits_ms(self, ceiling: Ceiling) -> dict[str, float]:
        """The time each resource alone would need."""
        upload_s = self.upload / ceiling.upload_bytes_per_s if ceiling.upload_bytes_per_s else 0.0
        compute_s = self.flop / ceiling.flop_per_s + self.flop_fp8 / (ceiling.fp8_flop_per_s or ceiling.flop_per_s)
        return {"compute": 1e3 * compute_s, "memory": 1e3 * self.bytes / ceiling.bytes_per_s,
                "upload": 1e3 * upload_s}

    def floor_ms(self, ceiling: Ceiling) -> float:
        return max(self.limits_ms(ceiling).values())

    def bound(self, ceiling: Ceiling) -> str:
        """The resource that sets the floor."""
        limits = self.limits_ms(ceiling)
        return max(limits, key=lambda name: limits[name])


@dataclass(frozen=True)
class Product:
    """[rows, inner] x [inner, columns], done `calls` times an inference; `work` is of one call.

    Attention is two products with one entry: rows are queries of all heads, inner is head_dim, columns are keys.
    """

    name: str
    rows: int
    inner: int
    columns: int
    calls: int
    work: Work

    @property
    def shape(self) -> str:
        return f"{self.rows} x {self.inner} x {self.columns}"


# Product -> a Linear of it, any layer; of a product all layers are in FP8, or it counts as in 16 bits.
LINEARS = {
    "vision": {"qkv": "vision_tower.*.q_proj", "out": "vision_tower.*.out_proj", "fc1": "vision_tower.*.fc1",
               "fc2": "vision_tower.*.fc2"},
    "prefix": {"qkv": "language_model.*.q_proj", "out": "language_model.*.o_proj",
               "gate|up": "language_model.*.gate_proj", "down": "language_model.*.down_proj",
               "last K, V": "language_model.*.v_proj"},
    "expert": {"qkv": "action_expert.*.q_proj", "out": "action_expert.*.o_proj",
               "gate|up": "action_expert.*.gate_proj", "down": "action_expert.*.down_proj"},
}


def fp8_products(config: Pi05Config, quantisation: Quantisation | None) -> set[tuple[str, str]]:
    """(stage, product) of those that the recipe has in FP8, whatever a backend makes of them."""
    names = [] if quantisation is None else [name for name, layer in quantisation.layers.items()
                                             if layer.precision.startswith("fp8")]
    depths = {"vision": config.vision.depth, "prefix": config.prefix.depth, "expert": config.expert.depth}
    return {(stage, product) for stage, products in LINEARS.items() for product, pattern in products.items()
            if len(matching(names, pattern)) == depths[stage]}


def stage_products(config: Pi05Config, shape: Shape, bytes_per_weight: int,
                   quantisation: Quantisation | None = None) -> dict[str, list[Product]]:
    """Every product of one observation; the last prefix layer stops after K and V. Weights are read once a call."""
    v, p, e = config.vision, config.prefix, config.expert
    rows, horizon = shape.cameras * v.num_patches, config.action_horizon
    prefix, passes = rows + shape.tokens, e.depth * shape.steps

    def dense(name: str, rows: int, inner: int, columns: int, calls: int) -> Product:
        work = Work(2.0 * rows * inner * columns, float(inner * columns * bytes_per_weight))
        return Product(name, rows, inner, columns, calls, work)

    def attention(queries: int, keys: int, heads: int, dim: int, calls: int, read: float = 0.0) -> Product:
        return Product("attention", queries * heads, dim, keys, calls, Work(4.0 * queries * heads * dim * keys, read))

    def gemma(c: GemmaConfig, rows: int, calls: int, keys: int, cache: float) -> list[Product]:
        width = c.num_heads * c.head_dim
        return [dense("qkv", rows, c.width, width + 2 * c.num_kv_heads * c.head_dim, calls),
                attention(rows, keys, c.num_heads, c.head_dim, calls, cache),
                dense("out", rows, width, c.width, calls),
                dense("gate|up", rows, c.width, 2 * c.mlp_dim, calls),
                dense("down", rows, c.mlp_dim, c.width, calls)]

    cache_bytes = 2.0 * prefix * e.num_kv_heads * e.head_dim * bytes_per_weight
    found = {
        "vision": [dense("patches", rows, 3 * v.patch_size**2, v.width, 1),
                   dense("qkv", rows, v.width, 3 * v.width, v.depth),
                   attention(rows, v.num_patches, v.num_heads, v.width // v.num_heads, v.depth),
                   dense("out", rows, v.width, v.width, v.depth),
                   dense("fc1", rows, v.width, v.mlp_dim, v.depth),
                   dense("fc2", rows, v.mlp_dim, v.width, v.depth),
                   dense("projector", rows, v.width, p.width, 1)],
        "prefix": [*gemma(p, prefix, p.depth - 1, prefix, 0.0),
                   dense("last K, V", prefix, p.width, 2 * p.num_kv_heads * p.head_dim, 1)],
        "expert": gemma(e, horizon, passes, prefix + horizon, cache_bytes),
    }
    low = fp8_products(config, quantisation)
    return {stage: [_in_fp8(p) if (stage, p.name) in low else p for p in products] for stage, products in found.items()}


def _in_fp8(product: Product) -> Product:
    work = Work(0.0, float(product.inner * product.columns), flop_fp8=product.work.flop)
    return replace(product, work=work)


def stage_work(config: Pi05Config, shape: Shape, bytes_per_weight: int,
               quantisation: Quantisation | None = None) -> dict[str, Work]:
    """Least work of each stage. `images`: camera frames come up from the host and become float32 images."""
    height, width = CAMERA_FRAME
    frames, out = shape.cameras * height * width * 3, shape.cameras * 3 * config.vision.image_size**2 * 4
    return {"images": Work(bytes=float(frames + out), upload=float(frames)),
            **{stage: _sum(products) for stage, products in
               stage_products(config, shape, bytes_per_weight, quantisation).items()}}


def _sum(products: Sequence[Product]) -> Work:
    return Work(sum(p.calls * p.work.flop for p in products), sum(p.calls * p.work.bytes for p in products),
                flop_fp8=sum(p.calls * p.work.flop_fp8 for p in products))
