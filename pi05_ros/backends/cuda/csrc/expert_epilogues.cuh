// What becomes of a product's sums, each straight from the registers of the thread that has it: queries, keys and values;
// the gated activation; a part of the residual's columns, which the cluster adds.
#pragma once
#include "expert_products.cuh"

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ __forceinline__ float4 four(const float* p, bool inside) {
    return inside ? *reinterpret_cast<const float4*>(p) : make_float4(0.f, 0.f, 0.f, 0.f);
}

// ---- activations: [features / 8][TOKENS][8], in FP8 [features / 16][TOKENS][16] ----
__device__ __forceinline__ u16* place(u16* to, int feature, int token) {
    return LOW ? to + (feature / 16 * TOKENS + token) * 8 + feature % 16 / 2 : to + (feature / 8 * TOKENS + token) * 8 + feature % 8;
}
// Four neighbours of a token, from a multiple of 4 on; in FP8 saturated.
__device__ __forceinline__ void store_four(u16* to, int feature, int token, float4 v) {
    to = place(to, feature, token);
    if (LOW) *reinterpret_cast<u32*>(to) = e4m3_pair(v.x, v.y) | (u32)e4m3_pair(v.z, v.w) << 16;
    else *reinterpret_cast<uint2*>(to) = make_uint2(bf16_pair(v.x, v.y), bf16_pair(v.z, v.w));
}

// ---- q, k, v: 32 rows of the weight a block ----
// q and k turned, v as it is: q to `queries` [CLUSTERS][HEAD_DIM / 32][32 rows][32], k and v behind the prefix's.
// A block's 32 rows are 16 features and the 16 half a head further, their partners in the rotation; a thread has 4 of
// each.
__device__ __forceinline__ void store_qkv(const Place& at, const float (&sums)[8], float factor, float4 bias,
                                          float4 bias_far, float4 cosine, float4 sine, u16* queries, u16* keys,
                                          u16* values) {
    const int t = token_of_sums(), feature = at.rank * 16 + 4 * at.q;
    if (t >= HORIZON) return;
    const float near[4] = {bias.x, bias.y, bias.z, bias.w}, far[4] = {bias_far.x, bias_far.y, bias_far.z, bias_far.w};
    const float c[4] = {cosine.x, cosine.y, cosine.z, cosine.w}, s[4] = {sine.x, sine.y, sine.z, sine.w};
    float a[4], b[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float first = sums[i] * factor + near[i], second = sums[4 + i] * factor + far[i];
        a[i] = first * c[i] - second * s[i], b[i] = second * c[i] + first * s[i];
    }
    u16* to = (at.cluster == HEADS ? keys : values) + t * HEAD_DIM + feature;
    int half = HEAD_DIM / 2;
    if (at.cluster < HEADS) {
        const int row = at.cluster * HORIZON + t;
        to = queries + (((row / ROWS) * 8 + feature / 32) * 32 + row % ROWS) * 32 + feature % 32;
        half = 4 * 32 * 32;
    }
    *reinterpret_cast<uint2*>(to) = make_uint2(bf16_pair(a[0], a[1]), bf16_pair(a[2], a[3]));
    *reinterpret_cast<uint2*>(to + half) = make_uint2(bf16_pair(b[0], b[1]), bf16_pair(b[2], b[3]));
}

// What a layer's FP8 sums are multiplied with: those of q, k, v; gate, up; over the input scale of `down`; down.
enum Scale { OF_QKV = 0, OF_GATE = 3, OF_UP = 4, OVER_HIDDEN = 5, OF_DOWN = 6 };
__device__ __forceinline__ float weight_scale(int layer, int which) {
    return LOW ? reinterpret_cast<const float*>(shared + SCALES)[layer % 2 * 8 + which] : 1.f;
}

