// Registers a library's custom ops with ONNX Runtime.
#pragma once

#include "onnxruntime/ort_api.h"

#include <cstdint>
#include <memory>
#include <vector>

namespace lfx::ort
{

using Ops = std::vector<std::shared_ptr<CustomOp>>; // a shared_ptr deletes the class that it was made of

// Adds the ops of make(api) to the options. `version` is that of the functions that the ops use, and `tooOld` the error of
// a runtime that does not have them.
Status* registerOps(SessionOptions* options, ApiBase const* base, uint32_t version, char const* tooOld,
    Ops (*make)(Function const* api)) noexcept;

} // namespace lfx::ort
