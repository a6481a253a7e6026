// The expert's products: weights through the ring, activations from shared memory, two warpgroups with half of k each.
// Their sums go to shared memory, [2][TOKENS][a row], where the activations were.
#pragma once
#include "expert_shapes.cuh"

// The ring's next slot, for a worker.
struct Ring {
    u32 bars, slot, parity;
    __device__ __forceinline__ u32 wait() const {
        mbarrier_wait(bars + 8 * (FULL + slot), parity);
        return shared_address(shared + RING) + slot * SLOT;
    }
    __device__ __forceinline__ void advance() {
        if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
    // The slot before this one may be filled again.
    __device__ __forceinline__ void release_last() const {
        if (threadIdx.x % 32 == 0) mbarrier_arrive(bars + 8 * (EMPTY + (slot ? slot : SLOTS) - 1));
    }
};

// `slots` of K k each: sums [2][TOKENS][ROW] of N rows of the weight. `ready`: barriers of the activations, 128 features
// each, and their parities.
template <int N, int K, int ROW>
__device__ __forceinline__ Ring product(Ring ring, int slots, u32 ready) {
    const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
    const u32 act = shared_address(shared + ACT);
    float d[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[i] = 0.f;
#pragma unroll 1
    for (int s = 0; s < slots; ++s) {
#pragma unroll
        for (int i = 0; i < K / 128; ++i) mbarrier_wait(ring.bars + 8 * (s * (K / 128) + i), ready >> (s * (K / 128) + i) & 1);
        const u32 w = ring.wait() + group * (K / 2) * N * 2, x = act + (s * K + group * (K / 2)) * TOKENS * 2;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < K / 2; k += 16) wgmma<N>(d, operand(x + k * TOKENS * 2, TOKENS), operand(w + k * N * 2, N));
        wgmma_commit();
        if (s) {
            wgmma_wait<1>();
            ring.release_last();
        }
        ring.advance();
    }
    wgmma_wait<0>();
    ring.release_last();
    workers_sync();  // everyone has read the activations
    const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    float* sums = reinterpret_cast<float*>(shared + ACT) + (group * TOKENS + row) * ROW + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
        if (row < TOKENS) *reinterpret_cast<float2*>(sums + 8 * j) = make_float2(d[4 * j], d[4 * j + 1]);
        if (row + 8 < TOKENS) *reinterpret_cast<float2*>(sums + 8 * ROW + 8 * j) = make_float2(d[4 * j + 2], d[4 * j + 3]);
    }
    workers_sync();
    return ring;
}
template <typename T, int ROW> __device__ __forceinline__ const T& sum_at(int half, int token, int column) {
    return *reinterpret_cast<const T*>(shared + ACT + ((half * TOKENS + token) * ROW + column) * 4);
}
__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// ---- q, k, v: 32 rows of the weight a block ----
__device__ __forceinline__ float sum_qkv(int token, int row) {
    return sum_at<float, QKV_SUM_ROW>(0, token, row) + sum_at<float, QKV_SUM_ROW>(1, token, row);
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

// Each block has the cluster's columns of every token, over its own part of k: every token to the block that owns it,
// then (lanes below COLUMNS / 4, 4 columns each) what came for this warp's token.
__device__ __noinline__ float4 exchange_sums(int rank, u32 bar, u32 parity) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) mbarrier_expect(bar, CLUSTER * OWN * COLUMNS * 4);
#pragma unroll 1
    for (int item = threadIdx.x; item < TOKENS * (COLUMNS / 4); item += WORKERS) {
        int token = item / (COLUMNS / 4), column = item % (COLUMNS / 4) * 4;
        float4 total = sum_at<float4, SUM_ROW>(0, token, column) + sum_at<float4, SUM_ROW>(1, token, column);
        u32 to = shared_address(shared + INBOX) + ((rank * OWN + token % OWN) * COLUMNS + column) * 4;
        peer_store(peer_address(to, token / OWN), *reinterpret_cast<uint4*>(&total), peer_address(bar, token / OWN));
    }
    mbarrier_wait(bar, parity >> INBOX_BAR & 1);
    float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
    if (warp < OWN && lane < COLUMNS / 4)
#pragma unroll 4
        for (int from = 0; from < CLUSTER; ++from)
            total = total + reinterpret_cast<const float4*>(shared + INBOX)[(from * OWN + warp) * (COLUMNS / 4) + lane];
    return total;
}

// 1 / rms(x) of a token, from the clusters' sums of squares [CLUSTERS][TOKENS].
__device__ __noinline__ float inverse_rms(const float* squares, int token) {
    float all[CLUSTERS], total = 0.f;
#pragma unroll
    for (int c = 0; c < CLUSTERS; ++c) all[c] = load_fresh(squares + c * TOKENS + token);
#pragma unroll
    for (int c = 0; c < CLUSTERS; ++c) total += all[c];
    return rsqrtf(total / WIDTH + EPS);
}
