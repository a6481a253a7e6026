// The prefix's products that end in the residual (of attention and MLP), for Hopper: x [rows, F] += y [rows, K] weight [F, K]^T,
// all bfloat16; summed in float32, with x, and rounded once.
//
// As in gate_up_tiles.cuh weights are the left operand and rows the right one. A block takes 128 features, ROWS rows and half of
// K; two blocks, a cluster, hand each other the sums of the rows that they do not keep: so 2048 features are one wave. One
// warpgroup only loads (TMA into a ring of STAGES), two multiply 64 features each; where the ring was, those sums come, and x
// comes and goes. Launched dependent: the first weights are under way before the kernel before has ended.
// Defines: F (of 128), K (of 128), ROWS (of 8, at most 256), STAGES, SHARED_BYTES; for the assembly of wgmma LAST, LEFT, RIGHT,
// KEEP as in gate_up_tiles.cuh. Launch: 384 threads, clusters of 2, each a tile: features first.
#include "wgmma.cuh"

constexpr int STEP = 64, STEPS = K / 2 / STEP, CHUNKS = ROWS / 8, MORE = (CHUNKS + 1) / 2;  // MORE: 8-row chunks that rank 0 keeps
constexpr u32 W_BYTES = 128 * 128, STAGE_BYTES = W_BYTES + ROWS * 128, BARRIERS = STAGES * STAGE_BYTES;
constexpr u32 CHUNK_BYTES = 256 * 16, X = MORE * CHUNK_BYTES, ARRIVED = BARRIERS + 16 * STAGES, THERE = ARRIVED + 8, READY = THERE + 8;
static_assert(SHARED_BYTES == READY + 8 && BARRIERS >= X + MORE * 8 * 256 && STEPS >= STAGES, "shared memory");

// d [64, ROWS] (+)= a [64, 16] b [ROWS, 16]^T; both K-major in shared memory.
DEVICE void wgmma(float (&d)[ROWS / 2], u64 a, u64 b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " NUMBER(KEEP) ", 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n" QUOTED(ROWS) "k16.f32.bf16.bf16 {" JOIN(REGISTERS_, LAST) "}, "
                 NUMBER(LEFT) ", " NUMBER(RIGHT) ", p, 1, 1, 0, 0;\n}" : JOIN(SUMS_, LAST)(d) : "l"(a), "l"(b), "r"(accumulate));
}

DEVICE void load_tiles(const TensorMap *y, const TensorMap *weight, u32 shared, int feature, int row, int rank) {
    u32 full = shared + BARRIERS, empty = full + 8 * STAGES;
    auto load = [&](const TensorMap *map, int stage, int step, u32 offset, int at) {
        tma_load(shared + stage * STAGE_BYTES + offset, map, full + 8 * stage, (rank * STEPS + step) * STEP, at);
    };
    for (int i = 0; i < STAGES; ++i) {
        barrier_expect(full + 8 * i, STAGE_BYTES);
        load(weight, i, i, 0, feature);
    }
    wait_for_grid();
    for (int i = 0; i < STAGES; ++i) load(y, i, i, W_BYTES, row);
    int stage = 0, phase = 0;
    for (int step = STAGES; step < STEPS; ++step) {
        barrier_wait(empty + 8 * stage, phase);
        barrier_expect(full + 8 * stage, STAGE_BYTES);
        load(weight, stage, step, 0, feature);
        load(y, stage, step, W_BYTES, row);
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
}

DEVICE void products(float (&d)[ROWS / 2], u32 shared, int group) {
    u32 full = shared + BARRIERS, empty = full + 8 * STAGES;
    int stage = 0, phase = 0, last = 0;
    for (int step = 0; step < STEPS; ++step) {
        barrier_wait(full + 8 * stage, phase);
        u64 a = tile_k_major(shared + stage * STAGE_BYTES + group * (W_BYTES / 2));
        u64 b = tile_k_major(shared + stage * STAGE_BYTES + W_BYTES);
        pin(d);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) wgmma(d, a + 2 * k, b + 2 * k, step + k > 0);
        wgmma_commit();
        pin(d);
        if (step > 0) {
            wgmma_wait<1>();  // the step before this one is done: its stage is free
            if (threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * last);
        }
        last = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    wgmma_wait<0>();
    pin(d);
}

// One 8 x 8 matrix after another, turned; lanes 0-15 give the addresses of the rows of two of them.
DEVICE void load_turned(u32 from, u32 &a, u32 &b) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "r"(from) : "memory");
}
DEVICE void store_turned(u32 to, u32 a, u32 b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(a), "r"(b) : "memory");
}

