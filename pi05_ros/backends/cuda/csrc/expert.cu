// The action expert's whole denoising loop in one kernel: every step, every layer, blocks that stay.
//
// One launch instead of 110 a step. Blocks meet at a barrier of the whole grid five times a layer; the weights of the next
// product are on their way into a ring in shared memory before the barrier, so that memory does not wait for it; they leave the
// L2 to what is read in every step. Clusters of 8 blocks share activations (one load, eight copies), and add their parts of k
// and of the keys through each other's shared memory. The residual, float32, never leaves the registers of the block that owns it.
//
// Floor: the weights, 623 MB a step (0.147 ms at 4.25 TB/s); in FP8 349 MB. What it takes, on an H200 with 968 keys before the action
// tokens: 0.43 ms a step, 24 us a layer; barriers and the loads behind them are nearly half of that. Nothing may spill:
// every look at the barrier empties the L1. Checked against model/gemma.py in float32, and bit for bit
// against itself. Tables as in modulation.py: (1 + scale) rides on the activation, 1/rms on the product, shift is a bias. With FP8
// q, k, v, gate, up and down are e4m3 and so is what they read, at a scale a token (expert_ends.cuh) or, for down, given.
#include "expert_attention.cuh"
#include "expert_ends.cuh"

// ---- copies that the conductor starts (one thread) ----
// The residual's activations in chunks, in order; each block of the cluster loads an eighth of each for all of them.
__device__ __forceinline__ void share_activations(const Place& at, const u16* from, u32 bars) {
#pragma unroll 1
    for (int i = 0; i < CHUNKS; ++i) {
        mbarrier_expect(bars + 8 * i, 4 * K32);
        const int part = 8 * i + at.rank;
        bulk_load_all(shared_address(shared + ACT) + part * (K32 / 2), from + part * (K32 / 4), K32 / 2, bars + 8 * i, 0xff);
    }
}
// This block's eighth of wider activations, in chunks of 128 features (in FP8 256).
__device__ __forceinline__ void load_activations(const Place& at, const u16* from, int chunks, u32 bars) {
#pragma unroll 1
    for (int i = 0; i < chunks; ++i) {
        mbarrier_expect(bars + 8 * i, 4 * K32);
        bulk_load(shared_address(shared + ACT) + i * 4 * K32, from + (at.rank * chunks + i) * 2 * K32, 4 * K32, bars + 8 * i);
    }
}
// The cluster's queries, an eighth of the features a block.
__device__ __forceinline__ void share_queries(const Place& at, const u16* from, u32 bar) {
    mbarrier_expect(bar, HEAD_DIM / 32 * 2048);
    bulk_load_all(shared_address(shared + QUERIES) + at.rank * 2048, from + (at.cluster * 8 + at.rank) * 1024, 2048, bar, 0xff);
}
__device__ __forceinline__ void conductor(const Place& at, const u16* act, const u16* queries, const u16* attended,
                                          const u16* hidden, u32* arrivals, int steps, u32 bars) {
    u32 met = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step)
#pragma unroll 1
        for (int phase = 0; phase <= 5 * DEPTH; ++phase) {
            const int kind = phase == 5 * DEPTH ? 5 : phase % 5;
            conduct(arrivals, met += BLOCKS, kind == 1, [&] {
                if (kind == 3 || kind == 0 && at.cluster < HEADS + 2) share_activations(at, act, bars);
                else if (kind == 1) share_queries(at, queries, bars);
                else if (kind == 2 || kind == 4)
                    load_activations(at, kind == 2 ? attended : hidden, kind == 2 ? 2 : CHUNKS / 2, bars);
            });
        }
}

