// CRC-32C (Castagnoli), with the CPU's own instruction where it has one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace negfast {

uint32_t crc32c(const void* data, size_t size);

}  // namespace negfast
