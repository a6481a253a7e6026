// The prefix attention's shared memory, and the ring in it through which keys and values come. Defines:
// SHARED_BYTES.
#pragma once
#include "hopper.cuh"

constexpr int BLOCK = 128, SLOTS = 5, MOST_KEYS = 512;  // BLOCK: keys a turn
// Tiles are 64 columns wide. A slot of the ring holds half the columns of a block's keys, or half the rows of its values.
constexpr u32 TILE = 64 * 128, KEY_TILE = BLOCK * 128, VALUE_TILE = BLOCK / 2 * 128, SLOT_BYTES = 2 * KEY_TILE;
constexpr u32 QUERIES_BYTES = 4 * TILE, RING = 2 * QUERIES_BYTES, MASK = RING + SLOTS * SLOT_BYTES;
constexpr u32 HIDES = MASK + 2 * MOST_KEYS, STATISTICS = HIDES + 16, NORMS = STATISTICS + 2 * 512, BARRIERS = NORMS + 512;
// What a warpgroup receives, where its queries were: 8 times 16 bytes of sums a thread; and 16 of statistics a row pair.
constexpr u32 EXCHANGE_BYTES = 8 * 128 * 16 + 32 * 16;
constexpr u32 ARRIVED = BARRIERS + 16 * SLOTS, READY = ARRIVED + 16, NORMED = READY + 16, TAKEN = NORMED + 8;  // two; one
constexpr int TURN = 3, LOADERS = 5;  // named barriers: 1 and 2 are the warpgroups' own, 3 and 4 say whose turn it is
static_assert(SHARED_BYTES == TAKEN + 8 && MOST_KEYS % BLOCK == 0, "shared memory");

// A place in the ring: its slots are filled, read and freed in one order.
struct Position {
    int slot = 0, phase = 0;
    DEVICE void next() { if (++slot == SLOTS) slot = 0, phase ^= 1; }
};

// Keys and values of block after block into the ring, two slots each. Values with the half of their columns first that this
// block of threads gives away at the end.
DEVICE void load_blocks(const TensorMap *keys, const TensorMap *values, u32 shared, int from, int blocks, int rank) {
    u32 full = shared + BARRIERS, empty = full + 8 * SLOTS;
    int swap = 2 - 2 * rank;  // in tiles
    Position at;
    auto slot = [&] {
        barrier_wait(empty + 8 * at.slot, at.phase ^ 1);
        barrier_expect(full + 8 * at.slot, SLOT_BYTES);
        return shared + RING + at.slot * SLOT_BYTES;
    };
    for (int block = 0; block < 2 * blocks; ++block) {  // halves of blocks
        int row = from + block / 2 * BLOCK;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 to = slot();
            if (block % 2 == 0)
                for (int i = 0; i < 2; ++i) tma_load(to + i * KEY_TILE, keys, full + 8 * at.slot, (2 * half + i) * 64, row);
            else
                for (int i = 0; i < 4; ++i)
                    tma_load(to + i * VALUE_TILE, values, full + 8 * at.slot, (i ^ swap) * 64, row + half * (BLOCK / 2));
            at.next();
        }
    }
}

// A warpgroup's side of the ring.
struct Ring {
    u32 shared;
    Position at, oldest;
    DEVICE u32 wait() {
        u32 full = shared + BARRIERS + 8 * at.slot, slot = shared + RING + at.slot * SLOT_BYTES;
        barrier_wait(full, at.phase);
        at.next();
        return slot;
    }
    DEVICE void release() {
        if ((threadIdx.x & 127) == 0) barrier_arrive(shared + BARRIERS + 8 * (SLOTS + oldest.slot));
        oldest.next();
    }
};
