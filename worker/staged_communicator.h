// Collectives for tensors in a device's own memory, through the host: what works wherever the
// device has no collectives of its own.
#pragma once

#include <memory>

#include "kernels/device.h"
#include "worker/communicator.h"

namespace fathom {

// `host` for tensors of `device`: they are copied to the host and back. `device` must outlive it.
std::unique_ptr<Communicator> MakeStagedCommunicator(Device& device,
                                                     std::unique_ptr<Communicator> host);

}  // namespace fathom
