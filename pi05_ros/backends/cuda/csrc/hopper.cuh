// Hopper's asynchronous instructions: barriers, the tensor memory copy (TMA), warpgroup products (wgmma), stmatrix.
// Shared addresses are 32-bit shared-window addresses. Tiles in shared memory are 64 bfloat16 (128 bytes) wide with the
// 128-byte swizzle: 16-byte chunk c of row r lies at chunk c ^ (r & 7); a tile begins at a multiple of 1024 bytes.
#pragma once

typedef unsigned u32;
typedef unsigned long long u64;
typedef unsigned short bf16;  // bits only

struct alignas(64) TensorMap { u64 opaque[16]; };  // CUtensorMap

#define DEVICE __device__ __forceinline__

DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

DEVICE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Everybody is here; orders no memory accesses.
DEVICE void cluster_meet() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// `address` in block `rank` of the cluster.
DEVICE u32 address_at(u32 address, u32 rank) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

// 16 bytes into another block's shared memory, counted by its barrier.
DEVICE void store_at(u32 there, u32 barrier, float a, float b, float c, float d) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];"
                 ::"r"(there), "r"(barrier), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

// The threads of one named barrier (1..15).
DEVICE void barrier_sync(int name, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

DEVICE void barrier_pass(int name, int threads) {  // arrive without waiting
    asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// Which group of 128 threads this is, as a number the compiler knows to be the same in all of a warp.
DEVICE int warpgroup() { return __shfl_sync(~0u, threadIdx.x / 128, 0); }

template <int N> DEVICE void set_registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEVICE void set_registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// ---- mbarrier ----
DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// On the same barrier of block `rank` of the cluster, this one included.
DEVICE void barrier_arrive_at(u32 barrier, u32 rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_at(barrier, rank)) : "memory");
}

DEVICE void barrier_wait(u32 barrier, u32 phase) {
    asm volatile("{\n.reg .pred done;\nWAIT:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra WAIT;\n}" ::"r"(barrier), "r"(phase) : "memory");
}

// ---- TMA ----
DEVICE void prefetch_map(const TensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

DEVICE void tma_load(u32 to, const TensorMap *map, u32 barrier, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 ::"r"(to), "l"(map), "r"(barrier), "r"(column), "r"(row) : "memory");
}

// The same bytes to the same place in every block of `blocks` (a bit mask), each told by its own barrier.
DEVICE void tma_load_multicast(u32 to, const TensorMap *map, u32 barrier, int column, int row, unsigned short blocks) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%3, %4}], [%2], %5;"
                 ::"r"(to), "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(blocks) : "memory");
}

DEVICE void tma_store(u32 from, const TensorMap *map, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%1, {%2, %3}], [%0];"
                 ::"r"(from), "l"(map), "r"(column), "r"(row) : "memory");
}

DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
DEVICE void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
DEVICE void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Ordinary shared stores before this are seen by TMA and wgmma after the next barrier.
DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void store_shared(u32 to, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// ---- programmatic dependent launch ----
DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- wgmma ----
// A tile whose rows run along the summed dimension: 8-row groups 1024 bytes apart. Step k16 of it: + 32 bytes.
DEVICE u64 tile_k_major(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | 1ull << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

// A tile whose rows run along the kept dimension, 64 of it a tile; the next 64 lie `next` bytes on. Step k16: 16 rows.
DEVICE u64 tile_mn_major(u32 address, u32 next) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(next >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// Keeps the compiler from moving accumulator accesses across the asynchronous products.
template <int N> DEVICE void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(d, i) D4(d, i), D4(d, i + 4), D4(d, i + 8), D4(d, i + 12)
#define D32(d, i) D16(d, i), D16(d, i + 16)
#define D128(d) D32(d, 0), D32(d, 32), D32(d, 64), D32(d, 96)
#define R32 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define R128 R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// d [64, 256] (+)= a [64, 16] b [256, 16]^T; both K-major in shared memory.
DEVICE void wgmma_256(float (&d)[128], u64 a, u64 b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " R128 "}, %128, %129, p, 1, 1, 0, 0;\n}"
                 : D128(d) : "l"(a), "l"(b), "r"(accumulate));
}

// d [64, 256] += a [64, 16] b [16, 256]; a in registers, b in shared memory with the 256 contiguous.
DEVICE void wgmma_256_registers(float (&d)[128], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " R128
                 "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 1;"
                 : D128(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// d [64, 64] (+)= a [64, 16] b [64, 16]^T; both K-major in shared memory.
DEVICE void wgmma_64(float (&d)[32], u64 a, u64 b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " R32 "}, %32, %33, p, 1, 1, 0, 0;\n}"
                 : D32(d, 0) : "l"(a), "l"(b), "r"(accumulate));
}

// ---- numbers ----
DEVICE u32 pack(float low, float high) {  // two bfloat16
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

DEVICE float low(u32 both) { return __uint_as_float(both << 16); }
DEVICE float high(u32 both) { return __uint_as_float(both & 0xffff0000u); }

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Four 8 x 8 matrices of bfloat16; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void stmatrix(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// A warp's 16 rows of one 8-column pair of accumulator blocks into a swizzled tile 64 columns wide: `block` is the first
// of two 8-column blocks (even), `row` the warp's first row; a, b rows 0-7 and 8-15 of the first block, c, d of the next.
DEVICE void store_blocks(u32 tile, int row, int block, u32 a, u32 b, u32 c, u32 d) {
    int lane = threadIdx.x & 31, r = row + (lane & 15), chunk = block + (lane >> 4);
    stmatrix(tile + r * 128 + ((chunk ^ (r & 7)) << 4), a, b, c, d);
}
