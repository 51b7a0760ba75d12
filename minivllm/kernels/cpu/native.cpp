// The CPU kernels of mini-vLLM: linears over packed weights, attention over the paged cache, and the elementwise ops between.
//
// Plain C functions (called through ctypes), no headers of any library. Written with the compiler's vector extension, so one
// source becomes AVX-512, AVX2 or NEON code; where an instruction has no such form (dot products of bfloat16 or int8) there are
// intrinsics beside the portable version.
//
// One rule holds everywhere: what is computed for a row (a token) is the same sequence of roundings whatever other rows share
// the call. A sum over the inputs is one chain in order for each output, never split by batch size or by thread. So results are
// bitwise the same alone and in a batch, and the batch-invariant mode needs no kernels of its own.
//
// Threads are a small pool of our own: see below why.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <algorithm>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// ---- vectors ------------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
enum Kind { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };  // of tensors, as the callers number them

template <class To, class From> static inline To bits_of(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &x, sizeof to);
    return to;
}

static inline vf splat(float x) { return x - vf{}; }

static inline vf load(const float *p) { vf x; std::memcpy(&x, p, sizeof x); return x; }
static inline vf load(const bf16 *p) {
    vh h;
    std::memcpy(&h, p, sizeof h);
    return bits_of<vf>(__builtin_convertvector(h, vu) << 16);
}
static inline void store(float *p, vf x) { std::memcpy(p, &x, sizeof x); }
static inline void store(bf16 *p, vf x) {  // to nearest, ties to even; not by vcvtneps2bf16, which drops denormals
    vu u = bits_of<vu>(x);
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vu nan = bits_of<vu>(x != x);
    vh h = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), vh);
    std::memcpy(p, &h, sizeof h);
}
#if defined(__AVX512F__)
static inline vf load(const f16 *p) { return (vf)_mm512_maskz_cvtph_ps(-1, _mm256_loadu_si256((const __m256i *)p)); }
static inline void store(f16 *p, vf x) { _mm256_storeu_si256((__m256i *)p, _mm512_maskz_cvtps_ph(-1, (__m512)x, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__F16C__) && defined(__AVX2__)
static inline vf load(const f16 *p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline void store(f16 *p, vf x) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT)); }
#else
#if defined(__aarch64__)
typedef __fp16 wide_half;
#else
typedef _Float16 wide_half;
#endif
static inline vf load(const f16 *p) {
    vf x;
    for (int i = 0; i < W; i++) x[i] = (float)bits_of<wide_half>(p[i].bits);
    return x;
}
static inline void store(f16 *p, vf x) {
    for (int i = 0; i < W; i++) p[i].bits = bits_of<uint16_t>((wide_half)x[i]);
}
#endif

// The first n lanes; the others read as zero and are not written. The same arithmetic as whole vectors, so the same bits.
template <class T> static inline vf load_part(const T *p, int n) {
    T whole[W] = {};
    std::memcpy(whole, p, n * sizeof(T));
    return load(whole);
}
template <class T> static inline void store_part(T *p, vf x, int n) {
    T whole[W];
    store(whole, x);
    std::memcpy(p, whole, n * sizeof(T));
}

static inline float sum(vf x) {  // lanes in a fixed tree
    float lanes[W];
    store(lanes, x);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

// Call f with a value of the type that a tensor's kind stands for.
template <class F> static inline void with_type(int kind, F f) {
    if (kind == FLOAT32) f(float{});
    else if (kind == BFLOAT16) f(bf16{});
    else f(f16{});
}

// ---- threads --------------------------------------------------------------------------------------------------------------

// One pool for the process. A job is cut into parts, and whoever is free takes the next one, the caller too. At the end the caller
// waits only for parts that somebody is at. So a worker that the system is not running just now (another process wants the
// core as well) is not waited for: it costs its help, nothing else. OpenMP's threads all have to arrive at the end of a loop,
// which on shared cores makes a step ten times longer.
//
// Workers look out for the next job for SPIN_NS, longer than the gap between two calls of a step, then sleep.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

static inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
  public:
    // Let jobs run on `threads` threads, the caller's included. There are never fewer workers than before; the surplus sleeps.
    void resize(int threads) {
        std::lock_guard<std::mutex> hold(busy);
        while ((int)num_workers < threads - 1) std::thread(&Pool::work, this, ++num_workers).detach();
        num_threads = threads;
    }
    int size() const { return num_threads; }

    // Call f(0) .. f(parts - 1), each once, on whatever threads are free.
    template <class F> void run(int64_t parts, F &f) {
        if (parts > 1 && num_threads > 1 && busy.try_lock()) {  // a second caller at the same time does its own work alone
            call = [](void *context, int64_t part) { (*(F *)context)(part); };
            context = &f, num_parts = parts, next = 0;
            gate += OPEN;
            round++;
            if (asleep.load()) {
                { std::lock_guard<std::mutex> hold(sleep); }
                wake.notify_all();
            }
            take_parts();
            gate -= OPEN;
            for (int64_t turns = 0; gate.load(std::memory_order_acquire) != 0; turns++)
                if (turns < 4096) relax();
                else std::this_thread::yield();
            busy.unlock();
        } else
            for (int64_t part = 0; part < parts; part++) f(part);
    }

  private:
    static constexpr int64_t OPEN = 1 << 30, SPIN_NS = 100000;

    void take_parts() {
        for (int64_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < num_parts;) call(context, part);
    }
    void work(int number) {
        for (uint64_t seen = 0;;) {
            wait_after(seen, number < num_threads);
            seen = round.load();
            if (number < num_threads && gate.fetch_add(1) >= OPEN) take_parts();  // the job's fields are read inside the gate only
            else if (number >= num_threads) continue;
            gate.fetch_sub(1, std::memory_order_release);
        }
    }
    void wait_after(uint64_t seen, bool at_once) {
        const auto until = std::chrono::steady_clock::now() + std::chrono::nanoseconds(at_once ? SPIN_NS : 0);
        while (std::chrono::steady_clock::now() < until)
            for (int turns = 0; turns < 32; turns++) {
                if (round.load(std::memory_order_acquire) != seen) return;
                relax();
            }
        std::unique_lock<std::mutex> hold(sleep);
        asleep++;
        wake.wait(hold, [&] { return round.load() != seen; });
        asleep--;
    }

    std::mutex busy, sleep;             // held by whoever runs a job; by whoever goes to sleep
    std::condition_variable wake;
    std::atomic<int64_t> gate{0};       // threads inside, plus OPEN while there may be parts left
    std::atomic<uint64_t> round{0};     // counts jobs
    std::atomic<int64_t> next{0};       // part
    std::atomic<int> asleep{0}, num_threads{1};
    int num_workers = 0;
    void (*call)(void *, int64_t) = nullptr;
    void *context = nullptr;
    int64_t num_parts = 0;
};
constexpr int64_t PART_CYCLES = 15000;  // a part that is not worth less: handing it over takes about 1,000
static Pool &pool = *new Pool;  // never destroyed: its workers may outlive the end of the program's other parts

