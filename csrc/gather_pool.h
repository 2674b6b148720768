// Threads that gather batches ahead of the one who consumes them. They open no OpenMP region and never take Python's
// lock.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>

#include "gather.h"

namespace eventkern {

class GatherPool {
 public:
  // num_windows bounds the window numbers of every batch. Without threads, the one who waits gathers.
  GatherPool(int64_t num_windows, int num_threads);
  ~GatherPool();
  GatherPool(const GatherPool&) = delete;
  GatherPool& operator=(const GatherPool&) = delete;

  // Puts a batch in the queue and returns its ticket. What the batch points to must stay until wait() or close().
  int64_t submit(const WindowGather& gather, int64_t* num_labels);

  // Returns once the batch is gathered, by the caller itself where no thread has begun it, and throws what gathering it
  // threw. A ticket is good for one wait.
  void wait(int64_t ticket);

  // Forgets the batches that nobody has begun, waits for the others, and ends the threads. May be called again.
  void close();

 private:
  struct State;

  State& state() const;

  std::unique_ptr<State> state_;
  pid_t owner_;
};

}  // namespace eventkern
