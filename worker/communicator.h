// The other ranks of the group, as a few collectives.
//
// Every rank calls the same functions in the same order with the same shapes. Sums are made in rank
// order, in F32, so that they are the same bits on every run and on every rank. A call fails with
// Aborted after Abort(), and with DeadlineExceeded when a peer stays away longer than the group's
// timeout; a failed communicator is of no further use: the group forms again under a new epoch with
// new ones.
//
// Not thread-safe, but Abort may be called from any thread.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"

namespace fathom {

class Communicator {
 public:
  virtual ~Communicator() = default;

  virtual int rank() const = 0;
  virtual int world_size() const = 0;

  // tensor = Σ over ranks, in place.   tensor: dense, f32 or bf16 (summed in f32, rounded once)
  virtual absl::Status AllReduceSum(const Tensor& tensor) = 0;

  // What stands between two halves of a layer: residual += Σ partial over ranks, then its norm, as
  // Ops::AddRmsNorm writes it. `partial` holds anything afterwards. Overridden where sum and norm
  // can be one; the bits may then differ from the default's, which is AllReduceSum and
  // ops.AddRmsNorm, but not between ranks.
  //   partial, residual: y and x of Ops::AddRmsNorm, the first dense   the others: as there
  virtual absl::Status AllReduceAddRmsNorm(Ops& ops, const Tensor& partial, const Tensor& residual,
                                           const Tensor& weight, float eps, const Tensor& normed,
                                           const LinearInput& quantized);

  // Whether the collectives on tensors only queue work on the device's own stream: they return
  // before it is done, need no host in between, and can be part of a Recording, which every rank
  // then replays as the same call. A replayed collective cannot return a status: a peer that is
  // lost shows in the next call that can, or in the device. BroadcastFromRank0 is the host's
  // always and is never recorded.
  virtual bool is_recordable() const { return false; }

  // whole[r] = part of rank r, at rank 0 only; other ranks may pass an absent `whole`.
  //   part: dense, n bytes   whole: dense, world_size * n bytes
  virtual absl::Status GatherToRank0(const Tensor& part, const Tensor& whole) = 0;

  // The bytes of rank 0 everywhere.
  virtual absl::Status BroadcastFromRank0(void* bytes, int64_t num_bytes) = 0;

  // Why this rank is lost to the group, if it is. Where collectives only queue work on the device,
  // it says of those that the device is through with whether they gave results.
  virtual absl::Status status() const { return absl::OkStatus(); }

  // Makes the blocked call and all later ones of this rank return Aborted, soon.
  virtual void Abort() = 0;

  // Unlike that of any other communicator of this process: who keeps recordings can tell whether
  // they are of this one.
  int64_t id() const { return id_; }

 protected:
  Communicator();

 private:
  const int64_t id_;
};

// A group of one: nothing to do.
std::unique_ptr<Communicator> MakeLonelyCommunicator();

}  // namespace fathom
