// gate_up.cu in FP8: out [rows, F] = gelu_tanh(g) * u / factors[2], g = x gate^T factors[0], u = x up^T factors[1];
// x [rows, K], weight [2F, K] = gate over up, out: all e4m3, out saturated.
//
// All as there, with 128 e4m3 where there were 64 bfloat16. The tensor cores add FP8 products to about 14 bits. Over K of
// 2048 that adds less than a tenth to the error of rounding the result (test_fp8_gpu.py), while adding their sums to float32
// ones every 256 took 23 us more a layer of 968 rows and allowed tiles of 200 rows at most (H200). Two lanes exchange what
// they have of one row, since two features make the 16 bits that shared memory is written in. Tiles, pairs of blocks and
// what is to be defined: gate_up_tiles.cuh, with K a multiple of 128.
#include "wgmma.cuh"

#define KIND "k32.f32.e4m3.e4m3 {"
#define ORDERS ", p, 1, 1;\n}"
constexpr int STEP = 128;
constexpr u32 OUT_BYTES = ROWS * 32;
#include "gate_up_tiles.cuh"

static_assert(SHARED_BYTES == BARRIERS + 16 * STAGES, "shared memory");

// gelu_tanh(g) * u * scale = g u scale / (1 + 2^-t) for two, with one reciprocal; as a pair of e4m3, saturated.
DEVICE u32 gated(float g0, float g1, float u0, float u1, float scale) {
    // t = 2 log2(e) sqrt(2/pi) (g + 0.044715 g^3); bounded, so that the product of both stays finite
    float e0 = 1.0f + exp2_fast(fminf(-g0 * (2.302208198f + 0.1029432397f * g0 * g0), 60.0f));
    float e1 = 1.0f + exp2_fast(fminf(-g1 * (2.302208198f + 0.1029432397f * g1 * g1), 60.0f));
    float r = reciprocal(e0 * e1) * scale;
    unsigned short both;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(g1 * u1 * (r * e0)), "f"(g0 * u0 * (r * e1)));
    return both;
}

DEVICE void multiply(const TensorMap *out, const TensorMap *fewer, const float *factors, u32 shared, Tiles tiles, int rank,
                     int group) {
    u32 staging = shared + OUT + group * OUT_BYTES;
    int thread = threadIdx.x & 127, lane = thread & 31, odd = lane / 4 & 1;
    // A lane holds feature lane / 4 of rows 2c and 2c + 1 of 8, c = lane % 4; with its partner's, it stores two features
    // of one of them. Rows are 32 bytes, in the 32-byte swizzle: of rows 4 to 7 of 8 the halves change places.
    int row_of = lane % 4 * 2 + odd;
    u32 to = staging + row_of * 32 + ((thread / 32 * 8 + (lane / 4 & 6)) ^ (row_of / 4 << 4));
    float gate = factors[0], up = factors[1], over = 1.0f / factors[2];
    float d[ROWS / 2];
    Place at{0, 0, group == 0};
    if (group == 1) barrier_sync(1, 256);  // the first warpgroup goes ahead
    for (int tile = blockIdx.x / 2; tile < tiles.count * PAIRS; tile += gridDim.x / 2) {
        auto [row, feature, wide] = tiles.at(tile, rank);
        if (wide) products<true>(d, shared, group, at);
        else products<false>(d, shared, group, at);
        if (thread == 0) tma_store_wait_read();  // the staging tile has been sent
        barrier_sync(2 + group, 128);
#pragma unroll
        for (int i = 0; i < ROWS / 8; ++i) {
            if (i == FEWER / 8 && !wide) break;
            u32 mine = gated(d[4 * i] * gate, d[4 * i + 1] * gate, d[4 * i + 2] * up, d[4 * i + 3] * up, over);
            u32 partner = __shfl_xor_sync(~0u, mine, 4);
            store_shared(to + i * 256, (unsigned short)__byte_perm(mine, partner, odd ? 0x15 : 0x40));
        }
        fence_async_proxy();
        barrier_sync(2 + group, 128);
        if (thread == 0) {
            tma_store(staging, wide ? out : fewer, feature + group * 32, row);
            tma_store_commit();
        }
    }
    if (thread == 0) tma_store_wait();
}

extern "C" __global__ void __launch_bounds__(384, 1)
gate_up_fp8(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
            const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap fewer, const float *factors, int rows) {
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 shared = shared_address(memory);
    int rank = cluster_rank(), group = warpgroup();
    Tiles tiles(rows);
    begin(&x, &weight, &out, shared);
    if (group == 0) {
        set_registers_down<40>();
        if (threadIdx.x == 0) load_tiles(&x, &weight, shared, tiles, rank);
    } else {
        set_registers_up<232>();
        multiply(&out, &fewer, factors, shared, tiles, rank, group - 1);
    }
}
