// Launching on AMD's devices, through a HIP runtime that is found when it is first needed.
#pragma once

#include <string>

namespace portalm {

// Loads the kernels of this file for the current device. Throws std::runtime_error, saying what is
// missing, where there is no runtime or it does not take the file.
void load_code_object(const std::string& path);

}  // namespace portalm
