// Errors of the plugins go to TensorRT's logger.
#pragma once

#include <NvInfer.h>

#include <string>

namespace lfx
{

// The logger of the process that loaded the library; without it, errors go to stderr.
void setLogger(nvinfer1::ILoggerFinder* finder) noexcept;

void logError(char const* op, std::string const& message) noexcept;

} // namespace lfx
