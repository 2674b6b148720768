// The gather pool without Python, for the thread sanitizer: every way to use it at once, and each batch held against
// one gathered alone. Prints the number of batches; ends with status 1 where one is wrong, and with the sanitizer's own
// where it saw a race. `.ci/sanitize` builds and runs it; the argument is a seed, and a second one the rounds.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "gather_pool.h"

namespace {

using eventkern::EntityIndex;
using eventkern::GatherPool;
using eventkern::WindowGather;
using Random = std::mt19937_64;

constexpr int kNumEvents = 600, kNumKeys = 7, kNumCategories = 5, kSourceLength = 9, kNumTargets = 6;
constexpr int64_t kNumWindows = kNumEvents - 1;

std::atomic<int64_t> num_batches = 0;

int64_t below(Random& random, int64_t limit) { return static_cast<int64_t>(random() % static_cast<uint64_t>(limit)); }

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "gather_pool_race: %s\n", what);
  std::_Exit(1);
}

// kNumEvents events of kNumKeys keys in turn, with a stream of the key and one of all events.
struct Store {
  std::vector<uint16_t> codes = std::vector<uint16_t>(kNumEvents * kNumCategories);
  std::vector<int32_t> cuts = std::vector<int32_t>(kNumCategories, 900);
  std::vector<int32_t> key_of_row;
  std::vector<int64_t> offsets{0};
  std::vector<int64_t> rows;
  std::vector<int64_t> anchors = std::vector<int64_t>(kNumWindows);

  Store() {
    for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint16_t>(i * 7919 % 1000);
    for (int row = 0; row < kNumEvents; ++row) key_of_row.push_back(row % kNumKeys);
    for (int key = 0; key < kNumKeys; ++key) {
      for (int row = key; row < kNumEvents; row += kNumKeys) rows.push_back(row);
      offsets.push_back(static_cast<int64_t>(rows.size()));
    }
    std::iota(anchors.begin(), anchors.end(), 0);
  }

  WindowGather gather() const {
    WindowGather gather{};
    gather.codes = codes.data();
    gather.code_bytes = sizeof(uint16_t);
    gather.num_categories = kNumCategories;
    gather.cuts = cuts.data();
    gather.key = {key_of_row.data(), offsets.data(), rows.data()};
    gather.limits = offsets.data() + 1;
    gather.num_streams = 2;
    gather.streams[0] = gather.key;
    gather.streams[1] = EntityIndex{};
    gather.src_seq_len = kSourceLength;
    gather.num_targets = kNumTargets;
    gather.anchors = anchors.data();
    gather.out_bytes = sizeof(int32_t);
    return gather;
  }
};

const Store& store() {
  static const Store store;
  return store;
}

// A batch in memory of its own; with `is_broken` one of its windows does not exist.
class Batch {
 public:
  Batch(Random& random, bool is_broken, int64_t most_windows = 40) : is_broken_(is_broken) {
    for (int64_t i = below(random, most_windows) + 1; i > 0; --i) windows_.push_back(below(random, kNumWindows));
    if (is_broken) windows_[below(random, static_cast<int64_t>(windows_.size()))] = kNumWindows;
    sources_.resize(windows_.size() * 2 * kSourceLength * kNumCategories, -1);
    targets_.resize(windows_.size() * kNumTargets * kNumCategories, -1);
  }

  void submit(GatherPool& pool) { ticket_ = pool.submit(call(), &num_labels_); }

  void wait(GatherPool& pool) {
    bool is_refused = false;
    try {
      pool.wait(ticket_);
    } catch (const std::out_of_range&) {
      is_refused = true;
    }
    require(is_refused == is_broken_, "a batch was refused, or a broken one was not");
    if (!is_broken_) check();
    ++num_batches;
  }

 private:
  WindowGather call() {
    WindowGather gather = store().gather();
    gather.windows = windows_.data();
    gather.batch_size = static_cast<int64_t>(windows_.size());
    gather.sources = sources_.data();
    gather.targets = targets_.data();
    return gather;
  }

  void check() {
    const std::vector<int32_t> sources = std::move(sources_), targets = std::move(targets_);
    sources_.assign(sources.size(), -2);
    targets_.assign(targets.size(), -2);
    int64_t num_labels = -2;
    gather_windows_cpu(call(), &num_labels);
    require(num_labels == num_labels_ && sources == sources_ && targets == targets_, "a batch differs");
  }

