// Many short runs of the team, for ThreadSanitizer (ci/sanitize.sh): each piece of a run is done
// exactly once, the caller sees what members wrote, and the team can be resized between runs.
#include "../thread_team.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

using portalm::ThreadTeam;

namespace {

struct Work {
  std::vector<int> done;  // plain memory: a race here is what ThreadSanitizer looks for
  std::atomic<int> next{0};
};

void run_once(int pieces) {
  Work work;
  work.done.assign(pieces, 0);
  ThreadTeam::instance().run(
      [](void* p, int, int) {
        Work& w = *static_cast<Work*>(p);
        for (int i; (i = w.next.fetch_add(1, std::memory_order_relaxed)) <
                    static_cast<int>(w.done.size());)
          ++w.done[i];
      },
      &work);
  for (int i = 0; i < pieces; ++i)
    if (work.done[i] != 1) {
      std::printf("piece %d of %d was done %d times\n", i, pieces, work.done[i]);
      std::exit(1);
    }
}

}  // namespace

int main() {
  for (int size : {4, 2, 3, 1, 4}) {
    ThreadTeam::instance().resize(size);
    for (int i = 0; i < 3000; ++i) run_once(1 + i % 37);
  }
  std::vector<std::thread> callers;  // concurrent callers wait for each other
  for (int c = 0; c < 3; ++c)
    callers.emplace_back([] {
      for (int i = 0; i < 1000; ++i) run_once(1 + i % 11);
    });
  for (std::thread& caller : callers) caller.join();
  ThreadTeam::instance().resize(1);
  std::puts("thread team: ok");
}
