"""What of the CUDA backend needs no GPU: buckets, the shape table, packed weights, modulations, refusals."""

import dataclasses

import pytest
import torch

from pi05_ros.backends import base
from pi05_ros.backends.cuda import checks, packing, shapes
from pi05_ros.backends.cuda.modulation import step_tables
from pi05_ros.config import GemmaConfig, Pi05Config, tiny_config
from pi05_ros.errors import BackendError
from pi05_ros.model import flow, weights
from pi05_ros.model.gemma import rms_normalise
from pi05_ros.model.recipe import RecipeSource

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source():
    return RecipeSource(tiny_config())


@pytest.fixture(scope="module")
def model(source):
    return weights.load(source)


@pytest.fixture(scope="module")
def packed(source):
    return packing.pack(source, CPU, ["vision", "prefix", "expert"])


@pytest.mark.parametrize(("cameras", "tokens", "rows"), [(3, 200, 968), (3, 161, 968), (2, 48, 560), (1, 1, 272),
                                                         (3, 49, 832)])
def test_a_prefix_is_rounded_up_to_the_next_bucket(cameras, tokens, rows):
    assert shapes.bucket_rows(Pi05Config(), cameras, tokens) == rows
    assert rows in shapes.all_buckets(Pi05Config())


@pytest.mark.parametrize(("cameras", "tokens"), [(4, 10), (0, 10), (3, 201)])
def test_a_shape_outside_the_buckets_is_refused(cameras, tokens):
    with pytest.raises(BackendError, match="prefix"):
        shapes.bucket_rows(Pi05Config(), cameras, tokens)


def test_the_shape_table_is_what_gets_allocated():
    config = tiny_config()
    buffers = shapes.allocate(config, CPU)
    assert {n: (tuple(t.shape), t.dtype) for n, t in buffers.tensors.items()} == shapes.shape_table(config)
    assert sum(t.nbytes for t in buffers.tensors.values()) == shapes.table_bytes(config)
    with pytest.raises(AttributeError):
        _ = buffers.no_such_buffer


def test_full_size_needs_less_than_eight_gigabytes():
    assert 7e9 < checks.bytes_needed(Pi05Config(), ["vision", "prefix", "expert"]) <= 8e9


class Float32Source(RecipeSource):
    """A checkpoint in float32, the largest there is."""

    def get(self, name, shape, device):
        return super().get(name, shape, device).float()


@pytest.mark.parametrize("stages", [["vision"], ["prefix"], ["expert"], ["vision", "prefix", "expert"], ["images"]])
def test_packed_weights_take_the_bytes_that_were_asked_for(stages):
    packed = packing.pack(Float32Source(tiny_config()), CPU, stages)
    counted = checks.weight_bytes(tiny_config(), stages)
    assert 0.99 * counted <= sum(t.nbytes for t in tensors(packed)) <= counted


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value) or isinstance(value, list):
        for part in vars(value).values() if dataclasses.is_dataclass(value) else value:
            yield from tensors(part)


@torch.no_grad()
def test_folded_and_merged_products_equal_the_models(model, packed):
    layer, ours = model.language_model.layers[0], packed.prefix.layers[0]
    x = torch.randn(5, 96)
    normed = layer.input_layernorm(x)[0]
    attention = layer.self_attn
    expected = torch.cat([p(normed) for p in (attention.q_proj, attention.k_proj, attention.v_proj)], dim=-1)
    torch.testing.assert_close(rms_normalise(x) @ ours.qkv.float().T, expected, atol=2e-2, rtol=2e-2)
    normed = layer.post_attention_layernorm(x)[0]
    expected = torch.cat([layer.mlp.gate_proj(normed), layer.mlp.up_proj(normed)], dim=-1)
    torch.testing.assert_close(rms_normalise(x) @ ours.gate_up.float().T, expected, atol=2e-2, rtol=2e-2)


