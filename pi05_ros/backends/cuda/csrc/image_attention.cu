// Attention of the vision tower: every patch of an image sees every patch of it. qkv [images * PATCHES, 3, HEADS, D] to
// out [images * PATCHES, HEADS, D], bfloat16, softmax and sums in float32.
//
// A block takes 16 WARPS queries of one head of one image. All keys and values of the head come into shared memory at
// once, in chunks that the first products do not wait for; a warp keeps its 16 rows of logits whole in registers, so
// the softmax needs no second pass. D need not be a power of two: the last 8 columns are a product of their own.
// Defines: PATCHES (a multiple of 64, at most 256), HEADS, D (a multiple of 8), WARPS, SHARED_BYTES. From sm_80 on.
typedef unsigned u32;
typedef unsigned short bf16;

#define DEVICE __device__ __forceinline__

constexpr int CHUNKS = D / 8, PITCH = D * 2 + (CHUNKS % 2 ? 0 : 16);  // an odd number of 16 bytes: no bank twice
constexpr int THREADS = 32 * WARPS, QUERIES = 16 * WARPS, ROW = 3 * HEADS * D, STEPS = D / 16, PARTS = PATCHES / 64;
constexpr u32 KEYS = QUERIES * PITCH, VALUES = KEYS + PATCHES * PITCH;
static_assert(SHARED_BYTES == VALUES + PATCHES * PITCH, "shared memory");

DEVICE void copy_async(u32 to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the last `left` groups of copies, of all threads.
DEVICE void copies_but(int left) {
    if (left >= 7) asm volatile("cp.async.wait_group 7;" ::: "memory");
    if (left == 6) asm volatile("cp.async.wait_group 6;" ::: "memory");
    if (left == 5) asm volatile("cp.async.wait_group 5;" ::: "memory");
    if (left == 4) asm volatile("cp.async.wait_group 4;" ::: "memory");
    if (left == 3) asm volatile("cp.async.wait_group 3;" ::: "memory");
    if (left == 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
    if (left == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
    if (left == 0) asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
}

// Four 8 x 8 matrices; a lane gives one row's address. `turned`: transposed.
template <bool turned> DEVICE void load4(u32 (&r)[4], u32 at) {
    if (turned) asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                             : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
    else asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
template <bool turned> DEVICE void load2(u32 (&r)[2], u32 at) {
    if (turned) asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                             : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
    else asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8]; below, a [16, 8] b [8, 8].
DEVICE void mma(float *c, const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma(float *c, const u32 (&a)[2], u32 b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b));
}
DEVICE u32 pack(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// `rows` rows of a head, ROW apart, into shared memory.
template <int rows> DEVICE void copy_rows(u32 to, const bf16 *from) {
    for (int i = threadIdx.x; i < rows * CHUNKS; i += THREADS)
        copy_async(to + i / CHUNKS * PITCH + i % CHUNKS * 16, from + (long long)(i / CHUNKS) * ROW + i % CHUNKS * 8);
}

extern "C" __global__ void __launch_bounds__(THREADS)
image_attention(const bf16 *qkv, bf16 *out, float scale) {
    extern __shared__ __align__(128) unsigned char memory[];
    u32 shared = (u32)__cvta_generic_to_shared(memory);
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32, first = blockIdx.x * QUERIES;
    const bf16 *image = qkv + (long long)blockIdx.z * PATCHES * ROW + blockIdx.y * D;
#if __CUDA_ARCH__ >= 900  // launched dependent (cpp.py)
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
    copy_rows<QUERIES>(shared, image + (long long)first * ROW);
#pragma unroll
    for (int part = 0; part < 2 * PARTS; ++part) {  // keys, then values, 64 rows each
        bool value = part >= PARTS;
        int row = part % PARTS * 64;
        copy_rows<64>(shared + (value ? VALUES : KEYS) + row * PITCH, image + (1 + value) * HEADS * D + (long long)row * ROW);
        copy_commit();
    }

    // A lane's row and 16-byte column in a 16 x 16 block: of the left operand, of keys (two blocks of 8), of values.
    int upper = lane & 15, right = lane >> 4;
    u32 a[STEPS + 1][4], a_tail[2] = {};
    float s[PATCHES / 8][4];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        copies_but(2 * PARTS - 1 - part);
        if (part == 0) {
            u32 q = shared + (warp * 16 + upper) * PITCH;
#pragma unroll
            for (int k = 0; k < STEPS; ++k) load4<false>(a[k], q + (2 * k + right) * 16);
            if (CHUNKS % 2) load2<false>(a_tail, q + (CHUNKS - 1) * 16);
        }
#pragma unroll
        for (int n = part * 4; n < part * 4 + 4; ++n) {  // 16 keys
            u32 k_at = shared + KEYS + (n * 16 + upper) * PITCH, b[4], tail[2];
            float *even = s[2 * n], *odd = s[2 * n + 1];
#pragma unroll
            for (int i = 0; i < 4; ++i) even[i] = odd[i] = 0.0f;
#pragma unroll
            for (int k = 0; k < STEPS; ++k) {
                load4<false>(b, k_at + (2 * k + right) * 16);
                mma(even, a[k], b[0], b[2]);
                mma(odd, a[k], b[1], b[3]);
            }
            if (CHUNKS % 2) {
                load2<false>(tail, k_at + (CHUNKS - 1) * 16);
                mma(even, a_tail, tail[0]);
                mma(odd, a_tail, tail[1]);
            }
        }
    }

    float most[2] = {-1.0e30f, -1.0e30f}, total[2] = {};
#pragma unroll
    for (int n = 0; n < PATCHES / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) most[i / 2] = fmaxf(most[i / 2], s[n][i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
        most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2)) * scale;
    }
    float d[CHUNKS][4] = {};
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        copies_but(PARTS - 1 - part);
#pragma unroll
        for (int n = part * 4; n < part * 4 + 4; ++n) {
            u32 p[4], v_at = shared + VALUES + (n * 16 + upper) * PITCH, b[4], tail[2];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float *pair = s[2 * n + i / 2] + i % 2 * 2;
                float x = exp2_fast(pair[0] * scale - most[i % 2]), y = exp2_fast(pair[1] * scale - most[i % 2]);
                total[i % 2] += x + y;
                p[i] = pack(x, y);
            }
#pragma unroll
            for (int k = 0; k < STEPS; ++k) {
                load4<true>(b, v_at + (2 * k + right) * 16);
                mma(d[2 * k], p, b[0], b[1]);
                mma(d[2 * k + 1], p, b[2], b[3]);
            }
            if (CHUNKS % 2) {
                load2<true>(tail, v_at + (CHUNKS - 1) * 16);
                mma(d[CHUNKS - 1], p, tail[0], tail[1]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        total[r] += __shfl_xor_sync(~0u, total[r], 1);
        total[r] += __shfl_xor_sync(~0u, total[r], 2);
        float over = 1.0f / total[r];
        int row = blockIdx.z * PATCHES + first + warp * 16 + lane / 4 + 8 * r;
        u32 *to = (u32 *)(out + ((long long)row * HEADS + blockIdx.y) * D) + lane % 4;
#pragma unroll
        for (int n = 0; n < CHUNKS; ++n) to[4 * n] = pack(d[n][2 * r] * over, d[n][2 * r + 1] * over);
    }
}
