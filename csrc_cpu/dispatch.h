// Which kernels this CPU can run.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace portalm {

// Of every instruction set that this CPU has, best last.
std::vector<const Kernels*> runnable_kernels();

// Use the kernels of another one from now on; weights must be packed again (tests do this).
void set_isa(const std::string& name);

}  // namespace portalm
