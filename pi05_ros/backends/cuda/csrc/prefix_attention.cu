// Prefix attention for Hopper: every valid row sees every valid row, all query heads share one key and value head, so
// the queries of all heads are one matrix [rows * HEADS, 256] against keys and values [rows, 256]. Queries are rotated
// (RoPE) on their way in, their norm (1 / rms of their row) is in the scale of their logits; keys were normed before.
//
// A pair of blocks (a cluster) takes 128 queries, each block half of the keys. One warpgroup only loads (TMA into a ring);
// two hold 64 queries each and take turns at the tensor cores: one's products, of the last block's values and the next
// block's keys, run under the other's softmax. At the end each warpgroup and its like in the other block exchange halves
// of their sums in bfloat16, under the last product. Logits, sums and softmax in float32, exponents of 2.
// Defines: HEADS, QKV (columns of a row), BLOCK (keys a turn, 64 or 128), LAST, LEFT, RIGHT, KEEP (of BLOCK: as in gate_up.cu),
// SLOTS (of the ring), SHARED_BYTES. Launch: 384 threads, clusters of 2. At most 1024 rows.
#include "prefix_queries.cuh"
#include "prefix_softmax.cuh"

constexpr int MOST_KEYS = 512;
// Tiles are 64 columns wide. A slot of the ring holds half the columns of a block's keys, or half the rows of its values.
constexpr u32 TILE = 64 * 128, KEY_TILE = BLOCK * 128, VALUE_TILE = BLOCK / 2 * 128, SLOT_BYTES = 2 * KEY_TILE;
constexpr u32 QUERIES_BYTES = 4 * TILE, RING = 2 * QUERIES_BYTES, MASK = RING + SLOTS * SLOT_BYTES;
constexpr u32 HIDES = MASK + 2 * MOST_KEYS, STATISTICS = HIDES + 16, BARRIERS = STATISTICS + 2 * 512;
// What a warpgroup receives, where its queries were: 8 times 16 bytes of sums a thread; and 16 of statistics a row pair.
constexpr u32 EXCHANGE_BYTES = 8 * 128 * 16 + 32 * 16;
constexpr u32 ARRIVED = BARRIERS + 16 * SLOTS, READY = ARRIVED + 16;  // for each warpgroup
constexpr int TURN = 3;  // named barriers: 1 and 2 are the warpgroups' own, 3 and 4 say whose turn it is
static_assert(SHARED_BYTES == READY + 16 && MOST_KEYS % BLOCK == 0, "shared memory");

#define QUOTE(x) #x
#define QUOTED(x) QUOTE(x)
#define NUMBER(x) "%" QUOTED(x)
#define JOINT(a, b) a##b
#define JOIN(a, b) JOINT(a, b)

// s [64, BLOCK] (+)= a [64, 16] b [BLOCK, 16]^T; both K-major in shared memory.
DEVICE void wgmma_keys(float (&s)[BLOCK / 2], u64 a, u64 b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " NUMBER(KEEP) ", 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n" QUOTED(BLOCK) "k16.f32.bf16.bf16 {" JOIN(REGISTERS_, LAST) "}, "
                 NUMBER(LEFT) ", " NUMBER(RIGHT) ", p, 1, 1, 0, 0;\n}" : JOIN(SUMS_, LAST)(s) : "l"(a), "l"(b), "r"(accumulate));
}

// A place in the ring: its slots are filled, read and freed in one order.
struct Position {
    int slot = 0, phase = 0;
    DEVICE void next() { if (++slot == SLOTS) slot = 0, phase ^= 1; }
};

// Keys and values of block after block into the ring, two slots each. Values with the half of their columns first that this
// block of threads gives away at the end.
DEVICE void load_blocks(const TensorMap *keys, const TensorMap *values, u32 shared, int from, int blocks, int rank) {
    u32 full = shared + BARRIERS, empty = full + 8 * SLOTS;
    int swap = 2 - 2 * rank;  // in tiles
    Position at;
    auto slot = [&] {
        barrier_wait(empty + 8 * at.slot, at.phase ^ 1);
        barrier_expect(full + 8 * at.slot, SLOT_BYTES);
        return shared + RING + at.slot * SLOT_BYTES;
    };
    for (int block = 0; block < 2 * blocks; ++block) {  // halves of blocks
        int row = from + block / 2 * BLOCK;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 to = slot();
            if (block % 2 == 0)
                for (int i = 0; i < 2; ++i) tma_load(to + i * KEY_TILE, keys, full + 8 * at.slot, (2 * half + i) * 64, row);
            else
                for (int i = 0; i < 4; ++i)
                    tma_load(to + i * VALUE_TILE, values, full + 8 * at.slot, (i ^ swap) * 64, row + half * (BLOCK / 2));
            at.next();
        }
    }
}

