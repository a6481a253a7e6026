// The ends of product.cu: the norm of the rows that were read, and what becomes of a product's sums. Included by it, behind its
// sizes.
#pragma once
#include "wgmma.cuh"

struct Tile { int row, column, sharer, split; };

struct Sums { const float2 *at; int parts; };  // float2 [parts, stride]

// 1 / deviation and mean of a row of the residual.
DEVICE float2 norm_of(Sums sums, int stride, int row, float eps) {
    constexpr float OVER = 1.0f / (NORM ? K : F);
    float sum = 0.0f, squares = 0.0f;
#pragma unroll 4
    for (int part = 0; part < sums.parts; ++part) {
        float2 s = sums.at[(long long)part * stride + row];
        sum += s.x, squares += s.y;
    }
    float mean = sum * OVER;
    return make_float2(rsqrtf(fmaxf(squares * OVER - mean * mean, 0.0f) + eps), mean);
}

// For the epilogue, of every row: with NORM what x W^T is multiplied with, and c W^T; else the unit it is rounded in. By 96
// threads, under the products.
DEVICE void row_norms(float2 *norms, Sums sums, Sums before, int stride, int rows, int first, float eps, float factor) {
    wait_for_grid();
    for (int i = threadIdx.x - 32; i < ROWS; i += 96) {
        int row = min(first + i, rows - 1);
        float2 n = norm_of(sums, stride, row, eps);
        if (!NORM) norms[i].x = n.x * ROOM;
        else norms[i] = make_float2(E4M3 ? n.x / (norm_of(before, stride, row, eps).x * ROOM) * factor : n.x, -n.y * n.x);
    }
}

DEVICE float activated(float v) {  // gelu_tanh
    if (!GELU) return v;
    float half = 0.5f * v, t;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(v * (0.7978845608f + 0.0356774081f * v * v)));
    return half + half * t;
}

template <bool> struct Out { typedef u32 Pair; typedef uint4 Eight; };  // numbers of out
template <> struct Out<true> { typedef unsigned short Pair; typedef uint2 Eight; };
typedef Out<NARROW>::Pair Pair;
typedef Out<NARROW>::Eight Eight;

DEVICE Pair pair_of(float low, float high) {
    if (!NARROW) return pack(low, high);
    unsigned short both;  // saturated
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(high), "f"(low));
    return both;
}

