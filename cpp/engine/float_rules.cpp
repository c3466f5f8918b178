#include "engine/float_rules.h"

namespace potluck {

FloatRules::FloatRules() {
  std::fegetenv(&former_);
  std::fesetenv(FE_DFL_ENV);
}

FloatRules::~FloatRules() { std::fesetenv(&former_); }

}  // namespace potluck
