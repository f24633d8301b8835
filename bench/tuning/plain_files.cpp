// Plain loops over files: what reading a base and its models of one type, merging them and writing the result takes without
// anything else. Prints its seconds. reads.py compiles it with csrc/merge_loop.cpp and compares.
//
//     plain_files READING THREADS CHUNK MERGES OUT BASE MODEL...
//
// READING: "in turn" reads one file after the other, as cat does; "read" the same chunk of every file before the next; "requested" asks
// for all of that chunk first; "direct" does not go through the page cache; "mapped" reads through maps of the files. CHUNK: bytes.
// MERGES: 1 to merge F32, 0 to write the base. Pages are given back but for "mapped".
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "merge_loop.h"

namespace negmerge {
void NEGMERGE_LOOP(const Batch&, Position, std::int64_t, bool);
}

namespace {

using namespace negmerge;
using Clock = std::chrono::steady_clock;

constexpr std::int64_t kPage = 4096, kWindow = 4 << 20;

std::string reading;
std::int64_t chunk_bytes, file_bytes;
bool merges;
std::vector<int> files;
int out;
std::atomic<std::int64_t> next_chunk{0};

void require(bool holds, const char* what) {
  if (holds) return;
  std::perror(what);
  std::exit(1);
}

void read(int file, char* to, std::int64_t at, std::int64_t size) {
  for (std::int64_t done = 0; done < size;) {
    const std::int64_t wanted = reading == "direct" ? (size - done + kPage - 1) / kPage * kPage : size - done;
    const ssize_t got = pread(file, to + done, wanted, at + done);
    require(got > 0, "pread");
    done += got;
  }
  if (reading != "direct") posix_fadvise(file, at, size, POSIX_FADV_DONTNEED);
}

void write(const char* from, std::int64_t at, std::int64_t size) {
  require(pwrite(out, from, size, at) == size, "pwrite");
  sync_file_range(out, at, size, SYNC_FILE_RANGE_WRITE);
}

struct Worker {
  struct Window {
    char* address = nullptr;
    std::int64_t begin = 0;
  };
  const std::int64_t versions = static_cast<std::int64_t>(files.size());
  char* memory = static_cast<char*>(
      mmap(nullptr, versions * chunk_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  std::vector<Window> windows = std::vector<Window>(files.size());

  char* mapped(std::int64_t k, std::int64_t at, std::int64_t size) {
    Window& window = windows[k];
    if (!window.address || at < window.begin || at + size > window.begin + kWindow) {
      if (window.address) munmap(window.address, kWindow);
      window.address = static_cast<char*>(mmap(nullptr, kWindow, PROT_READ, MAP_SHARED, files[k], at));
      require(window.address != MAP_FAILED, "mmap");
      window.begin = at;
    }
    return window.address + at - window.begin;
  }

  void merge(std::int64_t at, std::int64_t size) {
    const std::int64_t n = versions - 1;
    std::vector<Dtype> dtypes(n, kF32);
    std::vector<std::int64_t> row(3 + n);
    std::int64_t counts[kCounted] = {};
    for (std::int64_t k = 0; k < versions && reading == "requested"; ++k)
      posix_fadvise(files[k], at, size, POSIX_FADV_WILLNEED);
    row[0] = size / 4;
    for (std::int64_t k = 0; k < versions; ++k) {
      char* version = memory + k * chunk_bytes;
      if (k && reading == "mapped") version = mapped(k, at, size);
      else read(files[k], version, at, size);
      row[k ? 2 + k : 1] = reinterpret_cast<std::int64_t>(version);
    }
    row[2] = row[1];
    const Batch batch{kF32, dtypes.data(), n, false, 0.9, n, 1, row.data(), counts};
    if (merges) NEGMERGE_LOOP(batch, {0, 0}, row[0], false);
    write(memory, at, size);
  }

  void run() {
    const std::int64_t in_file = (file_bytes + chunk_bytes - 1) / chunk_bytes, all = reading == "in turn" ? versions * in_file : in_file;
    for (std::int64_t i; (i = next_chunk++) < all;) {
      const std::int64_t at = i % in_file * chunk_bytes, size = std::min(chunk_bytes, file_bytes - at);
      if (reading != "in turn") {
        merge(at, size);
        continue;
      }
      read(files[i / in_file], memory, at, size);
      if (i < in_file) write(memory, at, size);
    }
  }
};

}  // namespace

int main(int count, char** arguments) {
  if (count < 8) return 2;
  reading = arguments[1];
  chunk_bytes = std::atoll(arguments[3]);
  merges = std::atoi(arguments[4]);
  for (int i = 6; i < count; ++i) {
    files.push_back(open(arguments[i], O_RDONLY | (reading == "direct" ? O_DIRECT : 0)));
    require(files.back() >= 0, arguments[i]);
  }
  struct stat found;
  fstat(files[0], &found);
  file_bytes = found.st_size;
  const auto began = Clock::now();
  out = open(arguments[5], O_RDWR | O_CREAT | O_TRUNC, 0600);
  require(out >= 0 && !ftruncate(out, file_bytes), arguments[5]);
  std::vector<std::thread> threads;
  for (int i = 0; i < std::atoi(arguments[2]); ++i) threads.emplace_back([] { Worker().run(); });
  for (std::thread& thread : threads) thread.join();
  fdatasync(out);
  std::printf("%f\n", std::chrono::duration<double>(Clock::now() - began).count());
}
