// Threads that gather batches ahead of the one who consumes them. They open no OpenMP region and never take Python's
// lock.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>

#include "gather.h"

namespace eventkern {

inline constexpr int kMaxPoolThreads = 1024;

// Any thread may call any of these at any time; only the destructor comes last.
class GatherPool {
 public:
  // num_windows bounds the window numbers of every batch. Without threads, the one who waits gathers. Throws where
  // num_threads is not in [0, kMaxPoolThreads].
  GatherPool(int64_t num_windows, int num_threads);
  ~GatherPool();
  GatherPool(const GatherPool&) = delete;
  GatherPool& operator=(const GatherPool&) = delete;

  // Puts a batch in the queue and returns its ticket. What the batch points to must stay until wait() or close().
  int64_t submit(const WindowGather& gather, int64_t* num_labels);

  // Returns once the batch is gathered, by the caller itself where no thread has begun it, and throws what gathering it
  // threw. A ticket is good for one wait.
  void wait(int64_t ticket);

  // Forgets the batches that nobody has begun or waits for, waits for those begun, and ends the threads. May be called
  // again.
  void close();

 private:
  struct State;

  // A forked child of a process whose pool had threads: they are not in it, and it may have a lock that they held.
  bool is_forked() const;
  void check_owner() const;

  std::unique_ptr<State> state_;
  bool has_threads_;
  pid_t owner_;
};

}  // namespace eventkern
