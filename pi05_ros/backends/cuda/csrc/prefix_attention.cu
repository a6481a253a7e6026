// Prefix attention for Hopper: every valid row sees every valid row, all query heads share one key and value head, so
// the queries of all heads are one matrix [rows * HEADS, 256] against keys and values [rows, 256]. Queries are rotated
// (RoPE) on their way in, their norm (1 / rms of their row) is in the scale of their logits. Keys and values are prepared by
// all blocks together first (prefix_rows.cuh).
//
// A pair of blocks (a cluster) takes 128 queries, each block half of the keys. One warpgroup only loads (TMA into a ring);
// two hold 64 queries each and take turns at the tensor cores: one's products, of the last block's values and the next
// block's keys, run under the other's softmax. At the end each warpgroup and its like in the other block exchange halves
// of their sums in bfloat16, under the last product. Logits, sums and softmax in float32, exponents of 2.
// Defines: HEADS, QKV, WIDTH (prefix_rows.cuh), SHARED_BYTES. Launch: 384 threads, clusters of 2. At most 1024 rows.
#include "prefix_queries.cuh"
#include "prefix_ring.cuh"
#include "prefix_rows.cuh"
#include "prefix_softmax.cuh"

// Logits of 64 queries and the next block's keys; not waited for.
DEVICE void multiply_keys(float (&s)[BLOCK / 2], u32 queries, Ring &ring) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 keys = (u32)tile_k_major(ring.wait());
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 8; ++k)
            wgmma_128(s, tile_at(queries, (2 * half + k / 4) * TILE + k % 4 * 32), tile_at(keys, k / 4 * KEY_TILE + k % 4 * 32),
                       half + k > 0);
        wgmma_commit();
    }
}

// d += p times the next block's values.
DEVICE void multiply_values(float (&d)[128], const u32 (&p)[BLOCK / 4], Ring &ring) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 values = (u32)tile_mn_major(ring.wait(), VALUE_TILE);
        pin(d);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < BLOCK / 32; ++k) {
            const u32 *a = p + half * (BLOCK / 8) + 4 * k;
            wgmma_256_registers(d, {a[0], a[1], a[2], a[3]}, tile_at(values, k * 16 * 128));
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
    for (int k = 0; k < BLOCK / 16; ++k)
        wgmma_128_registers<HALF>(d, {p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3]},
                                  tile_at(k < BLOCK / 32 ? values : more, HALF * 2 * VALUE_TILE + k % (BLOCK / 32) * 16 * 128));
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
    float shrink[2];
    auto probabilities = [&](int block) {
        float s[BLOCK / 2];
        multiply_keys(s, queries, ring);
        barrier_pass(TURN + 1 - group, 256);
        wgmma_wait<1>();
        ring.release();
        wgmma_wait<0>();
        pin(s);
        ring.release();
        softmax(s, p, rows, shrink, hidden_keys<BLOCK>(ring.shared + HIDES, block), mask + 2 * block * BLOCK);
    };
    if (group == 1) barrier_pass(TURN, 256);  // the first warpgroup's turn
    barrier_sync(TURN + group, 256);
    probabilities(0);
    for (int block = 1; block < blocks; ++block) {
        barrier_sync(TURN + group, 256);
        multiply_values(d, p, ring);
        probabilities(block);
#pragma unroll
        for (int i = 0; i < 128; ++i) d[i] *= shrink[i >> 1 & 1];
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
    u32 values = (u32)tile_mn_major(ring.wait(), VALUE_TILE), more = (u32)tile_mn_major(ring.wait(), VALUE_TILE);
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
                 const __grid_constant__ TensorMap out, const bf16 *x, const bf16 *qkv, const int *positions,
                 const float *cosines, const float *sines, bf16 *key_cache, bf16 *value_cache, float *inverse, int *counters,
                 const unsigned char *valid, int rows, float scale) {
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 shared = shared_address(memory);
    int rank = cluster_rank(), group = warpgroup() - 1, half = (rows + 31) / 32 * 16;  // of the keys, whole steps of 16
    int from = rank * half, count = rank == 0 ? half : rows - half, blocks = (count + BLOCK - 1) / BLOCK;
    PrefixRows all = {x, qkv, positions, cosines, sines, key_cache, value_cache, inverse, counters, rows};
    int part = 0;
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
        barrier_init(shared + NORMED, 1);
        barrier_init_done();
        prefetch_map(&keys);
        prefetch_map(&values);
        prefetch_map(&out);
    }
    __syncthreads();
    wait_for_grid();
    let_next_grid();
    if (threadIdx.x == 0) part = all.take();
    cluster_arrive();  // this block's barriers may be told
    if (group < 0) {
        all.share(shared + TAKEN, LOADERS, part);
        set_registers_down<40>();
        if (threadIdx.x == 0) {
            all.wait();
            load_blocks(&keys, &values, shared, from, blocks, rank);
            all.leave();
        } else if (threadIdx.x / 32 == 1) {
            all.copy_norms(shared + NORMS, blockIdx.x / 2 * 128);
            if (threadIdx.x == 32) barrier_arrive(shared + NORMED), all.leave();
        }
        __syncwarp();
        cluster_wait();
    } else {
        u32 queries = shared + group * QUERIES_BYTES, p[BLOCK / 4];
        int first = blockIdx.x / 2 * 128 + group * 64, thread = threadIdx.x & 127;
        bool hidden[MOST_KEYS / 256];
#pragma unroll
        for (int j = 0; j < MOST_KEYS / 256; ++j) {
            int i = threadIdx.x - 128 + 256 * j;
            hidden[j] = i >= count || !valid[from + i];
        }
        load_queries(qkv, positions, cosines, sines, queries, first, rows * HEADS);
#pragma unroll
        for (int j = 0; j < MOST_KEYS / 256; ++j) {
            int i = threadIdx.x - 128 + 256 * j;
            ((bf16 *)(memory + MASK))[i] = hidden[j] ? pack(NOTHING, 0.0f) & 0xffff : 0;
            bool any = __any_sync(~0u, hidden[j]);
            if (thread % 32 == 0) memory[HIDES + i / 32] = any;
        }
        set_registers_up<232>();
        Rows sums = {{scale, scale}, {NOTHING, NOTHING}, {0.0f, 0.0f}};
        fence_async_proxy();
        cluster_wait();
        barrier_sync(TURN, 256);
        float d[128];
#pragma unroll
        for (int i = 0; i < 128; ++i) d[i] = 0.0f;
        Ring ring = {shared};
        barrier_wait(shared + NORMED, 0);
#pragma unroll
        for (int r = 0; r < 2; ++r) sums.scale[r] *= ((float *)(memory + NORMS))[group * 64 + thread / 32 * 16 + thread % 32 / 4 + 8 * r];
        attend(d, p, sums, ring, (u32)tile_k_major(queries), group, blocks);
        if (thread == 0) barrier_arrive_at(shared + READY + 8 * group, 1 - cluster_rank());
        finish(d, p, ring, sums, shared, queries, group, &out, first);
    }
}
