// Prefix attention for Hopper: every valid row sees every valid row, all query heads share one key and value head, so
// the queries of all heads are one matrix [rows * HEADS, 256] against keys and values [rows, 256]. Queries are normed
// (times 1 / rms of their row) and rotated (RoPE) on their way in; keys were before.
//
// A pair of blocks (a cluster) takes 128 queries, each block half of the keys: one warpgroup only loads (TMA into a
// ring of blocks of 64 keys or values), two hold 64 queries each, whose softmax runs under the other's products. At the
// end the blocks exchange halves of their sums. Logits, sums and softmax in float32, exponents of 2.
// Defines: HEADS, QKV (columns of a row), SHARED_BYTES. Launch: 384 threads, clusters of 2. At most 1024 rows.
#include "wgmma.cuh"

constexpr int D = 256, BLOCK = 64, SLOTS = 5, MOST_KEYS = 512;
constexpr u32 TILE = 64 * 128, SLOT_BYTES = 4 * TILE;  // a tile: 64 rows of 64 columns
constexpr u32 QUERIES = 0, RING = 2 * SLOT_BYTES, MASK = RING + SLOTS * SLOT_BYTES, BARRIERS = MASK + 2 * MOST_KEYS;
constexpr u32 EXCHANGE = RING, EXCHANGE_BYTES = 17 * 128 * 16;  // a warpgroup's: 16 float4 of sums, one of statistics
constexpr int TURN = 3;  // named barriers: 1 and 2 are the warpgroups' own, 3 and 4 say whose turn it is
static_assert(SHARED_BYTES == BARRIERS + 16 * SLOTS + 16, "shared memory");
constexpr float NOTHING = -1.0e30f;

// Where a ring is: its slots are filled and read in one order.
struct Position {
    int slot = 0, phase = 0;
    DEVICE void next() { if (++slot == SLOTS) slot = 0, phase ^= 1; }
};

// Keys 0, keys 1, values 0, keys 2, values 1, ... into the ring, in the order in which `attend` wants them.
DEVICE void load_blocks(const TensorMap *keys, const TensorMap *values, u32 shared, int from, int blocks) {
    u32 full = shared + BARRIERS, empty = full + 8 * SLOTS;
    Position at;
    auto load = [&](const TensorMap *map, int block) {
        barrier_wait(empty + 8 * at.slot, at.phase ^ 1);
        barrier_expect(full + 8 * at.slot, SLOT_BYTES);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            tma_load(shared + RING + at.slot * SLOT_BYTES + i * TILE, map, full + 8 * at.slot, 64 * i, from + block * BLOCK);
        at.next();
    };
    for (int block = 0; block < blocks; ++block) {
        load(keys, block);
        if (block > 0) load(values, block - 1);
    }
    load(values, blocks - 1);
}

// 64 normed and rotated queries from number `first` on into `to`: pair i with i + 128, in float32. A thread takes 8 pairs of one
// head in 8 rows, 4 rows at a time to have their loads under way together.
DEVICE void load_queries(const bf16 *qkv, const float *inverse, const int *positions, const float *cosines, const float *sines, u32 to,
                         int first, int queries) {
    int chunk = threadIdx.x & 15, group = (threadIdx.x & 127) / 16;
#pragma unroll
    for (int batch = 0; batch < 64; batch += 32) {
        uint4 a[4], b[4];
        float4 c[4][2], s[4][2];
        float factor[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int query = min(first + batch + 8 * i + group, queries - 1), row = query / HEADS;
            const bf16 *q = qkv + (long long)row * QKV + query % HEADS * D + chunk * 8;
            long long angle = (long long)positions[row] * (D / 2) + chunk * 8;
            factor[i] = inverse[row];
            a[i] = *(const uint4 *)q, b[i] = *(const uint4 *)(q + D / 2);
#pragma unroll
            for (int j = 0; j < 2; ++j)
                c[i][j] = *(const float4 *)(cosines + angle + 4 * j), s[i][j] = *(const float4 *)(sines + angle + 4 * j);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 *x = &a[i].x, *y = &b[i].x;
            const float *cosine = &c[i][0].x, *sine = &s[i][0].x;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float x0 = low(x[j]), x1 = high(x[j]), y0 = low(y[j]), y1 = high(y[j]);
                float c0 = factor[i] * cosine[2 * j], c1 = factor[i] * cosine[2 * j + 1];
                float s0 = factor[i] * sine[2 * j], s1 = factor[i] * sine[2 * j + 1];
                x[j] = pack(x0 * c0 - y0 * s0, x1 * c1 - y1 * s1);
                y[j] = pack(y0 * c0 + x0 * s0, y1 * c1 + x1 * s1);
            }
            int m = batch + 8 * i + group;
            u32 at = to + chunk / 8 * TILE + m * 128 + ((chunk % 8 ^ m & 7) << 4);
            store_shared(at, a[i]);
            store_shared(at + 2 * TILE, b[i]);
        }
    }
}

