// The gateway of a model that thinks and calls tools.
#pragma once

#include <string>

#include "tests/gateway/gateway_fixture.h"

namespace fathom {

// The tiny tokenizer with the tokens of DeepSeek-V3.1, in a folder of its own.
class ToolModelTest : public GatewayTest {
 protected:
  ToolModelTest();
  ~ToolModelTest() override;

  // The prompt of the last call, as text.
  std::string LastPrompt() const;

 private:
  std::string folder_;
};

}  // namespace fathom
