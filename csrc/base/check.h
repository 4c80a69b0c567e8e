// Invariants and errors. Functions rather than macros: they show up in a debugger and take part in overload
// resolution.
#pragma once

#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>

namespace engine {

// A broken promise of our own code: the message carries the file and line that noticed.
class InvariantError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

// What the user handed over cannot be used: a bad checkpoint, too little memory. The message names the thing
// and the remedy.
class InputError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline void check(bool condition, std::string_view what,
                  std::source_location where = std::source_location::current()) {
  if (!condition) [[unlikely]] {
    throw InvariantError(std::string(where.file_name()) + ":" + std::to_string(where.line()) + ": " +
                         std::string(what));
  }
}

inline void require(bool condition, const std::string& what) {
  if (!condition) [[unlikely]]
    throw InputError(what);
}

}  // namespace engine