// One thread's two rows (8 apart): running maximum (of logits times log2 e) and this thread's part of the sum.
struct Rows { float most[2], total[2]; };

// Logits s to probabilities; the sums so far shrink by `shrink`.
DEVICE void softmax(float (&s)[32], Rows &rows, float (&shrink)[2], u32 mask, float scale) {
    float most[2] = {rows.most[0], rows.most[1]};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        u32 pair;
        asm("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(mask + 16 * j));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            s[4 * j + i] = s[4 * j + i] * scale + (i & 1 ? high(pair) : low(pair));
            most[i / 2] = fmaxf(most[i / 2], s[4 * j + i]);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
        most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2));
        shrink[r] = exp2_fast(rows.most[r] - most[r]);
        rows.most[r] = most[r];
        rows.total[r] *= shrink[r];
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        s[2 * i] = exp2_fast(s[2 * i] - most[i & 1]), s[2 * i + 1] = exp2_fast(s[2 * i + 1] - most[i & 1]);
        rows.total[i & 1] += s[2 * i] + s[2 * i + 1];
    }
}

// Probabilities as pairs of bfloat16: just as wgmma wants its left operand.
DEVICE void to_operand(u32 (&p)[16], float (&s)[32]) {
    pin(s);  // not before the product that reads p is done
#pragma unroll
    for (int i = 0; i < 16; ++i) p[i] = pack(s[2 * i], s[2 * i + 1]);
}

// Logits of 64 queries and 64 keys; not waited for.
DEVICE void multiply_keys(float (&s)[32], u32 queries, u32 keys) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
        wgmma_64(s, tile_k_major(queries + k / 4 * TILE + k % 4 * 32), tile_k_major(keys + k / 4 * TILE + k % 4 * 32), k > 0);
    wgmma_commit();
}

// d += p times values; not waited for.
DEVICE void multiply_values(float (&d)[128], const u32 (&p)[16], u32 values) {
    pin(d);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < BLOCK / 16; ++k)
        wgmma_256_registers(d, {p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3]},
                            tile_mn_major(values + k * 16 * 128, TILE));
    wgmma_commit();
}

// This block's keys for 64 queries: d becomes the sums of probabilities times values. The two warpgroups take turns at
// the tensor cores: one issues the next block's logits and this block's sums while the other does its softmax.
DEVICE void attend(float (&d)[128], Rows &rows, u32 shared, u32 queries, int group, int blocks, float scale) {
    u32 full = shared + BARRIERS, empty = full + 8 * SLOTS, mask = shared + MASK + threadIdx.x % 4 * 4;
    bool speaks = (threadIdx.x & 127) == 0;
    Position at;
    auto wait = [&] { barrier_wait(full + 8 * at.slot, at.phase); return shared + RING + at.slot * SLOT_BYTES; };
    auto release = [&](int slot) { if (speaks) barrier_arrive(empty + 8 * slot); };
    float s[32], shrink[2];
    u32 p[16];
    if (group == 1) barrier_pass(TURN, 256);  // the first warpgroup's turn
    multiply_keys(s, queries, wait());
    wgmma_wait<0>();
    pin(s);
    release(at.slot);
    at.next();
    softmax(s, rows, shrink, mask, scale);
    to_operand(p, s);
    u32 ring = wait();
    for (int block = 1; block < blocks; ++block) {
        barrier_sync(TURN + group, 256);
        int keys = at.slot;
        multiply_keys(s, queries, ring);
        at.next();
        multiply_values(d, p, wait());
        barrier_pass(TURN + 1 - group, 256);
        wgmma_wait<1>();
        pin(s);
        release(keys);
        softmax(s, rows, shrink, mask + 2 * block * BLOCK, scale);
        int values = at.slot;
        at.next();
        ring = wait();  // a loop: the compiler does not move the softmax over it, away from under the running products
        wgmma_wait<0>();
        pin(d);
        release(values);
#pragma unroll
        for (int i = 0; i < 128; ++i) d[i] *= shrink[i >> 1 & 1];
        to_operand(p, s);
    }
    if (group == 0) barrier_sync(TURN, 256);  // takes up the other's last pass
    multiply_values(d, p, ring);
    wgmma_wait<0>();
    pin(d);
}

