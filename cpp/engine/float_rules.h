// The float rules of every thread that computes.
#pragma once

#include <cfenv>

namespace potluck {

// Gives this thread the float rules that canonical arithmetic assumes (round to nearest, subnormals
// kept) and its former ones back at the end. The pool's threads have them; a thread that calls into
// the engine holds one for the length of the call.
class FloatRules {
 public:
  FloatRules();
  ~FloatRules();
  FloatRules(const FloatRules&) = delete;
  FloatRules& operator=(const FloatRules&) = delete;

 private:
  std::fenv_t former_;
};

}  // namespace potluck