// Call f(part, parts) for all parts of `cycles` of work: one part if it is little, else several a thread, so that they end together.
template <class F> static inline void share(int64_t cycles, F f) {
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(cycles / PART_CYCLES, pool.size() * 8));
    auto part = [&](int64_t i) { f(i, parts); };
    pool.run(parts, part);
}

extern "C" void set_threads(int32_t threads) { pool.resize(threads); }

// ---- linears over packed weights ------------------------------------------------------------------------------------------
//
// A matrix [num_out, num_in] lies in panels: [panel][step][output of the panel][input of the step], filled up with zeros. A
// step is as many inputs as one 32-bit lane takes: two of bfloat16, four of int8, else one. So a panel is read from its
// beginning to its end, and every vector of weights serves all rows of a tile.
//
// A tile is up to TILE_ROWS rows times a panel. Its sums stay in registers: 8 rows x 3 vectors of sums, 3 vectors of weights
// and one input in all lanes are 28 of 32 registers. (6 rows x 4 vectors are as many, but then 8 rows are two tiles, and only
// the first computes while weights arrive: a quarter slower.) AVX2 has 16 registers: 6 rows x 2 vectors.

#include <cstdlib>
#include <type_traits>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int TILE_ROWS = 6, PANEL_VECTORS = 2;
#else
constexpr int TILE_ROWS = 8, PANEL_VECTORS = 3;
#endif
constexpr int PANEL = PANEL_VECTORS * W;
constexpr int64_t BLOCK_STEPS = 1024;  // such a block of a panel stays in the L2 cache while
constexpr int64_t GROUP_TILES = 32;    // so many tiles take turns with it
constexpr int64_t READ_AHEAD = 8192;   // bytes

// x [rows, num_in], its rows x_stride values apart, times a matrix [num_out, num_in]: out [rows, num_out]. The caller writes
// these 13 words, in this order.
struct Product {
    const char *x, *panels;
    const float *scales;  // [num_out], int8 only: values * scales are the weights
    const int32_t *sums;  // [panels * PANEL], int8 only: of each output's values
    const char *bias;     // [num_out] of x's kind, or null
    char *out;
    int64_t rows, x_stride, num_out, num_in, x_kind, matrix_kind, out_kind;
};

template <class T> static inline T peek(const char *p) {
    T x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

// One struct for each way to multiply. Weight: as it is stored; STEP: how many are a step; LANES: bytes of a vector of steps.
// Rows of x are read as 32-bit words, PARTS for a step, each put into all lanes (`input`) to meet vectors of `weights`.
// `prepare` makes such words of a row of x and returns what the sums are to be multiplied with; no need of it if `as_is`.

struct FloatSums {
    using Sum = vf;
    static vf input(const char *x) { return splat(peek<float>(x)); }
    static vf add(vf sum, vf x, vf w) { return x * w + sum; }
    template <class T> static float prepare(const T *x, int64_t num_in, char *words) {
        for (int64_t i = 0; i < num_in; i += W)
            store((float *)words + i, i + W <= num_in ? load(x + i) : load_part(x + i, (int)(num_in - i)));
        return 1;
    }
};
struct Float32 : FloatSums {
    using Weight = float;
    static constexpr int STEP = 1, PARTS = 1, LANES = W * 4;
    static bool as_is(int64_t) { return true; }
    static vf weights(const char *w, int) { return load((const float *)w); }
};
struct Float16 : FloatSums {
    using Weight = f16;
    static constexpr int STEP = 1, PARTS = 1, LANES = W * 2;
    static bool as_is(int64_t) { return false; }
    static vf weights(const char *w, int) { return load((const f16 *)w); }
};
// The instruction for bfloat16 is worth it where it does twice the work of an fma: on AMD. On Intel's CPUs it does half, and
// widening to float32 is twice as fast from 8 rows on. (GCC 12 takes a Zen 4 for a Zen 3 with AVX-512.)
#if defined(__AVX512BF16__) && (defined(__znver3__) || defined(__znver4__) || defined(__znver5__))
struct Bfloat16 {
    using Sum = vf;
    using Weight = bf16;
    static constexpr int STEP = 2, PARTS = 1, LANES = W * 4;
    static bool as_is(int64_t num_in) { return num_in % 2 == 0; }
    static vu input(const char *x) { return peek<uint32_t>(x) - vu{}; }
    static vu weights(const char *w, int) { return peek<vu>(w); }
    static vf add(vf sum, vu x, vu w) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w); }
    template <class T> static float prepare(const T *x, int64_t num_in, char *words) {
        std::memcpy(words, x, num_in * 2);
        if (num_in % 2) std::memset(words + num_in * 2, 0, 2);
        return 1;
    }
};
#else
struct Bfloat16 : FloatSums {
    using Weight = bf16;
    static constexpr int STEP = 2, PARTS = 2, LANES = W * 4;
    static bool as_is(int64_t) { return false; }
    static vf weights(const char *w, int part) {
        vu pairs = peek<vu>(w);
        return bits_of<vf>(part ? pairs & 0xffff0000 : pairs << 16);
    }
};
#endif

// x in eight bits, a scale for each row; sums are exact (of up to 65,000 inputs). An instruction takes four bytes of x, signed
// (ARM) or unsigned (x86: UNSIGNED is added to them), or pairs of 16 bits (AVX2: even inputs, then odd ones), or there is none.
struct Int8 {
    using Sum = vi;
    using Weight = int8_t;
    static constexpr int STEP = 4, LANES = W * 4;
    static bool as_is(int64_t) { return false; }
    static vi input(const char *x) { return peek<int32_t>(x) - vi{}; }
#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && defined(__AVX2__)) || defined(__ARM_FEATURE_DOTPROD)
    static constexpr int PARTS = 1;
    static vi weights(const char *w, int) { return peek<vi>(w); }
    static void put(char *words, int64_t i, vi q) {
        typedef int8_t vb __attribute__((vector_size(W)));
        vb bytes = __builtin_convertvector(q + UNSIGNED, vb);
        std::memcpy(words + i, &bytes, W);
    }
#if defined(__AVX512VNNI__)
    static constexpr int UNSIGNED = 128;
    static vi add(vi sum, vi x, vi w) { return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w); }
#elif defined(__AVXVNNI__)
    static constexpr int UNSIGNED = 128;
    static vi add(vi sum, vi x, vi w) { return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w); }
#else
    static constexpr int UNSIGNED = 0;
    static vi add(vi sum, vi x, vi w) { return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)x, (int8x16_t)w); }
#endif
#elif defined(__AVX2__)
    static constexpr int PARTS = 2, UNSIGNED = 0;
    typedef int16_t pairs __attribute__((vector_size(W * 4)));
    static vi weights(const char *w, int part) { return (vi)((part ? peek<pairs>(w) : peek<pairs>(w) << 8) >> 8); }
    static void put(char *words, int64_t i, vi q) {
        for (int64_t lane = 0; lane < W; lane++) {
            int64_t at = i + lane;
            ((int16_t *)words)[at - at % 4 + at % 2 * 2 + at % 4 / 2] = (int16_t)q[lane];
        }
    }
