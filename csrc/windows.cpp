#include "windows.h"

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>

namespace negmerge {
namespace {

// To ask for every page takes as long as a tenth of reading them. One that is not cached after all is read when it is used.
constexpr int kSamples = 7;

const std::int64_t kPage = sysconf(_SC_PAGESIZE);

thread_local Windows* in_use = nullptr;

std::mutex mutex;
int installed = 0;  // how many Windows there are
struct sigaction before;

void on_bus_error(int number, siginfo_t* info, void* context) {
  const int saved = errno;
  const bool ours = in_use && in_use->patch(static_cast<const char*>(info->si_addr));
  errno = saved;
  if (ours) return;
  if (before.sa_flags & SA_SIGINFO) return before.sa_sigaction(number, info, context);
  if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) return before.sa_handler(number);
  // The access is made again, and ends the process as it would have without this handler.
  struct sigaction usual {};
  usual.sa_handler = SIG_DFL;
  sigaction(SIGBUS, &usual, nullptr);
}

bool is_ours(const struct sigaction& action) { return action.sa_flags & SA_SIGINFO && action.sa_sigaction == on_bus_error; }

void install() {
  const std::lock_guard lock(mutex);
  if (installed++) return;
  struct sigaction ours {};
  ours.sa_sigaction = on_bus_error;
  ours.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK;
  sigaction(SIGBUS, nullptr, &before);
  if (!is_ours(before)) sigaction(SIGBUS, &ours, nullptr);
}

void uninstall() {
  const std::lock_guard lock(mutex);
  if (--installed) return;
  struct sigaction now {};
  sigaction(SIGBUS, nullptr, &now);
  if (is_ours(now)) sigaction(SIGBUS, &before, nullptr);  // else it was replaced meanwhile, and stays
}

}  // namespace

Windows::Windows(std::int64_t window_bytes) : window_bytes_(window_bytes) { install(); }

Windows::~Windows() {
  clear();
  uninstall();
}

const char* Windows::find(std::size_t slot, const FileRange& range) {
  if (slot >= windows_.size()) windows_.resize(slot + 1);
  Window& window = windows_[slot];
  const std::int64_t end = range.offset + range.size;
  if (window.file != range.file || range.offset < window.begin || end > window.begin + static_cast<std::int64_t>(window.size)) {
    unmap(window);
    const std::int64_t begin = range.offset / kPage * kPage;
    const std::size_t size = std::max(window_bytes_, end - begin);
    void* address = mmap(nullptr, size, PROT_READ, MAP_SHARED, static_cast<int>(range.descriptor), begin);
    if (address == MAP_FAILED) return nullptr;
    window = {range.file, begin, static_cast<char*>(address), size};
  }
  const char* found = window.address + (range.offset - window.begin);
  return is_cached(window, range) ? found : nullptr;
}

bool Windows::is_cached(const Window& window, const FileRange& range) {
  const std::int64_t first = (range.offset - window.begin) / kPage;
  const std::int64_t last = (range.offset + range.size - 1 - window.begin) / kPage;
  for (int i = 0; i <= kSamples; ++i) {
    unsigned char resident = 0;
    char* page = window.address + (first + (last - first) * i / kSamples) * kPage;
    if (mincore(page, kPage, &resident) || !(resident & 1)) return false;
  }
  return true;
}

Windows::Use::Use(Windows& windows) {
  windows.failed_ = false;
  in_use = &windows;
}

Windows::Use::~Use() { in_use = nullptr; }

void Windows::clear() {
  for (Window& window : windows_) unmap(window);
}

void Windows::unmap(Window& window) {
  if (window.address) munmap(window.address, window.size);
  window = {};
}

bool Windows::patch(const char* address) {
  for (const Window& window : windows_) {
    const char* end = window.address + window.size;
    if (!window.address || address < window.address || address >= end) continue;
    char* page = window.address + (address - window.address) / kPage * kPage;
    failed_ = true;
    return mmap(page, end - page, PROT_READ, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED;
  }
  return false;
}

}  // namespace negmerge
