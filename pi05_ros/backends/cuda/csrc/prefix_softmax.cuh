// Softmax of the prefix's attention over blocks of keys: one thread's logits of a product, in two rows 8 apart.
#pragma once
#include "wgmma.cuh"

constexpr float NOTHING = -1.0e30f;  // added to logits of keys that nobody sees

// The logits' factor (with the query's norm and log2 e), the largest logit before it, and this thread's part of the sum.
struct Rows {
    float scale[2], most[2], total[2];
    DEVICE float exponent(int r, float nothing) const { return most[r] > 0.1f * NOTHING ? most[r] * scale[r] : nothing; }
};

// Whether any key of a block is masked: a byte says so for 32 keys.
template <int KEYS> DEVICE bool hidden_keys(u32 flags, int block) {
    unsigned short any = 0, flag;
#pragma unroll
    for (int i = 0; i < KEYS / 32; ++i) {
        asm("ld.shared.u8 %0, [%1];" : "=h"(flag) : "r"(flags + block * (KEYS / 32) + i));
        any |= flag;
    }
    return any != 0;
}

// Logits s to probabilities p, as wgmma wants its left operand; the sums so far shrink by `shrink`. `hides`: whether any of the keys is masked at all.
template <int N> DEVICE void softmax(float (&s)[N], u32 (&p)[N / 2], Rows &rows, float (&shrink)[2], bool hides, u32 mask) {
    if (hides) {
#pragma unroll
        for (int j = 0; j < N / 4; ++j) {
            u32 pair;
            asm("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(mask + 16 * j));
#pragma unroll
            for (int i = 0; i < 4; ++i) s[4 * j + i] += i & 1 ? high(pair) : low(pair);
        }
    }
    float most[2] = {rows.most[0], rows.most[1]}, less[2];
#pragma unroll
    for (int i = 0; i < N; ++i) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], s[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
        most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2));
        shrink[r] = exp2_fast((rows.most[r] - most[r]) * rows.scale[r]);
        rows.most[r] = most[r];
        rows.total[r] *= shrink[r];
        less[r] = rows.exponent(r, 0.0f);
    }
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        float x = exp2_fast(s[2 * i] * rows.scale[i % 2] - less[i % 2]), y = exp2_fast(s[2 * i + 1] * rows.scale[i % 2] - less[i % 2]);
        rows.total[i % 2] += x + y;
        p[i] = pack(x, y);
    }
}
