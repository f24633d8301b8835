// Random memory for the drivers, and numbers in it.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <random>

#include "../../../csrc/batch.h"
#include "../../../csrc/dtypes.h"

namespace negmerge {

inline std::mt19937_64 random_bits(1);

inline std::int64_t random_below(std::int64_t bound) {
  return static_cast<std::int64_t>(random_bits() % static_cast<std::uint64_t>(bound));
}

// Bytes at any address; those behind them belong to nobody.
struct Memory {
  std::unique_ptr<char, std::function<void(char*)>> held;
  char* at;
  std::int64_t size;

  explicit Memory(std::int64_t bytes) : size(bytes) {
    if (random_below(2)) {
      const std::int64_t offset = random_below(64);
      held = {new char[offset + bytes], [](char* all) { delete[] all; }};
      at = held.get() + offset;
    } else {
      // A page follows that cannot be touched: the address sanitizer knows nothing of masked loads and stores.
      const std::int64_t page = sysconf(_SC_PAGESIZE), own = (bytes + page - 1) / page * page;
      char* pages = static_cast<char*>(mmap(nullptr, own + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      if (pages == MAP_FAILED || mprotect(pages + own, page, PROT_NONE)) std::abort();
      held = {pages, [=](char* all) { munmap(all, own + page); }};
      at = pages + own - bytes;
    }
  }
  // As descriptors have it: what is empty may be nowhere.
  std::int64_t address() const { return size ? reinterpret_cast<std::int64_t>(at) : 0; }

  void fill(Dtype dtype) {
    for (std::int64_t i = 0; i < size; i += 8) {
      const std::uint64_t bits = random_bits();
      std::memcpy(at + i, &bits, std::min<std::int64_t>(8, size - i));
    }
    // Most numbers of ordinary size.
    if (dtype == kF32 || dtype == kF64)
      for (std::int64_t i = kSizes[dtype] - 1; i < size; i += kSizes[dtype])
        if (i % 7) at[i] = static_cast<char>((at[i] & 0x80) | 0x3f);
  }
};

template <class Bits>
Bits read(const char* from) {
  Bits bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}

// A stored number in arithmetic type T.
template <class T, class M>
T number(const char* from) {
  return static_cast<T>(M::template widen<typename M::Float>(typename M::Word{read<typename M::Bits>(from)}));
}

// Calls a function with an object of a storage type.
template <class Function>
auto with_type(Dtype dtype, const Function& function) {
  return dtype == kF64 ? function(F64{}) : dtype == kF32 ? function(F32{}) : dtype == kF16 ? function(F16{}) : function(BF16{});
}

// Random batches by the rule of the other methods (family.cpp).
bool same_family(int round);

// Random deltas, applied, restored and saved; and masks, packed, expanded and counted (delta.cpp).
bool same_deltas(int round);
bool same_masks(int round);
// Random low-rank differences, written and merged (low_rank.cpp).
bool same_low_rank(int round);

}  // namespace negmerge