#if defined(__AVX512BW__)
    static vi add(vi sum, vi x, vi w) { return sum + (vi)_mm512_madd_epi16((__m512i)x, (__m512i)w); }
#else
    static vi add(vi sum, vi x, vi w) { return sum + (vi)_mm256_madd_epi16((__m256i)x, (__m256i)w); }
#endif
#else
    static constexpr int PARTS = 4, UNSIGNED = 0;
    static vi weights(const char *w, int part) { return peek<vi>(w) << (24 - 8 * part) >> 24; }
    static void put(char *words, int64_t i, vi q) { std::memcpy(words + i * 4, &q, sizeof q); }
    static vi add(vi sum, vi x, vi w) { return x * w + sum; }
#endif

    // x * 127 / max|x| to the nearest integer, ties to even. A row that is not finite gets the scale NaN.
    template <class T> static float prepare(const T *x, int64_t num_in, char *words) {
        auto take = [&](int64_t i) { return i + W <= num_in ? load(x + i) : load_part(x + i, (int)(num_in - i)); };
        vi largest = {};  // of positive floats the larger has the larger bits, and NaN has larger ones than Inf
        for (int64_t i = 0; i < num_in; i += W) {
            vi bits = bits_of<vi>(take(i)) & 0x7fffffff;
            largest = bits > largest ? bits : largest;
        }
        int32_t most = 0;
        for (int i = 0; i < W; i++) most = std::max<int32_t>(most, largest[i]);
        float amax = bits_of<float>(most), inverse = most ? 1 / amax * 127 : 0;  // in the way in which torch divides 127 by it
        for (int64_t i = 0; i < num_in; i += W) {
            vi y = bits_of<vi>(take(i) * inverse), negative = y >> 31;
            vf shifted = bits_of<vf>(y & 0x7fffffff) + 8388608.0f;  // 2^23: what is left of the fraction's bits is the integer
            put(words, i, ((bits_of<vi>(shifted) & 0xff) ^ negative) - negative);
        }
        return most < 0x7f800000 ? amax / 127.0f : __builtin_nanf("");
    }
};

enum { INT8 = 3 };  // a kind of matrices only
template <class F> static inline void with_way(int kind, F f) {
    if (kind == FLOAT32) f(Float32{});
    else if (kind == BFLOAT16) f(Bfloat16{});
    else if (kind == FLOAT16) f(Float16{});
    else f(Int8{});
}

// A tile's turn with a block of a panel: `steps` steps of weights, and of x, whose rows are x_stride bytes apart. The tile's
// sums [rows][PANEL_VECTORS] go on from where they were, unless they are new. Each step fetches `lines` cache lines `ahead`.
struct Turn {
    const char *weights, *x, *ahead;
    int64_t x_stride, steps, lines;
    bool is_new;
};

template <class K, int M> static __attribute__((noinline)) void add_tile(const Turn &turn, typename K::Sum *sums) {
    const char *w = turn.weights, *x = turn.x, *ahead = turn.ahead;
    const int64_t x_stride = turn.x_stride, lines = turn.lines;
    typename K::Sum sum[M][PANEL_VECTORS];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 3
        for (int v = 0; v < PANEL_VECTORS; v++) sum[m][v] = turn.is_new ? typename K::Sum{} : sums[m * PANEL_VECTORS + v];
    for (int64_t k = turn.steps; k > 0; k--) {
        for (int64_t line = 0; line < lines; line++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 4
        for (int part = 0; part < K::PARTS; part++, x += 4) {
            decltype(K::weights(w, part)) weights[PANEL_VECTORS];
#pragma GCC unroll 3
            for (int v = 0; v < PANEL_VECTORS; v++) weights[v] = K::weights(w + v * K::LANES, part);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                auto input = K::input(x + m * x_stride);
#pragma GCC unroll 3
                for (int v = 0; v < PANEL_VECTORS; v++) sum[m][v] = K::add(sum[m][v], input, weights[v]);
            }
        }
        w += PANEL_VECTORS * K::LANES;
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 3
        for (int v = 0; v < PANEL_VECTORS; v++) sums[m * PANEL_VECTORS + v] = sum[m][v];
}

template <class K, int M = TILE_ROWS> static void add_rows(int64_t rows, const Turn &turn, typename K::Sum *sums) {
    if (rows == M) add_tile<K, M>(turn, sums);
    else if constexpr (M > 1) add_rows<K, M - 1>(rows, turn, sums);
}

// What makes a panel's sums its outputs: (sum - offset) * the row's scale * scale + bias; without the first three if not int8.
struct Ending {
    vi offset[PANEL_VECTORS];
    vf scale[PANEL_VECTORS], bias[PANEL_VECTORS];
};
static Ending ending_of(const Product &p, int64_t panel) {
    Ending e = {};
    for (int64_t v = 0, o = panel * PANEL; v < PANEL_VECTORS && o < p.num_out; v++, o += W) {
        const int n = (int)std::min<int64_t>(W, p.num_out - o);
        if (p.scales) e.scale[v] = load_part(p.scales + o, n);
        if (p.sums) e.offset[v] = Int8::UNSIGNED * peek<vi>((const char *)(p.sums + o));
        if (p.bias) with_type(p.x_kind, [&](auto t) { e.bias[v] = load_part((const decltype(t) *)p.bias + o, n); });
    }
    return e;
}
template <class Sum>
static void finish(const Product &p, int64_t row, int64_t panel, float row_scale, const Ending &e, const Sum *sums) {
    with_type(p.out_kind, [&](auto t) {
        auto *out = (decltype(t) *)p.out + row * p.num_out + panel * PANEL;
        for (int64_t v = 0, left = p.num_out - panel * PANEL; v < PANEL_VECTORS && left > 0; v++, left -= W) {
            vf y;
            if constexpr (std::is_same_v<Sum, vi>) {
                y = __builtin_convertvector(sums[v] - e.offset[v], vf) * row_scale * e.scale[v];
                asm("" : "+m"(y));  // through memory, so that the bias is not fused into the product: the reference rounds it
            } else y = sums[v];
            if (left >= W) store(out + v * W, y + e.bias[v]);
            else store_part(out + v * W, y + e.bias[v], (int)left);
        }
    });
}

// Rows of x as words: those of row r are at words + r * stride, its sums are to be multiplied with scales[r].
struct Words {
    const char *words;
    int64_t stride;
    const float *scales;
};

// The tiles from `at` to `end`, counted panel by panel. A panel's tiles share the rows evenly. What this thread does next is
// likely to begin with the tile `after`.
template <class K> static void multiply_tiles(const Product &p, const Words &x, int64_t at, int64_t end, int64_t after) {
    const int64_t steps = (p.num_in + K::STEP - 1) / K::STEP, step_bytes = PANEL_VECTORS * K::LANES;
    const int64_t tiles = (p.rows + TILE_ROWS - 1) / TILE_ROWS, blocks = (steps + BLOCK_STEPS - 1) / BLOCK_STEPS;
    const char *end_of_panels = p.panels + (p.num_out + PANEL - 1) / PANEL * steps * step_bytes;
    typename K::Sum sums[GROUP_TILES][TILE_ROWS * PANEL_VECTORS];
    while (at < end) {
        const int64_t panel = at / tiles, tile = at % tiles, count = std::min({GROUP_TILES, tiles - tile, end - at});
        at += count;
        const int64_t next_tile = at < end ? at : after;
        const Ending ending = ending_of(p, panel);
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t k = steps * block / blocks, next = steps * (block + 1) / blocks, bytes = (next - k) * step_bytes;
            const char *weights = p.panels + (panel * steps + k) * step_bytes;
            // Of several tiles each fetches its part of what comes next meanwhile. A full one alone looks READ_AHEAD bytes on;
            // a smaller one only waits for memory, and the CPU's own prefetching serves it better.
            const char *then = next < steps ? weights + bytes : p.panels + next_tile / tiles * steps * step_bytes;
            const bool alone = count == 1, helped = alone ? p.rows >= TILE_ROWS - 1 : then != weights && then != end_of_panels;
            const int64_t lines = helped ? (step_bytes + 64 * count - 1) / (64 * count) : 0;
            for (int64_t i = 0; i < count; i++) {
                const int64_t row = p.rows * (tile + i) / tiles, rows = p.rows * (tile + i + 1) / tiles - row;
                const char *ahead = alone ? weights + READ_AHEAD : then + bytes * i / count;
                const char *words = x.words + row * x.stride + k * K::PARTS * 4;
                add_rows<K>(rows, {weights, words, ahead, x.stride, next - k, lines, k == 0}, sums[i]);
                if (next == steps)
                    for (int64_t m = 0; m < rows; m++)
                        finish(p, row + m, panel, x.scales ? x.scales[row + m] : 1, ending, sums[i] + m * PANEL_VECTORS);
            }
        }
    }
}

