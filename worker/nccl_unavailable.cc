#include "worker/nccl_communicator.h"

namespace fathom {

absl::StatusOr<std::unique_ptr<GroupCommunicator>> MakeNcclCommunicator(
    const NcclCommunicatorOptions&, Device&, std::unique_ptr<GroupCommunicator>) {
  return absl::UnavailableError(
      "--collectives nccl is not built in: this program was built without CUDA, or where nccl.h "
      "was not found; expected peer or shm on one host, gloo between hosts");
}

}  // namespace fathom
