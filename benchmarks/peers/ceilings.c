// The machine's limits: memory reads and multiply-adds, one thread per processor.
//
//   ceilings read BYTES PASSES   GB/s of each pass over a buffer of BYTES, on one line
//   ceilings flops               GFLOP/s: fp32 bf16 int8; 0 where the CPU has no dot product for it
//
// Build: cc -O3 -march=native -ffp-contract=fast -pthread ceilings.c
// Vectors use compiler extensions, so fp32 and reads work on every architecture.
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define WIDTH 64
#elif defined(__x86_64__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
#ifdef __x86_64__
#define KEEP(v) __asm__ volatile("" : "+x"(v))  // keeps the compiler from folding v
#else
#define KEEP(v) __asm__ volatile("" : "+w"(v))
#endif
#define MAX_THREADS 256
#define ROUNDS 20000000L
#define REPEATS 5

typedef int64_t longs __attribute__((vector_size(WIDTH)));
typedef float floats __attribute__((vector_size(WIDTH)));

static int num_threads, cpus[MAX_THREADS];
static pthread_barrier_t barrier;
static longs* buffer;
static size_t num_vectors;
static int passes;
static volatile double sink[MAX_THREADS];
static double (*kernel)(void);
static double operations;  // of one kernel call

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

static void pin(int index) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpus[index], &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

static void* read_share(void* argument) {
  const int index = (int)(intptr_t)argument;
  pin(index);
  const size_t begin = num_vectors * index / num_threads / 8 * 8;
  const size_t end = num_vectors * (index + 1) / num_threads / 8 * 8;
  memset(buffer + begin, 1, (end - begin) * sizeof(longs));  // allocated near the thread that reads it
  pthread_barrier_wait(&barrier);
  for (int pass = 0; pass < passes; ++pass) {
    pthread_barrier_wait(&barrier);
    longs sum[8] = {{0}};
    for (size_t i = begin; i < end; i += 8)
      for (int k = 0; k < 8; ++k) sum[k] += buffer[i + k];
    for (int k = 1; k < 8; ++k) sum[0] += sum[k];
    sink[index] = (double)sum[0][0];
    pthread_barrier_wait(&barrier);
  }
  return NULL;
}

// Named accumulators, not an array: gcc would keep an array in memory.
#define EACH(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7) do(8) do(9) do(10) do(11)
#define ACCUMULATORS 12  // hides a latency of 4-5 cycles at two per cycle

// Each kernel returns the operations of one call; a multiply-add is 2.
static double run_fp32(void) {
  const floats a = (floats){0} + 0.999f, b = (floats){0} + 0.001f;
#define BEGIN(k) floats s##k = (floats){0} + (float)k;
#define STEP(k) s##k = s##k * a + b; KEEP(s##k);
#define END(k) total += s##k;
  EACH(BEGIN)
  for (long i = 0; i < ROUNDS; ++i) { EACH(STEP) }
  floats total = {0};
  EACH(END)
#undef BEGIN
#undef STEP
#undef END
  sink[0] = total[0];
  return 2.0 * ROUNDS * ACCUMULATORS * WIDTH / 4;
}

static double run_bf16(void) {
#ifdef __AVX512BF16__
  const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80);  // ones
#define BEGIN(k) __m512 s##k = _mm512_set1_ps((float)k);
#define STEP(k) s##k = _mm512_dpbf16_ps(s##k, a, a); KEEP(s##k);
#define END(k) total = _mm512_add_ps(total, s##k);
  EACH(BEGIN)
  for (long i = 0; i < ROUNDS; ++i) { EACH(STEP) }
  __m512 total = _mm512_setzero_ps();
  EACH(END)
#undef BEGIN
#undef STEP
#undef END
  sink[0] = _mm512_reduce_add_ps(total);
  return 2.0 * ROUNDS * ACCUMULATORS * 32;
#else
  return 0;
#endif
}