  bool is_broken_;
  int64_t ticket_ = -1;
  int64_t num_labels_ = -1;
  std::vector<int64_t> windows_;
  std::vector<int32_t> sources_, targets_;
};

template <typename Work>
void in_threads(int num_threads, Work work) {
  std::vector<std::thread> threads;
  for (int thread = 0; thread < num_threads; ++thread) threads.emplace_back(work, thread);
  for (std::thread& thread : threads) thread.join();
}

// As a loader does: some batches ahead, waited for in turn, the last of them forgotten.
void load(GatherPool& pool, Random& random) {
  std::deque<Batch> pending;
  for (int i = 0; i < 60; ++i) {
    pending.emplace_back(random, below(random, 8) == 0).submit(pool);
    if (pending.size() <= 3) continue;
    pending.front().wait(pool);
    pending.pop_front();
  }
  pool.close();  // before the memory of what is in flight goes
}

// Several threads submit to one pool and wait on it, each for its own batches, the latest first.
void share(GatherPool& pool, uint64_t seed) {
  in_threads(3, [&](int thread) {
    Random random(seed + thread);
    for (int i = 0; i < 8; ++i) {
      std::deque<Batch> pending;
      for (int batch = 0; batch < 5; ++batch) pending.emplace_back(random, below(random, 8) == 0).submit(pool);
      for (; !pending.empty(); pending.pop_back()) pending.back().wait(pool);
    }
  });
}

// Two threads wait for one ticket, and one of them is refused.
void wait_twice(GatherPool& pool, Random& random) {
  Batch batch(random, false, 8'000);
  batch.submit(pool);
  std::atomic<int> num_gathered = 0;
  in_threads(2, [&](int) {
    try {
      batch.wait(pool);
      ++num_gathered;
    } catch (const std::invalid_argument&) {
      // The other one waits for it.
    }
  });
  require(num_gathered == 1, "two waited for one ticket, or none");
}

// Two threads close a pool while others submit and wait.
void close_under_way(GatherPool& pool, Random& random) {
  std::deque<Batch> batches;
  for (int i = 0; i < 12; ++i) batches.emplace_back(random, false).submit(pool);
  std::deque<Batch> late;
  for (int thread = 0; thread < 2; ++thread) late.emplace_back(random, false);
  in_threads(6, [&](int thread) {
    try {
      if (thread < 2) {
        pool.close();
      } else if (thread < 4) {
        late[thread - 2].submit(pool);
      } else {
        batches[thread].wait(pool);
      }
    } catch (const std::runtime_error&) {
      // It was closed before.
    }
  });
}

// A child has no threads of the pool: it is told so, and leaves the pool alone.
void fork_under_way(GatherPool& pool, Random& random, bool has_threads) {
  std::deque<Batch> batches;
  for (int i = 0; i < 4; ++i) batches.emplace_back(random, false).submit(pool);
  const pid_t child = fork();
  if (child == 0) {
    bool is_refused = false;
    try {
      batches.front().wait(pool);
    } catch (const std::runtime_error&) {
      is_refused = true;
    }
    pool.close();
    std::_Exit(is_refused == has_threads ? 0 : 1);
  }
  int status = -1;
  require(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0,
          "a forked child failed");
  for (Batch& batch : batches) batch.wait(pool);
}

}  // namespace

int main(int num_arguments, char** arguments) {
  const uint64_t seed = num_arguments > 1 ? std::strtoull(arguments[1], nullptr, 10) : 0;
  const int num_rounds = num_arguments > 2 ? std::atoi(arguments[2]) : 8;
  for (int round = 0; round < num_rounds; ++round) {
    for (const int num_threads : {0, 1, 2, 5}) {
      Random random(seed * 1'000 + round);
      const auto with_pool = [&](auto use) {
        GatherPool pool(kNumWindows, num_threads);
        use(pool);
      };
      with_pool([&](GatherPool& pool) { load(pool, random); });
      with_pool([&](GatherPool& pool) { share(pool, random()); });
      with_pool([&](GatherPool& pool) { wait_twice(pool, random); });
      with_pool([&](GatherPool& pool) { close_under_way(pool, random); });
      with_pool([&](GatherPool& pool) { fork_under_way(pool, random, num_threads > 0); });
    }
  }
  std::printf("gather_pool_race: %lld batches, each as gathered alone\n", static_cast<long long>(num_batches));
}
