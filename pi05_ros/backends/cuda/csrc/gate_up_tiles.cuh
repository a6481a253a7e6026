// What gate_up.cu and gate_up_fp8.cu share: who loads what, and the products of a tile. Included behind STEP, the numbers
// of a row that make 128 bytes, OUT_BYTES of a warpgroup's results, and KIND and ORDERS of wgmma's assembly.
//
// Weights are the left operand and rows of x the right one, because wgmma's right side may be any multiple of 8: tiles of
// 64 features (128 weight rows) and ROWS rows, or FEWER = ROWS - 8, waste at most 7 rows in all. The weights' tensor map puts
// 8 rows of gate and the same 8 of up in turn, so that one thread holds gate and up of the same element. One warpgroup only
// loads (TMA into a ring of STAGES), two multiply 64 weight rows each. Blocks come in pairs (a cluster) that share the rows
// of x, each loading half of them for both. Persistent: a pair walks over the tiles, rows fastest, so that the weights come
// from memory once. The second warpgroup starts LAG steps behind, so that epilogues run under the other's products.
// Defines: F (a multiple of 128), K (of STEP), ROWS (of 8, at most 256), FEWER (8 where ROWS is), STAGES, SHARED_BYTES, and for
// the assembly of wgmma: LAST = ROWS / 8 - 1 (its lists), FEWER_LAST alike, LEFT = ROWS / 2, RIGHT and KEEP the next two (the
// operands behind them).
// Launch: 384 threads, clusters of 2.
#pragma once
#include "wgmma.cuh"

constexpr int LAG = 1, FEATURES = 64, HALF = (ROWS + 15) / 16 * 8;  // HALF: rows of x a block loads
constexpr u32 W_BYTES = 128 * 128, X_BYTES = 2 * HALF * 128, STAGE_BYTES = W_BYTES + X_BYTES;
constexpr u32 OUT = STAGES * STAGE_BYTES, BARRIERS = OUT + 2 * OUT_BYTES;
constexpr int STEPS = K / STEP, PAIRS = F / FEATURES / 2;
static_assert(K % STEP == 0 && STEPS > LAG && F % 128 == 0, "sizes");

// Barriers and maps, by one thread; then the pair of blocks goes on together.
DEVICE void begin(const TensorMap *x, const TensorMap *weight, const TensorMap *out, u32 shared) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(shared + BARRIERS + 8 * i, 1);
            barrier_init(shared + BARRIERS + 8 * (STAGES + i), 4);  // two warpgroups of two blocks
        }
        barrier_init_done();
        prefetch_map(x);
        prefetch_map(weight);
        prefetch_map(out);
    }
    cluster_sync();
}

// What a block computes of `out`: ROWS rows where `wide`, else FEWER.
struct Tile {
    int row, feature;
    bool wide;
};

// The rows of x in as few tiles as can be, as few of them wide as hold all rows. Every pair of features begins with another,
// so that each pair of blocks gets its share of the wide ones.
struct Tiles {
    int count, wide;
    DEVICE explicit Tiles(int rows) : count((rows + ROWS - 1) / ROWS), wide((rows + 7) / 8 - count * (FEWER / 8)) {}
    DEVICE Tile at(int tile, int rank) const {
        int pair = tile / count, index = tile % count, row = index * FEWER;
        for (int i = 0; i < index; ++i) row += (i + pair) % count < wide ? 8 : 0;
        return {row, (pair * 2 + rank) * FEATURES, (index + pair) % count < wide};
    }
};

DEVICE void load_tiles(const TensorMap *x, const TensorMap *weight, u32 shared, Tiles tiles, int rank) {
    u32 full = shared + BARRIERS, empty = full + 8 * STAGES;
    int stage = 0, phase = 1;  // a fresh ring is empty
    for (int tile = blockIdx.x / 2; tile < tiles.count * PAIRS; tile += gridDim.x / 2) {
        auto [row, feature, wide] = tiles.at(tile, rank);
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

// Where a warpgroup reads in the ring. `leads`: the second one is still to be let go.
struct Place {
    int stage, phase;
    bool leads;
};

#define WGMMA(rows, last) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " NUMBER(KEEP) ", 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n" QUOTED(rows) KIND JOIN(REGISTERS_, last) "}, " NUMBER(LEFT) ", " \
                 NUMBER(RIGHT) ORDERS : JOIN(SUMS_, LAST)(d) : "l"(a), "l"(b), "r"(accumulate))
// d [64, ROWS] (+)= a [64, 32 bytes] b [ROWS, 32 bytes]^T, or FEWER rows; both K-major in shared memory.
template <bool WIDE> DEVICE void wgmma(float (&d)[ROWS / 2], u64 a, u64 b, int accumulate) {
    if constexpr (WIDE) WGMMA(ROWS, LAST);
    else WGMMA(FEWER, FEWER_LAST);
}

// d: the product of a tile's 64 weight rows of this warpgroup and ROWS rows, over all of K.
template <bool WIDE> DEVICE void products(float (&d)[ROWS / 2], u32 shared, int group, Place &at) {
    u32 full = shared + BARRIERS, empty = full + 8 * STAGES;
    int thread = threadIdx.x & 127, last = at.stage;
    for (int step = 0; step < STEPS; ++step) {
        barrier_wait(full + 8 * at.stage, at.phase);
        u64 a = tile_k_major(shared + at.stage * STAGE_BYTES + group * (W_BYTES / 2));
        u64 b = tile_k_major(shared + at.stage * STAGE_BYTES + W_BYTES);
        pin(d);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) wgmma<WIDE>(d, a + 2 * k, b + 2 * k, step + k > 0);
        wgmma_commit();
        pin(d);
        if (step > 0) {
            wgmma_wait<1>();  // the step before this one is done: its stage is free, in both blocks
            if (thread < 2) barrier_arrive_at(empty + 8 * last, thread);
        }
        last = at.stage;
        if (++at.stage == STAGES) at.stage = 0, at.phase ^= 1;
        if (at.leads && step == LAG) barrier_sync(1, 256);
    }
    at.leads = false;
    wgmma_wait<0>();
    if (thread < 2) barrier_arrive_at(empty + 8 * last, thread);
    pin(d);
}
