// A product of the vision tower with what stands around it, for Hopper: x [rows, K] weight [F, K]^T, bfloat16, and
//   out [rows, F] = y + bias, or gelu_tanh(y + bias) with GELU, y the product of LayerNorm(x) with NORM (below), or
//   with RESIDUAL residual [rows, F] += y + bias in float32, out it in bfloat16, and sums of it for the next NORM.
// table [F] is {bias, c W^T} with NORM, {bias, the next norm's scale} with RESIDUAL.
//
// NORM: sums [parts, rows, 2] are sums over parts of a row of r and of its squares, r the residual. x is r times the norm's
// scale c: in the weights it would round them, an error that all rows share and attention does not average away. Mean m
// and deviation s come after the product: (r - m) / s c W^T = (x W^T - m (c W^T)) / s; what the norm adds is in the bias.
// RESIDUAL: out is for the next NORM, times its scale.
// A block takes 128 rows and COLUMNS features. One warpgroup only loads (TMA into a ring of STAGES), two multiply 64
// rows each. SHARING blocks one under another share the weights, each loading a part for all; SPLIT blocks share a
// tile, each a part of K, and hand each other the sums of the columns that it keeps: all of them a cluster. Launched
// dependent: the first weights are under way before the kernel before has ended.
// Defines: F, OUT (columns of out's rows), K (of 8), COLUMNS (of 8 SPLIT, at most 256), SHARING, SPLIT, STAGES, NORM, GELU,
// RESIDUAL, SHARED_BYTES; for the assembly of wgmma LAST, LEFT, RIGHT, KEEP as in gate_up.cu. Launch: 384 threads.
#include "wgmma.cuh"

constexpr int ROWS = 128, STEP = 64, STEPS = (K + STEP * SPLIT - 1) / (STEP * SPLIT), FIRST = STEPS < STAGES ? STEPS : STAGES;
constexpr int PART = (COLUMNS / 8 + SHARING - 1) / SHARING * 8, KEPT = COLUMNS / SPLIT, CHUNKS = COLUMNS / 8;
constexpr u32 X_BYTES = ROWS * 128, W_BYTES = SHARING * PART * 128, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr u32 EXCHANGE = STAGES * STAGE_BYTES, EXCHANGE_BYTES = SPLIT > 1 ? ROWS * KEPT * 4 : 0;
constexpr u32 TABLE = EXCHANGE + EXCHANGE_BYTES, NORMS = TABLE + COLUMNS * 8, BARRIERS = NORMS + ROWS * 8;
constexpr int WIDE = (KEPT + 63) / 64;
constexpr u32 KEPT_PITCH = (KEPT * 4 + 95) / 128 * 128 + 32;  // 32 more than a multiple of 128: no bank twice
constexpr u32 PITCH = COLUMNS * 2 + (CHUNKS % 2 ? 0 : 16);  // an odd number of 16 bytes: no bank twice
static_assert(SHARED_BYTES == BARRIERS + 16 * STAGES + 16 && STAGES * STAGE_BYTES >= ROWS * (RESIDUAL ? KEPT_PITCH : PITCH), "shared memory");
static_assert(SPLIT <= 2 && (SPLIT == 1 || RESIDUAL) && COLUMNS % (8 * SPLIT) == 0, "shapes");

#define QUOTE(x) #x
#define QUOTED(x) QUOTE(x)
#define NUMBER(x) "%" QUOTED(x)
#define JOINT(a, b) a##b
#define JOIN(a, b) JOINT(a, b)

// d [64, COLUMNS] (+)= a [64, 16] b [COLUMNS, 16]^T; both K-major in shared memory.
DEVICE void wgmma(float (&d)[COLUMNS / 2], u64 a, u64 b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " NUMBER(KEEP) ", 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n" QUOTED(COLUMNS) "k16.f32.bf16.bf16 {" JOIN(REGISTERS_, LAST) "}, "
                 NUMBER(LEFT) ", " NUMBER(RIGHT) ", p, 1, 1, 0, 0;\n}" : JOIN(SUMS_, LAST)(d) : "l"(a), "l"(b), "r"(accumulate));
}

struct Tile { int row, column, sharer, split; };