@torch.no_grad()
def test_the_visions_norms_are_in_the_products_behind_them(model, packed):
    layer, ours = model.vision_tower.encoder.layers[0], packed.vision.layers[0]
    norm = torch.nn.LayerNorm(72, eps=layer.layer_norm2.eps)
    norm.weight.normal_(), norm.bias.normal_()
    folded = packing.affine(layer.mlp.fc1.weight, layer.mlp.fc1.bias, (norm.weight, norm.bias))
    x = torch.randn(5, 72) + 1
    mean, deviation = x.mean(1, keepdim=True), (x.var(1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    bias, of_mean = folded.table.T
    after = ((x * folded.scale) @ folded.weight.float().T - mean * of_mean) / deviation + bias
    torch.testing.assert_close(after, layer.mlp.fc1(norm(x)), atol=3e-2, rtol=3e-2)
    assert torch.equal(folded.weight, layer.mlp.fc1.weight.bfloat16())  # a scale in it would round it
    assert torch.equal(ours.out.table[:, 1], layer.layer_norm2.weight.float())
    assert torch.equal(ours.fc2.table[:, 1], model.vision_tower.encoder.layers[1].layer_norm1.weight.float())
    assert ours.fc2.weight.shape == (72, 152) and ours.fc2.weight.stride() == (192, 1)  # whole cache lines


def test_the_last_prefix_layer_keeps_keys_and_values_only(packed):
    last = packed.prefix.layers[-1]
    assert last.qkv.shape == (64, 96) and last.out is None and last.gate_up is None and last.down is None


def test_only_the_stages_asked_for_are_packed(source):
    packed = packing.pack(source, CPU, ["vision", "images"])
    assert packed.vision is not None and packed.prefix is None and packed.expert is None


def test_packing_reports_its_progress_to_the_end(source):
    seen = []
    packing.pack(source, CPU, ["vision", "prefix", "expert"], lambda done, total: seen.append((done, total)))
    # what the last prefix layer does not need is not read
    assert seen[-1][0] <= seen[-1][1] and seen == sorted(seen)


@torch.no_grad()
@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_modulated_products_equal_the_models(model, packed, num_steps):
    tables = step_tables(packed.expert, num_steps)
    x = torch.randn(1, 4, 64)
    for step, t in enumerate(flow.time_grid(num_steps)):
        _, cond, _ = model.embed_suffix(torch.zeros(1, 4, 32), torch.tensor(t), None)
        for i, layer in enumerate(model.action_expert.layers):
            y, gate = layer.input_layernorm(x, cond)
            expected = torch.cat([p(y) for p in (layer.self_attn.q_proj, layer.self_attn.k_proj,
                                                 layer.self_attn.v_proj)], dim=-1)
            ours = (rms_normalise(x) * tables.scales[step, 2 * i]) @ packed.expert.layers[i].qkv.float().T
            torch.testing.assert_close(ours + tables.qkv_bias[step, i], expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(tables.gates[step, 2 * i], gate[0, 0], atol=1e-5, rtol=1e-5)
        y, _ = model.action_expert.norm(x, cond)
        ours = (rms_normalise(x) * tables.scales[step, -1]) @ packed.expert.action_out.T + tables.out_bias[step]
        torch.testing.assert_close(ours, model.action_out_proj(y), atol=1e-4, rtol=1e-4)


def test_refuses_a_device_without_cuda_and_other_models():
    with pytest.raises(BackendError, match="a CUDA device"):
        checks.check_request(tiny_config(), ["vision"], CPU, "bfloat16")
    with pytest.raises(BackendError, match="a pi0.5 model"):
        checks.check_model(tiny_config(kind="pi0"), ["expert"])
    heads = GemmaConfig(width=96, mlp_dim=192, depth=3, head_dim=32, num_kv_heads=2, vocab_size=512)
    with pytest.raises(BackendError, match="1 key and value head"):
        checks.check_model(tiny_config(prefix=heads, expert=GemmaConfig(width=64, mlp_dim=128, depth=3, head_dim=32,
                                                                        num_kv_heads=2)), ["prefix"])


def test_cuda_is_a_backend_of_every_stage():
    assert base.parse_choice("prefix=cuda,expert=cuda") == {"images": "eager", "vision": "eager", "prefix": "cuda",
                                                            "expert": "cuda"}


@pytest.mark.parametrize(("rows", "tile"), [(968, 248), (560, 192), (272, 136), (256, 256), (257, 136), (1, 8)])
def test_tiles_of_the_gated_product_cover_the_rows_and_waste_little(rows, tile):
    tiles = -(-rows // tile)
    assert shapes.row_tile(rows) == tile and tile % 8 == 0 and tile <= 256 and tiles * tile - rows < 8 * tiles


def test_tiles_of_both_heights_hold_every_number_of_rows_with_at_most_7_too_many():
    for rows in range(1, 2000):
        tile = shapes.row_tile(rows)
        tiles, fewer = -(-rows // tile), shapes.fewer_rows(tile)
        held = [wide * tile + (tiles - wide) * fewer for wide in range(tiles + 1)]
        assert any(0 <= together - rows < 8 for together in held), rows


@pytest.mark.parametrize("rows", [768, 512, 256, 40])
@pytest.mark.parametrize(("features", "inner", "residual"), [(3456, 1152, False), (4304, 1152, False),
                                                             (2048, 1152, False), (1152, 1152, True),
                                                             (1152, 4304, True)])
def test_the_visions_products_run_in_one_wave_and_their_sums_have_room(rows, features, inner, residual):
    from pi05_ros.backends.cuda.kernels.vision_product import ROWS, tiling

    t = tiling(rows, features, inner, residual, processors=132)
    tiles = -(-features // t.columns)
    assert t.columns % (8 * t.split) == 0 and t.columns <= 256 and tiles * t.split <= shapes.NORM_PARTS
    assert -(-rows // (ROWS * t.sharing)) * t.sharing * tiles * t.split <= 132


def test_a_tensor_map_refuses_what_the_copy_engine_cannot_read():
    from pi05_ros.backends.cuda.tma import TensorMap

    for tensor, box in ((torch.zeros(8, 64), (8, 64)), (torch.zeros(64, 8, dtype=torch.bfloat16).T, (8, 64)),
                        (torch.zeros(8, 96, dtype=torch.bfloat16), (8, 96))):
        with pytest.raises(BackendError, match="tensor map"):
            TensorMap(tensor, box)