// Half GIVEN of the sums goes to the other block of the pair, the other half is finished here with what comes back.
template <int GIVEN> DEVICE void exchange(float (&d)[128], const Rows &rows, u32 shared, u32 queries, int group,
                                          const TensorMap *out, int first) {
    constexpr int KEPT = 1 - GIVEN;
    int thread = threadIdx.x & 127;
    u32 here = shared + EXCHANGE + group * EXCHANGE_BYTES + thread * 16, there = address_at(here, GIVEN);
    u32 arrived = shared + BARRIERS + 8 * (2 * SLOTS + group), their_barrier = address_at(arrived, GIVEN);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const float *from = d + GIVEN * 64 + 4 * i;
        store_at(there + i * 128 * 16, their_barrier, from[0], from[1], from[2], from[3]);
    }
    store_at(there + 16 * 128 * 16, their_barrier, rows.most[0], rows.most[1], rows.total[0], rows.total[1]);
    barrier_wait(arrived, 0);
    float4 other;
    auto read = [&](int i) {
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(other.x), "=f"(other.y), "=f"(other.z), "=f"(other.w)
                     : "r"(here + i * 128 * 16) : "memory");
    };
    read(16);
    float theirs_most[2] = {other.x, other.y}, theirs_total[2] = {other.z, other.w}, ours[2], theirs[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float most = fmaxf(rows.most[r], theirs_most[r]);
        ours[r] = exp2_fast(rows.most[r] - most), theirs[r] = exp2_fast(theirs_most[r] - most);
        float over = 1.0f / fmaxf(rows.total[r] * ours[r] + theirs_total[r] * theirs[r], 1.0e-30f);
        ours[r] *= over, theirs[r] *= over;
    }
#pragma unroll
    for (int block = 0; block < 16; block += 2) {
        u32 y[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float *mine = d + KEPT * 64 + 4 * (block + i);
            read(block + i);
            y[2 * i] = pack(mine[0] * ours[0] + other.x * theirs[0], mine[1] * ours[0] + other.y * theirs[0]);
            y[2 * i + 1] = pack(mine[2] * ours[1] + other.z * theirs[1], mine[3] * ours[1] + other.w * theirs[1]);
        }
        store_blocks(queries + block / 8 * TILE, thread / 32 * 16, block % 8, y[0], y[1], y[2], y[3]);
    }
    fence_async_proxy();
    barrier_sync(1 + group, 128);
    if (thread == 0) {
        tma_store(queries, out, KEPT * 128, first);
        tma_store(queries + TILE, out, KEPT * 128 + 64, first);
        tma_store_commit();
        tma_store_wait();
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
prefix_attention(const __grid_constant__ TensorMap keys, const __grid_constant__ TensorMap values,
                 const __grid_constant__ TensorMap out, const bf16 *qkv, const float *inverse, const unsigned char *valid,
                 const int *positions, const float *cosines, const float *sines, int rows, float scale) {
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 shared = shared_address(memory);
    int rank = cluster_rank(), group = warpgroup() - 1, all = (rows + BLOCK - 1) / BLOCK;
    int blocks = rank == 0 ? (all + 1) / 2 : all / 2, from = rank * ((all + 1) / 2) * BLOCK;
    if (threadIdx.x == 0) {
        for (int i = 0; i < SLOTS; ++i) {
            barrier_init(shared + BARRIERS + 8 * i, 1);
            barrier_init(shared + BARRIERS + 8 * (SLOTS + i), 2);
        }
        for (int i = 0; i < 2; ++i) {  // what the other block sends to each warpgroup
            barrier_init(shared + BARRIERS + 8 * (2 * SLOTS + i), 1);
            barrier_expect(shared + BARRIERS + 8 * (2 * SLOTS + i), EXCHANGE_BYTES);
        }
        barrier_init_done();
    }
    for (int i = threadIdx.x; i < blocks * BLOCK; i += 384)
        ((bf16 *)(memory + MASK))[i] = from + i < rows && valid[from + i] ? 0 : pack(NOTHING, 0.0f) & 0xffff;
    __syncthreads();
    if (group < 0) {
        set_registers_down<24>();
        if (threadIdx.x == 0) load_blocks(&keys, &values, shared, from, blocks);
        __syncwarp();
        cluster_meet();
    } else {
        set_registers_up<240>();
        u32 queries = shared + QUERIES + group * SLOT_BYTES;
        int first = blockIdx.x / 2 * 128 + group * 64;
        load_queries(qkv, inverse, positions, cosines, sines, queries, first, rows * HEADS);
        fence_async_proxy();
        barrier_sync(1 + group, 128);
        float d[128];
#pragma unroll
        for (int i = 0; i < 128; ++i) d[i] = 0.0f;
        Rows sums = {{NOTHING, NOTHING}, {0.0f, 0.0f}};
        attend(d, sums, shared, queries, group, blocks, scale);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            sums.total[r] += __shfl_xor_sync(~0u, sums.total[r], 1);
            sums.total[r] += __shfl_xor_sync(~0u, sums.total[r], 2);
        }
        cluster_meet();  // both blocks are done with their rings
        if (rank == 0) exchange<1>(d, sums, shared, queries, group, &out, first);
        else exchange<0>(d, sums, shared, queries, group, &out, first);
    }
}