DEVICE void load_tiles(const TensorMap *x, const TensorMap *weight, u32 shared, Tile tile) {
    u32 full = shared + BARRIERS, empty = full + 8 * STAGES;
    auto weights = [&](int stage, int step) {
        u32 to = shared + stage * STAGE_BYTES + X_BYTES + tile.sharer * PART * 128;
        int k = (tile.split * STEPS + step) * STEP, row = tile.column + tile.sharer * PART;
        barrier_expect(full + 8 * stage, STAGE_BYTES);
        if (SHARING == 1) tma_load(to, weight, full + 8 * stage, k, row);
        else tma_load_multicast(to, weight, full + 8 * stage, k, row, ((1 << SHARING) - 1) << tile.split * SHARING);
    };
    auto rows = [&](int stage, int step) {
        tma_load(shared + stage * STAGE_BYTES, x, full + 8 * stage, (tile.split * STEPS + step) * STEP, tile.row);
    };
    for (int i = 0; i < FIRST; ++i) weights(i, i);
    wait_for_grid();
    for (int i = 0; i < FIRST; ++i) rows(i, i);
    int stage = 0, phase = 0;
    for (int step = FIRST; step < STEPS; ++step) {
        barrier_wait(empty + 8 * stage, phase);
        weights(stage, step);
        rows(stage, step);
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    if (SHARING > 1)  // stay until the others have read the last of what we sent them
        for (int i = 0; i < FIRST; ++i) {
            barrier_wait(empty + 8 * stage, phase);
            if (++stage == FIRST) stage = 0, phase ^= 1;
        }
}

// The norm of every row, for the epilogue: x to x factor + offset; by 96 threads, under the products.
DEVICE void row_norms(float2 *norms, const float2 *sums, int parts, int stride, int rows, int first, float eps) {
    wait_for_grid();
    for (int i = threadIdx.x - 32; i < ROWS; i += 96) {
        float sum = 0.0f, squares = 0.0f;
#pragma unroll 4
        for (int part = 0; part < parts; ++part) {
            float2 s = sums[(long long)part * stride + min(first + i, rows - 1)];
            sum += s.x, squares += s.y;
        }
        float mean = sum * (1.0f / K), over = rsqrtf(fmaxf(squares * (1.0f / K) - mean * mean, 0.0f) + eps);
        norms[i] = make_float2(over, -mean * over);
    }
}

DEVICE float activated(float v) {  // gelu_tanh
    if (!GELU) return v;
    float half = 0.5f * v, t;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(v * (0.7978845608f + 0.0356774081f * v * v)));
    return half + half * t;
}

DEVICE void products(float (&d)[COLUMNS / 2], u32 shared, int group, int split) {
    u32 full = shared + BARRIERS, empty = full + 8 * STAGES;
    int thread = threadIdx.x & 127, stage = 0, phase = 0, last = 0;
    for (int step = 0; step < STEPS; ++step) {
        barrier_wait(full + 8 * stage, phase);
        u64 a = tile_k_major(shared + stage * STAGE_BYTES + group * (X_BYTES / 2));
        u64 b = tile_k_major(shared + stage * STAGE_BYTES + X_BYTES);
        pin(d);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < STEP / 16; ++k) wgmma(d, a + 2 * k, b + 2 * k, step + k > 0);
        wgmma_commit();
        pin(d);
        if (step > 0) {
            wgmma_wait<1>();  // the step before this one is done: its stage is free, in all that share it
            if (thread < SHARING) barrier_arrive_at(empty + 8 * last, split * SHARING + thread);
        }
        last = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    wgmma_wait<0>();
    if (thread < SHARING) barrier_arrive_at(empty + 8 * last, split * SHARING + thread);
    pin(d);
}

// y + bias, normed and activated, to out; through shared memory, so that rows are written whole.
DEVICE void leave(float (&d)[COLUMNS / 2], unsigned char *memory, Tile tile, int rows, bf16 *out) {
    constexpr int BATCH = 5;  // blocks of 8 columns under way together
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32 - 4;
    const float4 *table = (const float4 *)(memory + TABLE) + (lane & 3);  // {bias, c W^T} of two columns
    const float2 *norms = (const float2 *)(memory + NORMS) + warp * 16 + lane / 4;
    unsigned char *staging = memory + warp * 16 * PITCH;
    u32 *mine = (u32 *)(staging + lane / 4 * PITCH) + (lane & 3);
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
                    d[4 * (first + i) + 2 * h] = __uint_as_float(pack(activated(a), activated(b)));
                }
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                if (first + i < CHUNKS) mine[h * (8 * PITCH / 4) + (first + i) * 4] = __float_as_uint(d[4 * (first + i) + 2 * h]);
    }
    __syncwarp();
