// bfloat16 products of one warp, m16n8k16 with float32 sums, and the conversions around them.
#pragma once
#include "sync.cuh"

// c [16, 8] += a [16, 16] b [16, 8]. A lane (r = lane / 4, q = lane % 4) holds c[r][2q..], c[r + 8][2q..].
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// 32 values of k at once. Sums do not care for the order of k, so a lane takes the 8 neighbours k = 8q.. of its rows:
// `upper` of row r, `lower` of row r + 8, `b` of column r. One 16-byte load each, and no shuffling. In two halves, so
// that others can come between: the second waits for the first.
template <int HALF> __device__ __forceinline__ void mma32(float (&c)[4], const uint4& upper, const uint4& lower, const uint4& b) {
    if (HALF == 0) mma(c, upper.x, lower.x, upper.y, lower.y, b.x, b.y);
    else mma(c, upper.z, lower.z, upper.w, lower.w, b.z, b.w);
}
__device__ __forceinline__ uint4 load_transposed(u32 address) {  // four 8x8 matrices, one row address a lane
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}
__device__ __forceinline__ uint4 load_matrices(u32 address) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}
__device__ __forceinline__ u32 bf16_pair(float low, float high) {
    u32 v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
__device__ __forceinline__ u16 e4m3_pair(float low, float high) {  // saturated
    u16 v;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(v) : "f"(high), "f"(low));
    return v;
}
__device__ __forceinline__ u16 bf16(float x) { return (u16)bf16_pair(x, 0.f); }
__device__ __forceinline__ float2 floats(u32 pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int other = 16; other; other /= 2) x += __shfl_xor_sync(~0u, x, other);
    return x;
}
