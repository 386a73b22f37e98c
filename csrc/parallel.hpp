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

}  // namespace negfast
