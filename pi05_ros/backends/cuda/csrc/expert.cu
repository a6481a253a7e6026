// The action expert's whole denoising loop in one kernel: every step, every layer, blocks that stay.
//
// One launch instead of 110 a step. Blocks meet at a barrier of the whole grid five times a layer; the weights of the next
// product are on their way into a ring in shared memory before the barrier, so that memory does not wait for it. Clusters of 8 blocks
// share activations (one load, eight copies), and add their parts of k and of the keys through each other's shared memory.
// The residual, float32, never leaves the registers of the block that owns it.
//
// Floor: the weights, 623 MB a step (0.147 ms at 4.25 TB/s). Checked against model/gemma.py in float32, and bit for bit
// against itself. Tables as in modulation.py: (1 + scale) rides on the activation, 1/rms on the product, shift is a bias.
#include "expert_attention.cuh"
#include "expert_ends.cuh"

__device__ __forceinline__ float gelu_tanh(float x) {  // the logistic form: one exponential
    return x / (1.f + exp2_fast(-2.302208198f * (x + 0.044715f * x * x * x)));
}
// ---- copies that the conductor starts (one thread) ----
// The residual's activations in 8 chunks, each loaded by one block of the cluster for all of them.
__device__ __forceinline__ void share_activations(const Place& at, const u16* from, u32 bars) {
#pragma unroll 1
    for (int i = 0; i < CLUSTER; ++i) mbarrier_expect(bars + 8 * i, 4 * K32);
    bulk_load_all(shared_address(shared + ACT) + at.rank * 4 * K32, from + at.rank * 2 * K32, 4 * K32,
                  bars + 8 * at.rank, 0xff);
}
// This block's eighth of wider activations, in chunks of 128 features.
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
        for (int phase = 0; phase <= 5 * DEPTH; ++phase)
            conduct(arrivals, met += BLOCKS, [&] {
                const int kind = phase == 5 * DEPTH ? 5 : phase % 5;
                if (kind == 3 || kind == 0 && at.cluster < HEADS + 2) share_activations(at, act, bars);
                else if (kind == 1) share_queries(at, queries, bars);
                else if (kind == 2 || kind == 4)
                    load_activations(at, kind == 2 ? attended : hidden, kind, bars);
            });
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
        int blocks = at.block >= owners ? 0 : kind == 1 ? 2 : kind == 2 ? 8 : 4;
        from += (long long)(layer * owners + at.block) * blocks * bytes;
        if (kind == 1) {  // the keys had the ring's memory
            mbarrier_wait(bars + 8 * KEYS_READ, keys_read);
            keys_read ^= 1;
        }
#pragma unroll 1
        for (; blocks; --blocks, from += bytes) {
            mbarrier_wait(bars + 8 * (EMPTY + slot), parity);
            mbarrier_expect(bars + 8 * (FULL + slot), bytes);
            bulk_load(shared_address(shared + RING) + slot * SLOT, from, bytes, bars + 8 * (FULL + slot));
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
    // guidance (kernels/guidance.py): [HORIZON, 32], [steps], [steps, HORIZON]
    const float* previous, const float* reach, const float* pull,
    // the prefix; counters: prefix rows, first position, arrivals, steps, guided
    u16* keys, u16* values, const u8* valid, const float* cosines, const float* sines, u32* counters, const float* dt,
    // x_t [HORIZON, 32], in and out; then what blocks leave for each other
    float* x_t, u16* act, float* squares, u16* queries, u16* attended, u16* hidden, float* velocities) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = blockIdx.x;
    const Place at = {block, block / CLUSTER, block % CLUSTER, warp, lane, lane / 4, lane % 4};
    const bool has_qkv = at.cluster < HEADS + 2, has_mlp = block < MLP_BLOCKS;
    const int prefix = counters[0], steps = counters[3];
    const u32 bars = shared_address(shared + BARS), inbox = bars + 8 * INBOX_BAR;
    float* factors = reinterpret_cast<float*>(shared + FACTORS);
    float* bias_mlp = reinterpret_cast<float*>(shared + BIAS);
    float2* rope = reinterpret_cast<float2*>(shared + ROPE);
    const Part part = part_of_keys(at, prefix);

    if (threadIdx.x < EMPTY + SLOTS)  // workers' warps tell that keys and slots are read
        mbarrier_init(bars + 8 * threadIdx.x, threadIdx.x == KEYS_READ || threadIdx.x >= EMPTY ? WORKERS / 32 : 1);
    fence_barrier_init();
    for (int i = threadIdx.x; i < TOKENS * 16; i += THREADS) {
        bool turned = at.cluster <= HEADS && i / 16 < HORIZON;
        int from = (counters[1] + i / 16) * (HEAD_DIM / 2) + at.rank * 16 + i % 16;
        rope[i] = turned ? make_float2(cosines[from], sines[from]) : make_float2(1.f, 0.f);
    }
    cluster_barrier();
    if (warp == CONDUCTOR) return conductor(at, act, queries, attended, hidden, counters + 2, steps, bars);
    if (warp == CARRIER) {
        if (lane == 0) carrier(at, qkv, out, gate_up, down, steps, bars);
        return;
    }
    const u32 seen = seen_keys(at, part, valid);
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
        publish(at, x, four(scale, x.inside), act, squares);
