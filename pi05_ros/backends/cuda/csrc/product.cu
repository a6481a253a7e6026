// A product of the vision tower with what stands around it, for Hopper: x [rows, K] weight [F, K]^T, bfloat16, and
//   out [rows, F] = y + bias, or gelu_tanh(y + bias) with GELU, y the product of LayerNorm(x) with NORM (below), or
//   with RESIDUAL residual [rows, F] += y + bias in float32, out it in bfloat16, and sums of it for the next NORM.
// table [F] is {bias, c W^T} with NORM, {bias, the next norm's scale} with RESIDUAL.
//
// NORM: sums [parts, rows, 2] are sums over parts of a row of r and of its squares, r the residual. x is r times the norm's
// scale c: in the weights it would round them, an error that all rows share and attention does not average away. Mean m
// and deviation s come after the product: (r - m) / s c W^T = (x W^T - m (c W^T)) / s; what the norm adds is in the bias.
// RESIDUAL: out is for the next NORM, times its scale.
// E4M3: x and weight are; the product is multiplied by `factor`. NARROW: out is e4m3, saturated: with GELU times `over`, with
// RESIDUAL in a unit a row that `sums` give, those of r before this product: ROOM over its deviation (e4m3 is floating
// point: what it becomes by one product is well within its range). E4M3 with NORM reads such rows; `before` are those sums.
// A block takes 128 rows and COLUMNS features. One warpgroup only loads (TMA into a ring of STAGES), two multiply 64
// rows each. SHARING blocks one under another share the weights, each loading a part for all; SPLIT blocks share a
// tile, each a part of K, and hand each other the sums of the columns that it keeps: all of them a cluster. Launched
// dependent: the first weights are under way before the kernel before has ended.
// Defines: F, OUT (columns of out's rows), K (of 8), COLUMNS (of 8 SPLIT, at most 256), SHARING, SPLIT, STAGES, NORM, GELU,
// RESIDUAL, E4M3, NARROW, SHARED_BYTES; for the assembly of wgmma LAST, LEFT, RIGHT, KEEP as in
// gate_up_tiles.cuh. Launch: 384 threads.
#include "wgmma.cuh"

constexpr int ROWS = 128, STEP = E4M3 ? 128 : 64, STEPS = (K + STEP * SPLIT - 1) / (STEP * SPLIT), FIRST = STEPS < STAGES ? STEPS : STAGES;
constexpr int PART = (COLUMNS / 8 + SHARING - 1) / SHARING * 8, KEPT = COLUMNS / SPLIT, CHUNKS = COLUMNS / 8;
constexpr u32 X_BYTES = ROWS * 128, W_BYTES = SHARING * PART * 128, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr u32 EXCHANGE = STAGES * STAGE_BYTES, EXCHANGE_BYTES = SPLIT > 1 ? ROWS * KEPT * 4 : 0;
constexpr u32 TABLE = EXCHANGE + EXCHANGE_BYTES, NORMS = TABLE + COLUMNS * 8, BARRIERS = NORMS + ROWS * 8;
constexpr int WIDE = (KEPT + 63) / 64;
constexpr u32 KEPT_PITCH = (KEPT * 4 + 95) / 128 * 128 + 32;  // 32 more than a multiple of 128: no bank twice
constexpr u32 PITCH = (COLUMNS + (CHUNKS % 2 ? 0 : 8)) * (NARROW ? 1 : 2);  // an odd number of 16 bytes: no bank twice
constexpr float ROOM = 0.125f;
static_assert(SHARED_BYTES == BARRIERS + 16 * STAGES + 16 && STAGES * STAGE_BYTES >= ROWS * (RESIDUAL ? KEPT_PITCH : PITCH), "shared memory");
static_assert(SPLIT <= 2 && (SPLIT == 1 || RESIDUAL) && COLUMNS % (8 * SPLIT) == 0, "shapes");
#include "product_epilogues.cuh"

#if E4M3
#define KIND "k32.f32.e4m3.e4m3 {"
#define ORDERS ", p, 1, 1;\n}"
#else
#define KIND "k16.f32.bf16.bf16 {"
#define ORDERS ", p, 1, 1, 0, 0;\n}"
#endif
// d [64, COLUMNS] (+)= a [64, 16] b [COLUMNS, 16]^T, of e4m3 32 for 16; both K-major in shared memory.
DEVICE void wgmma(float (&d)[COLUMNS / 2], u64 a, u64 b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " NUMBER(KEEP) ", 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n" QUOTED(COLUMNS) KIND JOIN(REGISTERS_, LAST) "}, "
                 NUMBER(LEFT) ", " NUMBER(RIGHT) ORDERS : JOIN(SUMS_, LAST)(d) : "l"(a), "l"(b), "r"(accumulate));
}

