// What this CPU can do at most: multiplications in registers alone, and reading memory. A program that products.py runs:
//
//     peaks THREADS    prints a line of JSON: operations (a multiplication and its addition are two) and bytes per second
//
// Each figure is the best of many short moments; 0 where the CPU has no such instruction.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
#if defined(__x86_64__)
#define IN_REGISTER "+v"
#else
#define IN_REGISTER "+w"
#endif

static double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Twelve chains of sums, more than an instruction takes cycles. The compiler is kept from seeing that they are alike.
template <class V, class F> static __attribute__((noinline)) double seconds(int64_t times, F add) {
    const double began = now_s();
    V x = {}, y = {}, sums[12] = {};
    for (int64_t i = 0; i < times; i++) {
        asm volatile("" : IN_REGISTER(x), IN_REGISTER(y));
#pragma GCC unroll 12
        for (int chain = 0; chain < 12; chain++) {
            sums[chain] = add(sums[chain], x, y);
            asm volatile("" : IN_REGISTER(sums[chain]));
        }
    }
    return now_s() - began;
}

// The sum over the threads of what each did in its best moment, so that one which is kept waiting does not spoil the others'.
template <class V, class F> static double operations_per_s(int products_a_lane, F add) {
    const int64_t times = 10000;
    double total = 0;
#pragma omp parallel reduction(+ : total)
    {
        double shortest_s = 1e9;
        for (int moment = 0; moment < 400; moment++) shortest_s = std::min(shortest_s, seconds<V>(times, add));
        total += 12.0 * 2 * W * products_a_lane * times / shortest_s;
    }
    return total;
}

static double float32_per_s() {
    return operations_per_s<vf>(1, [](vf sum, vf x, vf y) { return x * y + sum; });
}

static double bfloat16_per_s() {
#if defined(__AVX512BF16__)
    return operations_per_s<vf>(2, [](vf sum, vf x, vf y) {
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
    });
#else
    return 0;
#endif
}

static double int8_per_s() {
#if defined(__AVX512VNNI__)
    return operations_per_s<vi>(4, [](vi sum, vi x, vi y) {
        return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)y);
    });
#elif defined(__AVXVNNI__) && defined(__AVX2__)
    return operations_per_s<vi>(4, [](vi sum, vi x, vi y) {
        return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)y);
    });
#else
    return 0;
#endif
}

static double bytes_per_s(const vi *memory, int64_t count) {
    const double began = now_s();
#pragma omp parallel
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const vi *p = memory + count * thread / threads, *end = memory + count * (thread + 1) / threads;
        vi a = {}, b = {}, c = {}, d = {};
        for (; p + 4 <= end; p += 4) a += p[0], b += p[1], c += p[2], d += p[3];
        vi sum = a + b + c + d;
        asm volatile("" : IN_REGISTER(sum));
    }
    return count * sizeof(vi) / (now_s() - began);
}

int main(int, char **arguments) {
    omp_set_num_threads(std::atoi(arguments[1]));
    const int64_t bytes = 256 << 20;
    char *memory = (char *)std::aligned_alloc(2 << 20, bytes);
#if defined(__linux__)
    madvise(memory, bytes, MADV_HUGEPAGE);  // as the packed weights have it
#endif
    std::memset(memory, 1, bytes);
    double read = 0;
    for (int moment = 0; moment < 60; moment++) read = std::max(read, bytes_per_s((const vi *)memory, bytes / sizeof(vi)));
    const double float32 = float32_per_s(), bfloat16 = bfloat16_per_s(), int8 = int8_per_s();
    std::printf("{\"float32\": %.4g, \"bfloat16\": %.4g, \"int8\": %.4g, \"read\": %.4g}\n", float32, bfloat16, int8, read);
}