// A warpgroup's side of the ring.
struct Ring {
    u32 shared;
    Position at, oldest;
    DEVICE u32 wait() {
        u32 full = shared + BARRIERS + 8 * at.slot, slot = shared + RING + at.slot * SLOT_BYTES;
        barrier_wait(full, at.phase);
        at.next();
        return slot;
    }
    DEVICE void release() {
        if ((threadIdx.x & 127) == 0) barrier_arrive(shared + BARRIERS + 8 * (SLOTS + oldest.slot));
        oldest.next();
    }
};

// Logits of 64 queries and the next block's keys; not waited for.
DEVICE void multiply_keys(float (&s)[BLOCK / 2], u32 queries, Ring &ring) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 keys = ring.wait();
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 8; ++k)
            wgmma_keys(s, tile_k_major(queries + (2 * half + k / 4) * TILE + k % 4 * 32), tile_k_major(keys + k / 4 * KEY_TILE + k % 4 * 32),
                       half + k > 0);
        wgmma_commit();
    }
}

// d += p times the next block's values.
DEVICE void multiply_values(float (&d)[128], const u32 (&p)[BLOCK / 4], Ring &ring) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 values = ring.wait();
        pin(d);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < BLOCK / 32; ++k) {
            const u32 *a = p + half * (BLOCK / 8) + 4 * k;
            wgmma_256_registers(d, {a[0], a[1], a[2], a[3]}, tile_mn_major(values + k * 16 * 128, VALUE_TILE));
        }
        wgmma_commit();
    }
    wgmma_wait<1>();
    ring.release();
    wgmma_wait<0>();
    pin(d);
    ring.release();
}

// The last of it, in two halves of the columns: the second is under way when the first can be read.
template <int HALF> DEVICE void multiply_half(float (&d)[128], const u32 (&p)[BLOCK / 4], u32 values, u32 more) {
#pragma unroll
    for (int k = 0; k < BLOCK / 16; ++k) {
        u32 rows = k < BLOCK / 32 ? values + k * 16 * 128 : more + (k - BLOCK / 32) * 16 * 128;
        wgmma_128_registers<HALF>(d, {p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3]},
                                  tile_mn_major(rows + HALF * 2 * VALUE_TILE, VALUE_TILE));
    }
    wgmma_commit();
}