// ---- the carrier: every weight this block needs, in order, as soon as a slot is free (one thread) ----
__device__ __forceinline__ void carrier(const Place& at, const u8* qkv, const u8* out, const u8* gate_up, const u8* down,
                                        int steps, u32 bars) {
    u32 slot = 0, parity = 1, keys_read = 0;  // fresh slots are free
#pragma unroll 1
    for (int part = 0; part < steps * DEPTH * 4; ++part) {
        const int layer = part / 4 % DEPTH, kind = part % 4;
        const u8* from = kind == 0 ? qkv : kind == 1 ? out : kind == 2 ? gate_up : down;
        const int owners = kind == 0 ? QKV_BLOCKS : kind == 2 ? MLP_BLOCKS : BLOCKS;
        const u32 bytes = kind == 0 ? QKV_SLOT : SLOT;
        const bool mine = at.block < owners;
        int blocks = kind == 0 ? 4 : kind == 1 ? 2 : kind == 2 ? CHUNKS : CHUNKS / 2;  // of the ring
        from += (long long)(layer * owners + at.block) * blocks * bytes;
        if (kind == 2) {  // the keys had the ring's first slots; two slots more than there are wait in the L2
            if (mine && CHUNKS > SLOTS) prefetch_l2(from + SLOTS * SLOT, (blocks - SLOTS) * SLOT);
            mbarrier_wait(bars + 8 * KEYS_READ, keys_read);
            keys_read ^= 1;
        }
#pragma unroll 1
        for (; blocks; --blocks, from += bytes) {
            mbarrier_wait(bars + 8 * (EMPTY + slot), parity);
            if (mine) {
                mbarrier_expect(bars + 8 * (FULL + slot), bytes);
                bulk_load_once(shared_address(shared + RING) + slot * SLOT, from, bytes, bars + 8 * (FULL + slot));
            } else {
                mbarrier_arrive(bars + 8 * (FULL + slot));
            }
            if (++slot == SLOTS) slot = 0, parity ^= 1;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) denoise(
    // weights, packed; the heads float32, transposed: action_in [32, WIDTH], action_out [WIDTH, 32]
    const u8* qkv, const u8* out, const u8* gate_up, const u8* down, const float* action_in,
    const float* action_in_bias, const float* action_out,
    // tables, first axis the step
    const float* scales, const float* gates, const float* qkv_bias, const float* gate_up_bias, const float* out_bias,
    // in FP8 [DEPTH + 1, 8]: a layer's scales (expert_epilogues.cuh), then the first unit's two numbers
    const float* weight_scales,
    // guidance (kernels/guidance.py): [HORIZON, 32], [steps], [steps, HORIZON]
    const float* previous, const float* reach, const float* pull,
    // the prefix, and rows from layer to layer of its keys and values; counters: prefix rows, first position, arrivals,
    // steps, guided
    const u16* prefix_keys, const u16* prefix_values, int prefix_stride, const u8* valid, const float* cosines, const float* sines, u32* counters, const float* dt,
    // x_t [HORIZON, 32], in and out; then what blocks leave for each other; keys, values [DEPTH, HORIZON, HEAD_DIM]
    float* x_t, u16* keys, u16* values, u16* act, float* squares, u16* queries, u16* attended, u16* hidden, float* velocities) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = blockIdx.x;
    const Place at = {block, block / CLUSTER, block % CLUSTER, warp, lane, lane / 4, lane % 4};
    const bool has_qkv = at.cluster < HEADS + 2, has_mlp = block < MLP_BLOCKS;
    const int prefix = counters[0], steps = counters[3];
    const u32 bars = shared_address(shared + BARS), inbox = bars + 8 * INBOX_BAR;
    float* factors = reinterpret_cast<float*>(shared + FACTORS);
    float* bias_mlp = reinterpret_cast<float*>(shared + BIAS);
    float* scales_now = reinterpret_cast<float*>(shared + SCALES);
    const Part part = part_of_keys(at, prefix);

    if (threadIdx.x < EMPTY + SLOTS)  // workers' warps tell that keys and slots are read
        mbarrier_init(bars + 8 * threadIdx.x, threadIdx.x == KEYS_READ || threadIdx.x >= EMPTY ? WORKERS / 32 : 1);
    fence_barrier_init();
    cluster_barrier();
    if (warp >= CONDUCTOR) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");  // 128 x 88 + 256 x 208 = 384 x 168
        if (warp == CONDUCTOR) conductor(at, act, queries, attended, hidden, counters + 2, steps, bars);
        else if (warp == CARRIER && lane == 0) carrier(at, qkv, out, gate_up, down, steps, bars);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
    float* squares_end = squares + CLUSTERS * TOKENS;
    const u32 seen = seen_keys(at, part, prefix, valid);
    const int token = token_of_sums(), turn = (counters[1] + token) * (HEAD_DIM / 2) + at.rank * 16 + 4 * at.q;
    const bool turned = at.cluster <= HEADS && token < HORIZON;  // q and k; v keeps as it is
    u32 parity = 0;  // a bit for each of the first barriers in shared memory
    Ring ring = {bars, 0, 0};
    Residual x = {};
    x.token = at.rank * OWN + warp, x.column = at.cluster * COLUMNS + 4 * lane, x.owns = warp < OWN;
    x.inside = x.owns && lane < COLUMNS / 4 && x.column < WIDTH;
    float x_own = x.owns && x.token < HORIZON ? x_t[x.token * ACTION_DIM + lane] : 0.f;  // lane: action dimension

#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        const float* scale = scales + step * (2 * DEPTH + 1) * WIDTH + x.column;
        const float* gate = gates + step * 2 * DEPTH * WIDTH + x.column;
        enter(x, x_own, action_in, action_in_bias);
        first_unit(x, x_own, weight_scales + DEPTH * 8);
        publish(at, x, four(scale, x.inside), act, squares);
#pragma unroll 1
        for (int layer = 0; layer < DEPTH; ++layer, gate += 2 * WIDTH) {
            const int table = step * DEPTH + layer;
            const int before = layer * prefix_stride * HEAD_DIM, own = layer * HORIZON * HEAD_DIM;

            // q, k, v: a cluster a head, 32 rows a block
            workers_arrive();
            const float* bias_qkv = qkv_bias + table * QKV + at.cluster * HEAD_DIM + at.rank * 16 + 4 * at.q;
            float4 bias = four(bias_qkv, has_qkv), bias_far = four(bias_qkv + HEAD_DIM / 2, has_qkv);
            if (LOW && threadIdx.x < 8) scales_now[layer % 2 * 8 + threadIdx.x] = weight_scales[layer * 8 + threadIdx.x];
            const float4 sine = four(sines + turn, turned);
            const float4 cosine = turned ? four(cosines + turn, true) : make_float4(1.f, 1.f, 1.f, 1.f);
            workers_wait();
            if ((LOW || has_qkv) && threadIdx.x < TOKENS) factors[threadIdx.x] = inverse_rms(squares, threadIdx.x);
            if (has_qkv) {
                float sums[8];
                ring = product<32, 32 * CHUNKS, LOW>(ring, 4, parity, sums);
                parity ^= (1 << CHUNKS) - 1;
                const float scale = weight_scale(layer, OF_QKV + max(at.cluster - HEADS + 1, 0));
                store_qkv(at, sums, factors[token] * scale, bias, bias_far, cosine, sine, queries,
                          keys + own, values + own);
            } else {
                ring = skip(ring, 4);
            }

            // attention: some rows of q a cluster, an eighth of the keys a block
            workers_arrive();
            workers_arrived();
            // the activations and four slots are read: room here
            fetch(prefix_keys + before, prefix_values + before, part.first, 0, part.before);
            workers_wait();
            fetch(keys + own, values + own, part.own, part.before, part.count);
            copy_wait();
            mbarrier_wait(bars, parity & 1);
            parity ^= 1;
            workers_sync();
            attend(at, part.count, seen, bars + 8 * KEYS_READ);
            workers_sync();
            exchange_attended(at, attended, inbox, parity);

            // its output into the residual: a head a block, the cluster's columns
            workers_arrive();
            float4 gate_now = four(gate, x.inside), scale_next = four(scale += WIDTH, x.inside);
            workers_wait();
            float sums[COLUMNS / 4];
            ring = product<COLUMNS, 128, false>(ring, 2, parity, sums);
            parity ^= 0x03;
            add(x, gate_now, exchange_sums(at, sums, inbox, parity));
            parity ^= 1 << INBOX_BAR;
            renew_unit(x, factors);
            publish(at, x, scale_next, act, squares);

            // gate and up, in turn, of some features a block
            workers_arrive();
            if (has_mlp && threadIdx.x < COLUMNS) {
                int feature = min(block * (COLUMNS / 2) + (int)threadIdx.x / 2, MLP - 1);
                bias_mlp[threadIdx.x] = gate_up_bias[(table * 2 + threadIdx.x % 2) * MLP + feature];
            }
            workers_wait();
            if ((LOW || has_mlp) && threadIdx.x < TOKENS) factors[threadIdx.x] = inverse_rms(squares, threadIdx.x);
            if (has_mlp) {
                ring = product<COLUMNS, 128, LOW>(ring, CHUNKS, parity, sums);
                store_hidden(at, sums, factors[token], layer, reinterpret_cast<const float2*>(bias_mlp), hidden);
            } else {
                ring = skip(ring, CHUNKS);
                for (int i = 0; i < CHUNKS; ++i) mbarrier_wait(bars + 8 * i, parity >> i & 1);
            }
            parity ^= (1 << CHUNKS) - 1;

            // down, into the residual: an eighth of the features a block, the cluster's columns
            workers_arrive();
            gate_now = four(gate + WIDTH, x.inside), scale_next = four(scale += WIDTH, x.inside);
            workers_wait();
            ring = product<COLUMNS, 128, LOW>(ring, CHUNKS / 2, parity, sums);
            parity ^= (1 << CHUNKS / 2) - 1;
            add(x, gate_now, exchange_sums(at, sums, inbox, parity), weight_scale(layer, OF_DOWN));
            parity ^= 1 << INBOX_BAR;
            renew_unit(x, factors);
            if (layer < DEPTH - 1) publish(at, x, scale_next, act, squares);
        }
        leave(at, x, four(scale, x.inside), action_out, velocities, squares_end);
        workers_arrive();
        float bias = out_bias[step * ACTION_DIM + lane];
        workers_wait();
        if (x.owns) {
            const float ahead = *dt * velocity(x.token, lane, velocities, squares_end, bias);
            float pulled = 0.f;
            if (counters[4] && x.token < HORIZON)
                pulled = pull[step * HORIZON + x.token] *
                         (previous[x.token * ACTION_DIM + lane] - (x_own + reach[step] * ahead));
            x_own += ahead + pulled;
        }
    }
    if (at.cluster == 0 && x.owns && x.token < HORIZON) x_t[x.token * ACTION_DIM + lane] = x_own;
}