#pragma unroll 1
        for (int layer = 0; layer < DEPTH; ++layer, gate += 2 * WIDTH) {
            const int table = step * DEPTH + layer;
            u16* layer_keys = keys + layer * KEY_ROWS * HEAD_DIM;
            u16* layer_values = values + layer * KEY_ROWS * HEAD_DIM;

            // q, k, v: a cluster a head, 32 rows a block
            workers_arrive();
            float2 bias = has_qkv ? qkv_bias_of(at, qkv_bias + table * QKV) : make_float2(0.f, 0.f);
            workers_wait();
            if (has_qkv) {
                if (threadIdx.x < TOKENS) factors[threadIdx.x] = inverse_rms(squares, threadIdx.x);
                ring = product<32, 256, QKV_SUM_ROW>(ring, 4, parity);
                parity ^= 0xff;
                store_qkv(at, factors, bias, rope, queries, layer_keys + prefix * HEAD_DIM, layer_values + prefix * HEAD_DIM);
            }

            // attention: some rows of q a cluster, an eighth of the keys a block
            workers_arrive();
            workers_sync();  // the sums are read, the ring is empty: keys and values may take their memory
            fetch(part, layer_keys, layer_values, false);
            workers_wait();
            if (part.end > prefix) fetch(part, layer_keys, layer_values, true);
            copy_wait();
            mbarrier_wait(bars, parity & 1);
            parity ^= 1;
            workers_sync();
            attend(at, seen, bars + 8 * KEYS_READ);
            workers_sync();
            exchange_attended(at, attended, inbox, parity);

            // its output into the residual: a head a block, the cluster's columns
            workers_arrive();
            float4 gate_now = four(gate, x.inside), scale_next = four(scale += WIDTH, x.inside);
            workers_wait();
            ring = product<COLUMNS, 128, SUM_ROW>(ring, 2, parity);
            parity ^= 0x03;
            add(x, gate_now, exchange_sums(at.rank, inbox, parity));
            parity ^= 1 << INBOX_BAR;
            publish(at, x, scale_next, act, squares);

            // gate and up, in turn, of some features a block
            workers_arrive();
            if (has_mlp && threadIdx.x < COLUMNS) {
                int feature = min(block * (COLUMNS / 2) + (int)threadIdx.x / 2, MLP - 1);
                bias_mlp[threadIdx.x] = gate_up_bias[(table * 2 + threadIdx.x % 2) * MLP + feature];
            }
            workers_wait();
            if (threadIdx.x < TOKENS) factors[threadIdx.x] = inverse_rms(squares, threadIdx.x);
            if (has_mlp) {
                ring = product<COLUMNS, 128, SUM_ROW>(ring, 8, parity);
#pragma unroll 1
                for (int i = threadIdx.x; i < TOKENS * (COLUMNS / 2); i += WORKERS) {
                    int t = i / (COLUMNS / 2), pair = i % (COLUMNS / 2), feature = block * (COLUMNS / 2) + pair;
                    float2 one = sum_at<float2, SUM_ROW>(0, t, 2 * pair), other = sum_at<float2, SUM_ROW>(1, t, 2 * pair);
                    float g = (one.x + other.x) * factors[t] + bias_mlp[2 * pair];
                    float u = (one.y + other.y) * factors[t] + bias_mlp[2 * pair + 1];
                    if (feature < MLP) hidden[(feature / 8 * TOKENS + t) * 8 + feature % 8] = bf16(gelu_tanh(g) * u);
                }
            } else {
                for (int i = 0; i < 8; ++i) mbarrier_wait(bars + 8 * i, parity >> i & 1);
            }
            parity ^= 0xff;

            // down, into the residual: an eighth of the features a block, the cluster's columns
            workers_arrive();
            gate_now = four(gate + WIDTH, x.inside), scale_next = four(scale += WIDTH, x.inside);
            workers_wait();
            ring = product<COLUMNS, 128, SUM_ROW>(ring, 4, parity);
            parity ^= 0x0f;
            add(x, gate_now, exchange_sums(at.rank, inbox, parity));
            parity ^= 1 << INBOX_BAR;
            if (layer < DEPTH - 1) publish(at, x, scale_next, act, squares);
            else leave(at, x, scale_next, action_out, velocities, squares + CLUSTERS * TOKENS);
        }
        workers_arrive();
        float bias = out_bias[step * ACTION_DIM + lane];
        workers_wait();
        if (x.owns) {
            const float ahead = *dt * velocity(x.token, lane, velocities, squares + CLUSTERS * TOKENS, bias);
            float pulled = 0.f;
            if (counters[4] && x.token < HORIZON)
                pulled = pull[step * HORIZON + x.token] *
                         (previous[x.token * ACTION_DIM + lane] - (x_own + reach[step] * ahead));
            x_own += ahead + pulled;
        }
    }
    if (at.cluster == 0 && x.owns && x.token < HORIZON) x_t[x.token * ACTION_DIM + lane] = x_own;
}
