// Attention of a cluster's query rows (any heads and tokens: they share one key head), an eighth of the keys a block; the
// cluster adds its parts through shared memory.
#pragma once
#include "expert_shapes.cuh"

// A block's keys: an eighth of the prefix's, then an eighth of the action tokens' own, which come last: few are best.
struct Part {
    int first, before, count;  // rows first.. of the prefix are keys 0.. `before`; then the action tokens own..
    int own;
};

__device__ __forceinline__ Part part_of_keys(const Place& at, int prefix) {
    const int share = (prefix + CLUSTER - 1) / CLUSTER;
    const int first = min(at.rank * share, prefix), before = min(share, prefix - first);
    return {first, before, before + max(0, min(OWN, HORIZON - at.rank * OWN)), at.rank * OWN};
}

// Rows from `row` on, as keys `from` to `to` [HEAD_DIM / 32][KEYS][32], and values by row.
__device__ __forceinline__ void fetch(const u16* keys, const u16* values, int row, int from, int to) {
    const int lane = threadIdx.x % 32;
    u32 key = shared_address(shared + KEY_TILE) + lane / 4 * (KEYS * 64) + lane % 4 * 16;
    const u32 swap = lane / 4 % 2 * 64;  // neighbours change places in every second tile of 32: other banks
    u32 value = shared_address(shared + VALUE_TILE) + lane * 16;
#pragma unroll 1
    for (int n = from + threadIdx.x / 32; n < to; n += WORKERS / 32) {
        const int at = (row + n - from) * HEAD_DIM + lane * 8;
        copy_async(key + (n * 64 ^ swap), keys + at);
        copy_async(value + n * VALUE_ROW, values + at);
    }
}
// Which keys this thread's products may see: bit 2 n + i for key 8 n + 2 q + i of its warp's quarter.
__device__ __forceinline__ u32 seen_keys(const Place& at, const Part& part, int prefix, const u8* valid) {
    u32 seen = 0;
    for (int j = 0; j < 8; ++j) {
        int n = at.warp % 4 * 32 + j / 2 * 8 + 2 * at.q + j % 2;
        int row = n < part.before ? part.first + n : prefix + part.own + n - part.before;
        if (n < part.count && valid[row]) seen |= 1u << j;
    }
    return seen;
}

// Queries in QUERIES, keys and values in their tiles: the weighted values (not divided) to OUTPUT, bfloat16, and each
// row's maximum and sum to ROW_STATS.
__device__ __forceinline__ void attend(const Place& at, int count, u32 seen, u32 keys_read) {
    const int tile = at.warp / 4, quarter = at.warp % 4;  // 16 rows; a quarter of the keys, then of HEAD_DIM
    const bool active = tile * 16 < ROWS;
    float* most = reinterpret_cast<float*>(shared + ROW_STATS);
    float* total = most + 4 * 32;
    const int row = tile * 16 + at.r;
    float s[4][4] = {};
    if (active) {
        const u8* q = shared + QUERIES + tile * 1024 + at.lane * 16;
        const u8* k = shared + KEY_TILE + quarter * 32 * 64;
#pragma unroll 1
        for (int kb = 0; kb < HEAD_DIM / 32; ++kb) {
            const uint4 upper = *reinterpret_cast<const uint4*>(q + kb * 2048);
            const uint4 lower = *reinterpret_cast<const uint4*>(q + kb * 2048 + 512);
            uint4 key[4];
#pragma unroll
            for (int n = 0; n < 4; ++n)
                key[n] = *reinterpret_cast<const uint4*>(k + kb * KEYS * 64 + n * 512 + (at.lane * 16 ^ kb % 2 * 64));
#pragma unroll
            for (int n = 0; n < 4; ++n) mma32<0>(s[n], upper, lower, key[n]);
#pragma unroll
            for (int n = 0; n < 4; ++n) mma32<1>(s[n], upper, lower, key[n]);
        }
        float high[2] = {-1e30f, -1e30f};
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[n][i] = seen >> (2 * n + i % 2) & 1 ? s[n][i] * (1.4426950408889634f / 16.f) : -1e30f;  // 2^x instead of e^x; 16 = sqrt(256)
                high[i / 2] = fmaxf(high[i / 2], s[n][i]);
            }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            high[i] = fmaxf(high[i], __shfl_xor_sync(~0u, high[i], 1));
            high[i] = fmaxf(high[i], __shfl_xor_sync(~0u, high[i], 2));
            if (at.q == 0) most[quarter * 32 + row + 8 * i] = high[i];
        }
    }
    __syncwarp();
    if (at.lane == 0) mbarrier_arrive(keys_read);  // weights may come into the ring again
    // Values that no weight takes, in the last 16: finite, at least.
    for (int n = count + at.warp; n < (count + 15) / 16 * 16; n += WORKERS / 32)
        *reinterpret_cast<uint4*>(shared + VALUE_TILE + n * VALUE_ROW + at.lane * 16) = make_uint4(0, 0, 0, 0);
    workers_sync();
    if (active) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float high = -1e30f, sum = 0.f;
