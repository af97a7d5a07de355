// Which of the compiled levels runs: chosen by what the processor can do, or by name.
#pragma once

#include <string>

#include "kernels/table.h"

namespace fpt {

// The kernels of the best level that this processor runs, or of `level` unless that is empty.
// Throws for a name that is unknown, or that this processor cannot run.
const Kernels& kernels_for(const std::string& level);

// Names of the levels that this processor runs, the best first, separated by commas.
std::string levels();

}  // namespace fpt