static double run_int8(void) {
#if defined(__AVX512VNNI__)
  const __m512i a = _mm512_set1_epi8(1);
#define BEGIN(k) __m512i s##k = _mm512_set1_epi32(k);
#define STEP(k) s##k = _mm512_dpbusd_epi32(s##k, a, a); KEEP(s##k);
#define END(k) total = _mm512_add_epi32(total, s##k);
  EACH(BEGIN)
  for (long i = 0; i < ROUNDS; ++i) { EACH(STEP) }
  __m512i total = _mm512_setzero_si512();
  EACH(END)
  sink[0] = _mm512_reduce_add_epi32(total);
  return 2.0 * ROUNDS * ACCUMULATORS * 64;
#elif defined(__AVX2__)
  __m256i a = _mm256_set1_epi8(1);
  const __m256i ones = _mm256_set1_epi16(1);
#define BEGIN(k) __m256i s##k = _mm256_set1_epi32(k);
#define STEP(k)                                                                   \
  KEEP(a);                                                                        \
  s##k = _mm256_add_epi32(s##k, _mm256_madd_epi16(_mm256_maddubs_epi16(a, a), ones)); \
  KEEP(s##k);
#define END(k) total = _mm256_add_epi32(total, s##k);
  EACH(BEGIN)
  for (long i = 0; i < ROUNDS; ++i) { EACH(STEP) }
  __m256i total = _mm256_setzero_si256();
  EACH(END)
  sink[0] = _mm256_extract_epi32(total, 0);
  return 2.0 * ROUNDS * ACCUMULATORS * 32;
#else
  return 0;
#endif
}

static void* run_kernel(void* argument) {
  pin((int)(intptr_t)argument);
  pthread_barrier_wait(&barrier);
  const double made = kernel();
  if (argument == NULL) operations = made;
  pthread_barrier_wait(&barrier);
  return NULL;
}

static void start(pthread_t* threads, void* (*body)(void*)) {
  pthread_barrier_init(&barrier, NULL, num_threads + 1);
  for (int i = 0; i < num_threads; ++i) pthread_create(&threads[i], NULL, body, (void*)(intptr_t)i);
}

static void join(pthread_t* threads) {
  for (int i = 0; i < num_threads; ++i) pthread_join(threads[i], NULL);
  pthread_barrier_destroy(&barrier);
}

static void measure_reads(size_t bytes) {
  pthread_t threads[MAX_THREADS];
  num_vectors = bytes / sizeof(longs);
  buffer = mmap(NULL, bytes + (2 << 20), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (buffer == MAP_FAILED) exit(1);
  buffer = (longs*)(((uintptr_t)buffer + (2 << 20) - 1) & ~(uintptr_t)((2 << 20) - 1));
  madvise(buffer, bytes, MADV_HUGEPAGE);
  start(threads, read_share);
  pthread_barrier_wait(&barrier);
  for (int pass = 0; pass < passes; ++pass) {
    pthread_barrier_wait(&barrier);
    const double begin = now();
    pthread_barrier_wait(&barrier);
    printf("%.2f ", bytes / (now() - begin) * 1e-9);
  }
  join(threads);
}

static void measure_kernel(double (*chosen)(void)) {
  double best = 0;
  kernel = chosen;
  for (int i = 0; i < REPEATS; ++i) {
    pthread_t threads[MAX_THREADS];
    start(threads, run_kernel);
    pthread_barrier_wait(&barrier);
    const double begin = now();
    pthread_barrier_wait(&barrier);
    const double rate = operations * num_threads / (now() - begin) * 1e-9;
    if (rate > best) best = rate;
    join(threads);
  }
  printf("%.2f ", best);
}

int main(int argc, char** argv) {
  cpu_set_t set;
  sched_getaffinity(0, sizeof set, &set);
  for (int cpu = 0; cpu < CPU_SETSIZE && num_threads < MAX_THREADS; ++cpu)
    if (CPU_ISSET(cpu, &set)) cpus[num_threads++] = cpu;
  if (argc == 4 && !strcmp(argv[1], "read")) {
    passes = atoi(argv[3]);
    measure_reads(strtoull(argv[2], NULL, 10));
  } else if (argc == 2 && !strcmp(argv[1], "flops")) {
    measure_kernel(run_fp32);
    measure_kernel(run_bf16);
    measure_kernel(run_int8);
  } else {
    fprintf(stderr, "usage: ceilings read BYTES PASSES | ceilings flops\n");
    return 2;
  }
  puts("");
  return 0;
}
