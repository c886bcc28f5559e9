// A step in the words of the scheduler's tests.
#pragma once

#include <string>
#include <vector>

#include "coordinator/step.h"

namespace fathom {

// "id:tokens" of each scheduled sequence, with a '*' when it samples.
inline std::vector<std::string> Story(const Step& step) {
  std::vector<std::string> story;
  for (const ScheduledSequence& s : step.scheduled) {
    story.push_back(std::to_string(s.id) + ":" + std::to_string(s.num_tokens) +
                    (s.samples ? "*" : ""));
  }
  return story;
}

}  // namespace fathom
