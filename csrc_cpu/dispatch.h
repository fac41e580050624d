// Which kernels this CPU can run.
#pragma once

#include <vector>

#include "kernels.h"

namespace portalm {

// Of every instruction set that this CPU has, best last.
std::vector<const Kernels*> runnable_kernels();

}  // namespace portalm
