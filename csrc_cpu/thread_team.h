// A team of threads for the life of the process. Idle workers spin briefly for the next run, then
// sleep. The caller is a member and runs where the system schedules it; each worker is pinned to
// one of the other cores in the process's affinity mask. Otherwise two spinning threads could share
// a core while another core is idle.
#pragma once

#include <atomic>
#include <cstdint>

namespace portalm {

class ThreadTeam {
 public:
  using Work = void (*)(void* context, int member, int num_members);

  // The process's team; started on first use, and again after a fork, which copies no threads.
  static ThreadTeam& instance();

  // Number of members, the caller included; initially usable_cores().
  int size() const { return size_; }

  // Use `size` members from the next run on.
  void resize(int size);

  // Call work(context, member, size) on this thread and on every worker that wakes up in time, and
  // return when all calls that started have returned. The work must be complete when the caller's
  // own call returns, so `work` takes pieces from a shared counter (parallel.h): on a busy machine
  // a worker may wake up too late, and is not waited for. One run at a time; members see what the
  // caller wrote before, and the caller sees what they wrote.
  void run(Work work, void* context);

  // Seconds that callers waited for workers to finish, since the last call of this; measured only
  // while `profile` is set.
  double take_wait_seconds();
  bool profile = false;

 private:
  explicit ThreadTeam(int size) : size_(size) {}
  void start();
  void stop();
  void loop(int member, uint32_t generation);
  void leave_callers_core();

  int size_;
  void* threads_ = nullptr;  // a std::vector of Worker; not touched in a forked child
  int free_core_ = -1;       // the core that no worker is pinned to
  Work work_ = nullptr;
  void* context_ = nullptr;
  std::atomic<bool> stopping_{false};
  double wait_seconds_ = 0;
  alignas(64) std::atomic<uint32_t> generation_{0};  // number of runs: workers wait for a change
  alignas(64) std::atomic<uint64_t> gate_{0};  // generation, open flag, number of workers inside
  alignas(64) std::atomic_flag in_use_ = ATOMIC_FLAG_INIT;
};

// Cores that this process may use: the smaller of its affinity mask (physical cores) and its
// cgroup's CPU quota.
int usable_cores();

}  // namespace portalm
