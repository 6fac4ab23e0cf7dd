// What g++'s OpenMP code calls, on std::thread: ThreadSanitizer sees who waits for whom here, which in libgomp it cannot.
//
// Only what the kernels need. A team is made for each region. Its barrier orders everything; the counter of a dynamic loop
// orders nothing, as OpenMP has it.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr int THREADS = 4;
constexpr int MOST_LOOPS = 1 << 12;  // dynamic ones, in one region

struct Team {
  explicit Team(int size) : size(size), taken(new std::atomic<long>[MOST_LOOPS]()) {}

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    const long mine = round;
    if (++arrived == size) {
      arrived = 0;
      round++;
      all_here.notify_all();
    } else {
      all_here.wait(lock, [&] { return round != mine; });
    }
  }

  const int size;
  const std::unique_ptr<std::atomic<long>[]> taken;  // of each dynamic loop, how many iterations
  std::mutex mutex;
  std::condition_variable all_here;
  int arrived = 0;
  long round = 0;
};

struct Member {
  Team* team = nullptr;
  int number = 0;
  int loop = -1;  // the dynamic loop that this thread is in
  long first = 0, end = 0, chunk = 1;
};
thread_local Member me;

bool take(long* from, long* to) {
  // Relaxed: who takes which iterations tells nobody what another thread has written.
  const long begin = me.first + me.team->taken[me.loop].fetch_add(me.chunk, std::memory_order_relaxed);
  *from = begin;
  *to = std::min(begin + me.chunk, me.end);
  return begin < me.end;
}

}  // namespace

extern "C" {

int omp_get_max_threads() { return THREADS; }
int omp_get_num_threads() { return me.team ? me.team->size : 1; }
int omp_get_thread_num() { return me.number; }
double omp_get_wtime() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void GOMP_barrier() {
  if (me.team) me.team->wait();
}

// asked: 0 = as many as there may be.
void GOMP_parallel(void (*body)(void*), void* data, unsigned asked, unsigned) {
  Team team(me.team ? 1 : asked ? (int)asked : THREADS);
  const Member outer = me;
  const auto run = [&](int number) {
    me = Member{&team, number};
    body(data);
  };
  std::vector<std::thread> others;
  for (int number = 1; number < team.size; number++) others.emplace_back(run, number);
  run(0);
  for (auto& other : others) other.join();
  me = outer;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long first, long end, long step, long chunk, long* from, long* to) {
  if (!me.team || step != 1 || me.loop + 1 == MOST_LOOPS) {
    std::fprintf(stderr, "gomp_threads: a dynamic loop outside of a region, not in steps of 1, or one too many\n");
    std::abort();
  }
  me.loop++, me.first = first, me.end = end, me.chunk = chunk;
  return take(from, to);
}
bool GOMP_loop_nonmonotonic_dynamic_next(long* from, long* to) { return take(from, to); }
void GOMP_loop_end_nowait() {}
}
