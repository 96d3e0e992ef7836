#include "tensorrt/logger.h"

#include <cstdio>

namespace lfx
{
namespace
{

nvinfer1::ILoggerFinder* gLoggerFinder = nullptr;

} // namespace

void setLogger(nvinfer1::ILoggerFinder* finder) noexcept
{
    gLoggerFinder = finder;
}

void logError(char const* op, std::string const& message) noexcept
{
    nvinfer1::ILogger* const logger = gLoggerFinder != nullptr ? gLoggerFinder->findLogger() : nullptr;
    std::string const line = std::string("lfx::") + op + ": " + message;
    if (logger != nullptr)
    {
        logger->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
    }
    else
    {
        std::fprintf(stderr, "%s\n", line.c_str());
    }
}

} // namespace lfx
