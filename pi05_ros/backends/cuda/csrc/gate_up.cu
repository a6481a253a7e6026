// The prefix's gate|up product with the gated linear unit as its epilogue, for Hopper:
// out [rows, F] = gelu_tanh(x gate^T) * (x up^T), x [rows, K], weight [2F, K] = gate over up, all bfloat16.
//
// A block works on tiles of 128 rows and 128 columns of both halves: 256 accumulated columns, so one thread holds gate
// and up of the same element. One warpgroup only loads (TMA into a ring of STAGES), two multiply 64 rows each. Blocks
// come in pairs (a cluster) that share one operand, each loading half of it for both: the weights where the row tiles
// are even in number (PAIR_ROWS), x otherwise. Persistent: a pair walks over the tiles, row tiles fastest, so that the
// weights come from memory once. The second warpgroup starts LAG steps behind the first, so that one warpgroup's
// epilogue runs under the other's products.
// Defines: F, K (multiples of 256 and 64), PAIR_ROWS, SHARED_BYTES. Launch: 384 threads, clusters of 2.
#include "hopper.cuh"

constexpr int STAGES = 4, LAG = 2, STEP = 64;          // STEP: of K, one swizzled tile wide
constexpr u32 X_BYTES = 128 * 128, W_BYTES = 256 * 128, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr u32 OUT = STAGES * STAGE_BYTES, BARRIERS = OUT + 128 * 128 * 2;
static_assert(SHARED_BYTES == BARRIERS + 16 * STAGES, "shared memory");
constexpr int STEPS = K / STEP, COLUMN_TILES = F / 128;

struct Tile { int row, column; };

// Tile `index` of this pair, for block `rank` of it.
DEVICE Tile tile_of(int index, int row_tiles, int rank) {
    if (PAIR_ROWS) {
        int pairs = row_tiles / 2;
        return {(index % pairs * 2 + rank) * 128, index / pairs * 128};
    }
    return {index % row_tiles * 128, (index / row_tiles * 2 + rank) * 128};
}

DEVICE void load_tiles(const TensorMap *x, const TensorMap *weight, u32 shared, int row_tiles, int rank) {
    u32 full = shared + BARRIERS, empty = full + 8 * STAGES;
    int stage = 0, phase = 1;  // a fresh ring is empty
    int tiles = row_tiles * COLUMN_TILES / 2;
    for (int index = blockIdx.x / 2; index < tiles; index += gridDim.x / 2) {
        Tile tile = tile_of(index, row_tiles, rank);
        for (int step = 0; step < STEPS; ++step) {
            u32 to = shared + stage * STAGE_BYTES, there = full + 8 * stage;
            barrier_wait(empty + 8 * stage, phase);
            barrier_expect(there, STAGE_BYTES);
            if (PAIR_ROWS) {  // both need the same 256 rows of the weights: one loads gate, the other up
                tma_load(to, x, there, step * STEP, tile.row);
                tma_load_multicast(to + X_BYTES + rank * (W_BYTES / 2), weight, there, step * STEP,
                                   tile.column + rank * F, 3);
            } else {
                tma_load_multicast(to + rank * (X_BYTES / 2), x, there, step * STEP, tile.row + rank * 64, 3);
                tma_load(to + X_BYTES, weight, there, step * STEP, tile.column);
                tma_load(to + X_BYTES + W_BYTES / 2, weight, there, step * STEP, tile.column + F);
            }
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
    }
    for (int i = 0; i < STAGES; ++i) {  // stay until the other block has read the last of what we sent it
        barrier_wait(empty + 8 * stage, phase);
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
}

// gelu_tanh(g) * u for four: g u / (1 + 2^-t), with one reciprocal for the four.
DEVICE void gated(const float *g, const float *u, float *out) {
    float e[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float t = g[i] * (2.302208198f + 0.1029432397f * g[i] * g[i]);  // 2 log2(e) sqrt(2/pi) (g + 0.044715 g^3)
        e[i] = 1.0f + exp2_fast(fminf(-t, 30.0f));                      // the product of four stays finite
    }
    float ab = e[0] * e[1], cd = e[2] * e[3], r = reciprocal(ab * cd);
    float rab = r * cd, rcd = r * ab;
    out[0] = g[0] * u[0] * (rab * e[1]);
    out[1] = g[1] * u[1] * (rab * e[0]);
    out[2] = g[2] * u[2] * (rcd * e[3]);
    out[3] = g[3] * u[3] * (rcd * e[2]);
}

DEVICE void multiply(const TensorMap *out, u32 shared, int row_tiles, int rank, int group) {
    u32 full = shared + BARRIERS, empty = full + 8 * STAGES;
    int thread = threadIdx.x & 127, warp_row = thread / 32 * 16;
    u32 staging = shared + OUT + group * (64 * 128 * 2);
    int stage = 0, phase = 0, tiles = row_tiles * COLUMN_TILES / 2;
    float d[128];
    if (group == 1) barrier_sync(1, 256);  // the first warpgroup goes ahead
    bool first = true;
    for (int index = blockIdx.x / 2; index < tiles; index += gridDim.x / 2) {
        Tile tile = tile_of(index, row_tiles, rank);
        int last = stage;
        for (int step = 0; step < STEPS; ++step) {
            barrier_wait(full + 8 * stage, phase);
            u64 a = tile_k_major(shared + stage * STAGE_BYTES + group * (X_BYTES / 2));
            u64 b = tile_k_major(shared + stage * STAGE_BYTES + X_BYTES);
            pin(d);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < STEP / 16; ++k) wgmma_256(d, a + 2 * k, b + 2 * k, step + k > 0);
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
        barrier_sync(2 + group, 128);
#pragma unroll
        for (int block = 0; block < 16; block += 2) {
            float y[8];
            gated(d + 4 * block, d + 64 + 4 * block, y);
            gated(d + 4 * block + 4, d + 64 + 4 * block + 4, y + 4);
            store_blocks(staging + block / 8 * 8192, warp_row, block % 8, pack(y[0], y[1]), pack(y[2], y[3]),
                         pack(y[4], y[5]), pack(y[6], y[7]));
        }
        fence_async_proxy();
        barrier_sync(2 + group, 128);
        if (thread == 0) {
            tma_store(staging, out, tile.column, tile.row + group * 64);
            tma_store(staging + 8192, out, tile.column + 64, tile.row + group * 64);
            tma_store_commit();
        }
    }
    if (thread == 0) tma_store_wait();
}

extern "C" __global__ void __launch_bounds__(384, 1)
gate_up(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
        const __grid_constant__ TensorMap out, int rows) {
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 shared = shared_address(memory);
    int rank = cluster_rank(), group = warpgroup(), row_tiles = (rows + 127) / 128;
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
        multiply(&out, shared, row_tiles, rank, group - 1);
    }
}
