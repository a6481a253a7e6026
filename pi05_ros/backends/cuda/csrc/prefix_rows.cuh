// What the prefix's attention reads of every row, prepared by the blocks together: 1 / rms of the row, its key normed, rotated
// and in the cache, its value normed and in the cache. A block takes 8 rows at a time, so that who waits for all rows never
// waits for a block that does not run yet. counters: parts taken, parts done, those that waited and left; zero before and after a launch.
// Defines: HEADS, QKV (columns of a row), WIDTH (of x).
#pragma once
#include "shared_rows.cuh"

struct PrefixRows {
    const bf16 *x, *qkv;  // x null: qkv is of normed rows, and the factor 1
    const int *positions;
    const float *cosines, *sines;
    bf16 *keys, *values;
    float *inverse;
    int *counters, rows;

    DEVICE int parts() const { return (rows + 7) / 8; }

    // Two rows by a warp, with all their loads under way together: lane l has columns 8 l to 8 l + 7 of key and value, and
    // lane l ^ 16 what they are paired with.
    DEVICE void prepare(const int (&row)[2]) const {
        constexpr int LOADS = (WIDTH + 255) / 256;
        int lane = threadIdx.x & 31;
        uint4 k[2], v[2], wide[2][LOADS];
        float4 c[2][2], s[2][2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int angle = positions[row[i]] * 128 + lane % 16 * 8;
            const bf16 *from = qkv + (long long)row[i] * QKV + HEADS * 256 + lane * 8;
            k[i] = *(const uint4 *)from, v[i] = *(const uint4 *)(from + 256);
#pragma unroll
            for (int j = 0; j < LOADS; ++j)
                wide[i][j] = x && j * 256 + lane * 8 < WIDTH ? *(const uint4 *)(x + (long long)row[i] * WIDTH + j * 256 + lane * 8)
                                                        : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int j = 0; j < 2; ++j)
                c[i][j] = *(const float4 *)(cosines + angle + 4 * j), s[i][j] = *(const float4 *)(sines + angle + 4 * j);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float factor = 1.0f, sign = lane < 16 ? -1.0f : 1.0f, sum = 0.0f;
#pragma unroll
            for (int j = 0; j < LOADS; ++j) sum += squares(wide[i][j]);
            if (x) factor = inverse_rms<WIDTH>(sum);
            u32 *key = &k[i].x, *value = &v[i].x;
            const float *cosine = &c[i][0].x, *sine = &s[i][0].x;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                u32 other = __shfl_xor_sync(~0u, key[j], 16);
                key[j] = pack(factor * (low(key[j]) * cosine[2 * j] + sign * low(other) * sine[2 * j]),
                              factor * (high(key[j]) * cosine[2 * j + 1] + sign * high(other) * sine[2 * j + 1]));
                value[j] = pack(factor * low(value[j]), factor * high(value[j]));
            }
            *(uint4 *)(keys + row[i] * 256 + lane * 8) = k[i];
            *(uint4 *)(values + row[i] * 256 + lane * 8) = v[i];
            if (lane == 0) inverse[row[i]] = factor;
        }
    }

    DEVICE int take() const { return atomicAdd(counters, 1); }

    // By the first 128 threads of a block, which meet at barrier `name`; `taken` is a word in shared memory, `part` what the
    // first of them took.
    DEVICE void share(u32 taken, int name, int part) const {
        int first = threadIdx.x / 32 * 2;
        while (true) {
            if (threadIdx.x == 0) asm volatile("st.shared.s32 [%0], %1;" ::"r"(taken), "r"(part) : "memory");
            barrier_sync(name, 128);
            asm volatile("ld.shared.s32 %0, [%1];" : "=r"(part) : "r"(taken) : "memory");
            if (part >= parts()) return;
            prepare({min(part * 8 + first, rows - 1), min(part * 8 + first + 1, rows - 1)});
            asm volatile("fence.proxy.async.global;" ::: "memory");  // TMA will read them
            barrier_sync(name, 128);
            if (threadIdx.x == 0) {
                part = take();
                asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counters + 1) : "memory");
            }
        }
    }

    // By who reads what all blocks wrote: returns when they have.
    DEVICE void wait() const {
        int done;
        do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(done) : "l"(counters + 1) : "memory");
        while (done < parts());
        asm volatile("fence.proxy.async.global;" ::: "memory");
    }
    // By a warp: 1 / rms of each of 128 queries' rows, when all are done.
    DEVICE void copy_norms(u32 to, int first) const {
        wait();
        for (int i = threadIdx.x % 32; i < 128; i += 32) {
            float factor;
            asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(factor) : "l"(inverse + min((first + i) / HEADS, rows - 1)) : "memory");
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + 4 * i), "f"(factor) : "memory");
        }
        __syncwarp();
    }

    // By both who waited: the last of all blocks' puts the counters back.
    DEVICE void leave() const {
        if (atomicAdd(counters + 2, 1) == 2 * gridDim.x - 1) counters[0] = counters[1] = counters[2] = 0;
    }
};
