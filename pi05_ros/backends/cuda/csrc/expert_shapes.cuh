// Sizes of the persistent expert, and how its blocks share the work.
// Given at compile time: HORIZON, DEPTH, PREFIX (at most, rows), and CLUSTERS, as many of 8 blocks as the GPU runs at once (15 or 16);
// FP8: 1 where q, k, v, gate, up and down are in e4m3, which halves their bytes and the activations' (`out` stays bfloat16).
#pragma once
#include "mma.cuh"
#include "expert_wgmma.cuh"

constexpr int WIDTH = 1024, MLP = 4096, HEADS = 8, HEAD_DIM = 256, ACTION_DIM = 32;
constexpr int QKV = (HEADS + 2) * HEAD_DIM, QKV_BLOCKS = QKV / 32;
constexpr float EPS = 1e-6f;
constexpr int WORKERS = 256, CONDUCTOR = 8, CARRIER = 9, THREADS = WORKERS + 128;  // warps 0-7 work
constexpr int CLUSTER = 8, BLOCKS = CLUSTER * CLUSTERS;
constexpr int TOKENS = (HORIZON + 7) / 8 * 8;
constexpr int OWN = TOKENS / CLUSTER;  // tokens of a block in the residual: one a warp

// Columns come in tiles of 8. A cluster has COLUMNS of the residual; a block as many of gate and up together, in turn.
constexpr int COLUMNS = (WIDTH / 8 + CLUSTERS - 1) / CLUSTERS * 8;
constexpr int MLP_BLOCKS = (2 * MLP + COLUMNS - 1) / COLUMNS;
// Queries of all heads share one key head, so any of the rows (head, token) may go together: ROWS of them a cluster.
constexpr int ROWS = (HEADS * HORIZON + CLUSTERS - 1) / CLUSTERS, OWN_ROWS = (ROWS + CLUSTER - 1) / CLUSTER;
constexpr int KEYS = 128;              // most keys of a block, which has an eighth of them
constexpr int K32 = TOKENS * 64;       // bytes of 32 features of every token, of 64 in FP8
constexpr bool LOW = FP8;
constexpr int CHUNKS = LOW ? 4 : 8;    // of K32 * 4 bytes, in the residual's activations; half of it in `down`'s
static_assert(HORIZON >= 1 && HORIZON <= 56, "a warp holds one token of the residual, and shared memory is finite");
static_assert((PREFIX + CLUSTER - 1) / CLUSTER + OWN <= KEYS, "more keys than the blocks hold");
static_assert((CLUSTERS == 15 || CLUSTERS == 16) && MLP_BLOCKS <= BLOCKS && QKV_BLOCKS <= BLOCKS && ROWS <= 32);

// Activations are bfloat16 [features / 8][TOKENS][8]: any run of features lies together, and ldmatrix reads it; in FP8
// [features / 16][TOKENS][16]. Products take 64 tokens; those beyond TOKENS are other features, and rows that nobody reads.
constexpr int ACT = 0, ACT_BYTES = WIDTH / 32 * K32;        // activations in; the groups' swap of sums after
// The same memory during attention: queries, then the output; softmax weights; values.
constexpr int OUTPUT_ROW = HEAD_DIM * 2 + 16, WEIGHTS_ROW = 2 * KEYS + 16;  // 16: banks
constexpr int VALUE_ROW = OUTPUT_ROW;
constexpr int QUERIES = ACT, OUTPUT = ACT, WEIGHTS = OUTPUT + 32 * OUTPUT_ROW, VALUE_TILE = WEIGHTS + 32 * WEIGHTS_ROW;
// What the cluster's other blocks send comes behind those, where `out` and `down` have no activations either.
constexpr int INBOX = VALUE_TILE + KEYS * VALUE_ROW;
constexpr int OUT_INBOX = CLUSTER * OWN * COLUMNS * 2, ROW_INBOX = CLUSTER * OWN_ROWS * HEAD_DIM * 2;
constexpr int INBOX_END = INBOX + (OUT_INBOX > ROW_INBOX ? OUT_INBOX : ROW_INBOX);
// Weights come through a ring of slots, 128 k of COLUMNS rows or 256 k of 32. A layer takes it round three times: qkv 4,
// out 2, gate_up 8, down 4; the keys have the first four slots after qkv. In FP8 twice: 4 (half full), 2, 4 and 2 of 256 k.
constexpr int SLOTS = 6, SLOT = COLUMNS * 256, QKV_SLOT = LOW ? 8192 : 16384;
constexpr int RING = ACT_BYTES > INBOX_END ? ACT_BYTES : INBOX_END, KEY_TILE = RING;
constexpr int STATS = RING + SLOTS * SLOT;                  // [CLUSTER][OWN_ROWS] max, sum
constexpr int ROW_STATS = STATS + CLUSTER * OWN_ROWS * 8;   // [4 quarters][32] max, then sums
constexpr int FACTORS = ROW_STATS + 2 * 4 * 32 * 4, BIAS = FACTORS + 64 * 4;
constexpr int SCALES = BIAS + COLUMNS * 4;                  // of a layer's weights, in turn
// Barriers in shared memory: 0-7 activations, then one each, then two for every slot of the ring.
constexpr int INBOX_BAR = 8, KEYS_READ = 9, FULL = 10, EMPTY = FULL + SLOTS;
constexpr int BARS = SCALES + 2 * 8 * 4, SHARED_BYTES = BARS + (EMPTY + SLOTS) * 8;
static_assert(KEYS * HEAD_DIM * 2 <= 4 * SLOT && QKV_SLOT <= SLOT && (6 + 3 * CHUNKS / 2) % SLOTS == 0 && SHARED_BYTES <= 232448);
static_assert(16 * K32 <= INBOX && COLUMNS * WORKERS <= INBOX && HEAD_DIM / 32 * 2048 <= WEIGHTS);

struct Place {  // of this thread
    int block, cluster, rank, warp, lane, r, q;
};

extern __shared__ __align__(128) u8 shared[];
