// The prefix's gate|up product with the gated linear unit as its epilogue, for Hopper:
// out [rows, F] = gelu_tanh(f x gate^T) * (f x up^T), x [rows, K], weight [2F, K] = gate over up, all bfloat16; f is a
// factor a row in float32 (the norm of x), of which there are as many as the tiles have rows: given, or computed here by a
// warp of each block while the first tiles are under way (shared_rows.cuh).
//
// Weights are the left operand and rows of x the right one, because wgmma's right side may be any multiple of 8: tiles of
// 64 features (128 weight rows) and ROWS rows waste little at any length. The weights' tensor map puts 8 rows of gate and
// the same 8 of up in turn, so that one thread holds gate and up of the same element. One warpgroup only loads (TMA into
// a ring of STAGES), two multiply 64 weight rows each. Blocks come in pairs (a cluster) that share the rows of x, each
// loading half of them for both. Persistent: a pair walks over the tiles, rows fastest, so that the weights come from
// memory once. The second warpgroup starts LAG steps behind, so that epilogues run under the other's products.
// Defines: F (a multiple of 128), K (of 64), ROWS (of 8, at most 256), STAGES, SHARED_BYTES, and for the assembly of
// wgmma: LAST = ROWS / 8 - 1 (its lists), LEFT = ROWS / 2, RIGHT and KEEP the next two (the operands behind them).
// Launch: 384 threads, clusters of 2.
#include "shared_rows.cuh"
#include "wgmma.cuh"

constexpr int LAG = 1, STEP = 64, FEATURES = 64, HALF = (ROWS + 15) / 16 * 8;  // HALF: rows of x a block loads
constexpr u32 W_BYTES = 128 * 128, X_BYTES = 2 * HALF * 128, STAGE_BYTES = W_BYTES + X_BYTES;
constexpr u32 OUT = STAGES * STAGE_BYTES, OUT_BYTES = ROWS * 64, BARRIERS = OUT + 2 * OUT_BYTES, NORMED = BARRIERS + 16 * STAGES;
static_assert(SHARED_BYTES == NORMED + 16, "shared memory");
constexpr int STEPS = K / STEP, PAIRS = F / FEATURES / 2;

#define QUOTE(x) #x
#define QUOTED(x) QUOTE(x)
#define NUMBER(x) "%" QUOTED(x)
#define JOINT(a, b) a##b
#define JOIN(a, b) JOINT(a, b)

// d [64, ROWS] (+)= a [64, 16] b [ROWS, 16]^T; both K-major in shared memory.
DEVICE void wgmma(float (&d)[ROWS / 2], u64 a, u64 b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " NUMBER(KEEP) ", 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n" QUOTED(ROWS) "k16.f32.bf16.bf16 {" JOIN(REGISTERS_, LAST) "}, "
                 NUMBER(LEFT) ", " NUMBER(RIGHT) ", p, 1, 1, 0, 0;\n}" : JOIN(SUMS_, LAST)(d) : "l"(a), "l"(b), "r"(accumulate));
}