// The sums of chunks FIRST to FIRST + COUNT, with the peer's, into x; those of the others go to the peer. A warpgroup's part of
// x is a tile of 64 features.
template <int FIRST, int COUNT> DEVICE void leave(float (&d)[ROWS / 2], const TensorMap *x, unsigned char *memory, u32 shared,
                                                  int group, int feature, int row) {
    constexpr int THEIRS = FIRST ? 0 : COUNT, THEIR_COUNT = CHUNKS - COUNT;
    int thread = threadIdx.x - 128, lane = threadIdx.x & 31, warp = thread / 32 % 4;
    u32 peer = FIRST ? 0 : 1, there = address_at(shared + thread * 16, peer), told = address_at(shared + ARRIVED, peer);
    u32 tile = shared + X + group * (COUNT * 8 * 128);
    barrier_sync(1, 256);  // both warpgroups are done with the ring
    if (thread == 0) {
        barrier_arrive_at(shared + READY, peer);
        barrier_expect(shared + THERE, 2 * COUNT * 8 * 128);
        for (int i = 0; i < 2; ++i) tma_load(shared + X + i * (COUNT * 8 * 128), x, shared + THERE, feature + 64 * i, row);
    }
    barrier_wait(shared + READY, 0);
#pragma unroll
    for (int i = 0; i < THEIR_COUNT; ++i) {
        float *v = d + 4 * (THEIRS + i);
        store_at(there + i * CHUNK_BYTES, told, v[0], v[1], v[2], v[3]);
    }
    barrier_wait(shared + ARRIVED, 0);
    barrier_wait(shared + THERE, 0);
    const float4 *others = (const float4 *)memory + thread;
    u32 at = tile + (lane & 7) * 128 + ((2 * warp + (lane >> 3 & 1) ^ lane & 7) << 4);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const float *v = d + 4 * (FIRST + i);
        float4 o = others[i * (CHUNK_BYTES / 16)];
        u32 a, b;
        load_turned(at + i * 1024, a, b);
        store_turned(at + i * 1024, pack(low(a) + (v[0] + o.x), high(a) + (v[1] + o.y)),
                     pack(low(b) + (v[2] + o.z), high(b) + (v[3] + o.w)));
    }
    fence_async_proxy();
    barrier_sync(2 + group, 128);
    if (thread % 128 == 0) {
        tma_store(tile, x, feature + 64 * group, row);
        tma_store_commit();
        tma_store_wait();
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
added(const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap more,
      const __grid_constant__ TensorMap fewer) {
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 shared = shared_address(memory);
    int rank = cluster_rank(), group = warpgroup(), tile = blockIdx.x / 2;
    int feature = tile % (F / 128) * 128, row = tile / (F / 128) * ROWS;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(shared + BARRIERS + 8 * i, 1);
            barrier_init(shared + BARRIERS + 8 * (STAGES + i), 2);
        }
        barrier_init(shared + ARRIVED, 1);
        barrier_init(shared + THERE, 1);
        barrier_init(shared + READY, 1);
        barrier_init_done();
        barrier_expect(shared + ARRIVED, (rank ? CHUNKS - MORE : MORE) * CHUNK_BYTES);
        prefetch_map(&y);
        prefetch_map(&weight);
        prefetch_map(rank ? &fewer : &more);
    }
    cluster_sync();
    let_next_grid();
    if (group == 0) {
        set_registers_down<40>();
        if (threadIdx.x == 0) load_tiles(&y, &weight, shared, feature, row, rank);
    } else {
        set_registers_up<232>();
        float d[ROWS / 2];
        products(d, shared, group - 1);
        wait_for_grid();
        if (rank == 0) leave<0, MORE>(d, &more, memory, shared, group - 1, feature, row);
        else leave<MORE, CHUNKS - MORE>(d, &fewer, memory, shared, group - 1, feature, row + MORE * 8);
    }
}
