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
  Stage stage;
  std::exception_ptr error;
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

GatherPool::GatherPool(int64_t num_windows, int num_threads) : state_(std::make_unique<State>()), owner_(getpid()) {
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

GatherPool::~GatherPool() { close(); }

GatherPool::State& GatherPool::state() const {
  if (!state_) throw std::runtime_error("the gather pool is closed");
  if (!state_->threads.empty() && getpid() != owner_) {
    throw std::runtime_error(
        "the batches were begun before this process was forked, and their threads are not in it; "
        "iterate the loader anew");
  }
  return *state_;
}

int64_t GatherPool::submit(const WindowGather& gather, int64_t* num_labels) {
  State& state = this->state();
  int64_t ticket;
  {
    const std::lock_guard lock(state.mutex);
    ticket = state.num_submitted++;
    state.jobs.emplace(ticket, Job{gather, num_labels, Stage::kWaiting, nullptr});
  }
  state.changed.notify_one();
  return ticket;
}

void GatherPool::wait(int64_t ticket) {
  State& state = this->state();
  std::unique_lock lock(state.mutex);
  const auto found = state.jobs.find(ticket);
  if (found == state.jobs.end()) throw std::invalid_argument("no batch has the ticket " + std::to_string(ticket));
  Job& job = found->second;
  if (job.stage == Stage::kWaiting) state.run(job, lock);
  state.done.wait(lock, [&] { return job.stage == Stage::kDone; });
  const std::exception_ptr error = job.error;
  state.jobs.erase(found);
  if (error) std::rethrow_exception(error);
}

void GatherPool::close() {
  if (!state_) return;
  if (!state_->threads.empty() && getpid() != owner_) {
    state_.release();  // a forked child: no thread to join, and a lock that one of them may have held
    return;
  }
  {
    const std::lock_guard lock(state_->mutex);
    state_->is_closed = true;
  }
  state_->changed.notify_all();
  for (std::thread& thread : state_->threads) thread.join();
  state_.reset();
}

}  // namespace eventkern