DEVICE void load_tiles(const TensorMap *x, const TensorMap *weight, u32 shared, int row_tiles, int rank) {
    u32 full = shared + BARRIERS, empty = full + 8 * STAGES;
    int stage = 0, phase = 1;  // a fresh ring is empty
    for (int tile = blockIdx.x / 2; tile < row_tiles * PAIRS; tile += gridDim.x / 2) {
        int row = tile % row_tiles * ROWS, feature = (tile / row_tiles * 2 + rank) * FEATURES;
        for (int step = 0; step < STEPS; ++step) {
            u32 to = shared + stage * STAGE_BYTES, there = full + 8 * stage;
            barrier_wait(empty + 8 * stage, phase);
            barrier_expect(there, STAGE_BYTES);
            tma_load(to, weight, there, step * STEP, 0, 0, feature / 8);
            tma_load_multicast(to + W_BYTES + rank * (X_BYTES / 2), x, there, step * STEP, row + rank * HALF, 3);
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
    }
    for (int i = 0; i < STAGES; ++i) {  // stay until the other block has read the last of what we sent it
        barrier_wait(empty + 8 * stage, phase);
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
}

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

DEVICE void multiply(const TensorMap *out, const float *factors, u32 shared, int row_tiles, int rank, int group) {
    u32 full = shared + BARRIERS, empty = full + 8 * STAGES, staging = shared + OUT + group * OUT_BYTES;
    int thread = threadIdx.x & 127, stage = 0, phase = 0;
    // A lane's 16 bytes, 8 features of its row in a block of 8, in the 64-byte swizzle
    u32 to = staging + thread % 8 * 64 + ((thread / 32 ^ thread % 8 / 2) << 4);
    float d[ROWS / 2];
    if (group == 1) barrier_sync(1, 256);  // the first warpgroup goes ahead
    bool first = true;
    for (int tile = blockIdx.x / 2; tile < row_tiles * PAIRS; tile += gridDim.x / 2) {
        int last = stage;
        for (int step = 0; step < STEPS; ++step) {
            barrier_wait(full + 8 * stage, phase);
            u64 a = tile_k_major(shared + stage * STAGE_BYTES + group * (W_BYTES / 2));
            u64 b = tile_k_major(shared + stage * STAGE_BYTES + W_BYTES);
            pin(d);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < STEP / 16; ++k) wgmma(d, a + 2 * k, b + 2 * k, step + k > 0);
            wgmma_commit();
            pin(d);
            if (step > 0) {
                wgmma_wait<1>();  // the step before this one is done: its stage is free, in both blocks
                if (thread < 2) barrier_arrive_at(empty + 8 * last, thread);
            }
            last = stage;
            if (++stage == STAGES) stage = 0, phase ^= 1;
            if (first && group == 0 && step == LAG) barrier_sync(1, 256);
        }
        first = false;
        wgmma_wait<0>();
        if (thread < 2) barrier_arrive_at(empty + 8 * last, thread);
        pin(d);
        if (thread == 0) tma_store_wait_read();  // the staging tile has been sent
        const float2 *factor = (const float2 *)(factors + tile % row_tiles * ROWS) + thread % 4;
        barrier_wait(shared + NORMED, 0);
        barrier_sync(2 + group, 128);
        asm volatile("" : "+l"(factor)::"memory");
#pragma unroll
        for (int i = 0; i < ROWS / 8; ++i) {
            float2 f = load_factors(factor + 4 * i);
            stmatrix_transposed(to + i * 512, gated(d[4 * i] * f.x, d[4 * i + 1] * f.y, d[4 * i + 2] * f.x, d[4 * i + 3] * f.y));
        }
        fence_async_proxy();
        barrier_sync(2 + group, 128);
        if (thread == 0) {
            int feature = (tile / row_tiles * 2 + rank) * FEATURES + group * 32;
            tma_store(staging, out, feature, tile % row_tiles * ROWS);
            tma_store_commit();
        }
    }
    if (thread == 0) tma_store_wait();
}

extern "C" __global__ void __launch_bounds__(384, 1)
gate_up(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
        const __grid_constant__ TensorMap out, const bf16 *to_norm, float *factors, int *counters, int norm, int rows) {
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 shared = shared_address(memory);
    int rank = cluster_rank(), group = warpgroup(), row_tiles = (rows + ROWS - 1) / ROWS;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(shared + BARRIERS + 8 * i, 1);
            barrier_init(shared + BARRIERS + 8 * (STAGES + i), 4);  // two warpgroups of two blocks
        }
        barrier_init(shared + NORMED, 1);
        barrier_init_done();
        prefetch_map(&x);
        prefetch_map(&weight);
        prefetch_map(&out);
    }
    cluster_sync();
    if (group == 0) {
        set_registers_down<40>();
        if (threadIdx.x == 0) load_tiles(&x, &weight, shared, row_tiles, rank);
        if (threadIdx.x / 32 == 1) {
            if (norm) norm_shared_rows<K>(to_norm, factors, counters, rows);
            if (threadIdx.x == 32) barrier_arrive(shared + NORMED);
        }
    } else {
        set_registers_up<232>();
        multiply(&out, factors, shared, row_tiles, rank, group - 1);
    }
}
