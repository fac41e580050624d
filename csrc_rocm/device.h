// Launching on AMD GPUs, through a HIP runtime that is loaded on first use.
#pragma once

#include <string>

namespace portalm {

// Load the kernels of a code object for the current device. Throws std::runtime_error if there is
// no HIP runtime or it rejects the file.
void load_code_object(const std::string& path);

}  // namespace portalm