template <class K> static int run_product(const Product &p) {
    const int64_t tiles = (p.rows + TILE_ROWS - 1) / TILE_ROWS * ((p.num_out + PANEL - 1) / PANEL);
    const int64_t row_bytes = ((p.num_in + W - 1) / W * W / K::STEP * K::PARTS * 4) | 64;
    Words x = {p.x, p.x_stride * (p.x_kind == FLOAT32 ? 4 : 2), nullptr};
    char *made = nullptr;
    // Rows whose distance is a multiple of 4,096 bytes push each other out of the L1 cache, so these are set apart, too.
    if (!K::as_is(p.num_in) || (p.rows > 4 && x.stride % 4096 == 0)) {
        made = (char *)std::malloc(p.rows * (row_bytes + sizeof(float)));
        if (!made) return 1;
        float *scales = (float *)(made + p.rows * row_bytes);
        share(p.rows * p.num_in / 2, [&](int64_t part, int64_t parts) {
            for (int64_t row = p.rows * part / parts; row < p.rows * (part + 1) / parts; row++)
                with_type(p.x_kind, [&](auto t) {
                    scales[row] = K::prepare((const decltype(t) *)p.x + row * p.x_stride, p.num_in, made + row * row_bytes);
                });
        });
        x = {made, row_bytes, scales};
    }
    // A vector of weights takes as many cycles as there are rows, and some 6 to arrive.
    share((p.num_out * p.num_in / K::STEP / W) * (p.rows + 6), [&](int64_t part, int64_t parts) {
        const int64_t after = std::min<int64_t>(part + pool.size(), parts);
        multiply_tiles<K>(p, x, tiles * part / parts, tiles * (part + 1) / parts, tiles * after / parts);
    });
    std::free(made);
    return 0;
}

static inline vf load(const int8_t *p) {
    vf x;
    for (int i = 0; i < W; i++) x[i] = p[i];
    return x;
}

// Outputs that make a panel.
extern "C" int panel_width() { return PANEL; }

// Ask for large pages behind memory that is not written yet: one core then reads a fifth faster from it.
static void prefer_huge_pages(char *memory, int64_t bytes) {
#if defined(__linux__)
    const uintptr_t page = 4096, first = ((uintptr_t)memory + page - 1) / page * page;
    const uintptr_t last = ((uintptr_t)memory + bytes) / page * page;
    if (first < last) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

// Values [num_out, num_in] into panels that are not written yet, and sums [panels * PANEL] of each output's if there are such.
extern "C" void pack(const char *values, char *panels, int32_t *sums, int64_t num_out, int64_t num_in, int matrix_kind) {
    with_way(matrix_kind, [&](auto way) {
        using K = decltype(way);
        using Weight = typename K::Weight;
        const int64_t num_panels = (num_out + PANEL - 1) / PANEL, steps = (num_in + K::STEP - 1) / K::STEP;
        prefer_huge_pages(panels, num_panels * steps * PANEL * K::STEP * (int64_t)sizeof(Weight));
        share(num_out * num_in, [&](int64_t part, int64_t parts) {
            for (int64_t panel = num_panels * part / parts; panel < num_panels * (part + 1) / parts; panel++) {
                const Weight *from = (const Weight *)values + panel * PANEL * num_in;
                Weight *to = (Weight *)panels + panel * steps * PANEL * K::STEP;
                const int64_t outputs = std::min<int64_t>(PANEL, num_out - panel * PANEL);
                for (int64_t k = 0; k < num_in; k += K::STEP, to += PANEL * K::STEP) {
                    const int64_t count = std::min<int64_t>(K::STEP, num_in - k);
                    std::fill_n(to, PANEL * K::STEP, Weight{});
                    for (int64_t o = 0; o < outputs; o++)
                        std::memcpy(to + o * K::STEP, from + o * num_in + k, count * sizeof(Weight));
                }
                if constexpr (std::is_same_v<K, Int8>)
                    for (int64_t o = 0; o < PANEL; o++) {
                        sums[panel * PANEL + o] = 0;
                        for (int64_t i = 0; o < outputs && i < num_in; i++) sums[panel * PANEL + o] += from[o * num_in + i];
                    }
            }
        });
    });
}

// The product, plus bias; rounded once. Returns 0, or 1 if there is no memory for the words.
extern "C" int linear(const Product *p) {
    int failed = 0;
    with_way(p->matrix_kind, [&](auto way) { failed = run_product<decltype(way)>(*p); });
    return failed;
}

// The matrix's rows `ids` [count] into out [count, num_in]. Returns 0, or 1 if there is no such row.
extern "C" int lookup(const int64_t *ids, const char *panels, const float *scales, char *out, int64_t count, int64_t num_out,
                      int64_t num_in, int matrix_kind, int out_kind) {
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= num_out) return 1;
    with_way(matrix_kind, [&](auto way) {
        using K = decltype(way);
        const int64_t steps = (num_in + K::STEP - 1) / K::STEP;
        share(count * num_in * 4, [&](int64_t part, int64_t parts) {
            for (int64_t i = count * part / parts; i < count * (part + 1) / parts; i++) {
                using Weight = typename K::Weight;
                const Weight *column = (const Weight *)panels + (ids[i] / PANEL * steps * PANEL + ids[i] % PANEL) * K::STEP;
                const float scale = scales ? scales[ids[i]] : 1;
                for (int64_t k = 0; k < num_in; k += W) {
                    const int n = (int)std::min<int64_t>(W, num_in - k);
                    Weight values[W] = {};
                    for (int j = 0; j < n; j++) values[j] = column[(k + j) / K::STEP * PANEL * K::STEP + (k + j) % K::STEP];
                    with_type(out_kind, [&](auto t) {
                        store_part((decltype(t) *)out + i * num_in + k, load(values) * scale, n);
                    });
                }
            }
        });
    });
    return 0;
}