template <int HALF> DEVICE void pin_half(float (&d)[128]) {
#pragma unroll
    for (int i = 64 * HALF; i < 64 * HALF + 64; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// This block's keys for 64 queries: d becomes the sums of probabilities times values but for the last block's, whose
// probabilities are p.
DEVICE void attend(float (&d)[128], u32 (&p)[BLOCK / 4], Rows &rows, Ring &ring, u32 queries, int group, int blocks) {
    u32 mask = ring.shared + MASK + threadIdx.x % 4 * 4;
    if (group == 1) barrier_pass(TURN, 256);  // the first warpgroup's turn
    for (int block = 0; block < blocks; ++block) {
        float s[BLOCK / 2], shrink[2];
        barrier_sync(TURN + group, 256);
        if (block > 0) multiply_values(d, p, ring);
        multiply_keys(s, queries, ring);
        barrier_pass(TURN + 1 - group, 256);
        wgmma_wait<1>();
        ring.release();
        wgmma_wait<0>();
        pin(s);
        ring.release();
        softmax(s, rows, shrink, hidden_keys<BLOCK>(ring.shared + HIDES, block), mask + 2 * block * BLOCK);
#pragma unroll
        for (int i = 0; i < 128; ++i) d[i] *= shrink[i >> 1 & 1];
#pragma unroll
        for (int i = 0; i < BLOCK / 4; ++i) p[i] = pack(s[2 * i], s[2 * i + 1]);  // just as wgmma wants its left operand
    }
    barrier_sync(TURN + group, 256);
}

// The last products. Half of the sums goes to the other block of the pair, as soon as its queries are not read any more, and
// the other half is finished here with what comes back.
DEVICE void finish(float (&d)[128], const u32 (&p)[BLOCK / 4], Ring &ring, Rows &rows, u32 shared, u32 queries, int group,
                   const TensorMap *out, int first) {
    int thread = threadIdx.x & 127, rank = cluster_rank(), other_rank = 1 - rank;
    u32 here = queries + thread * 16, there = address_at(here, other_rank);
    u32 said = shared + STATISTICS + group * 512 + thread / 4 * 16, said_there = address_at(said, other_rank);
    u32 arrived = shared + ARRIVED + 8 * group, their_barrier = address_at(arrived, other_rank);
    u32 values = ring.wait(), more = ring.wait();
    pin(d);
    wgmma_fence();
    multiply_half<0>(d, p, values, more);
    multiply_half<1>(d, p, values, more);
    if (group == 0) barrier_pass(TURN + 1, 256);
    float most[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        rows.total[r] += __shfl_xor_sync(~0u, rows.total[r], 1);
        rows.total[r] += __shfl_xor_sync(~0u, rows.total[r], 2);
        most[r] = rows.exponent(r, NOTHING);
    }
    barrier_wait(shared + READY + 8 * group, 0);
    if (thread % 4 == 0) store_at(said_there, their_barrier, most[0], most[1], rows.total[0], rows.total[1]);
    wgmma_wait<1>();
    pin_half<0>(d);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float *from = d + 8 * i;
        store_at(there + i * 128 * 16, their_barrier, __uint_as_float(pack(from[0], from[1])), __uint_as_float(pack(from[2], from[3])),
                 __uint_as_float(pack(from[4], from[5])), __uint_as_float(pack(from[6], from[7])));
    }
    wgmma_wait<0>();
    pin_half<1>(d);
    barrier_wait(arrived, 0);
    auto read = [&](u32 from) {
        uint4 v;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
        return v;
    };
    uint4 they = read(said);
    float theirs_most[2] = {__uint_as_float(they.x), __uint_as_float(they.y)};
    float theirs_total[2] = {__uint_as_float(they.z), __uint_as_float(they.w)}, ours[2], theirs[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float both = fmaxf(most[r], theirs_most[r]);
        ours[r] = exp2_fast(most[r] - both), theirs[r] = exp2_fast(theirs_most[r] - both);
        float over = 1.0f / fmaxf(rows.total[r] * ours[r] + theirs_total[r] * theirs[r], 1.0e-30f);
        ours[r] *= over, theirs[r] *= over;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // two blocks of 8 columns
        uint4 other = read(here + i * 128 * 16);
        const u32 *pair = &other.x;
        const float *mine = d + 64 + 8 * i;
        u32 y[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            y[j] = pack(mine[2 * j] * ours[j % 2] + low(pair[j]) * theirs[j % 2],
                        mine[2 * j + 1] * ours[j % 2] + high(pair[j]) * theirs[j % 2]);
        store_blocks(queries + (2 + i / 4) * TILE, thread / 32 * 16, i % 4 * 2, y[0], y[1], y[2], y[3]);
    }
    fence_async_proxy();
    barrier_sync(1 + group, 128);
    if (thread == 0) {
        tma_store(queries + 2 * TILE, out, rank * 128, first);
        tma_store(queries + 3 * TILE, out, rank * 128 + 64, first);
        tma_store_commit();
        tma_store_wait_read();
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
prefix_attention(const __grid_constant__ TensorMap keys, const __grid_constant__ TensorMap values,
                 const __grid_constant__ TensorMap out, const bf16 *qkv, const float *inverse, const unsigned char *valid,
                 const int *positions, const float *cosines, const float *sines, int rows, float scale) {
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 shared = shared_address(memory);
    int rank = cluster_rank(), group = warpgroup() - 1, half = (rows + 31) / 32 * 16;  // of the keys, whole steps of 16
    int from = rank * half, count = rank == 0 ? half : rows - half, blocks = (count + BLOCK - 1) / BLOCK;
    if (threadIdx.x == 0) {
        for (int i = 0; i < SLOTS; ++i) {
            barrier_init(shared + BARRIERS + 8 * i, 1);
            barrier_init(shared + BARRIERS + 8 * (SLOTS + i), 2);
        }
        for (int i = 0; i < 2; ++i) {  // what the other block's warpgroup sends, and that it has room for ours
            barrier_init(shared + ARRIVED + 8 * i, 1);
            barrier_expect(shared + ARRIVED + 8 * i, EXCHANGE_BYTES);
            barrier_init(shared + READY + 8 * i, 1);
        }
        barrier_init_done();
    }
    for (int i = threadIdx.x; i < blocks * BLOCK; i += 384) {
        bool hidden = i >= count || !valid[from + i];
        ((bf16 *)(memory + MASK))[i] = hidden ? pack(NOTHING, 0.0f) & 0xffff : 0;
        bool any = __any_sync(~0u, hidden);
        if (threadIdx.x % 32 == 0) memory[HIDES + i / 32] = any;
    }
    __syncthreads();
    cluster_arrive();  // this block's barriers may be told
    if (group < 0) {
        set_registers_down<40>();
        if (threadIdx.x == 0) load_blocks(&keys, &values, shared, from, blocks, rank);
        __syncwarp();
        cluster_wait();
    } else {
        set_registers_up<232>();
        u32 queries = shared + group * QUERIES_BYTES, p[BLOCK / 4];
        int first = blockIdx.x / 2 * 128 + group * 64, thread = threadIdx.x & 127;
        load_queries(qkv, positions, cosines, sines, queries, first, rows * HEADS);
        Rows sums = {{}, {NOTHING, NOTHING}, {0.0f, 0.0f}};
#pragma unroll
        for (int r = 0; r < 2; ++r)
            sums.scale[r] = scale * inverse[min(first + thread / 32 * 16 + thread % 32 / 4 + 8 * r, rows * HEADS - 1) / HEADS];
        fence_async_proxy();
        cluster_wait();
        barrier_sync(1 + group, 128);
        float d[128];
#pragma unroll
        for (int i = 0; i < 128; ++i) d[i] = 0.0f;
        Ring ring = {shared};
        attend(d, p, sums, ring, queries, group, blocks);
        if (thread == 0) barrier_arrive_at(shared + READY + 8 * group, 1 - cluster_rank());
        finish(d, p, ring, sums, shared, queries, group, &out, first);
    }
}
