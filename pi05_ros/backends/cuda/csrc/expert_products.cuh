// The expert's products: weights through the ring, activations from shared memory.
// A warp takes a part of the rows and a part of k; the parts are added in shared memory, in order.
#pragma once
#include "expert_shapes.cuh"

__device__ __forceinline__ const uint4& vector_at(const u8* p) { return *reinterpret_cast<const uint4*>(p); }

// The ring's next block of weights, for a worker: wait, read, give back.
struct Ring {
    u32 bars, slot, parity;
    __device__ __forceinline__ const u8* wait() const {
        mbarrier_wait(bars + 8 * (FULL + slot), parity);
        return shared + RING + slot * SLOT + threadIdx.x * 16;
    }
    __device__ __forceinline__ void release() {
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(bars + 8 * (EMPTY + slot));
        if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
};

// ---- q, k, v: 32 rows of the weight a block, an eighth of k a warp; rows are the product's 16, tokens its 8 ----
// The 32 rows' sums to [8 parts][TOKENS][36].
__device__ __forceinline__ void product_qkv(Ring& ring, const Place& at) {
    const u8* x = shared + ACT + at.warp * 4 * K32 + at.lane * 16;
    float acc[2][TOKEN_TILES][4] = {};
#pragma unroll 1
    for (int k = 0; k < 4; ++k, x += K32) {
        const u8* block = ring.wait();
        uint4 w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = vector_at(block + i * WORKERS * 16);
        ring.release();
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; ++t) {
            const uint4 b = vector_at(x + t * 512);
#pragma unroll
            for (int m = 0; m < 2; ++m) mma32<0>(acc[m][t], w[2 * m], w[2 * m + 1], b);
#pragma unroll
            for (int m = 0; m < 2; ++m) mma32<1>(acc[m][t], w[2 * m], w[2 * m + 1], b);
        }
    }
    workers_sync();  // everyone has read the activations, whose memory the sums take
    float* sums = reinterpret_cast<float*>(shared + ACT) + (at.warp * TOKENS + 2 * at.q) * 36 + at.r;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; ++t) {
            float* to = sums + t * 8 * 36 + m * 16;
            to[0] = acc[m][t][0], to[36] = acc[m][t][1], to[8] = acc[m][t][2], to[44] = acc[m][t][3];
        }
    workers_sync();
}
__device__ __forceinline__ float sum_qkv(int token, int row) {
    const float* sums = reinterpret_cast<const float*>(shared + ACT) + token * 36 + row;
    float total = 0.f;
#pragma unroll
    for (int part = 0; part < 8; ++part) total += sums[part * TOKENS * 36];
    return total;
}
__device__ __forceinline__ float2 qkv_bias_of(const Place& at, const float* bias) {
    const float* first = bias + at.cluster * HEAD_DIM + at.rank * 16 + at.lane % 16;
    return make_float2(first[0], first[HEAD_DIM / 2]);
}
// q and k turned, v as it is: q to `queries` [CLUSTERS][HEAD_DIM / 32][32 rows][32], k and v behind the prefix's.
// A block's 32 rows are 16 features and the 16 half a head further, their partners in the rotation.
__device__ __forceinline__ void store_qkv(const Place& at, const float* factors, float2 bias, const float2* rope,
                                          u16* queries, u16* keys, u16* values) {
    const int i = threadIdx.x % 16, feature = at.rank * 16 + i;
#pragma unroll 1
    for (int t = threadIdx.x / 16; t < HORIZON; t += WORKERS / 16) {
        float first = sum_qkv(t, i) * factors[t] + bias.x, second = sum_qkv(t, 16 + i) * factors[t] + bias.y;
        float2 turn = rope[t * 16 + i];
        u16 a = bf16(first * turn.x - second * turn.y), b = bf16(second * turn.x + first * turn.y);
        if (at.cluster < HEADS) {
            int row = at.cluster * HORIZON + t;
            u16* to = queries + (((row / ROWS) * 8 + feature / 32) * 32 + row % ROWS) * 32 + feature % 32;
            to[0] = a, to[4 * 32 * 32] = b;
        } else {
            u16* to = (at.cluster == HEADS ? keys : values) + t * HEAD_DIM + feature;
            to[0] = a, to[HEAD_DIM / 2] = b;
        }
    }
}

// ---- the others: COLUMNS rows of the weight a block; half of them (4 tiles of 8, and an extra one) and a quarter of the
// block's k a warp; tokens are the product's 16, the weight's rows its 8 ----
// `blocks` of 32 k for each quarter. Sums to [4 parts][TOKENS][SUM_ROW]. One function for three products: instructions
// that are read once a layer cost more than what they do.
__device__ __noinline__ Ring product(Ring ring, int blocks) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool extra = warp / 4 < EXTRA;
    const u8* x = shared + ACT + warp % 4 * blocks * K32 + lane * 16;
    float acc[ROW_TILES][5][4] = {};
