// The expert's products: weights through the ring, activations from shared memory by way of registers, two warpgroups
// with half of k each. Then each keeps every second run of 8 tokens and swaps the others: a thread has whole sums of one.
#pragma once
#include "expert_shapes.cuh"

// The ring's next slot, for a worker.
struct Ring {
    u32 bars, slot, parity;
    __device__ __forceinline__ u32 wait() const {
        mbarrier_wait(bars + 8 * (FULL + slot), parity);
        return address();
    }
    __device__ __forceinline__ u32 address() const { return shared_address(shared + RING) + slot * SLOT; }
    __device__ __forceinline__ void advance() {
        if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
    // The slot before this one may be filled again.
    __device__ __forceinline__ void release_last() const {
        if (threadIdx.x % 32 == 0) mbarrier_arrive(bars + 8 * (EMPTY + (slot ? slot : SLOTS) - 1));
    }
};

// Slots of weights that this block has no part of: the ring takes the same turns in every block.
__device__ __forceinline__ Ring skip(Ring ring, int slots) {
#pragma unroll 1
    for (; slots; --slots) {
        ring.wait();
        ring.advance();
        ring.release_last();
    }
    return ring;
}

// The token whose sums this thread gets; it may be beyond TOKENS.
__device__ __forceinline__ int token_of_sums() {
    return threadIdx.x % 128 / 32 * 16 + threadIdx.x / 128 * 8 + threadIdx.x % 32 / 4;
}

// `slots` of K k each, N rows of the weight: `sums` of this thread's token are of rows 8 j + 2 q and the next, j < N / 8
// (layouts.py says what these are). `ready`: barriers of the activations, 128 features each, and their parities. With E4M3
// numbers are pairs of them: twice as many features, and half the k here.
template <int N, int K, bool E4M3>
__device__ __forceinline__ Ring product(Ring ring, int slots, u32 ready, float (&sums)[N / 4]) {
    const int group = threadIdx.x / 128;
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16 + threadIdx.x % 32 / 16 * TOKENS;
    const u32 rows = shared_address(shared + ACT) + row * 16;  // for ldmatrix: this lane's
    float d[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[i] = 0.f;
    uint4 a[2][4];  // 64 k, while the 64 before are multiplied
#pragma unroll 1
    for (int s = 0; s < slots; s += 256 / K)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bool fresh = K == 128 || half == 0;  // a slot begins
            const int slot = K == 128 ? s + half : s, chunk = K == 128 ? slot : 2 * slot + group;
            const int k = group * (K / 2) + (K == 128 ? 0 : half * 64);
            if (fresh) mbarrier_wait(ring.bars + 8 * chunk, ready >> chunk & 1);
#pragma unroll
            for (int i = 0; i < 4; ++i) a[half][i] = load_matrices(rows + (slot * K + k + 16 * i) * TOKENS * 2);
            const u32 w = (fresh ? ring.wait() : ring.address()) + k * N * 2;
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < 4; ++i) wgmma<N, E4M3>(d, a[half][i], operand(w + 16 * i * N * 2, N));
            wgmma_commit();
            if (slot || half) wgmma_wait<1>();
            if (fresh && slot) ring.release_last();
            if (K == 128 || half) ring.advance();
        }
    wgmma_wait<0>();
    ring.release_last();
    workers_sync();  // everyone has read the activations
    float2* swap = reinterpret_cast<float2*>(shared + ACT);
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
        swap[j * WORKERS + threadIdx.x] = group ? make_float2(d[4 * j], d[4 * j + 1]) : make_float2(d[4 * j + 2], d[4 * j + 3]);
    workers_sync();
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
        const float2 other = swap[j * WORKERS + (threadIdx.x ^ 128)];
        sums[2 * j] = (group ? d[4 * j + 2] : d[4 * j]) + other.x;
        sums[2 * j + 1] = (group ? d[4 * j + 3] : d[4 * j + 1]) + other.y;
    }
    return ring;
}