// ---- norms, activations, rotary positions -----------------------------------------------------------------------------------

// Call f(row) for every row, all of them `cycles` of work.
template <class F> static inline void share_rows(int64_t rows, int64_t cycles, F f) {
    share(cycles, [&](int64_t part, int64_t parts) {
        for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; row++) f(row);
    });
}

// A row is walked in whole vectors and then, once, in the lanes that are left: f(i, Whole{}) and f(i, lanes). take, put and
// keep do the same for both, so that a value's bits do not depend on where in the row it stands.
struct Whole {};
template <class F> static inline void each_vector(int64_t dim, F f) {
    int64_t i = 0;
    for (; i + W <= dim; i += W) f(i, Whole{});
    if (i < dim) f(i, (int)(dim - i));
}
template <class T> static inline vf take(const T *p, Whole) { return load(p); }
template <class T> static inline vf take(const T *p, int n) { return load_part(p, n); }
template <class T> static inline void put(T *p, vf x, Whole) { store(p, x); }
template <class T> static inline void put(T *p, vf x, int n) { store_part(p, x, n); }

static inline vi lane_numbers() {
    vi x;
    for (int i = 0; i < W; i++) x[i] = i;
    return x;
}
static inline vi keep_lanes(vi x, Whole) { return x; }
static inline vi keep_lanes(vi x, int n) { return lane_numbers() < n ? x : vi{}; }
static inline vf keep(vf x, Whole) { return x; }
static inline vf keep(vf x, int n) { return lane_numbers() < n ? x : vf{}; }

