// CRC-32C (Castagnoli), the checksum of frames.
#pragma once

#include <cstddef>
#include <cstdint>

namespace potluck {

// Of n bytes; RFC 3720, appendix B.4: of 32 zero bytes 0x8A9136AA. Continues a former result if one
// is given.
uint32_t Crc32c(const void* data, size_t n, uint32_t before = 0);

// The same without the CPU's instruction for it, whichever CPU this is.
uint32_t Crc32cByTables(const void* data, size_t n, uint32_t before = 0);

}  // namespace potluck