#pragma unroll
            for (int part = 0; part < 4; ++part) high = fmaxf(high, most[part * 32 + row + 8 * i]);
            u8* weights = shared + WEIGHTS + (row + 8 * i) * WEIGHTS_ROW + quarter * 64 + at.q * 4;
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                float a = s[n][2 * i] > -1e29f ? exp2_fast(s[n][2 * i] - high) : 0.f;
                float b = s[n][2 * i + 1] > -1e29f ? exp2_fast(s[n][2 * i + 1] - high) : 0.f;
                sum += a + b;
                *reinterpret_cast<u32*>(weights + n * 16) = bf16_pair(a, b);
            }
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if (at.q == 0) total[quarter * 32 + row + 8 * i] = sum;
        }
    }
    workers_sync();
    if (!active) return;
    float o[8][4] = {};
    const u8* weights = shared + WEIGHTS + row * WEIGHTS_ROW + at.q * 4;
    u32 values = shared_address(shared + VALUE_TILE) + (at.lane % 16) * VALUE_ROW + quarter * 128 + at.lane / 16 * 16;
#pragma unroll 1
    for (int k = 0; k < (count + 15) / 16; ++k) {
        u32 a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            a[i] = *reinterpret_cast<const u32*>(weights + i % 2 * 8 * WEIGHTS_ROW + k * 32 + i / 2 * 16);
#pragma unroll
        for (int d = 0; d < 4; ++d) {
            uint4 v = load_transposed(values + k * 16 * VALUE_ROW + d * 32);
            mma(o[2 * d], a[0], a[1], a[2], a[3], v.x, v.y);
            mma(o[2 * d + 1], a[0], a[1], a[2], a[3], v.z, v.w);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        u8* to = shared + OUTPUT + (row + 8 * i) * OUTPUT_ROW + quarter * 128 + at.q * 4;
#pragma unroll
        for (int d = 0; d < 8; ++d) *reinterpret_cast<u32*>(to + d * 16) = bf16_pair(o[d][2 * i], o[d][2 * i + 1]);
    }
}

// Every row's part to the block of the cluster that owns the row, a warp a row; there the 8 parts are added, in order,
// divided, and stored as activations of their head: `attended`.
__device__ __forceinline__ void exchange_attended(const Place& at, u16* attended, u32 bar, u32& parity) {
    const int owned = max(0, min(OWN_ROWS, ROWS - at.rank * OWN_ROWS));
    if (threadIdx.x == 0 && owned) mbarrier_expect(bar, CLUSTER * owned * (HEAD_DIM * 2 + 8));
    const float* stats = reinterpret_cast<const float*>(shared + ROW_STATS);
#pragma unroll 1
    for (int row = at.warp; row < ROWS; row += WORKERS / 32) {
        u32 slot = at.rank * OWN_ROWS + row % OWN_ROWS, owner = row / OWN_ROWS;
        uint4 v = *reinterpret_cast<const uint4*>(shared + OUTPUT + row * OUTPUT_ROW + at.lane * 16);
        peer_store(peer_address(shared_address(shared + INBOX) + slot * HEAD_DIM * 2 + at.lane * 16, owner), v, peer_address(bar, owner));
        float most = fmaxf(fmaxf(stats[row], stats[32 + row]), fmaxf(stats[64 + row], stats[96 + row]));
        float total = stats[128 + row] + stats[160 + row] + stats[192 + row] + stats[224 + row];
        if (at.lane == 0)
            peer_store(peer_address(shared_address(shared + STATS) + slot * 8, owner), make_float2(most, total),
                       peer_address(bar, owner));
    }
    if (owned == 0) return;
    mbarrier_wait(bar, parity >> INBOX_BAR & 1);
    parity ^= 1 << INBOX_BAR;
    const int own = at.rank * OWN_ROWS + at.warp, row = at.cluster * ROWS + own;
    if (at.warp >= OWN_ROWS || own >= ROWS || row >= HEADS * HORIZON) return;
    const float2* parts = reinterpret_cast<const float2*>(shared + STATS);
    float most = -1e30f, total = 0.f, sums[8] = {};
#pragma unroll
    for (int from = 0; from < CLUSTER; ++from) most = fmaxf(most, parts[from * OWN_ROWS + at.warp].x);
#pragma unroll 2
    for (int from = 0; from < CLUSTER; ++from) {
        float2 part = parts[from * OWN_ROWS + at.warp];
        float weight = exp2_fast(part.x - most);
        total += weight * part.y;
        uint4 v = reinterpret_cast<const uint4*>(shared + INBOX)[(from * OWN_ROWS + at.warp) * 32 + at.lane];
        const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float2 two = floats(pairs[i]);
            sums[2 * i] += weight * two.x, sums[2 * i + 1] += weight * two.y;
        }
    }
    const float over = 1.f / fmaxf(total, 1e-30f);
    u32 v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = bf16_pair(sums[2 * i] * over, sums[2 * i + 1] * over);
    const int head = row / HORIZON, token = row % HORIZON;
    reinterpret_cast<uint4*>(attended)[(head * (HEAD_DIM / 8) + at.lane) * TOKENS + token] =
        make_uint4(v[0], v[1], v[2], v[3]);
}
