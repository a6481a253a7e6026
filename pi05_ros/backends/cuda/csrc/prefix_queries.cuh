// Queries of the prefix's attention on their way into shared memory. Defines: HEADS, QKV (columns of a row).
#pragma once
#include "hopper.cuh"

// 64 rotated queries of 256 from number `first` on into `to`, 4 swizzled tiles: pair i with i + 128, in float32. A thread takes
// 8 pairs of one head in 8 rows, 4 rows at a time to have their loads under way together.
DEVICE void load_queries(const bf16 *qkv, const int *positions, const float *cosines, const float *sines, u32 to, int first,
                         int queries) {
    constexpr int D = 256;
    constexpr u32 TILE = 64 * 128;
    int chunk = threadIdx.x & 15, group = (threadIdx.x & 127) / 16, position[8];
    auto number = [&](int i) { return min(first + 8 * i + group, queries - 1); };
#pragma unroll
    for (int i = 0; i < 8; ++i) position[i] = positions[number(i) / HEADS];
#pragma unroll
    for (int batch = 0; batch < 8; batch += 4) {
        uint4 a[4], b[4];
        float4 c[4][2], s[4][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int query = number(batch + i), angle = position[batch + i] * (D / 2) + chunk * 8;
            const bf16 *q = qkv + (long long)(query / HEADS) * QKV + query % HEADS * D + chunk * 8;
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
                float c0 = cosine[2 * j], c1 = cosine[2 * j + 1], s0 = sine[2 * j], s1 = sine[2 * j + 1];
                x[j] = pack(x0 * c0 - y0 * s0, x1 * c1 - y1 * s1);
                y[j] = pack(y0 * c0 + x0 * s0, y1 * c1 + x1 * s1);
            }
            int m = 8 * (batch + i) + group;
            u32 at = to + chunk / 8 * TILE + m * 128 + ((chunk % 8 ^ m & 7) << 4);
            store_shared(at, a[i]);
            store_shared(at + 2 * TILE, b[i]);
        }
    }
}