template <class T> static inline vf rounded(vf x) {  // to what a T can hold
    T narrow[W];
    store(narrow, x);
    return load(narrow);
}
template <> inline vf rounded<float>(vf x) { return x; }
template <> inline vf rounded<bf16>(vf x) {  // as `store` does, without the way there and back
    vu u = bits_of<vu>(x);
    return x != x ? x : bits_of<vf>((u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000);
}

// e to the x, to about 1 ulp; exactly 1 at 0, 0 at -inf, inf at inf, NaN at NaN. x = n ln 2 + r with |r| <= ln 2 / 2 (ln 2 in
// two parts, so that n ln 2 is exact enough), a polynomial for r, and n goes into the exponent.
static inline vf exponential(vf x) {
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves no place for a fraction
    x = splat(89.0f) < x ? splat(89.0f) : x;
    x = splat(-105.0f) > x ? splat(-105.0f) : x;
    vf shifted = x * 1.44269504f + magic;
    vf n = shifted - magic;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = r * 1.38145941e-3f + 8.36871751e-3f;
    p = p * r + 4.1668389e-2f;
    p = p * r + 0.166665211f;
    p = p * r + 0.49999994f;
    p = p * (r * r) + r;
    p = p + 1.0f;
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_scalef_ps(-1, (__m512)p, (__m512)n);
#else
    vi whole = bits_of<vi>(shifted) - bits_of<vi>(magic), half = whole >> 1;  // in two steps: 2^128 is no float, 2^-140 is tiny
    return p * bits_of<vf>((half + 127) << 23) * bits_of<vf>((whole - half + 127) << 23);
#endif
}

// A bend, as the callers number them. x / (1 + e^-2u) is x / 2 (1 + tanh u) without its cancellation.
enum Bend { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };
static inline vf silu(vf x) { return x / (1.0f + exponential(-x)); }
static inline vf gelu_tanh(vf x) { return x / (1.0f + exponential(-1.5957691216f * (x + 0.044715f * (x * x * x)))); }
static inline vf relu(vf x) { return x < 0.0f ? vf{} : x; }
static inline vf gelu(vf x) {  // erf by Abramowitz and Stegun 7.1.26, error under 1.5e-7
    vf z = x * 0.70710678f, size = z < 0.0f ? -z : z, t = 1.0f / (1.0f + 0.3275911f * size);
    vf p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vf rest = p * t * exponential(-(z * z));  // 1 - erf|z|
    return 0.5f * x * (z < 0.0f ? rest : 2.0f - rest);
}
template <class F> static inline void with_bend(int bend, F f) {
    if (bend == SILU) f([](vf x) { return silu(x); });
    else if (bend == GELU) f([](vf x) { return gelu(x); });
    else if (bend == GELU_TANH) f([](vf x) { return gelu_tanh(x); });
    else f([](vf x) { return relu(x); });
}

// A norm of the rows of x [num_tokens, heads, dim]; `stride` values lie from token to token, all else is contiguous. With a
// residual, total = x + residual comes first, rounded, and is normed. bias: may be null.
struct Norm {
    const void *x, *residual, *weight, *bias;
    void *total, *out;
    int64_t num_tokens, heads, dim, stride, kind, centred;  // centred: layer_norm, which takes off the mean; else rms_norm
    double eps;
};

template <class T> static void norm_row(const Norm &norm, int64_t row) {
    const T *x = (const T *)norm.x + row / norm.heads * norm.stride + row % norm.heads * norm.dim;
    const T *weight = (const T *)norm.weight, *bias = (const T *)norm.bias;
    T *out = (T *)norm.out + row * norm.dim;
    if (norm.residual) {
        const T *residual = (const T *)norm.residual + row * norm.dim;
        T *total = (T *)norm.total + row * norm.dim;
        each_vector(norm.dim, [&](int64_t i, auto n) { put(total + i, take(x + i, n) + take(residual + i, n), n); });
        x = total;
    }
    vf sums = {}, squares = {};
    if (norm.centred) each_vector(norm.dim, [&](int64_t i, auto n) { sums = sums + take(x + i, n); });
    const vf mean = splat(sum(sums) / norm.dim);
    each_vector(norm.dim, [&](int64_t i, auto n) {
        const vf apart = keep(take(x + i, n) - mean, n);
        squares = squares + apart * apart;
    });
    const vf scale = splat(1.0f / std::sqrt(sum(squares) / norm.dim + (float)norm.eps));
    each_vector(norm.dim, [&](int64_t i, auto n) {
        vf y = (take(x + i, n) - mean) * scale;
        y = (norm.centred ? y : rounded<T>(y)) * take(weight + i, n);  // rms_norm rounds twice, as the models' own code does
        put(out + i, bias ? y + take(bias + i, n) : y, n);
    });
}

extern "C" void norm(const Norm *norm) {
    const int64_t rows = norm->num_tokens * norm->heads;
    with_type(norm->kind, [&](auto one) {
        share_rows(rows, rows * norm->dim, [&](int64_t row) { norm_row<decltype(one)>(*norm, row); });
    });
}

// out [num_tokens, dim] = bend(x); or bend(x), rounded, times the dim values beside it in x (the "up" half of a gated MLP).
struct Activation {
    const void *x;
    void *out;
    int64_t num_tokens, dim, stride, kind, bend, gated;  // stride: values of x from token to token
};

extern "C" void activation(const Activation *a) {
    with_type(a->kind, [&](auto one) {
        using T = decltype(one);
        with_bend(a->bend, [&](auto bend) {
            share_rows(a->num_tokens, a->num_tokens * a->dim * 2, [&](int64_t token) {
                const T *gate = (const T *)a->x + token * a->stride, *up = gate + a->dim;
                T *to = (T *)a->out + token * a->dim;
                each_vector(a->dim, [&](int64_t i, auto n) {
                    const vf y = bend(take(gate + i, n));
                    put(to + i, a->gated ? rounded<T>(y) * take(up + i, n) : y, n);
                });
            });
        });
    });
}

// Turn the pairs (i, i + half) of each head of x [num_tokens, heads, dim] by the token's angles, cos and sin [num_tokens,
// half]; what stands behind the first 2 * half values of a head is copied.
struct Rope {
    const void *x;
    const float *cos, *sin;
    void *out;
    int64_t num_tokens, heads, dim, half, stride, kind;  // stride: values of x from token to token
};

extern "C" void rope(const Rope *rope) {
    const int64_t rows = rope->num_tokens * rope->heads, dim = rope->dim, half = rope->half;
    with_type(rope->kind, [&](auto one) {
        using T = decltype(one);
        share_rows(rows, rows * dim, [&](int64_t row) {
            const int64_t token = row / rope->heads;
            const T *first = (const T *)rope->x + token * rope->stride + row % rope->heads * dim, *second = first + half;
            const float *cos = rope->cos + token * half, *sin = rope->sin + token * half;
            T *to = (T *)rope->out + row * dim;
            each_vector(half, [&](int64_t i, auto n) {
                const vf a = take(first + i, n), b = take(second + i, n), c = take(cos + i, n), s = take(sin + i, n);
                put(to + i, a * c - b * s, n);
                put(to + half + i, b * c + a * s, n);
            });
            std::memcpy((void *)(to + 2 * half), (const void *)(first + 2 * half), (dim - 2 * half) * sizeof(T));
        });
    });
}

// ---- choosing from logits -------------------------------------------------------------------------------------------------

// For each row of logits [rows, vocab]: the place of the largest, the lowest among equals, and whether all are finite.
extern "C" void choose(const float *logits, int64_t *ids, uint8_t *finite, int64_t rows, int64_t vocab) {
    share_rows(rows, rows * vocab / 4, [&](int64_t row) {
        const float *x = logits + row * vocab;
        vf best = splat(-INFINITY);
        vi place = {}, broken = {};
        each_vector(vocab, [&](int64_t i, auto n) {
            vf y = take(x + i, n);
            broken |= (bits_of<vi>(y) & 0x7f800000) == 0x7f800000;
            vi better = keep_lanes(y > best, n);
            best = better ? y : best;
            place = better ? lane_numbers() + (int32_t)i : place;
        });
        int64_t id = place[0];
        float most = best[0];
        bool whole = true;
        for (int lane = 0; lane < W; lane++) {
            if (best[lane] > most || (best[lane] == most && place[lane] < id)) most = best[lane], id = place[lane];
            whole = whole && !broken[lane];
        }
        ids[row] = id, finite[row] = whole;
    });
}

// ---- attention over the paged cache ---------------------------------------------------------------------------------------

// A block of the cache holds, for each KV head, its keys as [head_dim, block_size] and its values as [block_size, head_dim]. So
// the scores of W neighbouring slots are one vector: a key channel of W slots times one number of the query, and no sum ever
// runs across lanes. (The K layout of vLLM's first CUDA kernels has the same purpose.) In bfloat16 two rows of these matrices
// stand together, number by number: both are widened from one vector by a shift and a mask, where a row alone takes as much.
//
// Online softmax (https://arxiv.org/abs/1805.02867) over tiles of TILE key positions; tiles begin at multiples of TILE. What a
// query computes depends on its position and on this grid alone: a key that it may not see has weight exactly 0, and a tile of
// such keys multiplies its sums by exactly 1.
//
// A work item is (sequence, KV head, ROWS rows), a row being one query of one of the heads that share the KV head, counted
// query by query. So keys and values are loaded, and widened, once for all rows of a register tile. All arithmetic is float32.

constexpr int TILE = 64;  // key positions
constexpr int ROWS = 16;  // rows of a work item
constexpr int MAX_HEAD_DIM = 256;
constexpr int LINE = MAX_HEAD_DIM + W;   // floats from row to row of an item; no power of two: rows would share cache sets
constexpr int CHAINS = W == 8 ? 8 : 16;  // accumulators of a register tile; AVX2 has 16 registers, the others 32

template <class C> constexpr int PAIR = 1;  // rows that stand together
template <> constexpr int PAIR<bf16> = 2;
template <class C> static inline void load_rows(const C *p, vf &row, vf &) { row = load(p); }
static inline void load_rows(const bf16 *p, vf &even, vf &odd) {
    const vu both = bits_of<vu>(load((const float *)p));
    even = bits_of<vf>(both << 16);
    odd = bits_of<vf>(both & 0xffff0000);
}

// One step of one KV group, as attention/native.py packs it. Behind it stand query_starts [num_rows + 1], context_lens
// [num_rows], rows of the block table [num_rows], first_items [num_rows + 1], row_of_item [num_items], items of one KV head.
struct Step {
    int64_t num_tokens, num_rows, num_items, num_visits;  // num_visits: keys x queries that may see them
    const int32_t *tables;                                // [.., max_blocks]
    int64_t max_blocks;
    const int64_t *slots;  // [num_tokens]
    int64_t num_heads, num_kv_heads, head_dim, block_size, kind, kv_kind;
};

struct Item {
    const int32_t *table;          // the sequence's blocks
    int64_t head, first, count;    // KV head; rows
    int64_t token, before, group;  // the sequence's first query, as a token of the step and as a position; heads of a KV head
    int64_t position(int64_t row) const { return before + (first + row) / group; }
    int64_t place(int64_t row) const { return (token + (first + row) / group) * group + (first + row) % group; }  // token, head
};

struct Rows {  // what an item's rows hold while they walk the keys
    alignas(64) float q[ROWS * LINE], sums[ROWS * LINE];  // scaled queries; weights times values so far
    alignas(64) float weights[ROWS * TILE];               // scores, then weights, of the present tile
    vf totals[ROWS];                                      // weights so far, by lane
    float peak[ROWS];                                     // the highest score so far
    int low[ROWS], high[ROWS];                            // slots low .. high - 1 of the present tile are seen
    int count;
};

// Where a tile's vectors of slots stand: keys[i] + channel * block_size, values[i] + slot * head_dim. `start` is a part of the
// block's keys of the same size as the vector's values, for reading ahead: the parts of all vectors are all keys.
template <class C> struct Places { const C *keys[TILE / W], *values[TILE / W], *start[TILE / W]; };

// Blocks are scattered, 2 KiB here and 2 KiB there, so the CPU cannot guess what comes next. Into the second cache: a core can
// have many more of these under way than loads that end in its first.
template <class C> static inline void read_ahead(const C *from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(C)) __builtin_prefetch(from + i, 0, 2);
}

