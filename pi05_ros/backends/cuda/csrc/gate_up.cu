// The prefix's gate|up product with the gated linear unit as its epilogue, for Hopper:
// out [rows, F] = gelu_tanh(f x gate^T) * (f x up^T), x [rows, K], weight [2F, K] = gate over up, all bfloat16; f is a
// factor a row in float32 (the norm of x), of which there are as many as the tiles have rows: given, or computed here by a
// warp of each block while the first tiles are under way (shared_rows.cuh).
// Tiles, pairs of blocks and what is to be defined: gate_up_tiles.cuh, with K a multiple of 64.
#include "shared_rows.cuh"
#include "wgmma.cuh"

#define KIND "k16.f32.bf16.bf16 {"
#define ORDERS ", p, 1, 1, 0, 0;\n}"
constexpr int STEP = 64;
constexpr u32 OUT_BYTES = ROWS * 64;
#include "gate_up_tiles.cuh"

constexpr u32 NORMED = BARRIERS + 16 * STAGES;
static_assert(SHARED_BYTES == NORMED + 16, "shared memory");

// Two factors; not before what `from` was said to wait for, but with others under way.
DEVICE float2 load_factors(const float2 *from) {
    float2 f;
    asm("ld.global.v2.f32 {%0, %1}, [%2];" : "=f"(f.x), "=f"(f.y) : "l"(from));
    return f;
}

// gelu_tanh(g) * u = g u / (1 + 2^-t) for two, with one reciprocal; as a pair of bfloat16.
DEVICE u32 gated(float g0, float g1, float u0, float u1) {
    // t = 2 log2(e) sqrt(2/pi) (g + 0.044715 g^3); bounded, so that the product of both stays finite
    float e0 = 1.0f + exp2_fast(fminf(-g0 * (2.302208198f + 0.1029432397f * g0 * g0), 60.0f));
    float e1 = 1.0f + exp2_fast(fminf(-g1 * (2.302208198f + 0.1029432397f * g1 * g1), 60.0f));
    float r = reciprocal(e0 * e1);
    return pack(g0 * u0 * (r * e1), g1 * u1 * (r * e0));
}

DEVICE void multiply(const TensorMap *out, const TensorMap *fewer, const float *factors, u32 shared, Tiles tiles, int rank,
                     int group) {
    u32 staging = shared + OUT + group * OUT_BYTES;
    int thread = threadIdx.x & 127;
    // A lane's 16 bytes, 8 features of its row in a block of 8, in the 64-byte swizzle
    u32 to = staging + thread % 8 * 64 + ((thread / 32 ^ thread % 8 / 2) << 4);
    float d[ROWS / 2];
    Place at{0, 0, group == 0};
    if (group == 1) barrier_sync(1, 256);  // the first warpgroup goes ahead
    for (int tile = blockIdx.x / 2; tile < tiles.count * PAIRS; tile += gridDim.x / 2) {
        auto [row, feature, wide] = tiles.at(tile, rank);
        if (wide) products<true>(d, shared, group, at);
        else products<false>(d, shared, group, at);
        if (thread == 0) tma_store_wait_read();  // the staging tile has been sent
        const float2 *factor = (const float2 *)(factors + row) + thread % 4;
        barrier_wait(shared + NORMED, 0);
        barrier_sync(2 + group, 128);
        asm volatile("" : "+l"(factor)::"memory");
#pragma unroll
        for (int i = 0; i < ROWS / 8; ++i) {
            if (i == FEWER / 8 && !wide) break;
            float2 f = load_factors(factor + 4 * i);
            stmatrix_transposed(to + i * 512, gated(d[4 * i] * f.x, d[4 * i + 1] * f.y, d[4 * i + 2] * f.x, d[4 * i + 3] * f.y));
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
gate_up(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
        const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap fewer, const bf16 *to_norm, float *factors,
        int *counters, int norm, int rows) {
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 shared = shared_address(memory);
    int rank = cluster_rank(), group = warpgroup();
    Tiles tiles(rows);
    if (threadIdx.x == 0) barrier_init(shared + NORMED, 1);
    begin(&x, &weight, &out, shared);
    wait_for_grid();
    let_next_grid();
    if (group == 0) {
        set_registers_down<40>();
        if (threadIdx.x == 0) load_tiles(&x, &weight, shared, tiles, rank);
        if (threadIdx.x / 32 == 1) {
            if (norm) norm_shared_rows<K>(to_norm, factors, counters, rows);
            if (threadIdx.x == 32) barrier_arrive(shared + NORMED);
        }
    } else {
        set_registers_up<232>();
        multiply(&out, &fewer, factors, shared, tiles, rank, group - 1);
    }
}
