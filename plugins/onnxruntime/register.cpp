// The function by which ONNX Runtime registers the custom ops of a library.
#include "onnxruntime/custom_op.h"

#include <memory>
#include <mutex>
#include <vector>

namespace lfx::ort
{
namespace
{

constexpr char const* kDOMAIN = "lfx";

// The ops for one ONNX Runtime; a process may have loaded several.
struct Registration
{
    explicit Registration(Function const* api)
        : api(api)
        , banded(api)
        , global(api)
    {
    }

    Status* createDomain()
    {
        if (Status* status = createCustomOpDomain(api, kDOMAIN, &domain))
        {
            return status;
        }
        if (Status* status = addCustomOp(api, domain, &banded))
        {
            return status;
        }
        return addCustomOp(api, domain, &global);
    }

    Function const* api;
    AttentionOp<BandedOp> banded;
    AttentionOp<GlobalOp> global;
    CustomOpDomain* domain = nullptr;
};

// Sessions keep pointers to the ops, so a registration is never freed.
Status* findOrCreate(Function const* api, Registration*& result)
{
    static std::mutex mutex;
    static auto* const registrations = new std::vector<std::unique_ptr<Registration>>();
    std::lock_guard<std::mutex> const lock(mutex);
    for (auto const& registration : *registrations)
    {
        if (registration->api == api)
        {
            result = registration.get();
            return nullptr;
        }
    }
    auto registration = std::make_unique<Registration>(api);
    Status* const status = registration->createDomain();
    if (status == nullptr)
    {
        result = registration.get();
        registrations->push_back(std::move(registration));
    }
    return status;
}

} // namespace
} // namespace lfx::ort

LFX_EXPORT lfx::ort::Status* RegisterCustomOps(
    lfx::ort::SessionOptions* options, lfx::ort::ApiBase const* base) noexcept
{
    using namespace lfx::ort;
    Function const* const api = base->getApi(kAPI_VERSION);
    if (api == nullptr)
    {
        // An older table has the first function at the same place.
        return createStatus(base->getApi(1), kNOT_IMPLEMENTED, "lfx's custom ops need ONNX Runtime 1.17 or later");
    }
    try
    {
        Registration* registration = nullptr;
        Status* const status = findOrCreate(api, registration);
        return status != nullptr ? status : addCustomOpDomain(api, options, registration->domain);
    }
    catch (std::exception const& error)
    {
        return createStatus(api, kFAIL, error.what());
    }
}
