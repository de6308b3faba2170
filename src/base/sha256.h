// SHA-256 (FIPS 180-4) of bytes that come in pieces: what `sha256sum` prints. Uses the processor's own instructions
// where it has them.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace sparsek {

class MappedFile;

class Sha256 {
 public:
  void update(std::span<const uint8_t> bytes);
  void update(std::string_view bytes) { update({reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()}); }
  std::string hex();  // of all bytes so far, 64 digits; the object is then as new

  // Tests compare the two ways to compute it.
  static bool has_instructions();
  explicit Sha256(bool use_instructions = has_instructions()) : use_instructions_(use_instructions) {}

 private:
  void compress(const uint8_t* blocks, size_t count);

  static constexpr std::array<uint32_t, 8> kStart = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                                     0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  bool use_instructions_;
  std::array<uint32_t, 8> state_ = kStart;
  std::array<uint8_t, 64> block_{};  // of which size_bytes_ % 64 bytes are filled
  uint64_t size_bytes_ = 0;
};

// Of a whole file, whose pages are given back on the way: memory does not grow with it.
std::string sha256_of(const MappedFile& file);

}  // namespace sparsek
