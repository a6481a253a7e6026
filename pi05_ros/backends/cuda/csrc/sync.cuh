// Waiting and copying: barriers over threads of a cluster and of the whole grid, bulk copies, ordered loads (sm_90 on).
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef unsigned char u8;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ---- mbarrier: arrivals, and as many bytes as announced ----
__device__ __forceinline__ void mbarrier_init(u32 bar, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void fence_barrier_init() {  // seen by the cluster after a cluster barrier
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(u32 bar, u32 parity) {
    constexpr u32 SUSPENDED_NS = 10000000;  // at most, before it looks again
    asm volatile(
        "{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1, %2;\n@p bra DONE;\nbra WAIT;\nDONE:\n}"
        ::"r"(bar), "r"(parity), "n"(SUSPENDED_NS) : "memory");
}

// ---- bulk copies, global to shared; `bytes` a multiple of 16 ----
__device__ __forceinline__ void bulk_load(u32 to, const void* from, u32 bytes, u32 bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
}
// The same for what nobody reads again soon: it leaves the L2 first.
__device__ __forceinline__ void bulk_load_once(u32 to, const void* from, u32 bytes, u32 bar) {
    constexpr u64 EVICT_FIRST = 0x12f0000000000000;  // as createpolicy.fractional.L2::evict_first makes it
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(bar), "l"(EVICT_FIRST) : "memory");
}
// To the same place, and the same barrier, of every block of the cluster in `mask`.
__device__ __forceinline__ void bulk_load_all(u32 to, const void* from, u32 bytes, u32 bar, u16 mask) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from), "r"(bytes), "r"(bar), "h"(mask) : "memory");
}
__device__ __forceinline__ void prefetch_l2(const void* from, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
// ---- 16-byte copies of a thread, global to shared ----
__device__ __forceinline__ void copy_async(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- loads of what other blocks wrote in this kernel: not from L1 ----
__device__ __forceinline__ float load_fresh(const float* p) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}
// ---- the cluster ----
__device__ __forceinline__ u32 peer_address(u32 address, u32 rank) {
    u32 peer;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(address), "r"(rank));
    return peer;
}
// Stores that tell the peer's mbarrier of their bytes: no fence, no barrier of the cluster.
__device__ __forceinline__ void peer_store(u32 address, uint4 v, u32 bar) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
                 ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(bar) : "memory");
}
__device__ __forceinline__ void peer_store(u32 address, float2 v, u32 bar) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
                 ::"r"(address), "f"(v.x), "f"(v.y), "r"(bar) : "memory");
}
__device__ __forceinline__ void peer_store(u32 address, u32 v, u32 bar) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
                 ::"r"(address), "r"(v), "r"(bar) : "memory");
}
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- inside a block: 8 warps work, one conducts, one brings weights ----
__device__ __forceinline__ void workers_sync() { asm volatile("bar.sync 1, 256;" ::: "memory"); }
__device__ __forceinline__ void workers_arrive() { asm volatile("bar.arrive 2, 288;" ::: "memory"); }
__device__ __forceinline__ void workers_arrived() { asm volatile("bar.sync 4, 288;" ::: "memory"); }
__device__ __forceinline__ void workers_wait() { asm volatile("bar.sync 3, 288;" ::: "memory"); }

// ---- the grid: every block is resident (cooperative launch) ----
// The conductor arrives for its block when its workers have, waits for all blocks, starts the block's copies, and lets
// the workers go. `target` counts all arrivals so far. `tell`: workers wait for the arrival (workers_arrived) before they
// start copies of their own, behind which it would have to queue.
template <typename Start> __device__ __forceinline__ void conduct(u32* counter, u32 target, bool tell, Start start) {
    asm volatile("bar.sync 2, 288;" ::: "memory");
    if (threadIdx.x % 32 == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
    __syncwarp();
    if (tell) asm volatile("bar.arrive 4, 288;" ::: "memory");
    if (threadIdx.x % 32 == 0) {
        u32 seen, tries = 0;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
            if (++tries > (1u << 23)) __trap();  // seconds: a block is lost; an error is better than a hang
            if (seen < target) __nanosleep(40);  // looks crowd out what others wait for
        } while (seen < target);
        // What was stored in the ordinary way, bulk copies now may read (global) and overwrite (shared).
        asm volatile("fence.proxy.async.global;\nfence.proxy.async.shared::cta;" ::: "memory");
        start();
    }
    __syncwarp();
    asm volatile("bar.arrive 3, 288;" ::: "memory");
}
