#include "thread_team.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <unistd.h>
#endif

namespace portalm {
namespace {

constexpr uint64_t kOpen = uint64_t{1} << 31;  // in gate_: workers may enter this run
constexpr uint64_t kInside = kOpen - 1;        // in gate_: number of workers inside
constexpr int kSpins = 2000;  // about 50 to 100 microseconds, more than between a step's runs

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::vector<int> allowed_cores() {
  std::vector<int> cores;
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int core = 0; core < CPU_SETSIZE; ++core)
      if (CPU_ISSET(core, &set)) cores.push_back(core);
#endif
  if (cores.empty())
    for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); ++i)
      cores.push_back(static_cast<int>(i));
  return cores;
}

// One logical core per physical core: hyperthreads share the units that the kernels fill.
std::vector<int> physical_cores(const std::vector<int>& cores) {
  std::vector<int> first;
  for (int core : cores) {
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(core) +
                       "/topology/thread_siblings_list");
    int lowest = core;
    if (file) file >> lowest;
    bool has_sibling = false;
    for (int other : first) has_sibling = has_sibling || other == lowest;
    if (!has_sibling) first.push_back(lowest == core ? core : lowest);
  }
  return first.empty() ? cores : first;
}

double cgroup_quota() {  // in cores; 0: no quota
  std::ifstream v2("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (v2 && (v2 >> quota >> period) && quota != "max" && period > 0)
    return std::stod(quota) / period;
  std::ifstream v1_quota("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
  std::ifstream v1_period("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  double q = 0;
  if ((v1_quota >> q) && (v1_period >> period) && q > 0 && period > 0) return q / period;
  return 0;
}

struct Worker {
  std::thread thread;
  int core;  // -1: not pinned
};
std::vector<Worker>& as_workers(void* p) { return *static_cast<std::vector<Worker>*>(p); }

void pin([[maybe_unused]] Worker& worker, [[maybe_unused]] int core) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  pthread_setaffinity_np(worker.thread.native_handle(), sizeof set, &set);
#endif
  worker.core = core;
}

}  // namespace

int usable_cores() {
  int cores = static_cast<int>(physical_cores(allowed_cores()).size());
  double quota = cgroup_quota();
  if (quota > 0) cores = std::min(cores, std::max(1, static_cast<int>(std::ceil(quota))));
  return cores;
}

ThreadTeam& ThreadTeam::instance() {
  static ThreadTeam* team = nullptr;
#if defined(__linux__)
  static pid_t owner = 0;
  if (team != nullptr && owner != getpid()) team = nullptr;  // a forked child has no threads
  if (team == nullptr) {
    team = new ThreadTeam(usable_cores());
    owner = getpid();
  }
#else
  if (team == nullptr) team = new ThreadTeam(usable_cores());
#endif
  return *team;
}

void ThreadTeam::resize(int size) {
  while (in_use_.test_and_set(std::memory_order_acquire)) relax();
  stop();
  size_ = std::max(1, size);
  in_use_.clear(std::memory_order_release);
}

void ThreadTeam::start() {
  auto* workers = new std::vector<Worker>;
  std::vector<int> cores = physical_cores(allowed_cores());
  free_core_ = cores[0];
  stopping_ = false;
  uint32_t generation = generation_.load();
  for (int member = 1; member < size_; ++member) {
    workers->push_back({std::thread([this, member, generation] { loop(member, generation); }), -1});
    if (member < static_cast<int>(cores.size())) pin(workers->back(), cores[member]);
  }
  threads_ = workers;
}

// If a worker is pinned to the core that the caller runs on, move it to the free core.
void ThreadTeam::leave_callers_core() {
#if defined(__linux__)
  const int here = sched_getcpu();
  if (here == free_core_ || here < 0) return;
  for (Worker& worker : as_workers(threads_)) {
    if (worker.core != here) continue;
    pin(worker, free_core_);
    free_core_ = here;
    return;
  }
#endif
}

void ThreadTeam::stop() {
  if (threads_ == nullptr) return;
  stopping_ = true;
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (Worker& worker : as_workers(threads_)) worker.thread.join();
  delete &as_workers(threads_);
  threads_ = nullptr;
}

void ThreadTeam::loop(int member, uint32_t generation) {
  for (;;) {
    uint32_t now = generation_.load(std::memory_order_acquire);
    for (int spin = 0; now == generation && spin < kSpins; ++spin) {
      relax();
      now = generation_.load(std::memory_order_acquire);
    }
    while (now == generation) {
      generation_.wait(generation, std::memory_order_acquire);
      now = generation_.load(std::memory_order_acquire);
    }
    generation = now;
    if (stopping_) return;
    uint64_t gate = gate_.load(std::memory_order_acquire);
    bool is_inside = false;
    while (!is_inside && gate >> 32 == generation && (gate & kOpen))
      is_inside = gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel);
    if (!is_inside) continue;  // too late: the caller finished the work
    work_(context_, member, size_);
    gate_.fetch_sub(1, std::memory_order_release);
  }
}

void ThreadTeam::run(Work work, void* context) {
  if (size_ == 1) {
    work(context, 0, 1);
    return;
  }
  while (in_use_.test_and_set(std::memory_order_acquire)) std::this_thread::yield();
  if (threads_ == nullptr) start();
  leave_callers_core();
  work_ = work;
  context_ = context;
  const uint32_t generation = generation_.load(std::memory_order_relaxed) + 1;
  gate_.store(uint64_t{generation} << 32 | kOpen, std::memory_order_release);
  generation_.store(generation, std::memory_order_release);
  generation_.notify_all();
  work(context, 0, size_);
  const auto ended =
      profile ? std::chrono::steady_clock::now() : std::chrono::steady_clock::time_point{};
  uint64_t gate = gate_.fetch_and(~kOpen, std::memory_order_acq_rel);
  for (int spin = 0; gate & kInside; ++spin) {
    if (spin < kSpins) relax();
    else std::this_thread::yield();  // a worker was descheduled in the middle of a piece
    gate = gate_.load(std::memory_order_acquire);
  }
  if (profile)
    wait_seconds_ +=
        std::chrono::duration<double>(std::chrono::steady_clock::now() - ended).count();
  in_use_.clear(std::memory_order_release);
}

double ThreadTeam::take_wait_seconds() {
  const double seconds = wait_seconds_;
  wait_seconds_ = 0;
  return seconds;
}

}  // namespace portalm