// Call f(Count<R>, first) so that every row is in one group. A row's arithmetic is the same in groups of any size.
template <int N> struct Count { static constexpr int value = N; };
template <int N, class F> static inline void row_groups(int rows, F f) {
    int r = 0;
    if constexpr (8 * N <= CHAINS) for (; r + 8 <= rows; r += 8) f(Count<8>{}, r);
    if constexpr (4 * N <= CHAINS) for (; r + 4 <= rows; r += 4) f(Count<4>{}, r);
    for (; r + 2 <= rows; r += 2) f(Count<2>{}, r);
    if (r < rows) f(Count<1>{}, r);
}

// acc[r][n] += a[r * STRIDE_A + i] * (row i of the matrix at b[n], W numbers of it), for i = low .. high - 1 in order.
template <int R, int N, int STRIDE_A, class C>
static inline __attribute__((always_inline)) void multiply(const float *a, const C *const *b, int64_t stride_b, int low,
                                                           int high, vf (&acc)[R][N]) {
    auto add = [&](int i, const vf (&row)[N]) __attribute__((always_inline)) {
        for (int r = 0; r < R; r++)
            for (int n = 0; n < N; n++) acc[r][n] = a[r * STRIDE_A + i] * row[n] + acc[r][n];
    };
    for (int i = low / PAIR<C> * PAIR<C>; i < high; i += PAIR<C>) {
        vf row[N], row_after[N];
        for (int n = 0; n < N; n++) load_rows(b[n] + i * stride_b, row[n], row_after[n]);
        if (i >= low) add(i, row);
        if (PAIR<C> == 2 && i + 1 < high) add(i + 1, row_after);
    }
}

// weights = queries times keys, N vectors of slots at a time; those that none of a group's rows sees are left as they are.
// Meanwhile the next tile's keys are fetched.
template <int N, class C>
static void score(Rows &rows, const Places<C> &here, const Places<C> &next, int64_t head_dim, int64_t block_size) {
    for (int v = 0; v < TILE / W; v += N)
        row_groups<N>(rows.count, [&](auto group, int r) {
            constexpr int R = decltype(group)::value;
            if (rows.high[r + R - 1] <= v * W || rows.low[r] >= (v + N) * W) return;
            vf acc[R][N] = {};
            for (int64_t d = 0; d < head_dim; d += W) {
                const C *b[N];
                for (int n = 0; n < N; n++) {
                    b[n] = here.keys[v + n] + d * block_size;
                    if (r == 0) read_ahead(next.start[v + n] + d * W, W * W);
                }
                multiply<R, N, LINE>(rows.q + r * LINE + d, b, block_size, 0, W, acc);
            }
            for (int i = 0; i < R; i++)
                for (int n = 0; n < N; n++) store(rows.weights + (r + i) * TILE + (v + n) * W, acc[i][n]);
        });
}

// sums += weights times values, for N vectors of channels from `channel` on. Slots that none of a group's rows sees are not
// used. Meanwhile the next tile's values are fetched.
template <int N, class C>
static void add_values(Rows &rows, const Places<C> &here, const Places<C> &next, int64_t head_dim, int64_t channel) {
    row_groups<N>(rows.count, [&](auto group, int r) {
        constexpr int R = decltype(group)::value;
        const int low = rows.low[r], high = rows.high[r + R - 1];
        float *sums = rows.sums + r * LINE + channel;
        vf acc[R][N];
        for (int i = 0; i < R; i++)
            for (int n = 0; n < N; n++) acc[i][n] = load(sums + i * LINE + n * W);
        for (int v = low / W; v * W < high; v++) {
            const C *b[N];
            for (int n = 0; n < N; n++) b[n] = here.values[v] + (channel + n * W) * PAIR<C>;
            if (r == 0) read_ahead(next.values[v] + channel * W, N * W * W);
            const float *weights = rows.weights + r * TILE + v * W;
            multiply<R, N, TILE>(weights, b, head_dim, std::max(low - v * W, 0), std::min(high - v * W, W), acc);
        }
        for (int i = 0; i < R; i++)
            for (int n = 0; n < N; n++) store(sums + i * LINE + n * W, acc[i][n]);
    });
}

template <int N> struct Lanes { typedef float type __attribute__((vector_size(N * 4))); };
template <int N> static inline float largest(typename Lanes<N>::type x) {
    if constexpr (N == 1) return x[0];
    else {
        struct Halves { typename Lanes<N / 2>::type low, high; } h = bits_of<Halves>(x);
        return largest<N / 2>(h.low > h.high ? h.low : h.high);
    }
}

// From scores to weights, row r: e to the score minus the highest so far, and what was summed under a lower peak shrinks.
static inline void soften(Rows &rows, int r, int64_t head_dim) {
    float *weights = rows.weights + r * TILE, *sums = rows.sums + r * LINE;
    const bool partly = rows.low[r] > 0 || rows.high[r] < TILE;
    vf s[TILE / W], top = splat(-INFINITY), total = {};
    for (int v = 0; v < TILE / W; v++) {
        const vi slot = lane_numbers() + v * W;
        s[v] = load(weights + v * W);
        if (partly) s[v] = (slot >= rows.low[r]) & (slot < rows.high[r]) ? s[v] : splat(-INFINITY);
        top = top > s[v] ? top : s[v];
    }
    const float highest = largest<W>(top);
    if (highest > rows.peak[r]) {
        const vf shrink = exponential(splat(rows.peak[r] - highest));
        rows.peak[r] = highest;
        rows.totals[r] = rows.totals[r] * shrink;
        for (int64_t d = 0; d < head_dim; d += W) store(sums + d, load(sums + d) * shrink);
    }
    const vf peak = splat(std::max(rows.peak[r], -3e38f));  // -inf where no key was seen yet, and -inf - -inf is NaN
    for (int v = 0; v < TILE / W; v++) {
        s[v] = exponential(s[v] - peak);
        total = total + s[v];
        store(weights + v * W, s[v]);
    }
    rows.totals[r] = rows.totals[r] + total;
}

// The tile of keys at position `at`: scores, softmax, values.
template <class C>
static void visit(const Step &step, const Item &item, Rows &rows, const Places<C> &here, const Places<C> &next, int64_t at,
                  int64_t window) {
    for (int r = 0; r < rows.count; r++) {
        rows.low[r] = std::clamp<int64_t>(item.position(r) - window + 1 - at, 0, TILE);
        rows.high[r] = std::clamp<int64_t>(item.position(r) + 1 - at, 0, TILE);
    }
    const bool few = rows.count <= 4;  // then more columns keep the multipliers busy
    if (few) score<4>(rows, here, next, step.head_dim, step.block_size);
    else score<2>(rows, here, next, step.head_dim, step.block_size);
    for (int r = 0; r < rows.count; r++) soften(rows, r, step.head_dim);
    int64_t channel = 0, end = step.head_dim;
    if (few) for (; channel + 4 * W <= end; channel += 4 * W) add_values<4>(rows, here, next, end, channel);
    for (; channel + 2 * W <= end; channel += 2 * W) add_values<2>(rows, here, next, end, channel);
    for (; channel < end; channel += W) add_values<1>(rows, here, next, end, channel);
}

