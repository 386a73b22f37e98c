// Work split over a given number of threads; the calling thread is one of them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace negfast {

// Calls task(i, worker) for every i < count, in no order. The first exception stops the rest and is thrown on.
template <class Task>
void parallel_for(size_t count, unsigned threads, Task&& task) {
  threads = static_cast<unsigned>(std::clamp<size_t>(count, 1, std::max(1u, threads)));
  std::atomic<size_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  auto work = [&](unsigned worker) {
    try {
      for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i, worker);
    } catch (...) {
      next.store(count, std::memory_order_relaxed);
      std::lock_guard lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  };
  std::vector<std::thread> pool;
  pool.reserve(threads - 1);
  for (unsigned worker = 1; worker < threads; ++worker) pool.emplace_back(work, worker);
  work(0);
  for (auto& thread : pool) thread.join();
  if (error) std::rethrow_exception(error);
}

constexpr size_t kRowsAtOnce = 96, kRowsAThread = 512;  // fewer are not worth the start of a thread

// Calls task(first, count) for blocks of at most kRowsAtOnce rows.
template <class Task>
void parallel_rows(size_t rows, unsigned threads, const Task& task) {
  threads = static_cast<unsigned>(std::min<size_t>(threads, 1 + rows / kRowsAThread));
  parallel_for((rows + kRowsAtOnce - 1) / kRowsAtOnce, threads, [&](size_t block, unsigned) {
    task(block * kRowsAtOnce, std::min(kRowsAtOnce, rows - block * kRowsAtOnce));
  });
}

}  // namespace negfast
