// What the engine throws: one class for each of potluck.errors that it raises. bindings.cpp maps
// them by name. Thrown where the fact is known, with its numbers; kernels throw nothing.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace potluck {

// what() says what was wrong and what was expected; remedy(), if not empty, what people can do.
class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& message, std::string remedy = "")
      : std::runtime_error(message), remedy_(std::move(remedy)) {}
  ~Error() override;  // in errors.cpp, so that every object file sees one type_info
  const std::string& remedy() const { return remedy_; }

 private:
  std::string remedy_;
};

// An argument out of range.
class UsageError : public Error {
 public:
  using Error::Error;
  ~UsageError() override;
};

// A matrix that the file or the caller gives is not what the model needs.
class ModelError : public Error {
 public:
  using Error::Error;
  ~ModelError() override;
};

// A pack file is not what was written; it is to be made again.
class DamagedPack : public ModelError {
 public:
  using ModelError::ModelError;
  ~DamagedPack() override;
};

// A step does not fit its session.
class SessionError : public Error {
 public:
  using Error::Error;
  ~SessionError() override;
};

class UnknownSession : public SessionError {
 public:
  using SessionError::SessionError;
  ~UnknownSession() override;
};

// No KV pages or no place for a session.
class Full : public SessionError {
 public:
  using SessionError::SessionError;
  ~Full() override;
};

// An activation that is not finite.
class FrameError : public Error {
 public:
  using Error::Error;
  ~FrameError() override;
};

// A forward was asked to stop.
class Cancelled : public Error {
 public:
  using Error::Error;
  ~Cancelled() override;
};

// An ISA that does not exist or that this CPU lacks.
class EngineError : public Error {
 public:
  using Error::Error;
  ~EngineError() override;
};

}  // namespace potluck