// y + bias, normed and activated, to out; through shared memory, so that rows are written whole.
DEVICE void leave(float (&d)[COLUMNS / 2], unsigned char *memory, Tile tile, int rows, bf16 *out, float over) {
    constexpr int BATCH = 5;  // blocks of 8 columns under way together
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32 - 4;
    const float4 *table = (const float4 *)(memory + TABLE) + (lane & 3);  // {bias, c W^T} of two columns
    const float2 *norms = (const float2 *)(memory + NORMS) + warp * 16 + lane / 4;
    unsigned char *staging = memory + warp * 16 * PITCH;
    Pair *mine = (Pair *)(staging + lane / 4 * PITCH) + (lane & 3);
    float2 norm[2] = {{1.0f, 0.0f}, {1.0f, 0.0f}};
    if (NORM) norm[0] = norms[0], norm[1] = norms[8];
#pragma unroll
    for (int first = 0; first < CHUNKS; first += BATCH) {
        float4 t[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            if (first + i < CHUNKS) t[i] = table[4 * (first + i)];
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                if (first + i < CHUNKS) {
                    float a = d[4 * (first + i) + 2 * h] * norm[h].x + (norm[h].y * t[i].y + t[i].x);
                    float b = d[4 * (first + i) + 2 * h + 1] * norm[h].x + (norm[h].y * t[i].w + t[i].z);
                    float by = NARROW ? over : 1.0f;
                    d[4 * (first + i) + 2 * h] = __uint_as_float(pair_of(activated(a) * by, activated(b) * by));
                }
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                if (first + i < CHUNKS) mine[h * (8 * PITCH / sizeof(Pair)) + (first + i) * 4] = __float_as_uint(d[4 * (first + i) + 2 * h]);
    }
    __syncwarp();
#pragma unroll
    for (int first = 0; first < 16 * CHUNKS; first += 32 * BATCH) {
        Eight v[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            int at = first + i * 32 + lane;
            if (at < 16 * CHUNKS) v[i] = *(Eight *)(staging + at / CHUNKS * PITCH + at % CHUNKS * sizeof(Eight));
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            int at = first + i * 32 + lane, row = tile.row + warp * 16 + at / CHUNKS, column = tile.column + at % CHUNKS * 8;
            if (at < 16 * CHUNKS && row < rows && column < F) ((Eight *)out)[((long long)row * OUT + column) / 8] = v[i];
        }
    }
}

// A half warp's share of the residual: row 2 i + lane / 16 of the warp's 16, columns 64 j + lane % 16 * 4 on.
struct Residual { float4 x[WIDE][8], bias[WIDE], scale[WIDE]; };

DEVICE int column_of(int j) { return 64 * j + (threadIdx.x & 15) * 4; }

DEVICE void fetch(Residual &r, Tile tile, const float2 *table, const float *residual, int rows) {
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32 - 4;
#pragma unroll
    for (int j = 0; j < WIDE; ++j) {
        int c = column_of(j), column = tile.column + tile.split * KEPT + c;
        bool inside = c < KEPT && column < F;
        float4 b[2] = {};
        if (inside) b[0] = *(const float4 *)(table + column), b[1] = *(const float4 *)(table + column + 2);
        r.bias[j] = make_float4(b[0].x, b[0].z, b[1].x, b[1].z);
        r.scale[j] = make_float4(b[0].y, b[0].w, b[1].y, b[1].w);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            int row = tile.row + warp * 16 + 2 * i + lane / 16;
            r.x[j][i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (inside && row < rows) r.x[j][i] = *(const float4 *)(residual + (long long)row * F + column);
        }
    }
}

// The KEPT columns from `first` on into the residual; those of the other block of the tile go there.
template <int first> DEVICE void leave_residual(float (&d)[COLUMNS / 2], Residual &r, unsigned char *memory, u32 shared, Tile tile,
                                                int rows, int stride, float *residual, bf16 *out, float2 *sums, float factor) {
    int thread = threadIdx.x - 128, lane = threadIdx.x & 31, warp = thread / 32;
    unsigned char *staging = memory + warp * 16 * KEPT_PITCH;
    float *mine = (float *)(staging + lane / 4 * KEPT_PITCH) + (lane & 3) * 2;
    const float4 *others = (const float4 *)(memory + EXCHANGE) + thread;
    const float2 *norms = (const float2 *)(memory + NORMS) + warp * 16 + lane / 16;
    if (SPLIT > 1) {
        constexpr int theirs = KEPT / 2 - first / 2;
        u32 peer = SHARING * (1 - tile.split) + tile.sharer, arrived = shared + BARRIERS + 16 * STAGES;
        u32 there = address_at(shared + EXCHANGE + thread * 16, peer), told = address_at(arrived, peer);
#pragma unroll
        for (int i = 0; i < KEPT / 8; ++i) {
            float *v = d + theirs + 4 * i;
            store_at(there + i * 256 * 16, told, v[0], v[1], v[2], v[3]);
        }
        barrier_wait(arrived, 0);
    }
#pragma unroll
    for (int i = 0; i < KEPT / 8; ++i) {
        float *v = d + first / 2 + 4 * i;
        float4 o = SPLIT > 1 ? others[i * 256] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        *(float2 *)(mine + 8 * i) = make_float2(v[0] + o.x, v[1] + o.y);
        *(float2 *)(mine + 8 * i + 8 * KEPT_PITCH / 4) = make_float2(v[2] + o.z, v[3] + o.w);
    }
    __syncwarp();
    float sum[8] = {}, squares[8] = {};
#pragma unroll
    for (int j = 0; j < WIDE; ++j) {
        int c = column_of(j), column = tile.column + tile.split * KEPT + c;
        bool inside = c < KEPT && column < F;
        float4 y[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) y[i] = *(float4 *)(staging + (2 * i + lane / 16) * KEPT_PITCH + (c < KEPT ? c : 0) * 4);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            int row = tile.row + warp * 16 + 2 * i + lane / 16;
            float by = E4M3 ? factor : 1.0f, unit = NARROW ? norms[2 * i].x : 1.0f;
            float4 x = r.x[j][i], b = r.bias[j], c = r.scale[j];
            float4 v = {x.x + y[i].x * by + b.x, x.y + y[i].y * by + b.y, x.z + y[i].z * by + b.z, x.w + y[i].w * by + b.w};
            if (inside && row < rows) {
                long long at = (long long)row * F + column;
                *(float4 *)(residual + at) = v;
                u32 low = pair_of(v.x * c.x * unit, v.y * c.y * unit), high = pair_of(v.z * c.z * unit, v.w * c.w * unit);
                if (NARROW) ((u32 *)out)[at / 4] = low | high << 16;
                else ((uint2 *)out)[at / 4] = make_uint2(low, high);
                sum[i] += v.x + v.y + v.z + v.w, squares[i] += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int other = 1; other < 16; other *= 2) {
            sum[i] += __shfl_xor_sync(~0u, sum[i], other);
            squares[i] += __shfl_xor_sync(~0u, squares[i], other);
        }
        int row = tile.row + warp * 16 + 2 * i + lane / 16;
        if (lane % 16 == 0 && row < rows)
            sums[(long long)(tile.column / COLUMNS * SPLIT + tile.split) * stride + row] = make_float2(sum[i], squares[i]);
    }
}