// ---- gate and up: a thread has both of 8 neighbouring features, and of one more where a block has 36 ----
__device__ __forceinline__ float gelu_tanh(float x) {  // the logistic form: one exponential
    return x / (1.f + exp2_fast(-2.302208198f * (x + 0.044715f * x * x * x)));
}
__device__ __forceinline__ void store_hidden(const Place& at, const float (&sums)[COLUMNS / 4], float factor, int layer,
                                             const float2* bias, u16* hidden) {
    const int t = token_of_sums(), first = at.block * (COLUMNS / 2);
    const float of_gate = factor * weight_scale(layer, OF_GATE), of_up = factor * weight_scale(layer, OF_UP);
    const float over = weight_scale(layer, OVER_HIDDEN);
    auto value = [&](int j, int feature) {
        const float2 b = bias[feature];
        const float v = gelu_tanh(sums[2 * j] * of_gate + b.x) * (sums[2 * j + 1] * of_up + b.y);
        return LOW ? v * over : v;
    };
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
        const int feature = 8 * at.q + j;
        const float4 v = {value(j, feature), value(j + 1, feature + 1), value(j + 2, feature + 2), value(j + 3, feature + 3)};
        if (t < TOKENS && first + feature < MLP) store_four(hidden, first + feature, t, v);
    }
    if constexpr (COLUMNS == 72) {
        const float v = value(8, 32 + at.q), next = __shfl_down_sync(~0u, v, 1);
        if (t < TOKENS && at.q % 2 == 0 && first + 32 < MLP) {
            u16* to = place(hidden, first + 32 + at.q, t);
            if (LOW) *to = e4m3_pair(v, next);
            else *reinterpret_cast<u32*>(to) = bf16_pair(v, next);
        }
    }
}

// Each block has the cluster's columns of every token, over its own part of k: every token to the block that owns it, in
// bfloat16 (half the bytes: that is what it costs), then (lanes below COLUMNS / 4, 4 columns each) what came for this
// warp's token.
__device__ __forceinline__ float4 exchange_sums(const Place& at, const float (&sums)[COLUMNS / 4], u32 bar, u32 parity) {
    const int token = token_of_sums(), owner = token / OWN;
    if (threadIdx.x == 0) mbarrier_expect(bar, OUT_INBOX);
    if (token < TOKENS) {
        const u32 to = peer_address(shared_address(shared + INBOX) + (at.rank * OWN + token % OWN) * COLUMNS * 2, owner);
        const u32 tell = peer_address(bar, owner);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float* v = sums + 8 * h;
            const uint4 eight = {bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]), bf16_pair(v[4], v[5]), bf16_pair(v[6], v[7])};
            peer_store(to + (32 * h + 8 * at.q) * 2, eight, tell);
        }
        if constexpr (COLUMNS == 72) peer_store(to + (64 + 2 * at.q) * 2, bf16_pair(sums[16], sums[17]), tell);
    }
    mbarrier_wait(bar, parity >> INBOX_BAR & 1);
    float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
    if (at.warp < OWN && at.lane < COLUMNS / 4)
#pragma unroll 4
        for (int from = 0; from < CLUSTER; ++from) {
            const int place = (from * OWN + at.warp) * (COLUMNS / 4) + at.lane;
            const uint2 v = reinterpret_cast<const uint2*>(shared + INBOX)[place];
            const float2 low = floats(v.x), high = floats(v.y);
            total = total + make_float4(low.x, low.y, high.x, high.y);
        }
    return total;
}

// 1 / rms(x) of a token, from the clusters' sums of squares, their share of EPS among them, [CLUSTERS][TOKENS].
__device__ __forceinline__ float inverse_rms(const float* squares, int token) {
    float all[CLUSTERS], total = 0.f;
#pragma unroll
    for (int c = 0; c < CLUSTERS; ++c) all[c] = load_fresh(squares + c * TOKENS + token);
#pragma unroll
    for (int c = 0; c < CLUSTERS; ++c) total += all[c];
    return rsqrtf(total / WIDTH);
}