DEVICE void load_tiles(const TensorMap *x, const TensorMap *weight, u32 shared, Tile tile) {
    u32 full = shared + BARRIERS, empty = full + 8 * STAGES;
    auto weights = [&](int stage, int step) {
        u32 to = shared + stage * STAGE_BYTES + X_BYTES + tile.sharer * PART * 128;
        int k = (tile.split * STEPS + step) * STEP, row = tile.column + tile.sharer * PART;
        barrier_expect(full + 8 * stage, STAGE_BYTES);
        if (SHARING == 1) tma_load(to, weight, full + 8 * stage, k, row);
        else tma_load_multicast(to, weight, full + 8 * stage, k, row, ((1 << SHARING) - 1) << tile.split * SHARING);
    };
    auto rows = [&](int stage, int step) {
        tma_load(shared + stage * STAGE_BYTES, x, full + 8 * stage, (tile.split * STEPS + step) * STEP, tile.row);
    };
    for (int i = 0; i < FIRST; ++i) weights(i, i);
    wait_for_grid();
    for (int i = 0; i < FIRST; ++i) rows(i, i);
    int stage = 0, phase = 0;
    for (int step = FIRST; step < STEPS; ++step) {
        barrier_wait(empty + 8 * stage, phase);
        weights(stage, step);
        rows(stage, step);
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    if (SHARING > 1)  // stay until the others have read the last of what we sent them
        for (int i = 0; i < FIRST; ++i) {
            barrier_wait(empty + 8 * stage, phase);
            if (++stage == FIRST) stage = 0, phase ^= 1;
        }
}

DEVICE void products(float (&d)[COLUMNS / 2], u32 shared, int group, int split) {
    u32 full = shared + BARRIERS, empty = full + 8 * STAGES;
    int thread = threadIdx.x & 127, stage = 0, phase = 0, last = 0;
    for (int step = 0; step < STEPS; ++step) {
        barrier_wait(full + 8 * stage, phase);
        u64 a = tile_k_major(shared + stage * STAGE_BYTES + group * (X_BYTES / 2));
        u64 b = tile_k_major(shared + stage * STAGE_BYTES + X_BYTES);
        pin(d);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) wgmma(d, a + 2 * k, b + 2 * k, step + k > 0);
        wgmma_commit();
        pin(d);
        if (step > 0) {
            wgmma_wait<1>();  // the step before this one is done: its stage is free, in all that share it
            if (thread < SHARING) barrier_arrive_at(empty + 8 * last, split * SHARING + thread);
        }
        last = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    wgmma_wait<0>();
    if (thread < SHARING) barrier_arrive_at(empty + 8 * last, split * SHARING + thread);
    pin(d);
}

DEVICE void multiply(unsigned char *memory, u32 shared, Tile tile, int group, int rows, int stride, const float2 *table,
                     float *residual, float2 *left, bf16 *out, float factor, float over) {
    float d[COLUMNS / 2];
    Residual r;
    wait_for_grid();
    if (RESIDUAL) fetch(r, tile, table, residual, rows);
    products(d, shared, group, tile.split);
    barrier_sync(1, 256 + 96);  // norms and table are there; everybody is done with the ring
    if (!RESIDUAL) leave(d, memory, tile, rows, out, over);
    else if (SPLIT == 1 || tile.split == 0) leave_residual<0>(d, r, memory, shared, tile, rows, stride, residual, out, left, factor);
    else leave_residual<SPLIT == 1 ? 0 : KEPT>(d, r, memory, shared, tile, rows, stride, residual, out, left, factor);
}

extern "C" __global__ void __launch_bounds__(384, 1)
product(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const float2 *table, float *residual,
        const float2 *sums, const float2 *before, float2 *left, bf16 *out, int rows, int stride, int parts, int parts_before,
        float eps, float factor, float over) {
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 shared = shared_address(memory);
    int rank = cluster_rank(), group = warpgroup(), heights = (rows + ROWS * SHARING - 1) / (ROWS * SHARING);
    int cluster = blockIdx.x / (SHARING * SPLIT);
    Tile tile = {(cluster % heights * SHARING + rank % SHARING) * ROWS, cluster / heights * COLUMNS, rank % SHARING, rank / SHARING};
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(shared + BARRIERS + 8 * i, 1);
            barrier_init(shared + BARRIERS + 8 * (STAGES + i), 2 * SHARING);  // two warpgroups of each that shares
        }
        barrier_init(shared + BARRIERS + 16 * STAGES, 1);
        barrier_init_done();
        if (SPLIT > 1) barrier_expect(shared + BARRIERS + 16 * STAGES, EXCHANGE_BYTES);
        prefetch_map(&x);
        prefetch_map(&weight);
    }
    if (SHARING * SPLIT > 1) cluster_sync();
    else __syncthreads();
    let_next_grid();
    if (group == 0) {
        set_registers_down<40>();
        if (threadIdx.x == 0) load_tiles(&x, &weight, shared, tile);
        if (threadIdx.x >= 32) {
            if (!RESIDUAL)
                for (int i = threadIdx.x - 32; i < COLUMNS; i += 96)
                    ((float2 *)(memory + TABLE))[i] = tile.column + i < F ? table[tile.column + i] : make_float2(0.0f, 0.0f);
            if (NORM || RESIDUAL && NARROW)
                row_norms((float2 *)(memory + NORMS), {sums, parts}, {before, parts_before}, stride, rows, tile.row, eps, factor);
            barrier_pass(1, 256 + 96);
        }
    } else {
        set_registers_up<232>();
        multiply(memory, shared, tile, group - 1, rows, stride, table, residual, left, out, factor, over);
    }
}
