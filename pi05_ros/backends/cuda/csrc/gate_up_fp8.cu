// gate_up.cu in FP8: out [rows, F] = gelu_tanh(g) * u / factors[2], g = x gate^T factors[0], u = x up^T factors[1];
// x [rows, K], weight [2F, K] = gate over up, out: all e4m3, out saturated.
//
// All as there, with 128 e4m3 where there were 64 bfloat16: tiles, ring, pairs of blocks, the lag. What differs:
// the tensor cores add FP8 products to about 14 bits, so every PROMOTE steps (of 128) their sums go into float32 ones,
// under the other warpgroup's products; 0: never, which leaves registers for tiles of more rows. And two lanes
// exchange what they have of one row, since two features make the 16 bits that shared memory is written in.
// Defines: as there, ROWS at most 200 with PROMOTE, K from 256 on, a multiple of 128 (and of 128 PROMOTE). Launch: 384 threads,
// clusters of 2.
#include "wgmma.cuh"

constexpr int LAG = 1, STEP = 128, FEATURES = 64, HALF = (ROWS + 15) / 16 * 8;  // HALF: rows of x a block loads
constexpr u32 W_BYTES = 128 * 128, X_BYTES = 2 * HALF * 128, STAGE_BYTES = W_BYTES + X_BYTES;
constexpr u32 OUT = STAGES * STAGE_BYTES, OUT_BYTES = ROWS * 32, BARRIERS = OUT + 2 * OUT_BYTES;
static_assert(SHARED_BYTES == BARRIERS + 16 * STAGES, "shared memory");
constexpr int STEPS = K / STEP, PAIRS = F / FEATURES / 2, EVERY = PROMOTE ? PROMOTE : STEPS, UNROLLED = PROMOTE ? PROMOTE : 1;
static_assert(K % (STEP * EVERY) == 0 && F % 128 == 0, "sizes");

#define QUOTE(x) #x
#define QUOTED(x) QUOTE(x)
#define NUMBER(x) "%" QUOTED(x)
#define JOINT(a, b) a##b
#define JOIN(a, b) JOINT(a, b)

// d [64, ROWS] (+)= a [64, 32] b [ROWS, 32]^T; both K-major in shared memory.
DEVICE void wgmma(float (&d)[ROWS / 2], u64 a, u64 b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " NUMBER(KEEP) ", 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n" QUOTED(ROWS) "k32.f32.e4m3.e4m3 {" JOIN(REGISTERS_, LAST) "}, "
                 NUMBER(LEFT) ", " NUMBER(RIGHT) ", p, 1, 1;\n}" : JOIN(SUMS_, LAST)(d) : "l"(a), "l"(b), "r"(accumulate));
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

DEVICE void multiply(const TensorMap *out, const float *factors, u32 shared, int row_tiles, int rank, int group) {
    u32 full = shared + BARRIERS, empty = full + 8 * STAGES, staging = shared + OUT + group * OUT_BYTES;
    int thread = threadIdx.x & 127, lane = thread & 31, odd = lane / 4 & 1, stage = 0, phase = 0;
    // A lane holds feature lane / 4 of rows 2c and 2c + 1 of 8, c = lane % 4; with its partner's, it stores two features
    // of one of them. Rows are 32 bytes, in the 32-byte swizzle: of rows 4 to 7 of 8 the halves change places.
    int row_of = lane % 4 * 2 + odd;
    u32 to = staging + row_of * 32 + ((thread / 32 * 8 + (lane / 4 & 6)) ^ (row_of / 4 << 4));
    float gate = factors[0], up = factors[1], over = 1.0f / factors[2];
    float d[ROWS / 2], sums[PROMOTE ? ROWS / 2 : 1];
    if (group == 1) barrier_sync(1, 256);  // the first warpgroup goes ahead
    bool first = true;
    for (int tile = blockIdx.x / 2; tile < row_tiles * PAIRS; tile += gridDim.x / 2) {
        for (int part = 0; part < STEPS / EVERY; ++part) {
            int last = stage;
#pragma unroll UNROLLED
            for (int step = 0; step < EVERY; ++step) {
                barrier_wait(full + 8 * stage, phase);
                u64 a = tile_k_major(shared + stage * STAGE_BYTES + group * (W_BYTES / 2));
                u64 b = tile_k_major(shared + stage * STAGE_BYTES + W_BYTES);
                pin(d);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < STEP / 32; ++k) wgmma(d, a + 2 * k, b + 2 * k, step + k > 0);
                wgmma_commit();
                pin(d);
                if (step > 0) {
                    wgmma_wait<1>();  // the step before this one is done: its stage is free, in both blocks
                    if (thread < 2) barrier_arrive_at(empty + 8 * last, thread);
                }
                last = stage;
                if (++stage == STAGES) stage = 0, phase ^= 1;
                if (first && group == 0 && part * EVERY + step == LAG) barrier_sync(1, 256);
            }
            wgmma_wait<0>();
            if (thread < 2) barrier_arrive_at(empty + 8 * last, thread);
            pin(d);
            if constexpr (PROMOTE > 0) {
#pragma unroll
                for (int i = 0; i < ROWS / 2; ++i) sums[i] = part ? sums[i] + d[i] : d[i];
            }
        }
        first = false;
        if (thread == 0) tma_store_wait_read();  // the staging tile has been sent
        barrier_sync(2 + group, 128);
#pragma unroll
        for (int i = 0; i < ROWS / 8; ++i) {
            const float *v = (PROMOTE ? sums : d) + 4 * i;
            u32 mine = gated(v[0] * gate, v[1] * gate, v[2] * up, v[3] * up, over);
            u32 partner = __shfl_xor_sync(~0u, mine, 4);
            store_shared(to + i * 256, (unsigned short)__byte_perm(mine, partner, odd ? 0x15 : 0x40));
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
gate_up_fp8(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
            const __grid_constant__ TensorMap out, const float *factors, int rows) {
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 shared = shared_address(memory);
    int rank = cluster_rank(), group = warpgroup(), row_tiles = (rows + ROWS - 1) / ROWS;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(shared + BARRIERS + 8 * i, 1);
            barrier_init(shared + BARRIERS + 8 * (STAGES + i), 4);  // two warpgroups of two blocks
        }
        barrier_init_done();
        prefetch_map(&x);
        prefetch_map(&weight);
        prefetch_map(&out);
    }
    cluster_sync();
    if (group == 0) {
        set_registers_down<40>();
        if (threadIdx.x == 0) load_tiles(&x, &weight, shared, row_tiles, rank);
    } else {
        set_registers_up<232>();
        multiply(&out, factors, shared, row_tiles, rank, group - 1);
    }
}
