#include "decode.hpp"

namespace negfast {

#define NEGFAST_DECLARE(ISA)                                                                                       \
  namespace ISA {                                                                                                  \
  void decode_items(const ShardFile& file, DecodeJobs jobs, int32_t* item, uint8_t* feedback);                     \
  void decode_rows(const ShardFile& file, DecodeJobs jobs, const uint8_t* table, size_t row_bytes, uint8_t* out);  \
  void decode_times(const ShardFile& file, DecodeJobs jobs, int64_t* time);                                        \
  }
NEGFAST_DECLARE(portable)
NEGFAST_DECLARE(bmi2)

namespace {

#if defined(__x86_64__)
const bool has_bmi2 = __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
#else
constexpr bool has_bmi2 = false;
#endif

}  // namespace

void decode_items(const ShardFile& file, DecodeJobs jobs, int32_t* item, uint8_t* feedback) {
  return (has_bmi2 ? bmi2::decode_items : portable::decode_items)(file, jobs, item, feedback);
}

void decode_rows(const ShardFile& file, DecodeJobs jobs, const uint8_t* table_by_rank, size_t row_bytes, uint8_t* out) {
  return (has_bmi2 ? bmi2::decode_rows : portable::decode_rows)(file, jobs, table_by_rank, row_bytes, out);
}

void decode_times(const ShardFile& file, DecodeJobs jobs, int64_t* time) {
  return (has_bmi2 ? bmi2::decode_times : portable::decode_times)(file, jobs, time);
}

}  // namespace negfast
