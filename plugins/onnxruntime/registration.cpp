#include "onnxruntime/registration.h"

#include <exception>
#include <mutex>

namespace lfx::ort
{
namespace
{

constexpr char const* kDOMAIN = "lfx";

// The ops for one ONNX Runtime; a process may have loaded several.
struct Registration
{
    Function const* api;
    Ops ops;
    CustomOpDomain* domain;
};

Status* createDomain(Registration& registration)
{
    if (Status* status = createCustomOpDomain(registration.api, kDOMAIN, &registration.domain))
    {
        return status;
    }
    for (auto const& op : registration.ops)
    {
        if (Status* status = addCustomOp(registration.api, registration.domain, op.get()))
        {
            return status;
        }
    }
    return nullptr;
}

// Sessions keep pointers to the ops, so a registration is never freed.
Status* findOrCreate(Function const* api, Ops (*make)(Function const* api), CustomOpDomain*& domain)
{
    static std::mutex mutex;
    static auto* const registrations = new std::vector<Registration>();
    std::lock_guard<std::mutex> const lock(mutex);
    for (Registration const& registration : *registrations)
    {
        if (registration.api == api)
        {
            domain = registration.domain;
            return nullptr;
        }
    }
    Registration registration{api, make(api), nullptr};
    Status* const status = createDomain(registration);
    if (status == nullptr)
    {
        domain = registration.domain;
        registrations->push_back(std::move(registration));
    }
    return status;
}

} // namespace

Status* registerOps(SessionOptions* options, ApiBase const* base, uint32_t version, char const* tooOld,
    Ops (*make)(Function const* api)) noexcept
{
    Function const* const api = base->getApi(version);
    if (api == nullptr)
    {
        return createStatus(
            base->getApi(1), kNOT_IMPLEMENTED, tooOld); // an older table has this function at the same place
    }
    try
    {
        CustomOpDomain* domain = nullptr;
        Status* const status = findOrCreate(api, make, domain);
        return status != nullptr ? status : addCustomOpDomain(api, options, domain);
    }
    catch (std::exception const& error)
    {
        return createStatus(api, kFAIL, error.what());
    }
}

} // namespace lfx::ort
