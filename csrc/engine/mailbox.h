// Letters between the engine thread and Python, swapped whole under a lock. Neither side ever waits for the
// other to read.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>
#include <variant>
#include <vector>

#include "engine/request.h"

namespace engine {

struct Cancel {
  uint64_t id;
};
struct ForgetPrefixes {};
using Letter = std::variant<Request, Cancel, ForgetPrefixes>;

// Python → engine.
class Inbox {
 public:
  bool post(Letter letter);  // false once closed: nobody will read it
  void close();              // refuses further letters
  // Everything posted since the last call, oldest first; waits for something if `wait`. nullopt once closed
  // and empty: a letter that was accepted is always delivered.
  std::optional<std::vector<Letter>> take(bool wait);

 private:
  std::mutex mutex_;
  std::condition_variable posted_;
  std::vector<Letter> letters_;
  bool closed_ = false;
};

// Engine → Python. fileno() becomes readable when there is an event that wakes, or so many that reading them
// would take long; at most one wake-up per drain. The engine thread never touches the GIL.
//
// A non-blocking pipe rather than an eventfd: the same code everywhere, and as it never holds more than one
// byte an eventfd would save only a descriptor.
class Outbox {
 public:
  Outbox();
  ~Outbox();
  Outbox(const Outbox&) = delete;
  Outbox& operator=(const Outbox&) = delete;

  int fileno() const { return read_fd_; }
  void post(std::vector<Event> events);  // never blocks
  std::vector<Event> drain();            // everything posted since the last call, oldest first

 private:
  std::mutex mutex_;
  std::vector<Event> events_;
  bool readable_ = false;
  int read_fd_ = -1, write_fd_ = -1;
};

}  // namespace engine
