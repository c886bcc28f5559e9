// A request that is being served, apart from where: what was asked, who listens, and how far it has
// come.
//
// It goes into a StepLoop with Submit. When the workers there are lost before it has ended it comes
// out again, and goes on elsewhere with Resume: the same tokens follow.
#pragma once

#include <memory>

#include "coordinator/request.h"
#include "coordinator/sequence.h"
#include "coordinator/token_stream.h"

namespace fathom {

struct LiveRequest {
  std::shared_ptr<const Request> request;
  std::shared_ptr<TokenStream> stream;  // has heard of all that is done
  SequenceProgress progress = {};
  // That broke while they computed it. A request that breaks workers must not meet them all.
  int num_groups_lost = 0;
};

}  // namespace fathom
