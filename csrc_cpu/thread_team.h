// A team of threads for the length of a process: spins for the next piece of work for a moment,
// then sleeps. The caller is a member and runs where the system puts it; workers are pinned, one to
// each other core of the process's affinity. Were they not, or stayed where the caller is put, two
// that spin would share a core while another one is idle.
#pragma once

#include <atomic>
#include <cstdint>

namespace portalm {

class ThreadTeam {
 public:
  using Work = void (*)(void* context, int member, int num_members);

  // The process's team; started on first use, again after a fork (threads do not survive one).
  static ThreadTeam& instance();

  // Members, the caller included: the cores that affinity and the container's quota leave.
  int size() const { return size_; }

  // A team of `size` members from the next run on.
  void resize(int size);

  // Call work(context, member, size) here and in every worker that is awake in time, and return when
  // all that began have ended. So `work` shares out pieces by a counter (parallel.h) and must be
  // complete when the caller's own call returns: on a busy machine a worker may come too late, and
  // is not waited for. One run at a time; what the caller wrote before is seen by all members, what
  // they write is seen by the caller.
  void run(Work work, void* context);

  // Seconds that callers waited for workers to end, since the last call of this; measured only
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
  void* threads_ = nullptr;  // a std::vector of Worker, left alone in a forked child
  int free_core_ = -1;       // the one that no worker is pinned to
  Work work_ = nullptr;
  void* context_ = nullptr;
  std::atomic<bool> stopping_{false};
  double wait_seconds_ = 0;
  alignas(64) std::atomic<uint32_t> generation_{0};  // grows with every run: what workers wait for
  alignas(64) std::atomic<uint64_t> gate_{
      0};  // generation, whether it may be entered, who is inside
  alignas(64) std::atomic_flag in_use_ = ATOMIC_FLAG_INIT;
};

// Cores this process may use: affinity and the cgroup's CPU quota, whichever is less.
int usable_cores();

}  // namespace portalm
