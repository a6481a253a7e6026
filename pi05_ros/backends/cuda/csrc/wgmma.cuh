// Products of a warpgroup (wgmma) on swizzled tiles (hopper.cuh), and the lists of registers they are written with.
#pragma once
#include "hopper.cuh"

// A tile whose rows run along the summed dimension: 8-row groups 1024 bytes apart. Step k16 of it: + 32 bytes.
DEVICE u64 tile_k_major(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | 1ull << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

// A tile whose rows run along the kept dimension, 64 of it a tile; the next 64 lie `next` bytes on. Step k16: 16 rows.
DEVICE u64 tile_mn_major(u32 address, u32 next) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(next >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

// The same from a low word, so that what lies `bytes` on in it or in the next tile is one addition away.
DEVICE u64 tile_at(u32 low, u32 bytes) {
    u64 descriptor;
    asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low + (bytes >> 4)), "r"(1024u >> 4 | 1u << 30));
    return descriptor;
}

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// Keeps the compiler from moving accumulator accesses across the asynchronous products.
template <int N> DEVICE void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// To write an operand's number, or a list's name, that is given when a kernel is compiled.
#define QUOTE(x) #x
#define QUOTED(x) QUOTE(x)
#define NUMBER(x) "%" QUOTED(x)
#define JOINT(a, b) a##b
#define JOIN(a, b) JOINT(a, b)

