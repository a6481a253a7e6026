// Sizes of the persistent expert, and how its blocks share the work.
// Given at compile time: HORIZON, DEPTH, KEY_ROWS, and CLUSTERS, as many of 8 blocks as the GPU runs at once (15 or 16).
#pragma once
#include "mma.cuh"
#include "expert_wgmma.cuh"

constexpr int WIDTH = 1024, MLP = 4096, HEADS = 8, HEAD_DIM = 256, ACTION_DIM = 32;
constexpr int QKV = (HEADS + 2) * HEAD_DIM, QKV_BLOCKS = QKV / 32;
constexpr float EPS = 1e-6f;
constexpr int WORKERS = 256, CONDUCTOR = 8, CARRIER = 9, THREADS = WORKERS + 64;  // warps 0-7 work
constexpr int CLUSTER = 8, BLOCKS = CLUSTER * CLUSTERS;
constexpr int TOKENS = (HORIZON + 7) / 8 * 8;
constexpr int OWN = TOKENS / CLUSTER;  // tokens of a block in the residual: one a warp

// Columns come in tiles of 8. A cluster has COLUMNS of the residual; a block as many of gate and up together, in turn.
constexpr int COLUMNS = (WIDTH / 8 + CLUSTERS - 1) / CLUSTERS * 8;
constexpr int SUM_ROW = COLUMNS % 32 == 8 ? COLUMNS : COLUMNS + 8, QKV_SUM_ROW = 40;  // 8 mod 32 keeps the banks apart
constexpr int MLP_BLOCKS = (2 * MLP + COLUMNS - 1) / COLUMNS;
// Queries of all heads share one key head, so any of the rows (head, token) may go together: ROWS of them a cluster.
constexpr int ROWS = (HEADS * HORIZON + CLUSTERS - 1) / CLUSTERS, OWN_ROWS = (ROWS + CLUSTER - 1) / CLUSTER;
constexpr int KEYS = 128;              // most keys of a block, which has an eighth of them
constexpr int K32 = TOKENS * 64;       // bytes of 32 features of every token
static_assert(HORIZON >= 1 && HORIZON <= 56, "a warp holds one token of the residual, and shared memory is finite");
static_assert(KEY_ROWS <= CLUSTER * KEYS, "more keys than the blocks hold");
static_assert((CLUSTERS == 15 || CLUSTERS == 16) && MLP_BLOCKS <= BLOCKS && QKV_BLOCKS <= BLOCKS && ROWS <= 32);

// Activations are bfloat16 [features / 8][TOKENS][8]: any run of features lies together, and is what wgmma reads. It
// reads 64 tokens; those beyond TOKENS are other features, and rows of the product that nobody reads.
constexpr int ACT = 0, ACT_BYTES = WIDTH / 32 * K32;        // activations in; partial sums of the products after
constexpr int SUM_BYTES = 2 * TOKENS * SUM_ROW * 4;
// The same memory during attention: queries, softmax weights, output, values.
constexpr int OUTPUT_ROW = HEAD_DIM * 2 + 16, WEIGHTS_ROW = 2 * KEYS + 16;  // 16: banks again
constexpr int VALUE_ROW = OUTPUT_ROW;
constexpr int QUERIES = ACT, WEIGHTS = QUERIES + HEAD_DIM / 32 * 32 * 64, OUTPUT = WEIGHTS + 32 * WEIGHTS_ROW;
constexpr int VALUE_TILE = OUTPUT + 32 * OUTPUT_ROW, ATTEND_BYTES = VALUE_TILE + KEYS * VALUE_ROW;
// Weights come through a ring of slots, 128 k of COLUMNS rows or 256 k of 32; the keys take its memory while needed.
constexpr int SLOTS = 5, SLOT = COLUMNS * 256, QKV_SLOT = 16384;
constexpr int RING = ACT_BYTES > ATTEND_BYTES ? ACT_BYTES : ATTEND_BYTES, KEY_TILE = RING;
constexpr int INBOX = RING + SLOTS * SLOT;                  // what the cluster's other blocks send
constexpr int OUT_INBOX = CLUSTER * OWN * COLUMNS * 4, ROW_INBOX = CLUSTER * OWN_ROWS * HEAD_DIM * 2;
constexpr int STATS = INBOX + (OUT_INBOX > ROW_INBOX ? OUT_INBOX : ROW_INBOX);  // [CLUSTER][OWN_ROWS] max, sum
constexpr int ROPE = STATS + CLUSTER * OWN_ROWS * 8;
constexpr int ROW_STATS = ROPE + TOKENS * 16 * 8;           // [4 quarters][32] max, then sums
constexpr int FACTORS = ROW_STATS + 2 * 4 * 32 * 4, BIAS = FACTORS + 64 * 4;
// Barriers in shared memory: 0-7 activations, then one each, then two for every slot of the ring.
constexpr int INBOX_BAR = 8, KEYS_READ = 9, FULL = 10, EMPTY = FULL + SLOTS;
constexpr int BARS = BIAS + COLUMNS * 4, SHARED_BYTES = BARS + (EMPTY + SLOTS) * 8;
static_assert(SUM_BYTES <= RING && KEYS * HEAD_DIM * 2 <= SLOTS * SLOT && QKV_SLOT <= SLOT && SHARED_BYTES <= 232448);

struct Place {  // of this thread
    int block, cluster, rank, warp, lane, r, q;
};

extern __shared__ __align__(128) u8 shared[];
