// Rows that the blocks of a grid norm together, beside what else they do. A warp takes job after job, so that who waits for
// all rows never waits for a block that does not run yet. counters: jobs taken, jobs done, blocks that left; zero before and
// after a launch.
#pragma once
#include "hopper.cuh"

constexpr int ROWS_A_JOB = 4;

DEVICE float squares(uint4 v) {
    const u32 *pair = &v.x;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += low(pair[j]) * low(pair[j]) + high(pair[j]) * high(pair[j]);
    return sum;
}

// 1 / rms of a row of N, to all lanes of a warp; from each lane's squares or from the row.
template <int N> DEVICE float inverse_rms(float sum) {
    constexpr float EPSILON = 1.0e-6f;
#pragma unroll
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
    return rsqrtf(sum / N + EPSILON);
}

template <int N> DEVICE float inverse_rms(const bf16 *row) {
    float sum = 0.0f;
#pragma unroll 4
    for (int i = (threadIdx.x & 31) * 8; i < N; i += 256) sum += squares(*(const uint4 *)(row + i));
    return inverse_rms<N>(sum);
}

// By one warp a block: returns when the factors of all rows can be read.
template <int N> DEVICE void norm_shared_rows(const bf16 *x, float *factors, int *counters, int rows) {
    int lane = threadIdx.x & 31, jobs = (rows + ROWS_A_JOB - 1) / ROWS_A_JOB;
    while (true) {
        int job = 0;
        if (lane == 0) job = atomicAdd(counters, 1);
        job = __shfl_sync(~0u, job, 0);
        if (job >= jobs) break;
#pragma unroll 1
        for (int row = job * ROWS_A_JOB; row < min(rows, (job + 1) * ROWS_A_JOB); ++row) {
            float factor = inverse_rms<N>(x + (long long)row * N);
            if (lane == 0) factors[row] = factor;
        }
        if (lane == 0) asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counters + 1) : "memory");
    }
    if (lane == 0) {
        int done;
        do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(done) : "l"(counters + 1) : "memory");
        while (done < jobs);
        if (atomicAdd(counters + 2, 1) == gridDim.x - 1) counters[0] = counters[1] = counters[2] = 0;
    }
    __syncwarp();
}
