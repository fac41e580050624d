// The kernels that this CPU can run, and the choice among them.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace portalm {

// The kernels of every instruction set that was built and that this CPU has, best last.
std::vector<const Kernels*> runnable_kernels();

// Use the kernels of instruction set `name` from now on; weights must be packed again. For tests.
void set_isa(const std::string& name);

}  // namespace portalm
