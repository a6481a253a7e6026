// Attention of the vision tower, for Hopper: what image_attention.cu computes, for images of 256 patches and heads of 72.
//
// A block takes 64 queries a warpgroup of one head of one image. Of queries, keys and values 64 columns are a tile, and the
// last 8 one of 16, which TMA fills with zeros beyond the head: a head is four products of 16 columns and one more. Keys
// and values come in halves, so that products begin before all of them are there. All 256 logits of a row stay in
// registers; their exponentials are the left operand of the products with the values. Launched dependent (cpp.py).
// Defines: HEADS, WARPGROUPS (1 or 2). Launch: 128 WARPGROUPS threads, a block per 64 WARPGROUPS queries, head, image.
#include "wgmma.cuh"

constexpr int D = 72, PATCHES = 256, HALF = PATCHES / 2, THREADS = 128 * WARPGROUPS, QUERIES = 64 * WARPGROUPS;
constexpr int WIDE = 128, NARROW = 32;  // bytes of a tile's row
constexpr u32 Q = 0, KEYS = Q + QUERIES * WIDE, VALUES = KEYS + PATCHES * WIDE, Q_TAIL = VALUES + PATCHES * WIDE;
constexpr u32 K_TAIL = Q_TAIL + QUERIES * NARROW, V_TAIL = K_TAIL + PATCHES * NARROW, BARRIERS = V_TAIL + PATCHES * NARROW;
static_assert(SHARED_BYTES == BARRIERS + 32, "shared memory");

// Tail tiles have the 32-byte swizzle: 8-row groups 256 bytes apart, rows along the summed or the kept dimension.
DEVICE u64 tail_tile(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | 1ull << 16 | (u64)(256 >> 4) << 32 | 3ull << 62;
}

// d [64, 128] (+)= a [64, 16] b [128, 16]^T; both K-major in shared memory. For half the keys.
template <int half> DEVICE void logits(float (&d)[128], u64 a, u64 b, int accumulate) {
    float *h = d + 64 * half;
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_15 "}, %64, %65, p, 1, 1, 0, 0;\n}"
                 : SUMS_15(h) : "l"(a), "l"(b), "r"(accumulate));
}

// d [64, 64] and [64, 8] += a [64, 16] b [16, ...]; a in registers, b in shared memory with its columns contiguous.
DEVICE void values(float (&d)[32], const u32 *a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" REGISTERS_7 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : SUMS_7(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEVICE void values(float (&d)[4], const u32 *a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {" REGISTERS_0 "}, {%4, %5, %6, %7}, %8, 1, 1, 1, 1;"
                 : SUMS_0(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Half the keys or values, told of by one barrier.
DEVICE void load_half(u32 tile, u32 tail, u32 barrier, const TensorMap *wide, const TensorMap *narrow, int head, int row) {
    tma_load(tile, wide, barrier, 0, head, row);
    tma_load(tail, narrow, barrier, 64, head, row);
}

template <int half> DEVICE void products(float (&s)[128], u32 shared, int group) {
    u64 q = tile_k_major(shared + Q + group * 64 * WIDE), k = tile_k_major(shared + KEYS + half * HALF * WIDE);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) logits<half>(s, q + 2 * i, k + 2 * i, i > 0);
    logits<half>(s, tail_tile(shared + Q_TAIL + group * 64 * NARROW), tail_tile(shared + K_TAIL + half * HALF * NARROW), 1);
    wgmma_commit();
}

extern "C" __global__ void __launch_bounds__(THREADS, 3 - WARPGROUPS)
image_attention(const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap query_tails,
                const __grid_constant__ TensorMap rows, const __grid_constant__ TensorMap tails, bf16 *out, float scale) {
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 shared = shared_address(memory), here = shared + BARRIERS;
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32, group = warpgroup(), head = blockIdx.y;
    int image = blockIdx.z * PATCHES, first = image + blockIdx.x * QUERIES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 4; ++i) barrier_init(here + 8 * i, 1);
        barrier_init_done();
        prefetch_map(&queries);
        prefetch_map(&query_tails);
        prefetch_map(&rows);
        prefetch_map(&tails);
    }
    __syncthreads();
    wait_for_grid();
    let_next_grid();
    if (threadIdx.x == 0) {
        barrier_expect(here, (QUERIES + HALF) * (WIDE + NARROW));
        for (int i = 1; i < 4; ++i) barrier_expect(here + 8 * i, HALF * (WIDE + NARROW));
        load_half(shared + Q, shared + Q_TAIL, here, &queries, &query_tails, head, first);
        for (int i = 0; i < 4; ++i) {  // keys, keys, values, values
            int row = i % 2 * HALF, which = 1 + i / 2;
            load_half(shared + (i < 2 ? KEYS : VALUES) + row * WIDE, shared + (i < 2 ? K_TAIL : V_TAIL) + row * NARROW, here + 8 * i,
                      &rows, &tails, which * HEADS + head, image + row);
        }
    }

    float s[128];
    barrier_wait(here, 0);
    pin(s);
    products<0>(s, shared, group);
    barrier_wait(here + 8, 0);
    products<1>(s, shared, group);
    wgmma_wait<0>();
    pin(s);

    float most[2] = {-1.0e30f, -1.0e30f}, total[2] = {}, o[32] = {}, o_tail[4] = {};
#pragma unroll
    for (int i = 0; i < 128; ++i) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], s[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
        most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2)) * scale;
    }
    u32 p[64];
#pragma unroll
    for (int part = 0; part < 4; ++part) {  // 64 keys: exponentials under the products of those before
#pragma unroll
        for (int i = part * 16; i < part * 16 + 16; ++i) {
            float x = exp2_fast(s[2 * i] * scale - most[i % 2]), y = exp2_fast(s[2 * i + 1] * scale - most[i % 2]);
            total[i % 2] += x + y;
            p[i] = pack(x, y);
        }
        if (part % 2 == 0) barrier_wait(here + 16 + 4 * part, 0);
        pin(o);
        pin(o_tail);
        wgmma_fence();
#pragma unroll
        for (int i = part * 4; i < part * 4 + 4; ++i) {  // 16 keys
            values(o, p + 4 * i, tile_mn_major(shared + VALUES + i * 16 * WIDE, 0));
            values(o_tail, p + 4 * i, tail_tile(shared + V_TAIL + i * 16 * NARROW));
        }
        wgmma_commit();
    }
    wgmma_wait<0>();
    pin(o);
    pin(o_tail);

    __syncthreads();  // every warp is done with the keys, whose place the rows take, to be written whole
    unsigned char *staging = memory + KEYS + warp * 16 * D * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        total[r] += __shfl_xor_sync(~0u, total[r], 1);
        total[r] += __shfl_xor_sync(~0u, total[r], 2);
        float over = 1.0f / total[r];
        u32 *to = (u32 *)(staging + (lane / 4 + 8 * r) * D * 2) + (lane & 3);
#pragma unroll
        for (int n = 0; n < 8; ++n) to[4 * n] = pack(o[4 * n + 2 * r] * over, o[4 * n + 2 * r + 1] * over);
        to[32] = pack(o_tail[2 * r] * over, o_tail[2 * r + 1] * over);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 5; ++i) {
        int at = i * 32 + lane, row = at / (D / 8), column = at % (D / 8) * 8;
        if (at < 16 * D / 8)
            *(uint4 *)(out + ((long long)(first + warp * 16 + row) * HEADS + blockIdx.y) * D + column) =
                *(uint4 *)(staging + row * D * 2 + column * 2);
    }
}