#pragma unroll
    for (int first = 0; first < 16 * CHUNKS; first += 32 * BATCH) {
        uint4 v[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            int at = first + i * 32 + lane;
            if (at < 16 * CHUNKS) v[i] = *(uint4 *)(staging + at / CHUNKS * PITCH + at % CHUNKS * 16);
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            int at = first + i * 32 + lane, row = tile.row + warp * 16 + at / CHUNKS, column = tile.column + at % CHUNKS * 8;
            if (at < 16 * CHUNKS && row < rows && column < F) *(uint4 *)(out + (long long)row * OUT + column) = v[i];
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
                                                int rows, int stride, float *residual, bf16 *out, float2 *sums) {
    int thread = threadIdx.x - 128, lane = threadIdx.x & 31, warp = thread / 32;
    unsigned char *staging = memory + warp * 16 * KEPT_PITCH;
    float *mine = (float *)(staging + lane / 4 * KEPT_PITCH) + (lane & 3) * 2;
    const float4 *others = (const float4 *)(memory + EXCHANGE) + thread;
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
            float4 x = r.x[j][i], b = r.bias[j], c = r.scale[j], v = {x.x + y[i].x + b.x, x.y + y[i].y + b.y, x.z + y[i].z + b.z, x.w + y[i].w + b.w};
            if (inside && row < rows) {
                long long at = (long long)row * F + column;
                *(float4 *)(residual + at) = v;
                *(uint2 *)(out + at) = make_uint2(pack(v.x * c.x, v.y * c.y), pack(v.z * c.z, v.w * c.w));
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

DEVICE void multiply(unsigned char *memory, u32 shared, Tile tile, int group, int rows, int stride, const float2 *table,
                     float *residual, float2 *sums, bf16 *out) {
    float d[COLUMNS / 2];
    Residual r;
    wait_for_grid();
    if (RESIDUAL) fetch(r, tile, table, residual, rows);
    products(d, shared, group, tile.split);
    barrier_sync(1, 256 + 96);  // norms and table are there; everybody is done with the ring
    if (!RESIDUAL) leave(d, memory, tile, rows, out);
    else if (SPLIT == 1 || tile.split == 0) leave_residual<0>(d, r, memory, shared, tile, rows, stride, residual, out, sums);
    else leave_residual<SPLIT == 1 ? 0 : KEPT>(d, r, memory, shared, tile, rows, stride, residual, out, sums);
}

extern "C" __global__ void __launch_bounds__(384, 1)
product(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const float2 *table, float *residual,
        float2 *sums, bf16 *out, int rows, int stride, int parts, float eps) {
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 shared = shared_address(memory);
    int rank = cluster_rank(), group = warpgroup(), heights = (rows + ROWS * SHARING - 1) / (ROWS * SHARING);
    int cluster = blockIdx.x / (SHARING * SPLIT);
    Tile tile = {(cluster % heights * SHARING + rank % SHARING) * ROWS, cluster / heights * COLUMNS, rank % SHARING, rank / SHARING};
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(shared + BARRIERS + 8 * i, 1);
            barrier_init(shared + BARRIERS + 8 * (STAGES + i), 2 * SHARING);  // two warpgroups of each that shares
        }
        barrier_init(shared + BARRIERS + 16 * STAGES, 1);
        barrier_init_done();
        if (SPLIT > 1) barrier_expect(shared + BARRIERS + 16 * STAGES, EXCHANGE_BYTES);
        prefetch_map(&x);
        prefetch_map(&weight);
    }
    if (SHARING * SPLIT > 1) cluster_sync();
    else __syncthreads();
    let_next_grid();
    if (group == 0) {
        set_registers_down<40>();
        if (threadIdx.x == 0) load_tiles(&x, &weight, shared, tile);
        if (threadIdx.x >= 32) {
            if (!RESIDUAL)
                for (int i = threadIdx.x - 32; i < COLUMNS; i += 96)
                    ((float2 *)(memory + TABLE))[i] = tile.column + i < F ? table[tile.column + i] : make_float2(0.0f, 0.0f);
            if (NORM) row_norms((float2 *)(memory + NORMS), sums, parts, stride, rows, tile.row, eps);
            barrier_pass(1, 256 + 96);
        }
    } else {
        set_registers_up<232>();
        multiply(memory, shared, tile, group - 1, rows, stride, table, residual, sums, out);
    }
}
