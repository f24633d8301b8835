// Files that are in the page cache: ranges of them mapped, while a chunk is merged.
#pragma once

#include <csignal>
#include <cstdint>
#include <vector>

namespace negmerge {

// A range of an open file.
struct FileRange {
  std::int64_t descriptor, offset, size;
};

// Reads what of a range is in memory already, from its beginning, and returns its size.
std::int64_t read_cached(const FileRange& range, char* memory);

// The maps of one thread. A page that cannot be read (the file shrank, or its disk failed) reads as zeros, and failed() tells so:
// without that, SIGBUS would end the process.
class Windows {
 public:
  Windows();
  ~Windows();
  Windows(const Windows&) = delete;
  Windows& operator=(const Windows&) = delete;

  // While it lives, its thread may read what is mapped. Nothing is mapped afterwards.
  class Use {
   public:
    explicit Use(Windows& windows);
    ~Use();
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
    // Whether the handler is in place: somebody else may have set another one.
    static bool is_guarded();
    // The address of a range that is in the page cache, as far as a few of its pages tell; null if it is not, cannot be mapped, or is
    // so short that a copy takes less time.
    const char* map(const FileRange& range);

   private:
    Windows& windows_;
    sigset_t blocked_;
  };
  // Whether anything that was read in the last use was not the file's.
  bool failed() const { return failed_; }

  // Called by the handler of SIGBUS: lets a fault at an address in a window read zeros. Returns whether it was in one.
  bool patch(const char* address);

 private:
  struct Window {
    FileRange range;
    char* address;
    std::size_t size;
  };
  std::vector<Window> windows_;
  volatile bool failed_ = false;
};

}  // namespace negmerge
