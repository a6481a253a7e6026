// Hopper's asynchronous instructions: barriers, the tensor memory copy (TMA), stmatrix. Products: wgmma.cuh.
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

DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }  // orders nothing
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

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

// Of kernels launched dependent (cpp.py): the grid before has ended and is seen; the next may start where there is room.
DEVICE void wait_for_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_next_grid() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

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

DEVICE void tma_load(u32 to, const TensorMap *map, u32 barrier, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 ::"r"(to), "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2) : "memory");
}

DEVICE void tma_load(u32 to, const TensorMap *map, u32 barrier, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];"
                 ::"r"(to), "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
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

DEVICE void store_shared(u32 to, unsigned short v) { asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(v) : "memory"); }

DEVICE void store_shared(u32 to, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
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

// One 8 x 8 matrix, turned: lanes 0-7 give the addresses of its columns.
DEVICE void stmatrix_transposed(u32 address, u32 a) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(address), "r"(a) : "memory");
}

// A warp's 16 rows of one 8-column pair of accumulator blocks into a swizzled tile 64 columns wide: `block` is the first
// of two 8-column blocks (even), `row` the warp's first row; a, b rows 0-7 and 8-15 of the first block, c, d of the next.
DEVICE void store_blocks(u32 tile, int row, int block, u32 a, u32 b, u32 c, u32 d) {
    int lane = threadIdx.x & 31, r = row + (lane & 15), chunk = block + (lane >> 4);
    stmatrix(tile + r * 128 + ((chunk ^ (r & 7)) << 4), a, b, c, d);
}