static inline Item item_at(const Step &step, int64_t index) {  // of all KV heads' items
    const int64_t *starts = (const int64_t *)(&step + 1), *contexts = starts + step.num_rows + 1;
    const int64_t *table_rows = contexts + step.num_rows, *first_items = table_rows + step.num_rows;
    const int64_t i = first_items[step.num_rows + 1 + index / step.num_kv_heads];
    const int64_t num_items = first_items[i + 1] - first_items[i], nth = index - first_items[i] * step.num_kv_heads;
    const int64_t group = step.num_heads / step.num_kv_heads, num_queries = starts[i + 1] - starts[i];
    const int64_t first = (num_items - 1 - nth % num_items) * ROWS;  // the longest first
    return {step.tables + table_rows[i] * step.max_blocks, nth / num_items, first,
            std::min<int64_t>(ROWS, num_queries * group - first), starts[i], contexts[i] - num_queries, group};
}

// The tile at `at` for rows that see positions low .. high; a vector of slots outside may have no block and gets a neighbour's
// place.
template <class C>
static Places<C> locate(const Step &step, const Item &item, int64_t at, int64_t low, int64_t high, const C *k, const C *v) {
    Places<C> places;
    for (int i = 0; i < TILE / W; i++) {
        const int64_t position = std::min(std::max(at + i * W, low / W * W), high / W * W), offset = position % step.block_size;
        const int64_t slot = (item.table[position / step.block_size] * step.num_kv_heads + item.head) * step.block_size;
        places.keys[i] = k + slot * step.head_dim + offset * PAIR<C>;
        places.start[i] = k + (slot + offset) * step.head_dim;
        places.values[i] = v + (slot + offset) * step.head_dim;
    }
    return places;
}

// One layer of a step: k and v [num_tokens, num_kv_heads, head_dim] are written into the pools, then q [num_tokens, num_heads,
// head_dim] attends into out (contiguous). Strides are values from token to token; a token's heads are contiguous.
struct Layer {
    const Step *step;
    const void *q, *k, *v;
    void *k_pool, *v_pool, *out;
    int64_t q_stride, k_stride, v_stride, window;
    double scale;
};

// One head of one token into the cache.
template <class T, class C> static void keep_token(const Layer &layer, int64_t token, int64_t head) {
    const Step &step = *layer.step;
    const int64_t head_dim = step.head_dim, block_size = step.block_size, slot = step.slots[token], offset = slot % block_size;
    const int64_t block = (slot / block_size * step.num_kv_heads + head) * head_dim * block_size;
    const T *k = (const T *)layer.k + token * layer.k_stride + head * head_dim;
    const T *v = (const T *)layer.v + token * layer.v_stride + head * head_dim;
    C *keys = (C *)layer.k_pool + block + offset * PAIR<C>;
    C *values = (C *)layer.v_pool + block + offset / PAIR<C> * PAIR<C> * head_dim + offset % PAIR<C>;
    C key[MAX_HEAD_DIM], value[MAX_HEAD_DIM];
    for (int64_t d = 0; d < head_dim; d += W) {
        store(key + d, load(k + d));
        store(value + d, load(v + d));
    }
    for (int64_t d = 0; d < head_dim; d += PAIR<C>)
        std::memcpy((void *)(keys + d * block_size), (const void *)(key + d), PAIR<C> * sizeof(C));
    for (int64_t d = 0; d < head_dim; d++) values[d * PAIR<C>] = value[d];
}

// A work item. While its last tile is computed the first of `after` is fetched, the item that this thread will do next.
template <class T, class C> static void attend(const Layer &layer, const Item &item, const Item &after) {
    const Step &step = *layer.step;
    const int64_t head_dim = step.head_dim, window = layer.window;
    const C *k = (const C *)layer.k_pool, *v = (const C *)layer.v_pool;
    auto first_seen = [&](const Item &of) { return std::max<int64_t>(of.position(0) - window + 1, 0); };
    auto head_of = [&](int64_t place) { return item.head * item.group + place % item.group; };
    Rows rows;
    rows.count = item.count;
    for (int r = 0; r < rows.count; r++) {
        const int64_t place = item.place(r);
        const T *q = (const T *)layer.q + place / item.group * layer.q_stride + head_of(place) * head_dim;
        rows.peak[r] = -INFINITY;
        rows.totals[r] = vf{};
        for (int64_t d = 0; d < head_dim; d += W) {
            store(rows.q + r * LINE + d, load(q + d) * (float)layer.scale);
            store(rows.sums + r * LINE + d, vf{});
        }
    }
    const int64_t low = first_seen(item), high = item.position(item.count - 1), low_after = first_seen(after);
    Places<C> next = locate(step, item, low / TILE * TILE, low, high, k, v);
    for (int64_t at = low / TILE * TILE; at <= high; at += TILE) {
        const Places<C> here = next;
        if (at + TILE <= high) next = locate(step, item, at + TILE, low, high, k, v);
        else next = locate(step, after, low_after / TILE * TILE, low_after, after.position(after.count - 1), k, v);
        visit(step, item, rows, here, next, at, window);
    }
    for (int r = 0; r < rows.count; r++) {
        const int64_t place = item.place(r);
        const vf total = splat(sum(rows.totals[r]));
        T *out = (T *)layer.out + (place / item.group * step.num_heads + head_of(place)) * head_dim;
        for (int64_t d = 0; d < head_dim; d += W) store(out + d, load(rows.sums + r * LINE + d) / total + 0.0f);  // never -0
    }
}

extern "C" void attention(const Layer *layer) {
    const Step &step = *layer->step;
    const int64_t heads = step.num_kv_heads, num_items = step.num_items * heads;
    with_type(step.kind, [&](auto one) {
        with_type(step.kv_kind, [&](auto kv) {
            share_rows(step.num_tokens * heads, step.num_tokens * heads * step.head_dim * 3, [&](int64_t i) {
                keep_token<decltype(one), decltype(kv)>(*layer, i / heads, i % heads);
            });
            share(step.num_visits * step.num_heads * step.head_dim * 4 / W, [&](int64_t part, int64_t parts) {
                const int64_t end = num_items * (part + 1) / parts;
                for (int64_t i = num_items * part / parts; i < end; i++)
                    attend<decltype(one), decltype(kv)>(*layer, item_at(step, i), item_at(step, std::min(i + 1, end - 1)));
            });
        });
    });
}

// Floats in a vector: block_size and head_dim must be multiples of it. Rows in a work item.
extern "C" int32_t vector_width() { return W; }
extern "C" int32_t item_rows() { return ROWS; }
