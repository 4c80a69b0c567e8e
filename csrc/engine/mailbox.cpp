#include "engine/mailbox.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <iterator>
#include <system_error>
#include <utility>

#include "base/check.h"

namespace engine {
namespace {

constexpr size_t kMostAsleep = 1024;  // events without a wake-up: Python reads them in a millisecond or two

}  // namespace

bool Inbox::post(Letter letter) {
  {
    const std::lock_guard lock(mutex_);
    if (closed_) return false;
    letters_.push_back(std::move(letter));
  }
  posted_.notify_one();
  return true;
}

void Inbox::close() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
  }
  posted_.notify_all();
}

std::optional<std::vector<Letter>> Inbox::take(bool wait) {
  std::unique_lock lock(mutex_);
  if (wait) posted_.wait(lock, [this] { return closed_ || !letters_.empty(); });
  if (closed_ && letters_.empty()) return std::nullopt;
  return std::exchange(letters_, {});
}

Outbox::Outbox() {
  int fds[2];
  if (pipe(fds) != 0)
    throw std::system_error(errno, std::generic_category(), "cannot make the outbox's pipe");
  for (int fd : fds) {
    fcntl(fd, F_SETFL, O_NONBLOCK);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
  }
  read_fd_ = fds[0];
  write_fd_ = fds[1];
}

Outbox::~Outbox() {
  close(read_fd_);
  close(write_fd_);
}

// The byte is written and read under the lock that guards the events, so it can neither get lost nor be left
// behind.
void Outbox::post(std::vector<Event> events) {
  if (events.empty()) return;
  const std::lock_guard lock(mutex_);
  const bool wakes = std::ranges::any_of(events, &Event::wakes) || events_.size() >= kMostAsleep;
  events_.insert(events_.end(), std::make_move_iterator(events.begin()),
                 std::make_move_iterator(events.end()));
  if (!wakes || std::exchange(readable_, true)) return;
  const char byte = 0;
  check(write(write_fd_, &byte, 1) == 1, "the outbox's pipe is full or closed");
}

std::vector<Event> Outbox::drain() {
  const std::lock_guard lock(mutex_);
  char byte;
  if (std::exchange(readable_, false))
    check(read(read_fd_, &byte, 1) == 1, "the outbox's pipe is empty or closed");
  return std::exchange(events_, {});
}

}  // namespace engine