// The assembly's list of 4 (i + 1) registers, and the operands behind it: the accumulators of 8 (i + 1) columns.
#define REGISTERS_0 "%0, %1, %2, %3"
#define REGISTERS_1 REGISTERS_0 ", %4, %5, %6, %7"
#define REGISTERS_2 REGISTERS_1 ", %8, %9, %10, %11"
#define REGISTERS_3 REGISTERS_2 ", %12, %13, %14, %15"
#define REGISTERS_4 REGISTERS_3 ", %16, %17, %18, %19"
#define REGISTERS_5 REGISTERS_4 ", %20, %21, %22, %23"
#define REGISTERS_6 REGISTERS_5 ", %24, %25, %26, %27"
#define REGISTERS_7 REGISTERS_6 ", %28, %29, %30, %31"
#define REGISTERS_8 REGISTERS_7 ", %32, %33, %34, %35"
#define REGISTERS_9 REGISTERS_8 ", %36, %37, %38, %39"
#define REGISTERS_10 REGISTERS_9 ", %40, %41, %42, %43"
#define REGISTERS_11 REGISTERS_10 ", %44, %45, %46, %47"
#define REGISTERS_12 REGISTERS_11 ", %48, %49, %50, %51"
#define REGISTERS_13 REGISTERS_12 ", %52, %53, %54, %55"
#define REGISTERS_14 REGISTERS_13 ", %56, %57, %58, %59"
#define REGISTERS_15 REGISTERS_14 ", %60, %61, %62, %63"
#define REGISTERS_16 REGISTERS_15 ", %64, %65, %66, %67"
#define REGISTERS_17 REGISTERS_16 ", %68, %69, %70, %71"
#define REGISTERS_18 REGISTERS_17 ", %72, %73, %74, %75"
#define REGISTERS_19 REGISTERS_18 ", %76, %77, %78, %79"
#define REGISTERS_20 REGISTERS_19 ", %80, %81, %82, %83"
#define REGISTERS_21 REGISTERS_20 ", %84, %85, %86, %87"
#define REGISTERS_22 REGISTERS_21 ", %88, %89, %90, %91"
#define REGISTERS_23 REGISTERS_22 ", %92, %93, %94, %95"
#define REGISTERS_24 REGISTERS_23 ", %96, %97, %98, %99"
#define REGISTERS_25 REGISTERS_24 ", %100, %101, %102, %103"
#define REGISTERS_26 REGISTERS_25 ", %104, %105, %106, %107"
#define REGISTERS_27 REGISTERS_26 ", %108, %109, %110, %111"
#define REGISTERS_28 REGISTERS_27 ", %112, %113, %114, %115"
#define REGISTERS_29 REGISTERS_28 ", %116, %117, %118, %119"
#define REGISTERS_30 REGISTERS_29 ", %120, %121, %122, %123"
#define REGISTERS_31 REGISTERS_30 ", %124, %125, %126, %127"
#define SUMS_OF(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_0(d) SUMS_OF(d, 0)
#define SUMS_1(d) SUMS_0(d), SUMS_OF(d, 4)
#define SUMS_2(d) SUMS_1(d), SUMS_OF(d, 8)
#define SUMS_3(d) SUMS_2(d), SUMS_OF(d, 12)
#define SUMS_4(d) SUMS_3(d), SUMS_OF(d, 16)
#define SUMS_5(d) SUMS_4(d), SUMS_OF(d, 20)
#define SUMS_6(d) SUMS_5(d), SUMS_OF(d, 24)
#define SUMS_7(d) SUMS_6(d), SUMS_OF(d, 28)
#define SUMS_8(d) SUMS_7(d), SUMS_OF(d, 32)
#define SUMS_9(d) SUMS_8(d), SUMS_OF(d, 36)
#define SUMS_10(d) SUMS_9(d), SUMS_OF(d, 40)
#define SUMS_11(d) SUMS_10(d), SUMS_OF(d, 44)
#define SUMS_12(d) SUMS_11(d), SUMS_OF(d, 48)
#define SUMS_13(d) SUMS_12(d), SUMS_OF(d, 52)
#define SUMS_14(d) SUMS_13(d), SUMS_OF(d, 56)
#define SUMS_15(d) SUMS_14(d), SUMS_OF(d, 60)
#define SUMS_16(d) SUMS_15(d), SUMS_OF(d, 64)
#define SUMS_17(d) SUMS_16(d), SUMS_OF(d, 68)
#define SUMS_18(d) SUMS_17(d), SUMS_OF(d, 72)
#define SUMS_19(d) SUMS_18(d), SUMS_OF(d, 76)
#define SUMS_20(d) SUMS_19(d), SUMS_OF(d, 80)
#define SUMS_21(d) SUMS_20(d), SUMS_OF(d, 84)
#define SUMS_22(d) SUMS_21(d), SUMS_OF(d, 88)
#define SUMS_23(d) SUMS_22(d), SUMS_OF(d, 92)
#define SUMS_24(d) SUMS_23(d), SUMS_OF(d, 96)
#define SUMS_25(d) SUMS_24(d), SUMS_OF(d, 100)
#define SUMS_26(d) SUMS_25(d), SUMS_OF(d, 104)
#define SUMS_27(d) SUMS_26(d), SUMS_OF(d, 108)
#define SUMS_28(d) SUMS_27(d), SUMS_OF(d, 112)
#define SUMS_29(d) SUMS_28(d), SUMS_OF(d, 116)
#define SUMS_30(d) SUMS_29(d), SUMS_OF(d, 120)
#define SUMS_31(d) SUMS_30(d), SUMS_OF(d, 124)

// d [64, 256] += a [64, 16] b [16, 256]; a in registers, b in shared memory with the 256 contiguous.
DEVICE void wgmma_256_registers(float (&d)[128], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" REGISTERS_31
                 "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 1;"
                 : SUMS_31(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// The same for 128 columns of d, from register 64 HALF on.
template <int HALF> DEVICE void wgmma_128_registers(float (&d)[128], const u32 (&a)[4], u64 b) {
    float *h = d + 64 * HALF;
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_15
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : SUMS_15(h) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// d [64, 128] (+)= a [64, 16] b [128, 16]^T; both K-major in shared memory.
DEVICE void wgmma_128(float (&d)[64], u64 a, u64 b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_15 "}, %64, %65, p, 1, 1, 0, 0;\n}"
                 : SUMS_15(d) : "l"(a), "l"(b), "r"(accumulate));
}
