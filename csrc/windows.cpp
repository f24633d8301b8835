#include "windows.h"

#include <algorithm>
#include <cerrno>
#include <mutex>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

namespace negmerge {
namespace {

// Below it, a copy takes less time than a map.
constexpr std::int64_t kMinMapped = 64 << 10;

// To ask for every page takes as long as a tenth of reading them. One that is not cached after all is read when it is used.
constexpr int kSamples = 7;

constexpr auto kTmpfs = 0x01021994;

const std::int64_t kPage = sysconf(_SC_PAGESIZE);

thread_local Windows* in_use = nullptr;

std::mutex mutex;
int installed = 0;        // how many Windows there are
bool was_covered = false;  // whether another handler took the place of ours, which it may call
struct sigaction before;

void on_bus_error(int number, siginfo_t* info, void* context) {
  const int saved = errno;
  const bool is_sent = info->si_code <= 0;  // by kill(): there is no address
  const bool ours = !is_sent && in_use && in_use->patch(static_cast<const char*>(info->si_addr));
  errno = saved;
  if (ours) return;
  if (before.sa_flags & SA_SIGINFO) return before.sa_sigaction(number, info, context);
  if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) return before.sa_handler(number);
  if (is_sent && before.sa_handler == SIG_IGN) return;
  // The access is made again, or the signal sent again, and ends the process as it would have without this handler.
  struct sigaction usual {};
  usual.sa_handler = SIG_DFL;
  sigaction(number, &usual, nullptr);
  if (is_sent) raise(number);
}

bool is_ours(const struct sigaction& action) { return action.sa_flags & SA_SIGINFO && action.sa_sigaction == on_bus_error; }

struct sigaction present() {
  struct sigaction found {};
  sigaction(SIGBUS, nullptr, &found);
  return found;
}

void install() {
  const std::lock_guard lock(mutex);
  // A handler that came to call ours must not be called by it.
  if (installed++ || was_covered || is_ours(present())) return;
  struct sigaction ours {};
  ours.sa_sigaction = on_bus_error;
  ours.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK;
  before = present();
  sigaction(SIGBUS, &ours, nullptr);
}

void uninstall() {
  const std::lock_guard lock(mutex);
  if (--installed) return;
  if (is_ours(present()))
    sigaction(SIGBUS, &before, nullptr);
  else
    was_covered = true;
}

bool is_in_memory(int descriptor) {
  struct statfs found;
  return !fstatfs(descriptor, &found) && found.f_type == kTmpfs;
}

// Not mincore: of files that the user may not write, it says that all pages are cached.
bool is_cached(const FileRange& range) {
  char byte;
  for (int i = 0; i <= kSamples; ++i)
    if (read_cached({range.descriptor, range.offset + (range.size - 1) * i / kSamples, 1}, &byte) != 1) return false;
  return true;
}

std::int64_t size_of(std::int64_t descriptor) {
  struct stat found;
  return fstat(static_cast<int>(descriptor), &found) ? 0 : found.st_size;
}

}  // namespace

std::int64_t read_cached(const FileRange& range, char* memory) {
#ifdef RWF_NOWAIT
  const int descriptor = static_cast<int>(range.descriptor);
  iovec to{memory, static_cast<std::size_t>(range.size)};
  ssize_t got = preadv2(descriptor, &to, 1, range.offset, RWF_NOWAIT);
  // A tmpfs cannot tell, and need not.
  if (got < 0 && errno == EOPNOTSUPP && is_in_memory(descriptor)) got = pread(descriptor, memory, to.iov_len, range.offset);
  return std::max<std::int64_t>(got, 0);
#else
  return 0;
#endif
}

Windows::Windows() { install(); }

Windows::~Windows() { uninstall(); }

Windows::Use::Use(Windows& windows) : windows_(windows) {
  windows_.failed_ = false;
  in_use = &windows_;
  // An access that fails ends the process if the signal is blocked.
  sigset_t bus;
  sigemptyset(&bus);
  sigaddset(&bus, SIGBUS);
  pthread_sigmask(SIG_UNBLOCK, &bus, &blocked_);
}

Windows::Use::~Use() {
  for (const Window& window : windows_.windows_) {
    // Behind its end, the last page of a file that shrank reads as zeros without a signal.
    if (size_of(window.range.descriptor) < window.range.offset + window.range.size) windows_.failed_ = true;
    munmap(window.address, window.size);
  }
  windows_.windows_.clear();
  in_use = nullptr;
  pthread_sigmask(SIG_SETMASK, &blocked_, nullptr);
}

bool Windows::Use::is_guarded() { return is_ours(present()); }

const char* Windows::Use::map(const FileRange& range) {
  if (range.size < kMinMapped || !is_cached(range)) return nullptr;
  const std::int64_t begin = range.offset / kPage * kPage;
  const std::size_t size = range.offset + range.size - begin;
  windows_.windows_.reserve(windows_.windows_.size() + 1);
  void* address = mmap(nullptr, size, PROT_READ, MAP_SHARED, static_cast<int>(range.descriptor), begin);
  if (address == MAP_FAILED) return nullptr;
  windows_.windows_.push_back({range, static_cast<char*>(address), size});
  return windows_.windows_.back().address + (range.offset - begin);
}

bool Windows::patch(const char* address) {
  for (const Window& window : windows_) {
    const char* end = window.address + (window.size + kPage - 1) / kPage * kPage;
    if (address < window.address || address >= end) continue;
    char* page = window.address + (address - window.address) / kPage * kPage;
    failed_ = true;
    return mmap(page, end - page, PROT_READ, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED;
  }
  return false;
}

}  // namespace negmerge
