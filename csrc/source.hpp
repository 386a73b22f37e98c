// Where a writer takes its events from: histories sorted by (user, time, order), a stripe of users at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "file.hpp"
#include "format.hpp"

namespace negfast {

// The events of consecutive rows; row r has the events offsets[r]..offsets[r + 1] of the columns.
struct Histories {
  std::span<const int64_t> offsets;  // need not start at 0
  const int32_t* item;
  const uint8_t* feedback;
  const int64_t* time;

  size_t rows() const { return offsets.size() - 1; }
};

struct Event {
  uint32_t user;
  uint32_t item_feedback;  // item * 4 + feedback
  int64_t time;
};

// Memory that a worker keeps from stripe to stripe.
struct SourceBuffer {
  std::vector<Event> events;
  std::vector<int64_t> offsets;
  std::vector<int32_t> item;
  std::vector<uint8_t> feedback;
  std::vector<int64_t> time;
};

class EventSource {
 public:
  virtual ~EventSource() = default;
  virtual uint64_t rows() const = 0;
  virtual int64_t earliest() const = 0;  // time of the first event of all; 0 without events
  // Rows [first, first + count); thread-safe for different buffers; the result lives as long as the buffer.
  virtual Histories read(uint64_t first, uint64_t count, SourceBuffer& buffer) const = 0;
};

// Histories that already lie in memory.
class MemorySource : public EventSource {
 public:
  explicit MemorySource(Histories histories) : all_(histories) {}
  uint64_t rows() const override { return all_.rows(); }
  int64_t earliest() const override;
  Histories read(uint64_t first, uint64_t count, SourceBuffer&) const override {
    return {all_.offsets.subspan(first, count + 1), all_.item, all_.feedback, all_.time};
  }

 private:
  Histories all_;
};

// Events in any order, sorted within a bounded amount of memory: sorted runs go to nameless scratch
// files, and a stripe is gathered from its slice of every run.
class SortingSource : public EventSource {
 public:
  SortingSource(std::string folder, uint64_t users, uint64_t items, uint64_t memory_bytes);
  SortingSource(const SortingSource&) = delete;
  SortingSource& operator=(const SortingSource&) = delete;

  void add(std::span<const int32_t> user, const int32_t* item, const uint8_t* feedback, const int64_t* time);
  void finish() { spill(); }

  uint64_t rows() const override { return users_; }
  int64_t earliest() const override { return earliest_; }
  Histories read(uint64_t first, uint64_t count, SourceBuffer& buffer) const override;

 private:
  struct Run {
    std::unique_ptr<ScratchFile> file;
    std::vector<uint64_t> stripes;  // events before every stripe of users, and in all
  };

  void spill();

  std::string folder_;
  uint64_t users_, items_;
  size_t run_events_;
  int64_t earliest_ = 0;
  std::vector<Event> pending_;
  std::vector<Run> runs_;
};

}  // namespace negfast
