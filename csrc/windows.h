// Files that are in the page cache, mapped a window at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace negmerge {

// A range of an open file. file: a number of its own for each file, as descriptors are used again.
struct FileRange {
  std::int64_t file, descriptor, offset, size;
};

// One window into a file for each slot, for one thread. While a window is in use, a page that cannot be read (the file shrank, or
// its disk failed) reads as zeros, and failed() tells so: without that, SIGBUS would end the process.
class Windows {
 public:
  // window_bytes: of a window, if a range is not longer. What was read of it counts as the process's resident memory.
  explicit Windows(std::int64_t window_bytes);
  ~Windows();
  Windows(const Windows&) = delete;
  Windows& operator=(const Windows&) = delete;

  // The address of a range that is in the page cache, as far as a few of its pages tell; null if it is not, or cannot be mapped.
  const char* find(std::size_t slot, const FileRange& range);

  // While it lives, its thread may read what find() returned.
  class Use {
   public:
    explicit Use(Windows& windows);
    ~Use();
  };
  // Whether anything that was read in the last use was not the file's.
  bool failed() const { return failed_; }
  void clear();

  // Called by the handler of SIGBUS: lets a fault at an address in a window read zeros. Returns whether it was in one.
  bool patch(const char* address);

 private:
  struct Window {
    std::int64_t file = -1, begin = 0;
    char* address = nullptr;
    std::size_t size = 0;
  };
  static bool is_cached(const Window& window, const FileRange& range);
  static void unmap(Window& window);

  const std::int64_t window_bytes_;
  std::vector<Window> windows_;
  volatile bool failed_ = false;
};

}  // namespace negmerge
