#include "gather_pool.h"

#include <unistd.h>

#include <condition_variable>
#include <exception>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(EVENTKERN_CUDA) && __has_include(<nvtx3/nvtx3.hpp>)
#include <nvtx3/nvtx3.hpp>
#define EVENTKERN_NVTX
#endif

namespace eventkern {
namespace {

#ifdef EVENTKERN_NVTX
struct Domain {
  static constexpr const char* name = "eventkern";
};
using ProfiledRange = nvtx3::scoped_range_in<Domain>;
#else
struct ProfiledRange {
  explicit ProfiledRange(const char*) {}
};
#endif

enum class Stage { kWaiting, kRunning, kDone };

struct Job {
  WindowGather gather;
  int64_t* num_labels;
  Stage stage = Stage::kWaiting;
  bool is_awaited = false;
  std::exception_ptr error = nullptr;
};

void check_windows(const WindowGather& gather, int64_t num_windows) {
  for (int64_t sample = 0; sample < gather.batch_size; ++sample) {
    const int64_t window = gather.windows[sample];
    if (window < 0 || window >= num_windows) {
      throw std::out_of_range("windows hold " + std::to_string(window) + " at sample " + std::to_string(sample) +
                              ", but the split has " + std::to_string(num_windows) + " windows");
    }
  }
}

}  // namespace

struct GatherPool::State {
  int64_t num_windows;
  std::mutex mutex;
  std::condition_variable changed;  // for the threads: a job to begin, or the end
  std::condition_variable done;     // for the one who waits
  std::map<int64_t, Job> jobs;      // by ticket; a thread works on its job without the lock, since a map moves nothing
  int64_t num_submitted = 0;
  bool is_closed = false;
  std::mutex closing;  // held while the threads end, so that whoever closes returns after that
  std::vector<std::thread> threads;

  // Gathers with the lock given up.
  void run(Job& job, std::unique_lock<std::mutex>& lock) {
    job.stage = Stage::kRunning;
    lock.unlock();
    try {
      const ProfiledRange range("gather");
      check_windows(job.gather, num_windows);
      gather_windows_cpu(job.gather, job.num_labels);
    } catch (...) {
      job.error = std::current_exception();
    }
    lock.lock();
    job.stage = Stage::kDone;
  }

  // With the lock held.
  void check_open() const {
    if (is_closed) throw std::runtime_error("the gather pool is closed");
  }

  Job* first_waiting() {
    for (auto& [ticket, job] : jobs) {
      if (job.stage == Stage::kWaiting) return &job;
    }
    return nullptr;
  }

  void work() {
    std::unique_lock lock(mutex);
    for (;;) {
      Job* job = nullptr;
      changed.wait(lock, [&] { return is_closed || (job = first_waiting()); });
      if (is_closed) return;
      run(*job, lock);
      done.notify_all();
    }
  }
};

GatherPool::GatherPool(int64_t num_windows, int num_threads)
    : state_(std::make_unique<State>()), has_threads_(num_threads > 0), owner_(getpid()) {
  if (num_threads < 0 || num_threads > kMaxPoolThreads) {
    throw std::invalid_argument("num_threads is " + std::to_string(num_threads) + "; want 0 to " +
                                std::to_string(kMaxPoolThreads));
  }
  state_->num_windows = num_windows;
  try {
    for (int thread = 0; thread < num_threads; ++thread) {
      state_->threads.emplace_back([state = state_.get()] { state->work(); });
    }
  } catch (...) {
    close();
    throw;
  }
}

GatherPool::~GatherPool() {
  close();
  if (is_forked()) state_.release();  // its locks and threads are not this process's to destroy
}

bool GatherPool::is_forked() const { return has_threads_ && getpid() != owner_; }

void GatherPool::check_owner() const {
  if (is_forked()) {
    throw std::runtime_error(
        "the batches were begun before this process was forked, and their threads are not in it; "
        "iterate the loader anew");
  }
}

int64_t GatherPool::submit(const WindowGather& gather, int64_t* num_labels) {
  check_owner();
  int64_t ticket;
  {
    const std::lock_guard lock(state_->mutex);
    state_->check_open();
    ticket = state_->num_submitted++;
    state_->jobs.emplace(ticket, Job{gather, num_labels});
  }
  state_->changed.notify_one();
  return ticket;
}

void GatherPool::wait(int64_t ticket) {
  check_owner();
  std::unique_lock lock(state_->mutex);
  const auto found = state_->jobs.find(ticket);
  if (found == state_->jobs.end() || found->second.is_awaited) {
    state_->check_open();
    throw std::invalid_argument("no batch has the ticket " + std::to_string(ticket));
  }
  Job& job = found->second;
  job.is_awaited = true;
  if (job.stage == Stage::kWaiting) state_->run(job, lock);
  state_->done.wait(lock, [&] { return job.stage == Stage::kDone; });
  const std::exception_ptr error = job.error;
  state_->jobs.erase(found);
  if (error) std::rethrow_exception(error);
}

void GatherPool::close() {
  if (is_forked()) return;
  const std::lock_guard closing(state_->closing);
  {
    const std::lock_guard lock(state_->mutex);
    state_->is_closed = true;
  }
  state_->changed.notify_all();
  for (std::thread& thread : state_->threads) thread.join();
  state_->threads.clear();
  const std::lock_guard lock(state_->mutex);
  std::erase_if(state_->jobs, [](const auto& entry) { return !entry.second.is_awaited; });
}

}  // namespace eventkern