#pragma unroll 1
    for (int k = 0; k < blocks; ++k, x += K32) {
        const u8* block = ring.wait();
        uint4 w[5];
#pragma unroll
        for (int n = 0; n < 4; ++n) w[n] = vector_at(block + n * WORKERS * 16);
        if (extra) w[4] = vector_at(block + 4 * WORKERS * 16);
        ring.release();
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
            const uint4 upper = vector_at(x + m * 1024), lower = vector_at(x + m * 1024 + 512);
#pragma unroll
            for (int n = 0; n < 4; ++n) mma32<0>(acc[m][n], upper, lower, w[n]);
            if (extra) mma32<0>(acc[m][4], upper, lower, w[4]);
#pragma unroll
            for (int n = 0; n < 4; ++n) mma32<1>(acc[m][n], upper, lower, w[n]);
            if (extra) mma32<1>(acc[m][4], upper, lower, w[4]);
        }
    }
    workers_sync();
    float* sums = reinterpret_cast<float*>(shared + ACT) + (warp % 4 * TOKENS + lane / 4) * SUM_ROW + 2 * (lane % 4);
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int n = 0; n < 5; ++n) {
            if (n == 4 && !extra) continue;
            float* to = sums + m * 16 * SUM_ROW + (n < 4 ? warp / 4 * 4 + n : 8 + warp / 4) * 8;
            *reinterpret_cast<float2*>(to) = make_float2(acc[m][n][0], acc[m][n][1]);
            if (m * 16 + 8 < TOKENS) *reinterpret_cast<float2*>(to + 8 * SUM_ROW) = make_float2(acc[m][n][2], acc[m][n][3]);
        }
    workers_sync();
    return ring;
}
template <typename T> __device__ __forceinline__ T sum_of(int token, int column);
template <> __device__ __forceinline__ float2 sum_of(int token, int column) {
    const float* sums = reinterpret_cast<const float*>(shared + ACT) + token * SUM_ROW + column;
    float2 total = make_float2(0.f, 0.f);
#pragma unroll
    for (int part = 0; part < 4; ++part) {
        float2 more = *reinterpret_cast<const float2*>(sums + part * TOKENS * SUM_ROW);
        total.x += more.x, total.y += more.y;
    }
    return total;
}
__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
template <> __device__ __forceinline__ float4 sum_of(int token, int column) {
    const float* sums = reinterpret_cast<const float*>(shared + ACT) + token * SUM_ROW + column;
    float4 total = *reinterpret_cast<const float4*>(sums);
#pragma unroll
    for (int part = 1; part < 4; ++part) total = total + *reinterpret_cast<const float4*>(sums + part * TOKENS * SUM_ROW);
    return total;
}

// Each block has the cluster's columns of every token, over its own part of k: every token to the block that owns it,
// then (lanes below COLUMNS / 4, 4 columns each) what came for this warp's token.
__device__ __forceinline__ float4 exchange_sums(const Place& at, u32 bar, u32& parity) {
    if (threadIdx.x == 0) mbarrier_expect(bar, CLUSTER * OWN * COLUMNS * 4);
#pragma unroll 2
    for (int item = threadIdx.x; item < TOKENS * (COLUMNS / 4); item += WORKERS) {
        int token = item / (COLUMNS / 4), column = item % (COLUMNS / 4) * 4;
        float4 total = sum_of<float4>(token, column);
        u32 to = shared_address(shared + INBOX) + ((at.rank * OWN + token % OWN) * COLUMNS + column) * 4;
        peer_store(peer_address(to, token / OWN), *reinterpret_cast<uint4*>(&total), peer_address(bar, token / OWN));
    }
    mbarrier_wait(bar, parity >> INBOX_BAR & 1);
    parity ^= 1 << INBOX_BAR;
    float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
    if (at.warp < OWN && at.lane < COLUMNS / 4)
#pragma unroll
        for (int from = 0; from < CLUSTER; ++from)
            total = total + reinterpret_cast<const float4*>(shared + INBOX)[(from * OWN + at.warp) * (COLUMNS / 4) + at.lane];
    return total;
}

// 1 / rms(x) of a token, from the clusters' sums of squares [CLUSTERS][TOKENS].
__device__ __forceinline__ float inverse_rms(const float* squares, int token) {
    float all[CLUSTERS], total = 0.f;
#pragma unroll
    for (int c = 0; c < CLUSTERS; ++c) all[c] = load_fresh(squares + c * TOKENS + token);
#pragma unroll
    for (int c = 0; c < CLUSTERS; ++c) total += all[c];
    return rsqrtf(total / WIDTH + EPS);
}
