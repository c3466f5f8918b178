#include "engine/errors.h"

namespace potluck {

// The destructors are here and not in the header: a class's first virtual function that is not
// inline decides which object file holds its type_info, and a catch in bindings.cpp must compare
// equal to a throw in the library.
Error::~Error() = default;
UsageError::~UsageError() = default;
ModelError::~ModelError() = default;
DamagedPack::~DamagedPack() = default;
SessionError::~SessionError() = default;
UnknownSession::~UnknownSession() = default;
Full::~Full() = default;
FrameError::~FrameError() = default;
Cancelled::~Cancelled() = default;
EngineError::~EngineError() = default;

}  // namespace potluck
