// The residual of this warp's token, 4 columns a lane, and the ends of a denoising step: actions to the residual, the
// residual to a velocity. Float32 throughout.
#pragma once
#include "expert_epilogues.cuh"

struct Residual {
    float4 x;
    float unit;         // in FP8: what x is multiplied with to be rounded
    int token, column;  // the first of 4
    bool owns, inside;  // this warp a token; this lane columns of it
};
// Of this cluster's columns, with their share of EPS.
__device__ __forceinline__ float squared(float4 x) {
    return warp_sum(x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w) + EPS * WIDTH / CLUSTERS;
}
// FP8 keeps its precision over 14 powers of two, so a token's last rms will do as its scale, before anyone knows the new
// one: it becomes 1/8, and what is 3600 times as large is saturated. The same in every cluster; rms(unit x) takes it out.
constexpr float ROOM = 0.125f, MOST_UNIT = 1e6f;
__device__ __forceinline__ void renew_unit(Residual& x, const float* factors) {
    if (LOW) x.unit = fminf(x.unit * factors[x.token] * ROOM, MOST_UNIT);
}
// Before the first layer: rms(x), as if its inputs x_t were independent. `entry`: mean squares of W_in a dimension of
// x_t, and of b.
__device__ __forceinline__ void first_unit(Residual& x, float x_t, const float* entry) {
    if (LOW) x.unit = fminf(rsqrtf(entry[0] * warp_sum(x_t * x_t) + entry[1]) * ROOM, MOST_UNIT);
}

// x += gate * sum * scale
__device__ __forceinline__ void add(Residual& x, float4 gate, float4 sum, float scale = 1.f) {
    x.x.x += gate.x * scale * sum.x, x.x.y += gate.y * scale * sum.y;
    x.x.z += gate.z * scale * sum.z, x.x.w += gate.w * scale * sum.w;
}
// (1 + scale) x and the sum of squares of x, for everyone; in FP8 times its unit.
__device__ __forceinline__ void publish(const Place& at, const Residual& x, float4 scale, u16* act, float* squares) {
    if (!x.owns) return;
    const float unit = LOW ? x.unit : 1.f;
    if (x.inside)
        store_four(act, x.column, x.token, make_float4(scale.x * x.x.x * unit, scale.y * x.x.y * unit,
                                                       scale.z * x.x.z * unit, scale.w * x.x.w * unit));
    float square = squared(x.x) * (unit * unit);
    if (at.lane == 0) squares[at.cluster * TOKENS + x.token] = square;
}
// x_t W_in^T + b; lane a holds x_t[a]. Zero for tokens that pad.
__device__ __forceinline__ void enter(Residual& x, float x_t, const float* weight, const float* bias) {
    float4 sum = four(bias + x.column, x.inside);
#pragma unroll 8  // loads at once: each takes as long as all
    for (int a = 0; a < ACTION_DIM; ++a) {
        float4 w = four(weight + a * WIDTH + x.column, x.inside);
        float v = __shfl_sync(~0u, x_t, a);
        sum.x += v * w.x, sum.y += v * w.y, sum.z += v * w.z, sum.w += v * w.w;
    }
    x.x = x.token < HORIZON ? sum : make_float4(0.f, 0.f, 0.f, 0.f);
}
// This cluster's columns' share of (1 + scale) x W_out^T: [CLUSTERS][TOKENS][32], and of the sum of squares.
__device__ __forceinline__ void leave(const Place& at, const Residual& x, float4 scale, const float* weight,
                                      float* velocities, float* squares) {
    if (!x.owns) return;
    const float* w = weight + at.cluster * COLUMNS * ACTION_DIM + at.lane;
    const int columns = min(COLUMNS, WIDTH - at.cluster * COLUMNS);
    float sum = 0.f;
#pragma unroll 6
    for (int c = 0; c < COLUMNS / 4; ++c, w += 4 * ACTION_DIM) {
        float v[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (4 * c < columns) v[i] = w[i * ACTION_DIM];
        sum += __shfl_sync(~0u, scale.x * x.x.x, c) * v[0] + __shfl_sync(~0u, scale.y * x.x.y, c) * v[1] +
               __shfl_sync(~0u, scale.z * x.x.z, c) * v[2] + __shfl_sync(~0u, scale.w * x.x.w, c) * v[3];
    }
    int row = at.cluster * TOKENS + x.token;
    velocities[row * ACTION_DIM + at.lane] = sum;
    float square = squared(x.x);
    if (at.lane == 0) squares[row] = square;
}
// v_t of a token, action dimension `lane`.
__device__ __forceinline__ float velocity(int token, int lane, const float* velocities, const float* squares, float bias) {
    float all[CLUSTERS], total = 0.f;
#pragma unroll
    for (int c = 0; c < CLUSTERS; ++c) all[c] = load_fresh(velocities + (c * TOKENS + token) * ACTION_DIM + lane);
    float factor = inverse_rms(squares, token);
#pragma unroll
    for (int c = 0; c < CLUSTERS; ++c) total += all[c];
    return total * factor + bias;
}
